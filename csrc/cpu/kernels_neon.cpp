// The kernels for arm64, where every CPU supports NEON (Advanced SIMD).
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels.h"

#define PARAMSTATS_LEVEL_NAME "neon"
#define PARAMSTATS_LOAD_HALVES(p, k) halves(p, k)
#define PARAMSTATS_LOAD_WORDS(p, k) words(p, k)
#define PARAMSTATS_LOW_HALVES(h) vcvt_f32_f16(vget_low_f16((float16x8_t)(h)))
#define PARAMSTATS_HIGH_HALVES(h) vcvt_high_f32_f16((float16x8_t)(h))
#define PARAMSTATS_MIN_PS(v, m) ((FloatLanes)vminq_f32((float32x4_t)(v), (float32x4_t)(m)))
#define PARAMSTATS_MAX_PS(v, m) ((FloatLanes)vmaxq_f32((float32x4_t)(v), (float32x4_t)(m)))
#define PARAMSTATS_MIN_PD(v, m) ((DoubleLanes)vminq_f64((float64x2_t)(v), (float64x2_t)(m)))
#define PARAMSTATS_MAX_PD(v, m) ((DoubleLanes)vmaxq_f64((float64x2_t)(v), (float64x2_t)(m)))
#define PARAMSTATS_TIMES_HALVES(v) \
  vmull_u32(vmovn_u64((uint64x2_t)(v)), vshrn_n_u64((uint64x2_t)(v), 32))
#define PARAMSTATS_SQRT_PS(v) ((FloatLanes)vsqrtq_f32((float32x4_t)(v)))
#define PARAMSTATS_SQRT_PD(v) ((DoubleLanes)vsqrtq_f64((float64x2_t)(v)))
#define PARAMSTATS_LOW_DOUBLES(v) ((DoubleLanes)vcvt_f64_f32(vget_low_f32((float32x4_t)(v))))
#define PARAMSTATS_HIGH_DOUBLES(v) ((DoubleLanes)vcvt_high_f64_f32((float32x4_t)(v)))
#define PARAMSTATS_LOOKUP(table, index) \
  ((UInt8Lanes)vqtbl1q_u8((uint8x16_t)(table), (uint8x16_t)(index)))
#define PARAMSTATS_SMALLEST_WORD(v) ((UInt16Lanes)vdupq_n_u16(vminvq_u16((uint16x8_t)(v))))
#define PARAMSTATS_MINUS_OR_ZERO(a, b) ((UInt16Lanes)vqsubq_u16((uint16x8_t)(a), (uint16x8_t)(b)))
#define PARAMSTATS_AS_BYTES(a, b) \
  ((UInt8Lanes)vqmovn_high_u16(vqmovn_u16((uint16x8_t)(a)), (uint16x8_t)(b)))
#define PARAMSTATS_ADD_BYTES(sum, squares, v)                                         \
  sum = (UInt16Lanes)vpadalq_u8((uint16x8_t)(sum), (uint8x16_t)(v));                  \
  squares[0] = (UInt32Lanes)add_low_squares((uint32x4_t)squares[0], (uint8x16_t)(v)); \
  squares[1] = (UInt32Lanes)add_high_squares((uint32x4_t)squares[1], (uint8x16_t)(v))

namespace paramstats::cpu::neon {
// Vector k of the two that a vector in memory is converted to.
inline float32x4_t halves(const uint16_t* p, int k) {
  const float16x8_t v = vreinterpretq_f16_u16(vld1q_u16(p));
  return k == 0 ? vcvt_f32_f16(vget_low_f16(v)) : vcvt_high_f32_f16(v);
}
inline float64x2_t words(const int32_t* p, int k) {
  const int32x4_t v = vld1q_s32(p);
  return vcvtq_f64_s64(k == 0 ? vmovl_s32(vget_low_s32(v)) : vmovl_high_s32(v));
}
inline float64x2_t words(const uint32_t* p, int k) {
  const uint32x4_t v = vld1q_u32(p);
  return vcvtq_f64_u64(k == 0 ? vmovl_u32(vget_low_u32(v)) : vmovl_high_u32(v));
}
inline uint32x4_t add_low_squares(uint32x4_t sums, uint8x16_t v) {
  return vpadalq_u16(sums, vmull_u8(vget_low_u8(v), vget_low_u8(v)));
}
inline uint32x4_t add_high_squares(uint32x4_t sums, uint8x16_t v) {
  return vpadalq_u16(sums, vmull_high_u8(v, v));
}

constexpr int kVectorBytes = 16;
constexpr int kUnroll = 4;
constexpr int kUnroll16 = 4;
constexpr int kTileUnroll = 1;
#include "kernels_body.h"
}  // namespace paramstats::cpu::neon
#endif

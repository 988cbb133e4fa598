// The kernels for AVX-512. Compiled on every x86-64 machine, used if the CPU supports AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#define PARAMSTATS_LEVEL_NAME "avx512"
// (With full masks, because GCC 12 warns about its own header for the versions without a mask.)
#define PARAMSTATS_LOAD256(p) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
#define PARAMSTATS_SUM_OF_SQUARES(v) _mm512_maskz_madd_epi16(0xffff, (__m512i)(v), (__m512i)(v))
#define PARAMSTATS_LOAD_HALVES(p, k) _mm512_maskz_cvtph_ps(0xffff, PARAMSTATS_LOAD256(p + 16 * k))
#define PARAMSTATS_LOW_HALVES(h) \
  _mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_extracti64x4_epi64(0xf, (__m512i)(h), 0))
#define PARAMSTATS_HIGH_HALVES(h) \
  _mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_extracti64x4_epi64(0xf, (__m512i)(h), 1))
#define PARAMSTATS_MIN_PS(v, m) ((FloatLanes)_mm512_maskz_min_ps(0xffff, (__m512)(v), (__m512)(m)))
#define PARAMSTATS_MAX_PS(v, m) ((FloatLanes)_mm512_maskz_max_ps(0xffff, (__m512)(v), (__m512)(m)))
#define PARAMSTATS_MIN_PD(v, m) ((DoubleLanes)_mm512_maskz_min_pd(0xff, (__m512d)(v), (__m512d)(m)))
#define PARAMSTATS_MAX_PD(v, m) ((DoubleLanes)_mm512_maskz_max_pd(0xff, (__m512d)(v), (__m512d)(m)))
#define PARAMSTATS_TIMES_HALVES(v) \
  _mm512_maskz_mul_epu32(0xff, (__m512i)(v), _mm512_maskz_srli_epi64(0xff, (__m512i)(v), 32))
#define PARAMSTATS_SQRT_PS(v) ((FloatLanes)_mm512_maskz_sqrt_ps(0xffff, (__m512)(v)))
#define PARAMSTATS_SQRT_PD(v) ((DoubleLanes)_mm512_maskz_sqrt_pd(0xff, (__m512d)(v)))
#define PARAMSTATS_LOW_DOUBLES(v) \
  ((DoubleLanes)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)(v), 0)))
#define PARAMSTATS_HIGH_DOUBLES(v) \
  ((DoubleLanes)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)(v), 1)))
#define PARAMSTATS_LOOKUP(table, index) \
  ((UInt8Lanes)_mm512_maskz_shuffle_epi8(~__mmask64{0}, (__m512i)(table), (__m512i)(index)))
#define PARAMSTATS_COUNT_ZEROS_PS(count, v)                                                   \
  count = (Int32Lanes)_mm512_mask_sub_epi32(                                                  \
      (__m512i)(count), _mm512_testn_epi32_mask((__m512i)(v), _mm512_set1_epi32(0x7fffffff)), \
      (__m512i)(count), _mm512_set1_epi32(-1))
#define PARAMSTATS_COUNT_ZEROS_PD(count, v)                                         \
  count = (Int64Lanes)_mm512_mask_sub_epi64(                                        \
      (__m512i)(count),                                                             \
      _mm512_testn_epi64_mask((__m512i)(v), _mm512_set1_epi64(0x7fffffffffffffff)), \
      (__m512i)(count), _mm512_set1_epi64(-1))
#define PARAMSTATS_COUNT_WITHOUT(type, count, v, mask)                             \
  count = (decltype(count + count))_mm512_mask_sub_##type(                         \
      (__m512i)(count), _mm512_testn_##type##_mask((__m512i)(v), (__m512i)(mask)), \
      (__m512i)(count), _mm512_set1_##type(-1))

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace paramstats::cpu::avx512 {
constexpr int kVectorBytes = 64;
constexpr int kUnroll = 4;
constexpr int kUnroll16 = 4;
constexpr int kTileUnroll = 8;
#include "kernels_body.h"
}  // namespace paramstats::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// The kernels for AVX2. Compiled on every x86-64 machine, used if the CPU supports AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#define PARAMSTATS_LEVEL_NAME "avx2"
#define PARAMSTATS_LOAD128(p) _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
#define PARAMSTATS_SUM_OF_SQUARES(v) _mm256_madd_epi16((__m256i)(v), (__m256i)(v))
#define PARAMSTATS_LOAD_HALVES(p, k) _mm256_cvtph_ps(PARAMSTATS_LOAD128(p + 8 * k))
#define PARAMSTATS_LOW_HALVES(h) _mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)(h)))
#define PARAMSTATS_HIGH_HALVES(h) _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)(h), 1))
#define PARAMSTATS_MIN_PS(v, m) ((FloatLanes)_mm256_min_ps((__m256)(v), (__m256)(m)))
#define PARAMSTATS_MAX_PS(v, m) ((FloatLanes)_mm256_max_ps((__m256)(v), (__m256)(m)))
#define PARAMSTATS_MIN_PD(v, m) ((DoubleLanes)_mm256_min_pd((__m256d)(v), (__m256d)(m)))
#define PARAMSTATS_MAX_PD(v, m) ((DoubleLanes)_mm256_max_pd((__m256d)(v), (__m256d)(m)))
#define PARAMSTATS_TIMES_HALVES(v) \
  _mm256_mul_epu32((__m256i)(v), _mm256_srli_epi64((__m256i)(v), 32))
#define PARAMSTATS_SQRT_PS(v) ((FloatLanes)_mm256_sqrt_ps((__m256)(v)))
#define PARAMSTATS_SQRT_PD(v) ((DoubleLanes)_mm256_sqrt_pd((__m256d)(v)))
#define PARAMSTATS_LOOKUP(table, index) \
  ((UInt8Lanes)_mm256_shuffle_epi8((__m256i)(table), (__m256i)(index)))
#define PARAMSTATS_SMALLEST_WORD(v)                                     \
  ((UInt16Lanes)_mm256_broadcastw_epi16(_mm_minpos_epu16(_mm_min_epu16( \
      _mm256_castsi256_si128((__m256i)(v)), _mm256_extracti128_si256((__m256i)(v), 1)))))
#define PARAMSTATS_MINUS_OR_ZERO(a, b) ((UInt16Lanes)_mm256_subs_epu16((__m256i)(a), (__m256i)(b)))
#define PARAMSTATS_AS_BYTES(a, b) ((UInt8Lanes)_mm256_packus_epi16((__m256i)(a), (__m256i)(b)))
#define PARAMSTATS_BLEND_WORDS(a, b) \
  ((UInt16Lanes)_mm256_blend_epi16((__m256i)(a), (__m256i)(b), 0xaa))
#define PARAMSTATS_BLEND_BYTES(a, b)                           \
  ((UInt16Lanes)_mm256_blendv_epi8((__m256i)(a), (__m256i)(b), \
                                   _mm256_set1_epi16(static_cast<int16_t>(0xff00))))
#define PARAMSTATS_SUM_EIGHT_BYTES(v) _mm256_sad_epu8((__m256i)(v), _mm256_setzero_si256())
#define PARAMSTATS_ANY_BELOW_128(v) (_mm256_movemask_epi8((__m256i)(v)) != -1)
#define PARAMSTATS_LOW_DOUBLES(v) \
  ((DoubleLanes)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)(v))))
#define PARAMSTATS_HIGH_DOUBLES(v) \
  ((DoubleLanes)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)(v), 1)))

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace paramstats::cpu::avx2 {
constexpr int kVectorBytes = 32;
constexpr int kUnroll = 2;  // AVX2 has 16 registers, enough for two sets of sums and of extremes
constexpr int kUnroll16 = 4;
constexpr int kTileUnroll = 8;
#include "kernels_body.h"
}  // namespace paramstats::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

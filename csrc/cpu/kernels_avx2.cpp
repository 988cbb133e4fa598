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
// The instruction finds the smallest of 8 words.
#define PARAMSTATS_LARGEST_WORD(v)                                                      \
  (0xffff & ~_mm_cvtsi128_si32(_mm_minpos_epu16(                                        \
                _mm_xor_si128(_mm_max_epu16(_mm256_castsi256_si128((__m256i)(v)),       \
                                            _mm256_extracti128_si256((__m256i)(v), 1)), \
                              _mm_set1_epi16(-1)))))
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

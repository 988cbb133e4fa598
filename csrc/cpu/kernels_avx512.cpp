// The kernels for AVX-512. Compiled on every x86-64 machine, called where the processor has it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#define PARAMSTATS_LEVEL_NAME "avx512"
// The narrow vector's width follows the element's: 128 bits of bytes, 256 bits of 16-bit integers.
// (The forms with a full mask, because GCC 12 warns about its own header in the plain ones.)
#define PARAMSTATS_EXTEND(type, p) PARAMSTATS_EXTEND_##type(p)
#define PARAMSTATS_LOAD128(p) _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
#define PARAMSTATS_LOAD256(p) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
#define PARAMSTATS_EXTEND_epi8(p) _mm512_maskz_cvtepi8_epi32(0xffff, PARAMSTATS_LOAD128(p))
#define PARAMSTATS_EXTEND_epu8(p) _mm512_maskz_cvtepu8_epi32(0xffff, PARAMSTATS_LOAD128(p))
#define PARAMSTATS_EXTEND_epi16(p) _mm512_maskz_cvtepi16_epi32(0xffff, PARAMSTATS_LOAD256(p))
#define PARAMSTATS_EXTEND_epu16(p) _mm512_maskz_cvtepu16_epi32(0xffff, PARAMSTATS_LOAD256(p))
#define PARAMSTATS_LOAD_HALF(p) _mm512_maskz_cvtph_ps(0xffff, PARAMSTATS_LOAD256(p))

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
#include "kernels_body.h"
}  // namespace paramstats::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#include "crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace paramstats::cpu {
namespace {

// A polynomial over GF(2) is a number whose highest bit is the coefficient of x^0. So is a CRC.
constexpr uint32_t kPolynomial = 0xedb88320;  // without x^32
constexpr uint32_t kOne = 1u << 31;

constexpr uint32_t times_x(uint32_t p) { return (p >> 1) ^ (p & 1 ? kPolynomial : 0); }

// x^n modulo the polynomial.
constexpr uint32_t power_of_x(int n) {
  uint32_t p = kOne;
  for (int i = 0; i < n; ++i) p = times_x(p);
  return p;
}

// [k][b]: the CRC of byte b and k zero bytes after it.
constexpr int kSlices = 8;
using Tables = std::array<std::array<uint32_t, 256>, kSlices>;
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int k = 0; k < kSlices; ++k) {
      for (int bit = 0; bit < 8; ++bit) crc = times_x(crc);
      tables[k][byte] = crc;
    }
  }
  return tables;
}
constexpr Tables kTables = make_tables();

// Adds bytes to the remainder of those before them.
uint32_t add_bytes(uint32_t crc, const unsigned char* p, size_t n) {
  for (; n >= kSlices; p += kSlices, n -= kSlices) {
    uint32_t sum = 0;
    for (int k = 0; k < kSlices; ++k) {
      const uint32_t before = k < 4 ? crc >> 8 * k & 0xff : 0;
      sum ^= kTables[kSlices - 1 - k][before ^ p[k]];
    }
    crc = sum;
  }
  for (; n > 0; ++p, --n) crc = crc >> 8 ^ kTables[0][(crc ^ *p) & 0xff];
  return crc;
}

#if defined(__x86_64__)
constexpr int kLane = 16;                // bytes of a vector
constexpr int kStep = 4 * kLane;         // bytes that are folded at a time
constexpr size_t kShortest = 4 * kStep;  // fewer are faster with tables

bool has_carryless_multiplication() {
  unsigned a, b, c, d;
  constexpr unsigned kNeeded = 1 << 1 | 1 << 19;  // PCLMULQDQ, SSE4.1
  return __get_cpuid(1, &a, &b, &c, &d) && (c & kNeeded) == kNeeded;
}

// The factors that move the halves of a vector past `bits`: x^(bits + 32) and x^(bits - 32), as the
// product of reflected numbers is one bit too low.
struct Factors {
  int64_t low, high;
};
constexpr Factors move_by(int bits) {
  return {static_cast<int64_t>(power_of_x(bits + 32)) << 1,
          static_cast<int64_t>(power_of_x(bits - 32)) << 1};
}
constexpr Factors kByStep = move_by(8 * kStep), kByLane = move_by(8 * kLane);

#define PARAMSTATS_CARRYLESS __attribute__((target("pclmul,sse4.1")))

PARAMSTATS_CARRYLESS inline __m128i load(const unsigned char* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Returns `sum` moved past the bytes up to `next`, plus `next`.
PARAMSTATS_CARRYLESS inline __m128i fold(__m128i sum, __m128i factors, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(sum, factors, 0x00);
  const __m128i high = _mm_clmulepi64_si128(sum, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// As add_bytes, for kShortest bytes or more. V. Gopal et al., "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ Instruction", Intel, 2009: four vectors are folded in parallel, then
// into one vector, which has the same remainder as all bytes.
PARAMSTATS_CARRYLESS uint32_t add_by_folding(uint32_t crc, const unsigned char* p, size_t n) {
  const __m128i by_step = _mm_set_epi64x(kByStep.high, kByStep.low);
  const __m128i by_lane = _mm_set_epi64x(kByLane.high, kByLane.low);
  __m128i sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = load(p + i * kLane);
  sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  for (p += kStep, n -= kStep; n >= kStep; p += kStep, n -= kStep) {
    for (int i = 0; i < 4; ++i) sums[i] = fold(sums[i], by_step, load(p + i * kLane));
  }
  __m128i sum = sums[0];
  for (int i = 1; i < 4; ++i) sum = fold(sum, by_lane, sums[i]);
  unsigned char remainder[kLane];
  std::memcpy(remainder, &sum, kLane);
  return add_bytes(add_bytes(0, remainder, kLane), p, n);
}
#endif

}  // namespace

uint32_t crc32_by_tables(const void* data, size_t nbytes, uint32_t before) {
  return ~add_bytes(~before, static_cast<const unsigned char*>(data), nbytes);
}

uint32_t crc32(const void* data, size_t nbytes, uint32_t before) {
#if defined(__x86_64__)
  static const bool can_fold = has_carryless_multiplication();
  if (can_fold && nbytes >= kShortest) {
    return ~add_by_folding(~before, static_cast<const unsigned char*>(data), nbytes);
  }
#endif
  return crc32_by_tables(data, nbytes, before);
}

}  // namespace paramstats::cpu

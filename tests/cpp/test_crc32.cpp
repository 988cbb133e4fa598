// Tests of the CRC-32: against its definition, bit by bit.
#include <cstdint>
#include <string>
#include <vector>

#include "../../csrc/cpu/crc32.h"
#include "check.h"

namespace {

using paramstats::cpu::crc32;
using paramstats::cpu::crc32_by_tables;

// Divides the bits of the bytes by the polynomial, one at a time.
uint32_t by_definition(const unsigned char* data, size_t n) {
  uint32_t crc = 0xffffffff;
  for (size_t i = 0; i < n; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xedb88320 : 0);
  }
  return ~crc;
}

std::vector<unsigned char> random_bytes(size_t n) {
  std::vector<unsigned char> bytes(n);
  uint32_t state = 1;
  for (auto& byte : bytes)
    byte = static_cast<unsigned char>((state = state * 1664525 + 1013904223) >> 24);
  return bytes;
}

void test_published_values() {
  const std::string digits = "123456789";  // the check value of the standard
  CHECK(crc32(digits.data(), digits.size()), 0xcbf43926u);
  CHECK(crc32(nullptr, 0), 0u);
  const std::vector<unsigned char> zeros(32);
  CHECK(crc32(zeros.data(), zeros.size()), 0x190a55adu);
}

void test_all_lengths_and_alignments() {
  const auto bytes = random_bytes(2000);
  for (size_t begin = 0; begin < 17; ++begin) {
    for (size_t n = 0; n <= 1200; n += n < 300 ? 1 : 61) {
      check::at(std::to_string(n) + " bytes from " + std::to_string(begin));
      const uint32_t expected = by_definition(bytes.data() + begin, n);
      CHECK(crc32(bytes.data() + begin, n), expected);
      CHECK(crc32_by_tables(bytes.data() + begin, n), expected);
    }
  }
}

void test_parts() {
  const auto bytes = random_bytes(5000);
  const uint32_t expected = by_definition(bytes.data(), bytes.size());
  for (const size_t first : {0, 1, 255, 256, 257, 1023, 4999, 5000}) {
    check::at("in parts at " + std::to_string(first));
    const uint32_t before = crc32(bytes.data(), first);
    CHECK(crc32(bytes.data() + first, bytes.size() - first, before), expected);
  }
}

}  // namespace

int main() {
  RUN(test_published_values);
  RUN(test_all_lengths_and_alignments);
  RUN(test_parts);
  return check::report("CRC-32");
}

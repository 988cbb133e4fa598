// CRC-32 of bytes, as zip archives have it (the reflected polynomial 0xedb88320).
#pragma once

#include <cstddef>
#include <cstdint>

namespace paramstats::cpu {

// Returns the CRC-32 of bytes that follow others, whose CRC-32 is `before` (0 if there are none).
uint32_t crc32(const void* data, size_t nbytes, uint32_t before = 0);

// The same without carry-less multiplication, for CPUs that have none. For tests.
uint32_t crc32_by_tables(const void* data, size_t nbytes, uint32_t before = 0);

}  // namespace paramstats::cpu

// Runs one kernel on one tensor; tools/count_instructions.py counts its instructions. As in most
// tensors, the mean of the elements is near zero and none is zero. With `far`, the mean is so far
// from zero that it needs a pivot, and some elements are zero.
//
//     one_kernel LEVEL DTYPE N near|far
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tensor.h"

int main(int argc, char** argv) {
  using namespace paramstats;
  if (argc != 5) return 2;
  const auto dtype = static_cast<DType>(std::atoi(argv[2]));
  test::Tensor t(dtype, 65536);
  const uint64_t sign = oracle::sign_bit(dtype);
  if (oracle::is_float(dtype) && std::strcmp(argv[4], "near") == 0) {
    t.fill([=](int64_t i) {
      const uint64_t magnitude = (oracle::random_bits(dtype, test::rng) & ~sign) | 1;
      return i % 2 ? magnitude | sign : magnitude;
    });
  }
  for (const cpu::Kernels* kernels : cpu::available_kernels()) {
    if (std::strcmp(kernels->name, argv[1]) != 0) continue;
    const Moments state = kernels->chunk[static_cast<int>(dtype)](t.data(), std::atoll(argv[3]));
    std::printf("%.17g\n", state.m2);
    return 0;
  }
  std::printf("this CPU does not support the level\n");
  return 3;
}

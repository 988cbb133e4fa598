// Runs one kernel over a part of a chunk: what tools/count_instructions.py counts. The elements'
// mean is near zero, as most tensors' is, or, with `far`, too far from it to do without a pivot.
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
  cpu::test::Tensor t(dtype, 65536);
  const uint64_t sign = uint64_t{1} << (8 * element_size(dtype) - 1);
  if (oracle::is_float(dtype) && std::strcmp(argv[4], "near") == 0) {
    t.fill([=](int64_t i) {
      const uint64_t magnitude = oracle::random_bits(dtype, cpu::test::rng) & ~sign;
      return i % 2 ? magnitude | sign : magnitude;
    });
  }
  for (const cpu::Kernels* kernels : cpu::available_kernels()) {
    if (std::strcmp(kernels->name, argv[1]) != 0) continue;
    const Moments state = kernels->chunk[static_cast<int>(dtype)](t.data(), std::atoll(argv[3]));
    std::printf("%.17g\n", state.m2);
    return 0;
  }
  std::printf("not here\n");
  return 3;
}

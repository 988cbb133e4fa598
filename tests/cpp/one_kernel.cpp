// Runs one kernel over one chunk of N(0, 1)-like elements: what tests/count_instructions.py counts.
//
//     one_kernel LEVEL DTYPE N
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tensor.h"

int main(int argc, char** argv) {
  using namespace paramstats;
  if (argc != 4) return 2;
  const auto dtype = static_cast<DType>(std::atoi(argv[2]));
  const cpu::test::Tensor t(dtype, 65536);
  for (const cpu::Kernels* kernels : cpu::available_kernels()) {
    if (std::strcmp(kernels->name, argv[1]) != 0) continue;
    const Moments state = kernels->chunk[static_cast<int>(dtype)](t.data(), std::atoll(argv[3]));
    std::printf("%.17g\n", state.m2);
    return 0;
  }
  std::printf("not here\n");
  return 3;
}

// Runs the tasks of the CPU backend on torch's own threads.
#pragma once

#include "cpu/engine.h"

namespace paramstats {

// A cpu::Pool.
void torch_pool(int64_t n, cpu::Task task, void* context);

// The number of threads that torch uses: torch.get_num_threads().
int torch_threads();

}  // namespace paramstats

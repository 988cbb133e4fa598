// torch's own threads, as the pool that csrc/cpu/engine.h asks for.
#pragma once

#include "cpu/engine.h"

namespace paramstats {

void torch_pool(int64_t n, cpu::Task task, void* context);
int torch_threads();

}  // namespace paramstats

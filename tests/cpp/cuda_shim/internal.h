// What the files of the shim share.
#pragma once

#include "cuda_runtime.h"

namespace cuda_shim {

constexpr unsigned kMaxThreads = 1024;  // of a block

// Reports misuse by the running thread, and aborts.
[[noreturn]] __attribute__((format(printf, 1, 2))) void die(const char* format, ...);

void run_kernel(dim3 grid, dim3 block, const std::function<void()>& body);

size_t page_size();
// Makes pinned memory accessible at the addresses of the device, or else at those of the host.
void set_kernels_run(bool run);

}  // namespace cuda_shim

// Runs kernels: a fiber for each thread, a scheduler for the threads of a block, and blocks one
// after the other.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "internal.h"

#ifdef CUDA_SHIM_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" {
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

// Saves the callee-saved registers and the stack pointer in *from, and continues at `to`. longjmp
// does not work: the address sanitizer's version forgets the state of the stack that it leaves.
void cuda_shim_switch(void** from, void* to);
}

#if defined(__x86_64__)
constexpr size_t kFrame = 8, kEntry = 6;  // words of a saved frame; index of the return address
asm(R"(
.text
.globl cuda_shim_switch
cuda_shim_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
#elif defined(__aarch64__)
constexpr size_t kFrame = 20, kEntry = 1;
asm(R"(
.text
.globl cuda_shim_switch
cuda_shim_switch:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]; stp x21, x22, [sp, #32]; stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]; stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]; ldp x21, x22, [sp, #32]; ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]; ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
)");
#else
#error "cuda_shim switches fibers on x86-64 and arm64 only"
#endif

namespace cuda_shim {
namespace {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = 256 * 1024;  // bytes of address space; pages are allocated on first use

struct Fiber {
  void* stack_pointer = nullptr;
  unsigned index = 0;
  // The collective that it waits at, its arguments, and then its result in `value`.
  Op op = kNone;
  unsigned mask = 0, argument = 0;
  uint64_t value = 0;
  // For the address sanitizer.
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};

struct Warp {
  unsigned waiting,
      exited;  // lanes that wait at a warp collective; lanes that do not exist any more
};

Fiber fibers[kMaxThreads], host;
Warp warps[kMaxThreads / kLanes];
Fiber* current = &host;
Fiber* previous = &host;
Fiber* ready[kMaxThreads];
unsigned threads, ready_count, exited, arrived;  // of the running block; arrived at __syncthreads
const std::function<void()>* kernel;
uint64_t random_state = 1;

const char* name(Op op) {
  constexpr const char* kNames[] = {"nothing",        "__syncthreads", "__syncwarp",
                                    "__ballot_sync",  "__shfl_sync",   "__shfl_down_sync",
                                    "__shfl_xor_sync"};
  return kNames[op];
}

// A random number in [0, n), by splitmix64: the same on every machine.
uint32_t draw(uint32_t n) {
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>(((z ^ z >> 31) >> 32) * n >> 32);
}

void finish_switch() {
#ifdef CUDA_SHIM_ASAN
  __sanitizer_finish_switch_fiber(current->fake_stack, &previous->bottom, &previous->size);
#endif
}

void switch_to(Fiber* next) {
  if (next == current) return;
  Fiber* self = previous = current;
  current = next;
  threadIdx.x = next->index;
#ifdef CUDA_SHIM_ASAN
  __sanitizer_start_switch_fiber(&self->fake_stack, next->bottom, next->size);
#endif
  cuda_shim_switch(&self->stack_pointer, next->stack_pointer);
  finish_switch();
}

void make_ready(Fiber& fiber) {
  fiber.op = kNone;
  ready[ready_count++] = &fiber;
}

[[noreturn]] void deadlock() {
  std::string waits;
  for (unsigned i = 0; i < threads; ++i) {
    char text[128];
    std::snprintf(text, sizeof text, "\n  thread %u at %s mask 0x%08x", i, name(fibers[i].op),
                  fibers[i].mask);
    waits += text;
  }
  die("all threads wait:%s", waits.c_str());
}

Fiber* next() {
  if (ready_count == 0) deadlock();
  const unsigned i = draw(ready_count);
  Fiber* fiber = ready[i];
  ready[i] = ready[--ready_count];
  return fiber;
}

Warp& warp_of(const Fiber& fiber) { return warps[fiber.index / kLanes]; }

void exit_thread() {
  Warp& warp = warp_of(*current);
  const unsigned lane = current->index % kLanes;
  if (arrived > 0) die("exits while others wait at __syncthreads");
  for (unsigned i = 0; i < kLanes && warp.waiting >> i; ++i) {
    const Fiber& other = fibers[current->index - lane + i];
    if ((warp.waiting >> i & 1) && (other.mask >> lane & 1)) {
      die("exits while lane %u waits for it at %s mask 0x%08x", i, name(other.op), other.mask);
    }
  }
  warp.exited |= 1u << lane;
  switch_to(++exited == threads ? &host : next());
}

// A fiber runs a thread of one block after the other and never ends, so that its stack never
// contains frames of a finished function.
[[noreturn]] void fiber_main() noexcept {
  finish_switch();
  for (;;) {
    (*kernel)();
    exit_thread();
  }
}

void make_fibers() {
  void* memory = mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) die("no memory for stacks");
  const size_t page = page_size();
  for (unsigned i = 0; i < kMaxThreads; ++i) {
    char* bottom = static_cast<char*>(memory) + i * kStack;
    mprotect(bottom, page, PROT_NONE);
    // Different offsets in a page: otherwise the tops of all stacks would share a few cache lines.
    const size_t size = kStack - i % 32 * 128;
    void** frame = reinterpret_cast<void**>(bottom + size) - kFrame;
    frame[kEntry] = reinterpret_cast<void*>(&fiber_main);
    fibers[i].stack_pointer = frame;
    fibers[i].bottom = bottom;
    fibers[i].size = size;
    fibers[i].index = i;
  }
}

void run_block(unsigned index) {
  blockIdx.x = index;
  if (__start_cuda_shared != nullptr) {
    std::memset(__start_cuda_shared, 0xa5,
                static_cast<size_t>(__stop_cuda_shared - __start_cuda_shared));
  }
  for (unsigned i = 0; i < threads; i += kLanes) {
    warps[i / kLanes] = {0, threads - i >= kLanes ? 0 : ~0u << (threads - i)};
  }
  ready_count = exited = arrived = 0;
  for (unsigned i = 0; i < threads; ++i) make_ready(fibers[i]);
  switch_to(next());
}

}  // namespace

void die(const char* format, ...) {
  std::fprintf(stderr, "cuda_shim: deadlock/divergence: ");
  if (current != &host) std::fprintf(stderr, "block %u thread %u: ", blockIdx.x, threadIdx.x);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

void run_kernel(dim3 grid, dim3 block, const std::function<void()>& body) {
  if (fibers[0].stack_pointer == nullptr) make_fibers();
  gridDim = grid;
  blockDim = block;
  threads = block.x;
  kernel = &body;
  set_kernels_run(true);
  std::vector<uint32_t> order(grid.x);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t n = order.size(); n > 0; --n) {
    std::swap(order[n - 1], order[draw(static_cast<uint32_t>(n))]);
    run_block(order[n - 1]);
  }
  set_kernels_run(false);
}

void sync_threads() {
  if (exited > 0) die("__syncthreads after %u threads have exited", exited);
  current->op = kSyncThreads;
  current->mask = ~0u;
  if (++arrived == threads) {
    arrived = 0;
    for (unsigned i = 0; i < threads; ++i) make_ready(fibers[i]);
  }
  switch_to(next());
}

uint64_t warp_collective(Op op, unsigned mask, uint64_t value, unsigned argument) {
  Fiber& self = *current;
  Warp& warp = warp_of(self);
  const unsigned lane = self.index % kLanes;
  Fiber* lanes = &self - lane;
  if (!(mask >> lane & 1)) die("%s mask 0x%08x lacks its own lane %u", name(op), mask, lane);
  if (mask & warp.exited) die("%s mask 0x%08x has lanes that have exited", name(op), mask);
  if (op >= kShfl) {  // the lane to read: its own if there is no such lane
    const unsigned from = op == kShfl       ? argument % kLanes
                          : op == kShflDown ? lane + argument
                                            : lane ^ argument;
    argument = from < kLanes ? from : lane;
    if (!(mask >> argument & 1)) die("%s mask 0x%08x reads lane %u", name(op), mask, argument);
  }
  self.op = op;
  self.mask = mask;
  self.value = value;
  self.argument = argument;
  warp.waiting |= 1u << lane;

  bool complete = (warp.waiting & mask) == mask;
  for (unsigned i = 0; i < kLanes && complete; ++i) {
    complete = !(mask >> i & 1) || (lanes[i].op == op && lanes[i].mask == mask);
  }
  if (complete) {
    uint64_t given[kLanes] = {}, ballot = 0;
    for (unsigned i = 0; i < kLanes; ++i) {
      if (!(mask >> i & 1)) continue;
      given[i] = lanes[i].value;
      ballot |= (given[i] & 1) << i;
    }
    for (unsigned i = 0; i < kLanes; ++i) {
      if (!(mask >> i & 1)) continue;
      lanes[i].value = op >= kShfl ? given[lanes[i].argument] : ballot;
      make_ready(lanes[i]);
    }
    warp.waiting &= ~mask;
  }
  switch_to(next());
  return self.value;
}

void reschedule() {
  make_ready(*current);
  switch_to(next());
}

void set_seed(uint64_t seed) { random_state = seed; }

int64_t loads = 0;

}  // namespace cuda_shim

// Pinned memory: mapped at one address for the host and at another one for kernels.
#include <sys/mman.h>
#include <unistd.h>

#include <mutex>
#include <vector>

#include "internal.h"

namespace cuda_shim {
namespace {

struct Pinned {  // mapped twice; ends where a page ends, before pages without access
  char *host, *device;
  size_t offset, size;  // of the first byte; of the pages
};
std::vector<Pinned> pinned;
std::mutex mutex;  // of `pinned`

}  // namespace

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

void set_kernels_run(bool run) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Pinned& p : pinned) {
    mprotect(p.host, p.size, run ? PROT_NONE : PROT_READ | PROT_WRITE);
    mprotect(p.device, p.size, run ? PROT_READ | PROT_WRITE : PROT_NONE);
  }
}

void* host_alloc(size_t bytes) {
  const size_t page = page_size(), size = (bytes + page - 1) / page * page;
  const int file = memfd_create("pinned", 0);
  if (file < 0 || ftruncate(file, static_cast<off_t>(size)) != 0) die("no pinned memory");
  const auto map = [&](int protection) {
    void* pages =
        mmap(nullptr, size + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) die("no memory for pinned memory");
    if (size > 0) mmap(pages, size, protection, MAP_SHARED | MAP_FIXED, file, 0);
    return static_cast<char*>(pages);
  };
  const Pinned memory = {map(PROT_READ | PROT_WRITE), map(PROT_NONE), size - bytes, size};
  close(file);
  const std::lock_guard<std::mutex> lock(mutex);
  pinned.push_back(memory);
  return memory.host + memory.offset;
}

void host_free(void* host) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (Pinned& p : pinned) {
    if (p.host + p.offset != host) continue;
    munmap(p.host, p.size + page_size());
    munmap(p.device, p.size + page_size());
    p = pinned.back();
    pinned.pop_back();
    return;
  }
  die("host_free of memory that host_alloc did not return");
}

void* device_pointer(void* host) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Pinned& p : pinned) {
    const auto offset = static_cast<char*>(host) - p.host;
    if (offset >= 0 && static_cast<size_t>(offset) < p.size) return p.device + offset;
  }
  return host;
}

}  // namespace cuda_shim

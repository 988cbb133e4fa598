// Splits tensors into chunks, summarizes the chunks on a thread pool, and merges their states in
// order of their index.
#include "engine.h"

#include <algorithm>
#include <utility>

#include "denormals.h"
#include "details.h"
#include "strides.h"
#include "zero_rows.h"

namespace paramstats::cpu {
namespace {

// Elements of a tensor with gaps that are copied to contiguous memory at a time: 64 KiB of the
// widest dtype, which stay in L2.
constexpr int64_t kGather = 2 * kPart;

// Thread-local instead of on the stack, which is too small on some threads.
alignas(64) thread_local char gather_buffer[kGather * 8];
alignas(64) thread_local char part_buffer[kPart * sizeof(double)];  // of float or double
alignas(64) thread_local double update_buffer[7 * kUpdateBlock];

int64_t chunk_count(int64_t numel) { return ceil_div(numel, kChunk); }

// Reads one chunk. `dims` is null if the tensor is dense.
Moments read_chunk(const TensorView& t, const std::vector<Dim>* dims, int64_t index,
                   const Kernels& kernels) {
  const ChunkKernel kernel = kernels.chunk[static_cast<int>(t.dtype)];
  const int size = element_size(t.dtype);
  const int64_t begin = index * kChunk;
  const int64_t end = t.numel - begin < kChunk ? t.numel : begin + kChunk;
  if (Details* const details = t.details) {
    Moments state;
    if (details->has_distribution) {
      state = details->read_distribution(t, dims, begin, end, kernels);
    }
    if (details->rows != nullptr) return details->read_rows(t, begin, end, kernels);
    if (details->has_distribution) return state;
  }
  if (dims == nullptr) return kernel(static_cast<const char*>(t.data) + begin * size, end - begin);
  Moments state;
  for (int64_t i = begin; i < end; i += kGather) {
    const int64_t n = end - i < kGather ? end - i : kGather;
    gather(t.data, *dims, i, n, size, gather_buffer);
    state = merge(state, kernel(gather_buffer, n));
  }
  return state;
}

// The dimensions of a tensor with gaps (stored in `storage`), or null for a dense tensor.
const std::vector<Dim>* dims_with_gaps(const TensorView& t, std::vector<Dim>& storage) {
  if (is_contiguous(t)) return nullptr;
  storage = memory_order(t);
  return is_dense(storage) ? nullptr : &storage;
}

void summarize_on_this_thread(const std::vector<TensorView>& tensors,
                              const std::vector<Moments*>& out, const Kernels& kernels,
                              ZeroRowSearch& zero_rows) {
  std::vector<Dim> storage;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t chunks = chunk_count(tensors[t].numel);
    const auto* dims = dims_with_gaps(tensors[t], storage);
    Moments state;
    if (chunks > 0) state = read_chunk(tensors[t], dims, 0, kernels);
    for (int64_t c = 1; c < chunks; ++c) {
      state = merge(state, read_chunk(tensors[t], dims, c, kernels));
    }
    *out[t] = state;
    if (state.zeros > 0) zero_rows.add(t, state);
  }
}

// The fixed cost of a call of a kernel, as the number of elements that it reads in that time.
constexpr int64_t kCallCost = 1024;

// The tensors with gaps of a call, in order.
struct Gaps {
  explicit Gaps(const std::vector<TensorView>& tensors) {
    for (size_t t = 0; t < tensors.size(); ++t) {
      std::vector<Dim> storage;
      if (dims_with_gaps(tensors[t], storage)) all.emplace_back(t, std::move(storage));
    }
  }
  const std::vector<Dim>* dims(size_t tensor) const {
    const auto found =
        std::lower_bound(all.begin(), all.end(), tensor,
                         [](const auto& entry, size_t t) { return entry.first < t; });
    return found != all.end() && found->first == tensor ? &found->second : nullptr;
  }
  std::vector<std::pair<size_t, std::vector<Dim>>> all;
};

// What a job reads: items of `numel` elements, all of whose states are computed chunk by chunk.
// Here each tensor is an item and has one state.
struct TensorItems {
  const std::vector<TensorView>& tensors;
  const std::vector<Moments*>& rows;
  const Kernels& kernels;
  ZeroRowSearch& zero_rows;
  const Gaps gaps{tensors};

  size_t size() const { return tensors.size(); }
  int64_t numel(size_t i) const { return tensors[i].numel; }
  static constexpr size_t states(size_t) { return 1; }
  Moments& out(size_t i, size_t) const { return *rows[i]; }
  template <class To>
  void read(size_t i, int64_t chunk, const To& to) const {
    to(0) = read_chunk(tensors[i], gaps.dims(i), chunk, kernels);
  }
  // Uses the state of an item and those of its chunks, `n` of each chunk, or none if it has one.
  void finish(size_t i, const Moments* chunks, size_t n) const {
    if (rows[i]->zeros > 0) zero_rows.add(i, *rows[i], chunks, n);
  }
};

// Each update and the tensors that it reads are an item, as is each of the other tensors.
struct UpdateItems {
  struct Item {
    std::array<size_t, 4> tensors;
    size_t n_tensors;
    const Update* update;  // or null
  };
  const TensorItems one;
  std::vector<Item> items;

  UpdateItems(const std::vector<TensorView>& tensors, const std::vector<Moments*>& rows,
              const std::vector<Update>& updates, const Kernels& kernels, ZeroRowSearch& zero_rows)
      : one{tensors, rows, kernels, zero_rows} {
    std::vector<bool> taken(tensors.size());
    for (const Update& update : updates) {
      Item item{{}, 0, &update};
      for (size_t t : update.tensors) {
        if (t == kNoTensor || taken[t] || tensors[t].numel != update.numel) continue;
        taken[t] = true;
        item.tensors[item.n_tensors++] = t;
      }
      items.push_back(item);
    }
    for (size_t t = 0; t < tensors.size(); ++t) {
      if (!taken[t]) items.push_back({{t}, 1, nullptr});
    }
  }
  size_t size() const { return items.size(); }
  int64_t numel(size_t i) const {
    const Item& item = items[i];
    return item.update ? item.update->numel : one.tensors[item.tensors[0]].numel;
  }
  size_t states(size_t i) const {
    return items[i].n_tensors + (items[i].update ? size_t{kUpdateRows} : 0);
  }
  Moments& out(size_t i, size_t state) const {
    const Item& item = items[i];
    return state < item.n_tensors ? *one.rows[item.tensors[state]]
                                  : item.update->rows[state - item.n_tensors];
  }
  template <class To>
  void read(size_t i, int64_t chunk, const To& to) const {
    const Item& item = items[i];
    if (item.update != nullptr) {  // first, so that its arithmetic overlaps with the memory's time
      const int64_t begin = chunk * kChunk, rest = item.update->numel - begin;
      one.kernels.update(item.update->operands, begin, rest < kChunk ? rest : kChunk,
                         &to(item.n_tensors));
    }
    for (size_t k = 0; k < item.n_tensors; ++k) {
      one.read(item.tensors[k], chunk, [&](size_t) -> Moments& { return to(k); });
    }
  }
  void finish(size_t i, const Moments* chunks, size_t n) const {
    for (size_t k = 0; k < items[i].n_tensors; ++k) {
      one.finish(items[i].tensors[k], chunks ? chunks + k : nullptr, n);
    }
  }
};

// A chunk of all items.
struct Position {
  size_t item = 0;
  int64_t chunk = 0;
  size_t state = 0;  // of this chunk or, if its item has only one, of the next one with states
  bool operator<(const Position& other) const {
    return item < other.item || (item == other.item && chunk < other.chunk);
  }
};

// The data that all threads share. An item with several chunks has elements of `states` for each.
template <class Items>
struct Job {
  const Items& items;
  // Of each task: a run of chunks that takes about as long as one chunk of kChunk elements.
  std::vector<Position> begin = {Position()};
  std::vector<Moments> states = {};

  explicit Job(const Items& all) : items(all) {
    int64_t in_task = 0;
    size_t n_states = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      const int64_t numel = items.numel(i), chunks = chunk_count(numel);
      for (int64_t c = 0; c < chunks; ++c) {
        if (chunks > 1) n_states += items.states(i);
        const int64_t n = numel - c * kChunk < kChunk ? numel - c * kChunk : kChunk;
        in_task += (kCallCost + n) * static_cast<int64_t>(items.states(i));
        if (in_task < kChunk) continue;
        begin.push_back(c + 1 < chunks ? Position{i, c + 1, n_states}
                                       : Position{i + 1, 0, n_states});
        in_task = 0;
      }
    }
    const Position end{items.size(), 0, n_states};
    if (begin.back() < end) begin.push_back(end);
    states.resize(n_states);
  }

  static void run_task(int64_t i, void* context) {
    Job& job = *static_cast<Job*>(context);
    const Items& items = job.items;
    const WithDenormals with_denormals;
    for (Position at = job.begin[i]; at < job.begin[i + 1];) {
      const int64_t chunks = chunk_count(items.numel(at.item));
      const auto out = [&](size_t s) -> Moments& { return items.out(at.item, s); };
      const auto state = [&](size_t s) -> Moments& { return job.states[at.state + s]; };
      if (chunks == 0) {
        for (size_t s = 0; s < items.states(at.item); ++s) out(s) = Moments();
      } else if (chunks == 1) {
        items.read(at.item, 0, out);
      } else {
        items.read(at.item, at.chunk, state);
        at.state += items.states(at.item);
      }
      if (++at.chunk >= chunks) at = {at.item + 1, 0, at.state};
    }
  }

  void run(Pool pool) {
    const auto tasks = static_cast<int64_t>(begin.size()) - 1;
    if (pool == nullptr) {
      for (int64_t i = 0; i < tasks; ++i) run_task(i, this);
    } else {
      pool(tasks, run_task, this);
    }
    const Moments* state = states.data();
    for (size_t i = 0; i < items.size(); ++i) {
      const int64_t chunks = chunk_count(items.numel(i));
      if (chunks < 2) {
        items.finish(i, nullptr, 0);
        continue;
      }
      const size_t n = items.states(i);
      const Moments* const first = state;
      for (size_t s = 0; s < n; ++s) items.out(i, s) = state[s];
      state += n;
      for (int64_t c = 1; c < chunks; ++c, state += n) {
        for (size_t s = 0; s < n; ++s) items.out(i, s) = merge(items.out(i, s), state[s]);
      }
      items.finish(i, first, n);
    }
  }
};

// Marks the rows that have no operands.
void mark_absent(const Update& update) {
  const UpdateOperands& u = update.operands;
  const bool has_update = u.method != UpdateMethod::kNone, has_grad = u.grad.data != nullptr;
  const bool has[kUpdateRows] = {has_update, has_grad && u.momentum.data, has_update && has_grad,
                                 has_grad && u.variance.data};
  for (int row = 0; row < kUpdateRows; ++row) {
    if (!has[row]) update.rows[row] = unread(kAbsent);
  }
}

}  // namespace

double* scratch() { return reinterpret_cast<double*>(part_buffer); }

double* update_scratch() { return update_buffer; }

void summarize(const std::vector<TensorView>& tensors, const std::vector<Moments*>& out,
               const Kernels& kernels, Pool pool, const std::vector<Update>& updates,
               ZeroRows* zero_rows) {
  const WithDenormals with_denormals;
  int64_t bytes = 0;
  bool has_details = false, has_strided = false;
  for (const TensorView& t : tensors) {
    bytes += t.numel * element_size(t.dtype);
    has_details |= t.details != nullptr;
    has_strided |= t.ndim > 0;
  }
  for (const Update& u : updates) bytes += u.numel * kUpdateRows * int64_t{sizeof(float)};
  if (bytes < kSerialBytes) pool = nullptr;
  if (has_details) {
    for (const TensorView& t : tensors) {
      if (t.details != nullptr) t.details->prepare(t);
    }
  }
  ZeroRowSearch search(tensors, has_strided);
  if (!updates.empty()) {
    const UpdateItems items(tensors, out, updates, kernels, search);
    Job<UpdateItems>(items).run(pool);
    for (const Update& update : updates) mark_absent(update);
  } else if (pool == nullptr) {
    summarize_on_this_thread(tensors, out, kernels, search);
  } else {
    const TensorItems items{tensors, out, kernels, search};
    Job<TensorItems>(items).run(pool);
  }
  if (has_details) {
    for (const TensorView& t : tensors) {
      if (t.details != nullptr) t.details->finish(t);
    }
  }
  if (zero_rows != nullptr) search.run(pool, *zero_rows);
}

}  // namespace paramstats::cpu

// Divides what a call reads on a device, and its memory. A part of the engine.
#pragma once

#include <string>

#include "engine.h"
#include "table.h"

namespace paramstats::cuda {

// Whether zero rows are looked for. A run, which is a row or a part of one that has no gaps, needs
// a bit of host memory in each call.
inline bool is_searched_for_zero_rows(const TensorView& t) {
  return t.size0 > 0 && t.inner > 0 && t.numel / t.inner <= kMostRows;
}

// The bytes of a DistributionHead and the counts of all bins.
inline int64_t distribution_size(DType dtype) {
  return static_cast<int64_t>(sizeof(DistributionHead)) + 16 * exponents_of(dtype).bins;
}

// The entries that were added, and their chunks and groups. A launch has at most 2^31 - 1 blocks.
struct Plan {
  static constexpr int64_t kMaxChunks = 0x7fffffff;
  int64_t entries = 0, chunks = 0, groups = 0;
  int64_t updates = 0, tensor_chunks = 0, update_chunks = 0;
  int64_t words = 0;  // of zero rows
  int64_t distributions = 0, spans = 0, counts = 0, distribution_bytes = 0;

  // What is added for a tensor besides its entry, if not null.
  struct Details {
    ZeroRowsEntry* zero_rows = nullptr;
    DistributionEntry* distributions = nullptr;
    int64_t flags = 0, words = 0, out = 0;  // offsets of all flags, words and distributions
  };

  void add_details(const TensorView& t, const Details* out) {
    const bool is_searched = is_searched_for_zero_rows(t);
    if (out != nullptr) {
      out->zero_rows[entries] = {is_searched ? t.inner : 0, out->flags + chunks,
                                 out->words + words * static_cast<int64_t>(sizeof(uint32_t))};
    }
    if (is_searched) {
      words += segment_count(t.numel, t.dtype) * segment_words(t.numel, t.dtype, t.inner);
    }
    if ((t.details & kReadDistribution) == 0) return;
    if (out != nullptr) {
      out->distributions[distributions] = {static_cast<uint32_t>(entries),
                                           static_cast<uint32_t>(spans), counts,
                                           out->out + distribution_bytes};
    }
    ++distributions;
    spans += span_count(chunk_count(t.numel, t.dtype));
    counts += distribution_words(t.dtype);
    distribution_bytes += distribution_size(t.dtype);
  }

  // Adds a tensor, or a row of an update, and writes its entry unless `out` is null.
  bool add(const TensorView& t, Entry* out) {
    const int64_t count = chunk_count(t.numel, t.dtype);
    if (t.numel <= 0 || count > kMaxChunks - chunks) return false;
    if (out != nullptr) {
      out[entries] = Entry(t, static_cast<uint32_t>(chunks), static_cast<uint32_t>(groups));
    }
    ++entries;
    chunks += count;
    groups += group_count(count);
    return true;
  }

  // Adds an update after all tensors.
  bool add(const UpdateView& u, Entry* out, UpdateEntry* updates_out) {
    if (updates_out != nullptr) {
      updates_out[updates] = {u, static_cast<uint32_t>(update_chunks),
                              static_cast<uint32_t>(entries)};
    }
    for (int row = 0; row < kUpdateRows; ++row) {
      if (!u.has(static_cast<UpdateRow>(row))) continue;
      if (!add({nullptr, u.numel, kUpdateRowDType}, out)) return false;
    }
    ++updates;
    update_chunks += chunk_count(u.numel, kUpdateRowDType);
    return true;
  }

  // Adds everything, up to what cannot be read, for which it returns an error.
  std::string add(const Inputs& inputs, Entry* out, UpdateEntry* updates_out,
                  const Details* details_out) {
    const auto refuse = [this](int64_t numel, const char* kind, int64_t index) {
      return "expected tensors with elements, of at most " + std::to_string(kMaxChunks) +
             " chunks in all, got " + std::to_string(numel) + " elements in " + kind + " " +
             std::to_string(index) + " after " + std::to_string(chunks) + " chunks";
    };
    for (int64_t t = 0; t < inputs.n; ++t) {
      const TensorView& view = inputs.tensors[t];
      if (view.numel > 0) add_details(view, details_out);
      if (!add(view, out)) return refuse(view.numel, "tensor", t);
    }
    tensor_chunks = chunks;
    for (int64_t u = 0; u < inputs.n_updates; ++u) {
      const UpdateView& view = inputs.updates[u];
      if (!add(view, out, updates_out)) return refuse(view.numel, "update", u);
    }
    return "";
  }
};

// Byte offsets in host memory: results, what zero rows and distributions need, then the table,
// which are the entries of tensors and rows, of updates and of distributions. In device memory: the
// table, states, counters, counts. What a call does not need takes no memory. Everything has
// multiples of 8 bytes.
struct Offsets {
  int64_t zero_rows, flags, words, distributions, table, host_end;
  int64_t updates, distribution_entries, table_end;  // in the table
  int64_t states, merged, moments, counts, device_end;

  Offsets(const Inputs& inputs, const Plan& plan) {
    const bool merges = plan.groups > 0;
    zero_rows = plan.entries * size_of<Moments>();
    flags = zero_rows + inputs.n * size_of<ZeroRowsEntry>();
    words = flags + (plan.tensor_chunks + 7) / 8 * 8;
    distributions = words + (plan.words + 1) / 2 * 8;
    table = distributions + plan.distribution_bytes;
    updates = is_inline(plan) ? 0 : plan.entries * size_of<Entry>();
    distribution_entries = updates + plan.updates * size_of<UpdateEntry>();
    table_end = distribution_entries + plan.distributions * size_of<DistributionEntry>();
    host_end = table + table_end;
    states = table_end;
    merged = states + (merges ? plan.chunks * size_of<Moments>() : 0);
    moments = merged + (merges ? (plan.entries + 1) / 2 * 8 : 0);
    counts = moments + plan.spans * size_of<HigherMoments>();
    device_end = counts + plan.counts * 8;
  }

  static bool is_inline(const Plan& plan) {
    return plan.updates == 0 && plan.distributions == 0 && plan.entries <= kInlineEntries;
  }

 private:
  template <class T>
  static constexpr int64_t size_of() {
    return static_cast<int64_t>(sizeof(T));
  }
};

}  // namespace paramstats::cuda

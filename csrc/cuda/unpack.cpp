// Packs what the kernels have written to host memory in addition to the states of tensors.
#include <algorithm>
#include <cstring>

#include "engine.h"
#include "plan.h"

namespace paramstats::cuda {
namespace {

// Appends the bytes of n objects.
template <class T>
void append(std::string& out, const T* objects, int64_t n) {
  out.append(reinterpret_cast<const char*>(objects), static_cast<size_t>(n) * sizeof(T));
}

// The distribution at `from`, without empty bins at both ends.
std::string distribution_at(const char* from) {
  DistributionHead head;
  std::memcpy(&head, from, sizeof(head));
  std::vector<int64_t> counts(2 * head.bins);
  std::memcpy(counts.data(), from + sizeof(head), counts.size() * sizeof(int64_t));
  const auto is_empty = [&](int64_t k) { return counts[k] == 0 && counts[head.bins + k] == 0; };
  int64_t begin = 0, end = head.bins;
  while (end > 0 && is_empty(end - 1)) --end;
  while (begin < end && is_empty(begin)) ++begin;
  const int64_t* positive = counts.data() + head.bins;
  head.first = begin < end ? head.first + begin : 0;
  head.bins = end - begin;
  head.moments = packed(head.moments);
  std::string out;
  append(out, &head, 1);
  append(out, counts.data() + begin, head.bins);
  append(out, positive + begin, head.bins);
  return out;
}

// Clears the bits of the rows of runs [begin, end), which are not zero.
void clear_rows(std::string& bits, int64_t begin, int64_t end, int64_t rows) {
  if (end - begin >= rows) std::fill(bits.begin(), bits.end(), 0);
  for (int64_t run = begin; run < end && run - begin < rows; ++run) {
    const int64_t row = run % rows;
    bits[row / 8] = static_cast<char>(bits[row / 8] & ~(1 << row % 8));
  }
}

// The number of rows and a bit for each that is zero; "" if none is. A row is zero if all its parts
// in all segments are.
std::string zero_rows_at(const TensorView& t, const char* flags, const uint32_t* words) {
  std::string bits((t.size0 + 7) / 8, static_cast<char>(0xff));
  if (t.size0 % 8 != 0) bits.back() = static_cast<char>((1 << t.size0 % 8) - 1);
  const int64_t size = chunk_size(t.numel, t.dtype), segment = size / kSegments;
  const int64_t in_segment = segment_words(t.numel, t.dtype, t.inner);
  for (int64_t begin = 0; begin < t.numel; begin += size, ++flags) {
    const int64_t end = std::min(begin + size, t.numel);
    if (*flags == kAllPartsZero) continue;
    if (*flags == kNoPartZero) {
      clear_rows(bits, begin / t.inner, (end - 1) / t.inner + 1, t.size0);
      continue;
    }
    for (int64_t from = begin; from < end; from += segment) {
      const uint32_t* tested = words + from / segment * in_segment;
      const int64_t first = from / t.inner;
      const int64_t runs = (std::min(from + segment, end) - 1) / t.inner - first + 1;
      for (int64_t k = 0; k < runs; ++k) {
        if ((tested[k / 32] >> k % 32 & 1) == 0) {
          clear_rows(bits, first + k, first + k + 1, t.size0);
        }
      }
    }
  }
  if (std::all_of(bits.begin(), bits.end(), [](char byte) { return byte == 0; })) return "";
  std::string out;
  append(out, &t.size0, 1);
  return out + bits;
}

}  // namespace

std::vector<Details> details(const Inputs& inputs, const void* host_memory) {
  const auto* host = static_cast<const char*>(host_memory);
  const auto* states = reinterpret_cast<const Moments*>(host);
  Plan plan;
  plan.add(inputs, nullptr, nullptr, nullptr);
  const Offsets offsets(inputs, plan);
  const char* distribution = host + offsets.distributions;
  const auto* zero_rows = reinterpret_cast<const ZeroRowsEntry*>(host + offsets.zero_rows);
  std::vector<Details> out;
  for (int64_t t = 0; t < inputs.n; ++t) {
    const TensorView& view = inputs.tensors[t];
    Details of_tensor{t, "", ""};
    if ((view.details & kReadDistribution) != 0) {
      of_tensor.distribution = distribution_at(distribution);
      distribution += distribution_size(view.dtype);
    }
    const int64_t zeros = states[t].zeros;
    if (view.size0 > 0 && zeros >= view.numel / view.size0 && zeros < view.numel) {
      of_tensor.zero_rows =
          zero_rows[t].inner == 0
              ? std::string(1, kNotKnown)
              : zero_rows_at(view, host + zero_rows[t].flags,
                             reinterpret_cast<const uint32_t*>(host + zero_rows[t].words));
    }
    if (!of_tensor.distribution.empty() || !of_tensor.zero_rows.empty()) {
      out.push_back(std::move(of_tensor));
    }
  }
  return out;
}

}  // namespace paramstats::cuda

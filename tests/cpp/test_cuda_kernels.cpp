// The CUDA engine on the CPU: csrc/cuda/engine.cu as it is, on the runtime of tests/cpp/cuda_shim,
// against the oracle. It proves indices, heads, tails, merges, types and the order of what is
// enqueued; not speed, and not races between two barriers.
//
//     make test-cuda-shim
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/engine.h"
#include "check.h"
#include "hostile.h"
#include "oracle.h"
#include "tensor.h"

namespace paramstats::cuda::test {
namespace {

using cpu::test::all_dtypes;
using cpu::test::bounds;
using cpu::test::kHostiles;
using cpu::test::name_of;
using cpu::test::noise;
using cpu::test::rng;
using cpu::test::Tensor;
using Tensors = std::vector<Tensor>;

TensorView view_of(const Tensor& t) { return {t.data(), t.numel(), t.dtype}; }

// A call that has been enqueued and not waited for. Memory is of the exact size, so that an address
// sanitizer sees anything beyond, and full of garbage; the views are gone before anything runs.
struct Call {
  std::unique_ptr<unsigned char[]> host, device;
  int64_t n;
  const char* error;

  explicit Call(const Tensors& tensors, cudaStream_t stream = nullptr)
      : n(static_cast<int64_t>(tensors.size())) {
    std::vector<TensorView> views;
    for (const Tensor& t : tensors) views.push_back(view_of(t));
    const Sizes sizes = api().sizes(views.data(), n);
    host.reset(new unsigned char[sizes.host]);
    device.reset(new unsigned char[sizes.device]);
    std::memset(host.get(), 0xa5, sizes.host);
    std::memset(device.get(), 0xa5, sizes.device);
    error = api().enqueue(views.data(), n, host.get(), device.get(), stream);
    std::memset(views.data(), 0xa5, n * sizeof(TensorView));
  }

  std::vector<Moments> rows() const {
    const auto* first = reinterpret_cast<const Moments*>(host.get());
    return std::vector<Moments>(first, first + n);
  }
};

std::vector<Moments> summaries_of(const Tensors& tensors) {
  const Call call(tensors);
  CHECK(call.error == nullptr, true);
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  return call.rows();
}

void check_all(const std::string& what, const Tensors& tensors,
               const oracle::Bounds* tighter = nullptr) {
  const auto states = summaries_of(tensors);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    check::at(what + " " + name_of(t.dtype) + " n=" + std::to_string(t.numel()) + "+" +
              std::to_string(t.first));
    oracle::check_state(states[i], oracle::truth_of(t.values()),
                        tighter != nullptr ? *tighter : bounds(t.dtype));
  }
}

Tensor of_values(DType dtype, int64_t n, double (*at)(int64_t)) {
  Tensor t(dtype, n);
  t.fill([=](int64_t i) {
    const double wide = at(i);
    const auto narrow = static_cast<float>(wide);
    uint64_t bits = 0;
    if (dtype == DType::kFloat64) std::memcpy(&bits, &wide, sizeof(wide));
    if (dtype != DType::kFloat64) std::memcpy(&bits, &narrow, sizeof(narrow));
    return dtype == DType::kBFloat16 ? bits >> 16 : bits;
  });
  return t;
}

// ---- element types -----------------------------------------------------------------------------

// As the only element, and where 16 bytes are full of them; all of them in one launch.
void every_pattern_of_8_and_16_bits_is_read_right() {
  for (DType dtype : all_dtypes()) {
    if (element_size(dtype) > 2) continue;
    const int per_vector = 16 / element_size(dtype);
    const uint64_t patterns = uint64_t{1} << (8 * element_size(dtype));
    // Of 16 bits only some alone: a block for each of 65,536 would take a minute.
    for (uint64_t begin = 0; begin < patterns; begin += 4096) {
      Tensors tensors;
      const uint64_t step = element_size(dtype) == 1 ? 1 : 8;
      for (uint64_t bits = begin; bits < std::min(begin + 4096, patterns); bits += step) {
        for (int64_t n : {1, per_vector}) {
          tensors.emplace_back(dtype, n);
          tensors.back().fill([=](int64_t i) { return bits + i % step; });
        }
      }
      const auto states = summaries_of(tensors);
      for (size_t i = 0; i < tensors.size(); ++i) {
        check::at(name_of(dtype) + " from " + std::to_string(begin));
        oracle::check_state(states[i], oracle::truth_of(tensors[i].values()), bounds(dtype));
      }
    }
  }
}

void wide_integers_keep_their_extremes() {
  Tensors tensors;
  for (DType dtype : {DType::kInt32, DType::kUInt32, DType::kInt64, DType::kUInt64}) {
    const uint64_t top = uint64_t{1} << (8 * element_size(dtype) - 1);
    for (uint64_t edge : {uint64_t{0}, ~uint64_t{0}, top, top - 1, (uint64_t{1} << 53) + 1}) {
      tensors.emplace_back(dtype, 100);
      tensors.back().fill([=](int64_t i) { return i % 9 == 0 ? edge : i % 9; });
    }
  }
  check_all("edges", tensors);
}

// ---- sizes and addresses -----------------------------------------------------------------------

void every_size_at_every_address() {
  for (DType dtype : all_dtypes()) {
    const int64_t per_vector = 16 / element_size(dtype);
    const int64_t chunk = chunk_size(dtype);
    Tensors tensors;
    for (int64_t first = 0; first <= per_vector; ++first) {
      for (int64_t n : {0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 511, 4099}) {
        tensors.emplace_back(dtype, n, first);
      }
    }
    for (int64_t first : {int64_t{0}, int64_t{1}, per_vector - 1}) {
      for (int64_t n : {chunk - 1, chunk, chunk + 1, 3 * chunk - 1, 3 * chunk + 17}) {
        tensors.emplace_back(dtype, n, first);
      }
    }
    check_all("sizes", tensors);
  }
}

// More chunks than a block has threads, so that each merges a run of them.
void a_tensor_of_many_chunks() {
  Tensors tensors;
  tensors.emplace_back(DType::kFloat64, 1030 * chunk_size(DType::kFloat64) + 5, 1);
  for (int64_t chunks : {31, 32, 33, 511, 512, 513}) {
    tensors.emplace_back(DType::kInt64, (chunks - 1) * chunk_size(DType::kInt64) + 7);
  }
  tensors.emplace_back(DType::kFloat32, 3);
  check_all("many chunks", tensors);
}

void every_tensor_finds_its_chunks() {
  const auto dtypes = all_dtypes();
  for (size_t count : {1, 2, 31, 32, 33, 34, 1023, 1025, 2500}) {
    Tensors tensors;
    for (size_t i = 0; i < count; ++i) {
      const DType dtype = dtypes[i * 7 % dtypes.size()];
      const int64_t n = i % 5 == 3 ? 0 : i % 97 == 1 ? chunk_size(dtype) + 9 : rng() % 20;
      tensors.emplace_back(dtype, n, i % 4);
    }
    check_all("of " + std::to_string(count), tensors);
  }
  check_all("only empty ones", Tensors(3, Tensor(DType::kFloat32, 0)));
}

// ---- hostile values ----------------------------------------------------------------------------

void constants_have_no_variance() {
  Tensors tensors;
  for (DType dtype : all_dtypes()) {
    for (int64_t n : {int64_t{2}, int64_t{3}, int64_t{100}, chunk_size(dtype) + 5}) {
      for (int repetition = 0; repetition < 5; ++repetition) {
        const uint64_t bits = oracle::random_bits(dtype, rng);
        tensors.emplace_back(dtype, n);
        tensors.back().fill([=](int64_t) { return bits; });
      }
    }
  }
  const auto states = summaries_of(tensors);
  for (size_t i = 0; i < tensors.size(); ++i) {
    check::at(name_of(tensors[i].dtype) + " n=" + std::to_string(tensors[i].numel()));
    const double constant = tensors[i].values()[0];
    CHECK(states[i].mean, constant);
    CHECK(states[i].m2, 0);
  }
}

void hostile_values() {
  for (const auto& h : kHostiles) {
    Tensors tensors;
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      tensors.push_back(of_values(dtype, cpu::test::kHostile, h.at));
      tensors.push_back(of_values(dtype, 2 * chunk_size(dtype) + 77, h.at));
    }
    const auto states = summaries_of(tensors);
    for (size_t i = 0; i < tensors.size(); ++i) {
      check::at(std::string(h.name) + " " + name_of(tensors[i].dtype));
      oracle::check_state(states[i], oracle::truth_of(tensors[i].values()), oracle::kFloatLanes);
    }
  }
}

// A sample that says nothing of the rest: the chunk must be read again. Rounding to float32
// once a tile hides much of what a bad pivot does, hence the tight bounds.
void a_sample_that_misleads() {
  static constexpr oracle::Bounds kTight = {1e-6, 1e-6, 1e-6};
  static constexpr int64_t kN = 32 * 1024;  // a chunk of float32, two of float64
  static const auto sampled = [](int64_t i) {
    const int64_t stride = kN / 64;
    return i % stride == (i / stride * 37 + 11) % stride;
  };
  for (double (*at)(int64_t) : {
           +[](int64_t i) { return sampled(i) ? 1e4 : 3 + noise(); },
           +[](int64_t i) { return sampled(i) ? double{cpu::test::kNaN} : noise(); },
           +[](int64_t i) { return sampled(i) ? 3e38 : 3e38 * (i % 2); },
           +[](int64_t i) { return sampled(i) ? 0.0 : 1000 + 0.02 * noise(); },
           +[](int64_t i) { return sampled(i) ? 1e30 : 1e-3 * noise(); },
       }) {
    check_all("misled", {of_values(DType::kFloat32, kN, at), of_values(DType::kFloat64, kN, at)},
              &kTight);
  }
}

// Loads tell the roads apart: one for 16 bytes where the pivot is good, two where the sample
// misled, and one for each element besides where float32 cannot hold the sums.
void a_chunk_is_read_as_often_as_it_must_be() {
  static constexpr int64_t kN = 32 * 1024, kStride = kN / 64;
  static const auto sampled = [](int64_t i) {
    return i % kStride == (i / kStride * 37 + 11) % kStride;
  };
  const struct {
    const char* what;
    double (*at)(int64_t);
    double loads;  // of each 16 bytes
  } cases[] = {
      {"noise", [](int64_t) { return noise(); }, 1},
      {"a mean far from zero", [](int64_t) { return 1000 + 0.02 * noise(); }, 1},
      {"a first element unlike the others", [](int64_t i) { return i == 0 ? 9.0 : 1e-3 * noise(); },
       1},
      {"columns of powers of two", [](int64_t i) { return i % 512 == 0 ? 50.0 : noise(); }, 1},
      {"large", [](int64_t) { return 1e16 * noise(); }, 1},
      {"a sample unlike the rest", [](int64_t i) { return sampled(i) ? 1e4 : noise(); }, 2},
      {"a sample that is a std off", [](int64_t i) { return sampled(i) ? 1 : noise(); }, 2},
      {"squares too large", [](int64_t) { return 1e30 * noise(); }, 5},
      {"squares too small", [](int64_t) { return 1e-30 * noise(); }, 5},
      {"a NaN", [](int64_t i) { return i == 77 ? double{cpu::test::kNaN} : noise(); }, 5},
  };
  for (const auto& c : cases) {
    const Tensors tensors = {of_values(DType::kFloat32, kN, c.at)};
    const int64_t before = cuda_shim::loads;
    summaries_of(tensors);
    check::at(c.what);
    // Every thread also looks at the sample, and at a first element with each read.
    const double loads = static_cast<double>(cuda_shim::loads - before) / (kN / 4);
    CHECK(std::floor(loads), c.loads);
    CHECK(loads < c.loads + 0.1, true);
  }
}

void one_that_is_not_finite_anywhere() {
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16,
                      DType::kFloat8E4M3FN, DType::kFloat8E5M2}) {
    const uint64_t infinity[] = {0x7ff0000000000000, 0x7f800000, 0x7f80, 0x7c00, 0x7f, 0x7c};
    const uint64_t nan[] = {0xfff8000000000001, 0x7fc00000, 0xffc1, 0x7e00, 0xff, 0x7d};
    const auto kind = static_cast<int>(dtype);
    const int64_t n = chunk_size(dtype) + 100;
    Tensors tensors;
    for (uint64_t odd : {infinity[kind], nan[kind]}) {
      for (int64_t at :
           {int64_t{0}, int64_t{1}, int64_t{18}, n / 2, chunk_size(dtype) - 1, n - 1}) {
        tensors.emplace_back(dtype, n, 1);
        std::memcpy(tensors.back().memory.data() + (1 + at) * element_size(dtype), &odd,
                    element_size(dtype));
      }
    }
    check_all("odd one", tensors);
  }
}

// ---- the same bits, always ---------------------------------------------------------------------

void any_schedule_and_any_company_give_the_same_bits() {
  Tensors tensors;
  for (DType dtype : all_dtypes()) {
    tensors.emplace_back(dtype, 2 * chunk_size(dtype) + 1001, 1);
    tensors.emplace_back(dtype, 37);
  }
  tensors.push_back(of_values(
      DType::kFloat32, 5000, [](int64_t i) { return i % 50 ? noise() : double{cpu::test::kInf}; }));
  const auto want = summaries_of(tensors);
  for (uint64_t seed = 1; seed < 4; ++seed) {
    cuda_shim::set_seed(seed);
    const auto got = summaries_of(tensors);
    for (size_t i = 0; i < want.size(); ++i) {
      check::at("seed " + std::to_string(seed) + " " + name_of(tensors[i].dtype));
      CHECK(oracle::same_bits(got[i], want[i]), true);
    }
  }
  for (size_t i = 0; i < want.size(); ++i) {
    check::at("alone " + name_of(tensors[i].dtype));
    CHECK(oracle::same_bits(summaries_of({tensors[i]})[0], want[i]), true);
  }
}

// ---- what is enqueued --------------------------------------------------------------------------

void a_call_is_two_launches_and_two_copies_and_never_waits() {
  const int64_t launches = cuda_shim::launches(), copies = cuda_shim::copies();
  const int64_t waits = cuda_shim::synchronisations();
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream), cudaSuccess);
  const Tensors tensors = {Tensor(DType::kFloat32, 1000), Tensor(DType::kInt8, 1 << 20)};
  const Call call(tensors, stream);
  CHECK(call.error == nullptr, true);
  CHECK(cuda_shim::launches() - launches, 2);
  CHECK(cuda_shim::copies() - copies, 2);
  CHECK(cuda_shim::synchronisations() - waits, 0);
  CHECK(cudaStreamQuery(stream), cudaErrorNotReady);
  cuda_shim::run(stream);
  CHECK(cudaStreamQuery(stream), cudaSuccess);
  CHECK(cudaStreamDestroy(stream), cudaSuccess);
}

void only_empty_tensors_launch_no_chunks() {
  const int64_t launches = cuda_shim::launches();
  check_all("empty", Tensors(2, Tensor(DType::kFloat64, 0)));
  CHECK(cuda_shim::launches() - launches, 1);
}

void calls_in_flight_do_not_disturb_each_other() {
  const Tensors first = {Tensor(DType::kFloat32, 70000)}, second = {Tensor(DType::kFloat32, 70000)};
  const Call a(first), b(second);
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  check::at("in flight");
  oracle::check_state(a.rows()[0], oracle::truth_of(first[0].values()), oracle::kFloatLanes);
  oracle::check_state(b.rows()[0], oracle::truth_of(second[0].values()), oracle::kFloatLanes);
}

void an_error_is_told_and_nothing_follows_it() {
  const Tensors tensors = {Tensor(DType::kFloat32, 10)};
  for (int skip = 0; skip < 4; ++skip) {
    check::at("call " + std::to_string(skip));
    const int64_t calls = cuda_shim::calls();
    cuda_shim::fail_next(cudaErrorUnknown, skip);
    const Call call(tensors);
    CHECK(std::string(call.error ? call.error : ""),
          std::string(cudaGetErrorString(cudaErrorUnknown)));
    CHECK(cuda_shim::calls() - calls, skip + 1);
    CHECK(cudaGetLastError(), cudaSuccess);
    cuda_shim::run_all();
  }
  CHECK(api().check() == nullptr, true);
  for (cudaError_t never : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction}) {
    cuda_shim::fail_next(never);
    CHECK(std::string(api().check()), std::string(cudaGetErrorString(never)));
    CHECK(cudaGetLastError(), cudaSuccess);
  }
  cuda_shim::fail_next(cudaErrorUnknown);  // may be over at the next call
  CHECK(api().check() == nullptr, true);
}

void capture_is_seen_without_touching_it() {
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream), cudaSuccess);
  for (bool wanted : {false, true, false}) {
    cuda_shim::set_capturing(stream, wanted);
    bool capturing = !wanted;
    CHECK(api().is_capturing(stream, capturing) == nullptr, true);
    CHECK(capturing, wanted);
    CHECK(cuda_shim::capture_touched(), false);
  }
  CHECK(cudaStreamDestroy(stream), cudaSuccess);
}

int run_all() {
  RUN(every_pattern_of_8_and_16_bits_is_read_right);
  RUN(wide_integers_keep_their_extremes);
  RUN(every_size_at_every_address);
  RUN(a_tensor_of_many_chunks);
  RUN(every_tensor_finds_its_chunks);
  RUN(constants_have_no_variance);
  RUN(hostile_values);
  RUN(a_sample_that_misleads);
  RUN(a_chunk_is_read_as_often_as_it_must_be);
  RUN(one_that_is_not_finite_anywhere);
  RUN(any_schedule_and_any_company_give_the_same_bits);
  RUN(a_call_is_two_launches_and_two_copies_and_never_waits);
  RUN(only_empty_tensors_launch_no_chunks);
  RUN(calls_in_flight_do_not_disturb_each_other);
  RUN(an_error_is_told_and_nothing_follows_it);
  RUN(capture_is_seen_without_touching_it);
  return check::report("cuda kernels on the CPU");
}

}  // namespace
}  // namespace paramstats::cuda::test

int main() { return paramstats::cuda::test::run_all(); }

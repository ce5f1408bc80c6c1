// Decoding of a batch on the GPU. A block owns a tile of output samples, all leads of one record: it decodes the inputs
// of the tile once into shared memory, in the order in which they lie, then filters from there. Weights come with the
// task: the table that the CPU uses, on the device.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "decode.h"

namespace dbeta {
namespace {

#ifndef DBETA_THREADS
#define DBETA_THREADS 256
#endif
constexpr int kThreads = DBETA_THREADS;
constexpr int kTile = 512;               // output samples of a block, fewer where the shared memory would not do
constexpr int64_t kShared = 100 * 1024;  // two blocks per SM on Hopper

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("wfdb_decode: ") + what + ": " + cudaGetErrorString(status));
}

// mV for float output, codes otherwise; both take four bytes.
template <class T>
using Staged = std::conditional_t<std::is_same_v<T, float>, float, int32_t>;

template <class T>
__device__ Staged<T> convert(const Source& s, const Window& window, int lead, int32_t code) {
  if constexpr (std::is_same_v<T, float>) return millivolts(code, s.gain[lead], s.baseline[lead], window.invalid);
  else return code == kInvalid ? kNone<T> : code;
}

// Samples [first, first + count) of every lead to staged[lead * span + t - first].
template <class F, class T>
__device__ void stage(const Source& s, const Window& window, int64_t first, int count, uint32_t* before,
                      Staged<T>* staged, int span) {
  const uint8_t* bytes = s.bytes + s.offset;
  if constexpr (F::differences) {
    // All differences before the tile are summed by the block, those inside it by one thread per lead.
    for (int lead = threadIdx.x; lead < s.leads; lead += kThreads) {
      before[lead] = static_cast<uint32_t>(s.initial[lead]);
    }
    __syncthreads();
    for (int lead = 0; lead < s.leads; ++lead) {
      uint32_t sum = 0;
      const int64_t end = min(first + s.skew[lead], s.samples);
      for (int64_t t = threadIdx.x; t < end; t += kThreads) {
        sum += static_cast<uint32_t>(F::at(bytes, position(s, lead, t)));
      }
      atomicAdd(&before[lead], sum);
    }
    __syncthreads();
    for (int lead = threadIdx.x; lead < s.leads; lead += kThreads) {
      uint32_t sum = before[lead];
      for (int i = 0; i < count; ++i) {
        const int64_t t = first + i + s.skew[lead];
        if (t < s.samples) sum += static_cast<uint32_t>(F::at(bytes, position(s, lead, t)));
        staged[lead * span + i] = convert<T>(s, window, lead, t < s.samples ? static_cast<int32_t>(sum) : kInvalid);
      }
    }
  } else {
    for (int i = threadIdx.x; i < s.leads * count; i += kThreads) {
      const int lead = s.planar ? i / count : i % s.leads, at = s.planar ? i % count : i / s.leads;
      const int64_t t = first + at + s.skew[lead];
      const int32_t code = t < s.samples ? valid<F>(F::at(bytes, position(s, lead, t))) : kInvalid;
      staged[lead * span + at] = convert<T>(s, window, lead, code);
    }
  }
}

__device__ float filtered(const Filter& f, const float* staged, int64_t first, int64_t samples, int64_t n) {
  const int64_t base = f.base(n);
  const float* weights = f.weights(n);
  const float* x = staged + (base - first);
  if (base >= 0 && base + f.taps <= samples) {
    float sum = 0;
    for (int k = 0; k < f.taps; ++k) sum = fmaf(weights[k], x[k], sum);
    return sum;
  }
  double sum = 0, total = 0;
  const int64_t end = min(static_cast<int64_t>(f.taps), samples - base);
  for (int64_t k = max(static_cast<int64_t>(0), -base); k < end; ++k) {
    sum += static_cast<double>(weights[k]) * x[k];
    total += weights[k];
  }
  return static_cast<float>(sum / total);
}

template <class T>
__global__ void __launch_bounds__(kThreads) decode_tile(const Task<T>* tasks, int tile, int span) {
  extern __shared__ int32_t shared[];  // one word per lead for format 8, then the tile's inputs
  auto* before = reinterpret_cast<uint32_t*>(shared);
  auto* staged = reinterpret_cast<Staged<T>*>(shared + kMaxLeads);
  const Task<T>& task = tasks[blockIdx.y];
  const Source& s = task.source;
  const Window& window = task.window;
  const bool resample = std::is_same_v<T, float> && task.filter.table != nullptr;
  const int64_t begin = window.start + int64_t{blockIdx.x} * tile;
  const int64_t end = min(begin + tile, window.start + window.length);
  if (begin >= end) return;
  const int64_t stored = min(end, resample ? task.filter.resampled(s.samples) : s.samples);
  int64_t first = begin, last = stored;
  if (resample && begin < stored) {
    first = max(static_cast<int64_t>(0), task.filter.base(begin));
    last = min(s.samples, task.filter.base(stored - 1) + task.filter.taps);
  }
  if (first < last) {
    with_format(s.format, [&](auto format) {
      stage<decltype(format), T>(s, window, first, static_cast<int>(last - first), before, staged, span);
    });
  }
  __syncthreads();
  const int width = static_cast<int>(end - begin);
  for (int i = threadIdx.x; i < s.leads * width; i += kThreads) {
    const int lead = i / width;
    const int64_t n = begin + i % width;
    T value;
    if constexpr (std::is_same_v<T, float>) {
      value = n >= stored ? window.invalid
              : resample  ? filtered(task.filter, staged + lead * span, first, s.samples, n)
                          : staged[lead * span + (n - first)];
    } else {
      value = n >= stored ? kNone<T> : static_cast<T>(staged[lead * span + (n - first)]);
    }
    task.out[lead * window.length + (n - window.start)] = value;
  }
}

template <class T>
void launch(const std::vector<Task<T>>& tasks, void* raw_stream) {
  auto stream = static_cast<cudaStream_t>(raw_stream);
  int64_t longest = 0, leads = 1;
  for (const auto& task : tasks) {
    longest = std::max(longest, task.window.length);
    leads = std::max<int64_t>(leads, task.source.leads);
  }
  if (longest == 0) return;
  int tile = kTile, span = 0;
  for (;; tile /= 2) {
    int64_t reach = tile;
    for (const auto& task : tasks) {
      const Filter& f = task.filter;
      if (f.table) reach = std::max(reach, int64_t{tile} * f.down / f.up + 2 + f.taps);
    }
    span = static_cast<int>(std::min(reach, kShared));
    if ((kMaxLeads + leads * span) * 4 <= kShared) break;
    if (tile == 1) throw std::runtime_error("wfdb_decode: the filter is too long for the GPU's shared memory");
  }
  const int bytes = static_cast<int>((kMaxLeads + leads * span) * 4);
  require(cudaFuncSetAttribute(decode_tile<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  const auto tiles = static_cast<unsigned>((longest + tile - 1) / tile);
  constexpr size_t kRows = 65535;  // of a grid
  for (size_t at = 0; at < tasks.size(); at += kRows) {
    const size_t count = std::min(kRows, tasks.size() - at);
    Task<T>* device = nullptr;
    require(cudaMallocAsync(reinterpret_cast<void**>(&device), count * sizeof(Task<T>), stream), "task memory");
    // From pageable memory: the tasks have left `tasks` when the call returns.
    require(cudaMemcpyAsync(device, tasks.data() + at, count * sizeof(Task<T>), cudaMemcpyHostToDevice, stream),
            "tasks");
    void* arguments[] = {&device, &tile, &span};
    require(cudaLaunchKernel(decode_tile<T>, dim3(tiles, static_cast<unsigned>(count)), dim3(kThreads), arguments,
                             static_cast<size_t>(bytes), stream), "launch");
    require(cudaFreeAsync(device, stream), "task memory");
  }
}

}  // namespace

void decode_batch(const std::vector<Task<float>>& tasks, void* stream) { launch(tasks, stream); }
void decode_batch(const std::vector<Task<int16_t>>& tasks, void* stream) { launch(tasks, stream); }
void decode_batch(const std::vector<Task<int32_t>>& tasks, void* stream) { launch(tasks, stream); }

}  // namespace dbeta

// Just enough of CUDA to run csrc/decode.cu on the host, with sanitisers: a block is a few threads and a barrier, device
// memory is host memory. It shows that the kernel's indices and its synchronisation are right, not that CUDA runs it.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(threads)

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
inline std::barrier<>* block_barrier = nullptr;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline uint32_t atomicAdd(uint32_t* to, uint32_t value) { return std::atomic_ref(*to).fetch_add(value); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaMemcpyHostToDevice, cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaMallocAsync(void** to, size_t size, cudaStream_t) {
  return (*to = std::malloc(size)) ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaFreeAsync(void* from, cudaStream_t) { return std::free(from), cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, int, cudaStream_t) {
  return std::memcpy(to, from, size), cudaSuccess;
}

constexpr size_t kHostShared = 100 * 1024;  // what decode.cu asks for at most
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int bytes) {
  return static_cast<size_t>(bytes) <= kHostShared ? cudaSuccess : cudaErrorInvalidValue;
}

template <class A, class B, class C>
cudaError_t cudaLaunchKernel(void (*kernel)(A, B, C), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  std::barrier barrier(block.x);
  block_barrier = &barrier;
  const auto run = [&](unsigned thread) {
    threadIdx = {thread, 0, 0};
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, 0};
        kernel(*static_cast<A*>(arguments[0]), *static_cast<B*>(arguments[1]), *static_cast<C*>(arguments[2]));
        barrier.arrive_and_wait();  // the next block has the same shared memory
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < block.x; ++thread) threads.emplace_back(run, thread);
  for (auto& thread : threads) thread.join();
  return cudaSuccess;
}

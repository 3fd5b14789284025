// Kernels as blocks of threads, on a CUDA device or (in tests: tests/native/emulated_blocks.h) emulated on the processor.
//
// A kernel is a struct (its arguments) with
//
//   static constexpr int threads;  struct Shared {…};  int64_t shared_bytes() const;  (without it: that of a Shared)
//   template <class Block> void operator()(const Block& block, Shared& shared, int64_t id) const;
//
// whose body is a sequence of steps: block.each(f) calls f(thread) for every thread of the block and then waits for all.
// What a thread keeps from one step to the next lies in a Block::Local<T>, indexed by the thread. Code between steps
// runs the same in all threads; it reads shared memory through block.uniform() only, which waits until all have read.
// Within a step threads share nothing but what goes through the atomics below, whose results must not decide the answer
// by their order: the emulation runs threads and blocks in shuffled orders, so that tests can tell.
#pragma once

#include "common/host_device.h"

namespace npeff {

#ifdef __CUDACC__

template <int size>
class CudaBlock {
 public:
  static constexpr int threads = size;

  template <class T>
  struct Local {
    T value;
    NPEFF_INLINE explicit Local(const CudaBlock&) {}
    NPEFF_INLINE T& operator[](int) { return value; }
  };

  template <class F>
  NPEFF_INLINE void each(F f) const { NPEFF_ON_DEVICE(f(static_cast<int>(threadIdx.x)); __syncthreads();) }

  template <class T>
  NPEFF_INLINE T uniform(const T& shared) const {
    const T value = shared;
    NPEFF_ON_DEVICE(__syncthreads();)
    return value;
  }

  // Adds; returns what was there.
  NPEFF_INLINE static uint32_t add(uint32_t* to, uint32_t n) {
    NPEFF_ON_DEVICE(n = atomicAdd(to, n);)
    return n;
  }
  NPEFF_INLINE static int64_t add(int64_t* to, int64_t n) {
    NPEFF_ON_DEVICE(n = static_cast<int64_t>(
        atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(n)));)
    return n;
  }
  NPEFF_INLINE static void set(uint32_t* to, uint32_t bits) { NPEFF_ON_DEVICE(atomicOr(to, bits);) }
  NPEFF_INLINE static void lower(int64_t* to, int64_t n) { NPEFF_ON_DEVICE(atomicMin(reinterpret_cast<long long*>(to), n);) }
  NPEFF_INLINE static void raise(int64_t* to, int64_t n) { NPEFF_ON_DEVICE(atomicMax(reinterpret_cast<long long*>(to), n);) }
};

#endif  // __CUDACC__

// A step of one thread.
template <class Block, class F>
NPEFF_INLINE void once(const Block& block, F f) { block.each([&](int t) { if (t == 0) f(); }); }

// Sums of all values before each thread's own: in place, and the total. scratch: (2, threads).
template <class Block, class T>
NPEFF_INLINE T exclusive_scan(const Block& block, T (*scratch)[Block::threads], typename Block::template Local<T>& values) {
  constexpr int n = Block::threads;
  int from = 0;
  block.each([&](int t) { scratch[0][t] = values[t]; });
  for (int reach = 1; reach < n; reach *= 2) {
    block.each([&](int t) { scratch[1 - from][t] = scratch[from][t] + (t >= reach ? scratch[from][t - reach] : T{0}); });
    from = 1 - from;
  }
  const T total = block.uniform(scratch[from][n - 1]);
  block.each([&](int t) { values[t] = scratch[from][t] - values[t]; });
  return total;
}

// The lowest of the threads' values. scratch: (threads,).
template <class Block, class T>
NPEFF_INLINE T lowest_of(const Block& block, T* scratch, typename Block::template Local<T>& values) {
  block.each([&](int t) { scratch[t] = values[t]; });
  for (int half = Block::threads / 2; half > 0; half /= 2)
    block.each([&](int t) {
      if (t < half && scratch[t + half] < scratch[t]) scratch[t] = scratch[t + half];
    });
  return block.uniform(scratch[0]);
}

// The shared memory that a kernel takes.
template <class Kernel>
auto shared_bytes_of(const Kernel& kernel, int) -> decltype(kernel.shared_bytes()) { return kernel.shared_bytes(); }
template <class Kernel>
int64_t shared_bytes_of(const Kernel&, ...) { return sizeof(typename Kernel::Shared); }

// The kernel that has one thread for each of n elements, which share nothing: body.template at<Block>(i).
template <class Body>
struct ElementBlocks {
  static constexpr int threads = 256;
  struct Shared { char none; };
  int64_t n;
  Body body;

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared&, int64_t id) const {
    block.each([&](int t) {
      const int64_t i = id * threads + t;
      if (i < n) body.template at<Block>(i);
    });
  }
};

template <class Queue, class Body>
void run_elements(Queue& queue, int64_t n, const Body& body) {
  queue.run(ceil_div<int64_t>(n, ElementBlocks<Body>::threads), ElementBlocks<Body>{n, body});
}

}  // namespace npeff

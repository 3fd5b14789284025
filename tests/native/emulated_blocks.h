// The blocks of the CUDA kernels (see common/block.h), run on the processor.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/device.h"

namespace npeff {

// One block on the processor: threads one after the other, in the order of their places in `order`.
template <int size>
class HostBlock {
 public:
  static constexpr int threads = size;
  explicit HostBlock(const int* order) : order_(order) {}

  template <class T>
  struct Local {
    std::vector<T> values;
    explicit Local(const HostBlock&) : values(size) {}
    T& operator[](int thread) { return values[thread]; }
  };

  template <class F>
  void each(F f) const {
    for (int i = 0; i < size; ++i) f(order_[i]);
  }

  template <class T>
  T uniform(const T& shared) const { return shared; }

  template <class T>
  static T add(T* to, T n) {
    const T before = *to;
    *to += n;
    return before;
  }
  static void set(uint32_t* to, uint32_t bits) { *to |= bits; }
  static void lower(int64_t* to, int64_t n) { *to = std::min(*to, n); }
  static void raise(int64_t* to, int64_t n) { *to = std::max(*to, n); }

 private:
  const int* order_;
};

// Runs kernels on the processor, each block with shared memory full of rubbish. The stream's address is the seed of the
// orders; 0: ascending.
class EmulatedQueue {
 public:
  EmulatedQueue(py::handle, int, uintptr_t stream, const char*) : random_(stream) {}

  template <class Kernel>
  void run(int64_t blocks, const Kernel& kernel) {
    std::vector<int64_t> order(blocks);
    std::iota(order.begin(), order.end(), int64_t{0});
    shuffle(order);
    std::vector<int> threads(Kernel::threads);
    std::iota(threads.begin(), threads.end(), 0);
    std::vector<unsigned char> memory(shared_bytes_of(kernel, 0) + 64);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    auto* shared = reinterpret_cast<typename Kernel::Shared*>((address + 63) / 64 * 64);
    for (const int64_t id : order) {
      shuffle(threads);
      std::memset(memory.data(), 0xa5, memory.size());
      kernel(HostBlock<Kernel::threads>(threads.data()), *shared, id);
    }
  }

  // Memory full of rubbish.
  template <class T>
  T* scratch(int64_t n) {
    scratch_.emplace_back(n * static_cast<int64_t>(sizeof(T)) / 8 + 1, ~uint64_t{0});
    return reinterpret_cast<T*>(scratch_.back().data());
  }

  // As a small device would say.
  int64_t processors() const { return 3; }
  int64_t most_shared_bytes() const { return 64 << 10; }

 private:
  template <class T>
  void shuffle(std::vector<T>& order) {
    if (random_ == 0) return;
    for (size_t i = order.size(); i > 1; --i) {
      random_ = random_ * 6364136223846793005u + 1442695040888963407u;
      std::swap(order[i - 1], order[(random_ >> 33) % i]);
    }
  }

  uint64_t random_;
  std::vector<std::vector<uint64_t>> scratch_;
};

using Emulated = Device<EmulatedQueue, Place::emulated>;

}  // namespace npeff

// Threads for the kernels: one pool per process, made on first use and again after a fork.
#pragma once

#include <cstdint>
#include <functional>

namespace npeff {

// Calls body(i) once for every i in [0, n), on the calling thread and up to threads − 1 others; each thread
// takes the next task when it is free. Returns when all are done; rethrows the first exception. While one call is under
// way, further calls (from other threads, or from inside body) run on their own thread alone.
void parallel_for(int64_t n, int threads, const std::function<void(int64_t)>& body);

// The stretch [begin, end) of part `part` out of `parts` near-equal parts of [0, n).
struct Range { int64_t begin, end; };
inline Range part_of(int64_t n, int64_t part, int64_t parts) {
  return {n * part / parts, n * (part + 1) / parts};
}

}  // namespace npeff

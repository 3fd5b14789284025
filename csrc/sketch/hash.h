// Which bucket and which sign a parameter has in a sketch. The seed and the parameter's index alone decide, so that
// every machine, CPU or GPU, computes the same sketch.
//
// Flat map: parameters are taken by blocks of 16 (index >> 4). A block falls on one group of 16 buckets: the element in
// lane l goes to bucket 16·group + (l ^ turn) with a sign of its own. Two parameters of one block never meet; two of
// different blocks meet with probability 1/(16·groups), as in a count sketch with a hash per parameter, at a sixteenth
// of the hashes and with vectors in place of scattered adds.
//
// Two-sided map of a matrix: element (i, j) goes to bucket(i) ^ bucket(j) with sign(i)·sign(j), so that the sketch of an
// outer product is the dyadic convolution of the sketches of its factors. A row's or column's place is bucket·2 + (1 where
// the sign is −); the caller computes the places (sketch_places in kernels/reference.py).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace npeff {

constexpr int sketch_lanes = 16;

constexpr uint64_t sketch_step = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio

// Stream `number` of a seed: the copies of the flat map are streams 0, 1, …
NPEFF_INLINE uint64_t sketch_key(uint64_t seed, uint64_t number) {
  return mix(mix(seed + sketch_step) ^ mix(number + 0x5851f42d4c957f2du));
}

// Entry `index` of a stream.
NPEFF_INLINE uint64_t sketch_hash(uint64_t key, uint64_t index) {
  return mix(key + (index + 1) * sketch_step);
}

// The flat map: every parameter has one bucket in each of `copies` stretches of d / copies buckets.
struct SketchMap {
  static constexpr int most_copies = 64;
  int64_t d;        // a multiple of 16·copies
  int copies;       // non-zeros per parameter
  uint32_t groups;  // groups of buckets per copy
  uint64_t keys[most_copies];  // (copies,): streams

  NPEFF_INLINE SketchMap(int64_t d, int copies, uint64_t seed)
      : d(d), copies(copies), groups(static_cast<uint32_t>(d / (sketch_lanes * copies))), keys{} {
    for (int c = 0; c < copies; ++c) keys[c] = sketch_key(seed, c);
  }
};

// The parts of a block's hash: bit l of the signs negates the element in lane l.
NPEFF_INLINE uint32_t sketch_signs(uint64_t hash) { return static_cast<uint32_t>(hash) & 0xffffu; }
NPEFF_INLINE uint32_t sketch_turn(uint64_t hash) { return static_cast<uint32_t>(hash >> 16) & 15u; }
NPEFF_INLINE uint32_t sketch_group(uint64_t hash, uint32_t groups) {
  return static_cast<uint32_t>(((hash >> 32) * groups) >> 32);
}

}  // namespace npeff

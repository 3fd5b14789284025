// The inner loops of topk.cpp, for each instruction set.
#pragma once

#include "common/isa.h"

namespace npeff {

constexpr int64_t scan_chunk = 4096;  // most entries of one scan(): 16 KiB, within L1
constexpr int64_t scan_slack = 64;    // entries that scan() may write beyond its result

struct Magnitudes { uint32_t least, largest; };

struct TopkSimd {
  // Appends the entries of x (n ≤ scan_chunk,) with |x|'s bits > floor to bits and index (base + position); returns
  // their number.
  int64_t (*scan)(const float* x, int64_t n, int64_t base, int32_t floor, uint32_t* bits, int64_t* index);
  // Range of the magnitudes of bits (n,).
  Magnitudes (*magnitudes)(const uint32_t* bits, int64_t n);
  // Keeps, in place and in order, the candidates above threshold, and those at it with index ≤ last.
  int64_t (*keep)(uint32_t* bits, int64_t* index, int64_t n, uint32_t threshold, int64_t last);
  // out[i] = factor · x[i], both (n,).
  void (*multiply)(float factor, const float* x, int64_t n, float* out);
};
NPEFF_SIMD(TopkSimd, topk_simd)

}  // namespace npeff

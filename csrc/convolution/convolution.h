// Per-example gradients of convolution kernels, for some cotangent columns side by side.
#pragma once

#include <cstdint>

namespace npeff {

struct Convolution {
  int64_t examples;
  int64_t turns;               // uses per example, summed
  int64_t groups, in, out;     // channels per group
  int64_t first, count;        // of the out channels of each group, those that are wanted
  int64_t in_height, in_width;  // of the inputs, padded
  int64_t height, width;       // of the outputs
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t dilation_height, dilation_width;

  int64_t channels() const { return groups * out; }
  int64_t taps() const { return in * kernel_height * kernel_width; }
  int64_t wanted() const { return groups * count; }
};

// G[b, r, g·count + o, i, ky, kx] =
//     Σ_{t, y, x} delta_r[b, t, g·out + first + o, y, x] · inputs[b, t, g·in + i, y·stride + ky·dilation, x·stride + …]
//   inputs (examples, turns, groups·in, in_height, in_width)
//   delta  columns pointers to (examples, turns, groups·out, height, width)
//   out    (examples, columns, wanted, taps) = G, or with squared (examples, wanted, taps) = Σ_r G²; overlaps nothing
void convolution_gradients(const Convolution& c, const float* inputs, const float* const* delta, int64_t columns,
                           bool squared, float* out, int threads);

}  // namespace npeff

// The kernel of convolution.h: arguments from Python, and the call.
#pragma once

#include <pybind11/stl.h>

#include <list>
#include <utility>
#include <vector>

#include "common/memory.h"
#include "common/device.h"
#include "convolution/convolution.h"

namespace npeff {

using IntPair = std::pair<int64_t, int64_t>;

// The last place in the inputs that a kernel meets.
inline int64_t reach(int64_t n, int64_t stride, int64_t taps, int64_t dilation) {
  return checked_sum({checked_product({n - 1, stride}), checked_product({taps - 1, dilation})});
}

inline void run_convolution(py::handle inputs, const py::list& delta, int64_t turns, int64_t groups, IntPair kernel, IntPair stride,
         IntPair dilation, IntPair channels, bool squared, py::handle out, int threads) {
  const TensorView in(inputs, "inputs"), result(out, "out", write);
  check_threads(threads);
  if (delta.empty()) fail("delta: expected at least one column");
  std::list<TensorView> views;
  std::vector<const float*> columns;
  for (const py::handle column : delta) {
    views.emplace_back(column, "delta");
    const TensorView& one = views.front();
    if (one.ndim() != 4) fail("delta: expected four dimensions");
    check_apart({&result, &views.back()});
    columns.push_back(views.back().as<const float>({one.shape(0), one.shape(1), one.shape(2), one.shape(3)}));
  }
  const auto* padded = in.as<const float>({any, any, any, any});
  const TensorView& d = views.front();
  for (const int64_t number : {turns, groups, kernel.first, kernel.second, stride.first, stride.second, dilation.first,
                               dilation.second})
    if (number < 1 || number >= int64_t{1} << 31)
      fail("turns, groups, kernel, stride, dilation: expected 1 … 2³¹ − 1, got " + std::to_string(number));
  if (in.shape(0) != d.shape(0) || in.shape(0) % turns || in.shape(1) % groups || d.shape(1) % groups)
    fail("inputs, delta: their rows differ, or do not divide by turns, or their channels by groups");
  const Convolution c{in.shape(0) / turns, turns, groups, in.shape(1) / groups, d.shape(1) / groups, channels.first,
                      channels.second - channels.first, in.shape(2), in.shape(3), d.shape(2), d.shape(3), kernel.first,
                      kernel.second, stride.first, stride.second, dilation.first, dilation.second};
  if (c.first < 0 || c.count < 1 || channels.second > c.out) fail("channels: not within the channels of a group");
  if (c.height < 1 || c.width < 1 ||
      reach(c.height, c.stride_height, c.kernel_height, c.dilation_height) >= c.in_height ||
      reach(c.width, c.stride_width, c.kernel_width, c.dilation_width) >= c.in_width)
    fail("inputs: the kernel does not fit into them at every position of delta");
  const auto n = static_cast<int64_t>(columns.size());
  check_apart({&in, &result});
  float* to = squared ? result.as<float>({c.examples, c.wanted(), c.taps()})
                      : result.as<float>({c.examples, n, c.wanted(), c.taps()});
  const py::gil_scoped_release release;
  convolution_gradients(c, padded, columns.data(), n, squared, to, threads);
}

template <class D>
void bind_convolution(py::module_& m) {
  if constexpr (D::on_host)
    m.def("convolution_gradients", &run_convolution, py::kw_only(), "inputs"_a, "delta"_a, "turns"_a, "groups"_a, "kernel"_a,
          "stride"_a, "dilation"_a, "channels"_a, "squared"_a, "out"_a, "threads"_a,
          "Per-example gradients of a convolution's kernel; see convolution.h.");
}

}  // namespace npeff

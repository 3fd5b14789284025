#include "convolution/convolution.h"

#include <algorithm>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "convolution/simd.h"

namespace npeff {
namespace {

constexpr int most_taps = 7;  // of a kernel row at a time

// One example's sums of one group of channels. A lane is an output channel of a column; lanes are padded to vectors
// and lie in panels of as many vectors as the inner loop holds. Positions are taken in chunks whose panels stay in the
// cache while all taps pass over them.
class Worker {
 public:
  Worker(const Convolution& c, int64_t columns)
      : c_(c), table_(convolution_simd()), columns_(columns), lanes_(columns * c.count),
        width_(table_.vector_bytes / static_cast<int>(sizeof(float))), vectors_((lanes_ + width_ - 1) / width_),
        padded_(vectors_ * width_), pieces_((c.kernel_width + most_taps - 1) / most_taps),
        fit_(table_.patch_vectors(static_cast<int>((c.kernel_width + pieces_ - 1) / pieces_))),
        panels_((vectors_ + fit_ - 1) / fit_),
        rows_(std::clamp<int64_t>(l2_bytes() / 2 / (c.width * padded_ * static_cast<int64_t>(sizeof(float))), 1, c.height)),
        panel_(checked_product({rows_, c.width, padded_})), sums_(checked_product({c.taps(), padded_})) {}

  void run(const float* inputs, const float* const* delta, int64_t example, int64_t group, bool squared, float* out) {
    bool add = false;
    for (int64_t turn = 0; turn < c_.turns; ++turn) {
      const int64_t image = example * c_.turns + turn;
      const float* under = inputs + (image * c_.groups + group) * c_.in * c_.in_height * c_.in_width;
      for (int64_t y = 0; y < c_.height; y += rows_, add = true) {
        const int64_t rows = std::min(rows_, c_.height - y);
        gather(delta, image, group, y, rows);
        multiply(under + y * c_.stride_height * c_.in_width, rows, add);
      }
    }
    if (squared) square();
    const int64_t n = squared ? 1 : columns_;
    write(n, out + (example * n * c_.wanted() + group * c_.count) * c_.taps());
  }

 private:
  // Vectors [begin, end) of a panel.
  Range panel(int64_t number) const { return part_of(vectors_, number, panels_); }

  void gather(const float* const* delta, int64_t image, int64_t group, int64_t y, int64_t rows) {
    const int64_t positions = rows * c_.width;
    const float* lane_rows[64];
    for (int64_t p = 0; p < panels_; ++p) {
      const auto [begin, end] = panel(p);
      float* to = panel_.data() + begin * width_ * positions;
      for (int64_t v = begin; v < end; ++v) {
        for (int i = 0; i < width_; ++i) {
          const int64_t lane = v * width_ + i, column = lane / c_.count;
          const int64_t channel = group * c_.out + c_.first + lane % c_.count;
          lane_rows[i] = lane < lanes_ ? delta[column] + ((image * c_.channels() + channel) * c_.height + y) * c_.width : nullptr;
        }
        table_.transpose_rows(lane_rows, width_, positions, to + (v - begin) * width_, (end - begin) * width_);
      }
    }
  }

  void multiply(const float* under, int64_t rows, bool add) {
    PatchRun run;
    run.rows = rows;
    run.width = c_.width;
    run.row_step = c_.stride_height * c_.in_width;
    run.step = c_.stride_width;
    run.dilation = c_.dilation_width;
    run.stride = padded_;
    run.add = add;
    for (int64_t p = 0; p < panels_; ++p) {
      const auto [begin, end] = panel(p);
      run.panel = panel_.data() + begin * width_ * rows * c_.width;
      run.vectors = static_cast<int>(end - begin);
      float* sums = sums_.data() + begin * width_;
      for (int64_t i = 0; i < c_.in; ++i)
        for (int64_t ky = 0; ky < c_.kernel_height; ++ky)
          for (int64_t piece = 0; piece < pieces_; ++piece) {
            const auto [from, to] = part_of(c_.kernel_width, piece, pieces_);
            run.taps = static_cast<int>(to - from);
            run.inputs = under + (i * c_.in_height + ky * c_.dilation_height) * c_.in_width + from * c_.dilation_width;
            run.sums = sums;
            table_.patch_sums(run);
            sums += run.taps * padded_;
          }
    }
  }

  // The sums of the first n columns, transposed.
  void write(int64_t n, float* out) {
    const float* tap_rows[64];
    for (int64_t k = 0; k < c_.taps(); k += width_) {
      const int count = static_cast<int>(std::min<int64_t>(width_, c_.taps() - k));
      for (int64_t r = 0; r < n; ++r) {
        for (int i = 0; i < count; ++i) tap_rows[i] = sums_.data() + (k + i) * padded_ + r * c_.count;
        table_.transpose_rows(tap_rows, count, c_.count, out + r * c_.wanted() * c_.taps() + k, c_.taps());
      }
    }
  }

  // The first column's sums become the squares summed over all columns.
  void square() {
    for (int64_t k = 0; k < c_.taps(); ++k) {
      float* sums = sums_.data() + k * padded_;
      for (int64_t o = 0; o < c_.count; ++o) sums[o] *= sums[o];
      for (int64_t r = 1; r < columns_; ++r)
        for (int64_t o = 0; o < c_.count; ++o) sums[o] += sums[r * c_.count + o] * sums[r * c_.count + o];
    }
  }

  const Convolution c_;
  const ConvolutionSimd& table_;
  const int64_t columns_, lanes_;
  const int width_;
  const int64_t vectors_, padded_, pieces_;
  const int fit_;
  const int64_t panels_, rows_;
  Aligned<float> panel_, sums_;
};

}  // namespace

void convolution_gradients(const Convolution& c, const float* inputs, const float* const* delta, int64_t columns,
                           bool squared, float* out, int threads) {
  const int64_t pairs = c.examples * c.groups, parts = std::min<int64_t>(pairs, 4 * threads);
  parallel_for(parts, threads, [&](int64_t part) {
    Worker worker(c, columns);
    const auto [begin, end] = part_of(pairs, part, parts);
    for (int64_t pair = begin; pair < end; ++pair)
      worker.run(inputs, delta, pair / c.groups, pair % c.groups, squared, out);
  });
}

}  // namespace npeff

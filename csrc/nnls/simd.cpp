// A tile holds a few vectors' worth of rows, transposed: for each coordinate, one vector of rows after the other.
// Coordinates go in blocks. A block's gradient is computed afresh, gram[block, :]·w − cross, as a small matrix product
// in registers; then its coordinates are updated one after the other, and each update is added to the gradients of the
// block alone. That is plain cyclic coordinate descent at the speed of a matrix product, with no gradient to keep up to date,
// or to drift. Several vectors of rows at a time, because each coordinate waits for the one before it.

#include "common/simd.h"
#include "nnls/active_set.h"
#include "nnls/nnls.h"
#include "nnls/simd.h"

namespace npeff::NPEFF_ISA {
namespace {

// As many sums, block × vectors, as leave registers for the operands.
#if defined(__AVX512F__)
constexpr int block = 8, vectors = 3;
#elif defined(__AVX2__)
constexpr int block = 4, vectors = 3;
#else
constexpr int block = 4, vectors = 2;
#endif

template <class T>
class Tile {
  using V = typename Simd<T>::Vec;
  static constexpr int lanes = Simd<T>::lanes;
  struct Rows { V v[vectors]; };  // a number for every row of the tile

 public:
  explicit Tile(const NnlsTile<T>& tile)
      : t_(tile),
        w_(reinterpret_cast<Rows*>(tile.scratch)),
        cross_(w_ + tile.padded),
        used_(reinterpret_cast<uint64_t*>(cross_ + tile.padded)) {}

  int64_t run() {
    transpose_in();
    Rows residual{};
    for (int64_t i = 0; i < t_.n; ++i) residual.v[i / lanes][i % lanes] = t_.residual[i];
    int64_t sweep = 0;
    for (; sweep < t_.max_sweeps && choose_live(residual); ++sweep) {
      const Rows met = pass<true>();
      for (int t = 0; t < vectors; ++t) residual.v[t] = live_.v[t] > 0 ? met.v[t] : residual.v[t];
    }
    if (t_.kkt) residual = pass<false>();
    transpose_out();
    for (int64_t i = 0; i < t_.n; ++i) t_.residual[i] = residual.v[i / lanes][i % lanes];
    return sweep;
  }

 private:
  // Rows beyond n are zero, and stay zero.
  void transpose_in() {
    for (int64_t j = 0; j < t_.padded; ++j) w_[j] = cross_[j] = Rows{};
    for (int64_t j = 0; j < (t_.padded + 63) / 64; ++j) used_[j] = 0;
    auto* w = reinterpret_cast<T*>(w_);
    auto* cross = reinterpret_cast<T*>(cross_);
    for (int64_t i = 0; i < t_.n; ++i)
      for (int64_t j = 0; j < t_.r; ++j) {
        const T start = t_.w[i * t_.r + j];
        cross[j * (vectors * lanes) + i] = t_.cross[i * t_.r + j];
        w[j * (vectors * lanes) + i] = nnls_start(start, t_.inverse_diagonal[j]);
      }
    scale_ = Rows{};
    for (int64_t j = 0; j < t_.r; ++j) {
      for (int t = 0; t < vectors; ++t) scale_.v[t] = larger(scale_.v[t], size_of(cross_[j].v[t]));
      mark(j);
    }
    for (V& scale : scale_.v) scale = scale > 0 ? scale : V{} + 1;
  }

  void transpose_out() {
    const auto* w = reinterpret_cast<const T*>(w_);
    for (int64_t i = 0; i < t_.n; ++i)
      for (int64_t j = 0; j < t_.r; ++j) t_.w[i * t_.r + j] = w[j * (vectors * lanes) + i];
  }

  // Rows whose residual is above tol are swept; false when there is none.
  bool choose_live(const Rows& residual) {
    bool any = false;
    for (int t = 0; t < vectors; ++t) {
      live_.v[t] = residual.v[t] > t_.tol ? V{} + 1 : V{};
      any |= any_bit(live_.v[t]);
    }
    return any;
  }

  // Coordinates that are zero in all rows of the tile take no part in the products.
  void mark(int64_t j) {
    bool any = false;
    for (const V& v : w_[j].v) any |= any_bit(v);
    if (any) used_[j / 64] |= uint64_t{1} << (j % 64);
  }

  // gradient = gram[start : start + block, :]·w − cross.
  void compute_gradient(int64_t start, const T* panel, Rows* gradient) const {
    V sum[block][vectors];
#pragma GCC unroll 16
    for (int b = 0; b < block; ++b)
#pragma GCC unroll 4
      for (int t = 0; t < vectors; ++t) sum[b][t] = -cross_[start + b].v[t];
    for (int64_t word = 0; word * 64 < t_.r; ++word)
      for (uint64_t bits = used_[word]; bits; bits &= bits - 1) {
        const int64_t l = word * 64 + __builtin_ctzll(bits);
        const T* g = panel + l * block;
#pragma GCC unroll 16
        for (int b = 0; b < block; ++b)
#pragma GCC unroll 4
          for (int t = 0; t < vectors; ++t) sum[b][t] += w_[l].v[t] * g[b];
      }
#pragma GCC unroll 16
    for (int b = 0; b < block; ++b)
#pragma GCC unroll 4
      for (int t = 0; t < vectors; ++t) gradient[b].v[t] = sum[b][t];
  }

  // One sweep over the rows that are live (or, without update, none): the largest violation met on the way, relative.
  // Not inlined: within its callers' loops GCC keeps fewer of the sums in registers (13% of the time in float64).
  template <bool update>
  __attribute__((noinline)) Rows pass() {
    Rows worst{};
    for (int64_t start = 0; start < t_.padded; start += block) {
      const T* panel = t_.panels + start * t_.r;  // (r, block): gram[:, start : start + block]
      Rows gradient[block];
      compute_gradient(start, panel, gradient);
      const int64_t end = start + block < t_.r ? start + block : t_.r;
      for (int64_t j = start; j < end; ++j) {
        if (!(t_.inverse_diagonal[j] > 0)) continue;
        Rows step;
#pragma GCC unroll 4
        for (int t = 0; t < vectors; ++t) {
          const V old = w_[j].v[t], g = gradient[j - start].v[t];
          worst.v[t] = larger(worst.v[t], nnls_violation(old, g));
          step.v[t] = (nnls_moved(old, g, t_.inverse_diagonal[j]) - old) * live_.v[t];
          if (update) w_[j].v[t] = old + step.v[t];
        }
        if (!update) continue;
        const T* row = panel + j * block;
#pragma GCC unroll 16
        for (int c = 0; c < block; ++c)
#pragma GCC unroll 4
          for (int t = 0; t < vectors; ++t) gradient[c].v[t] += step.v[t] * row[c];
      }
      if (update)
        for (int64_t j = start; j < end; ++j) mark(j);
    }
    for (int t = 0; t < vectors; ++t) worst.v[t] /= scale_.v[t];
    return worst;
  }

  const NnlsTile<T>& t_;
  Rows *w_, *cross_;  // (padded,)
  uint64_t* used_;
  Rows scale_, live_{};
};

template <class T>
int64_t run_tile(const NnlsTile<T>& tile) { return Tile<T>(tile).run(); }

}  // namespace

const NnlsSimd nnls_simd{block, vectors, vector_bytes, run_tile<float>, run_tile<double>, nnls_active_set};

}  // namespace npeff::NPEFF_ISA

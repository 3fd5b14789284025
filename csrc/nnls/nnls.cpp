#include "nnls/nnls.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "nnls/simd.h"

namespace npeff {
namespace {

// Whether x (n,) holds neither NaN nor infinity: by the bits of 0·x but its sign, so that vectors do it.
template <class T>
bool finite(const T* x, int64_t n) {
  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= bit_cast<decltype(bad)>(x[i] * 0) << 1;
  return bad == 0;
}

int64_t run_tile(const NnlsSimd& table, const NnlsTile<float>& tile) { return table.tile_f32(tile); }
int64_t run_tile(const NnlsSimd& table, const NnlsTile<double>& tile) { return table.tile_f64(tile); }

// gram by blocks of columns, as a tile reads it.
template <class T>
Aligned<T> pack(const T* gram, int64_t r, int64_t padded, int64_t block) {
  Aligned<T> panels(checked_product({padded, r}));
  for (int64_t start = 0; start < padded; start += block)
    for (int64_t l = 0; l < r; ++l)
      for (int64_t b = 0; b < block; ++b)
        panels[start * r + l * block + b] = start + b < r ? gram[l * r + start + b] : T{0};
  return panels;
}

// Writes the status of all parts, each with its first bad row (or −1) and its iterations.
void write_status(const std::vector<int64_t>& bad, const std::vector<int64_t>& iterations, int64_t* status) {
  status[0] = nnls_all_finite;
  status[1] = 0;
  for (auto part = static_cast<int64_t>(bad.size()) - 1; part >= 0; --part) {
    if (bad[part] >= 0) status[0] = bad[part];
    status[1] = std::max(status[1], iterations[part]);
  }
}

}  // namespace

template <class T>
void nnls(const T* gram, const T* cross, T* w, int64_t n, int64_t r, int64_t max_sweeps, T tol, bool kkt,
          T* residual, int64_t* status, int threads) {
  if (r == 0) {
    std::fill_n(residual, n, T{0});
    return write_status({}, {}, status);
  }
  const NnlsSimd& table = nnls_simd();  // one for the whole call: panels are laid out for it
  const int64_t block = table.block;
  const int64_t lanes = table.vectors * table.vector_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t padded = (r + block - 1) / block * block;
  const Aligned<T> panels = pack(gram, r, padded, block);
  Aligned<T> inverse_diagonal(padded);
  for (int64_t j = 0; j < padded; ++j) inverse_diagonal[j] = j < r ? nnls_inverse(gram[j * r + j]) : T{0};

  const int64_t tiles = (n + lanes - 1) / lanes, parts = std::min<int64_t>(tiles, 8 * threads);
  std::vector<int64_t> sweeps(parts, 0), bad(parts, -1);
  parallel_for(parts, n * r * r < 1 << 18 ? 1 : threads, [&](int64_t part) {
    Aligned<T> scratch(checked_product({2, padded, lanes}) + (padded / 8 + 8) / static_cast<int64_t>(sizeof(T)) + 1);
    const Range range = part_of(tiles, part, parts);
    for (int64_t tile = range.begin; tile < range.end; ++tile) {
      const int64_t first = tile * lanes, rows = std::min(lanes, n - first);
      for (int64_t i = first; i < first + rows; ++i)
        if (bad[part] < 0 && !(finite(cross + i * r, r) && finite(w + i * r, r))) bad[part] = i;
      if (bad[part] >= 0) return;
      sweeps[part] = std::max(sweeps[part], run_tile(table, {rows, r, padded, panels.data(), inverse_diagonal.data(),
                                                             cross + first * r, w + first * r, residual + first,
                                                             scratch.data(), max_sweeps, tol, kkt}));
      for (int64_t i = first; i < first + rows && bad[part] < 0; ++i)
        if (!finite(w + i * r, r)) bad[part] = i;
    }
  });
  write_status(bad, sweeps, status);
}

template void nnls(const float*, const float*, float*, int64_t, int64_t, int64_t, float, bool, float*, int64_t*, int);
template void nnls(const double*, const double*, double*, int64_t, int64_t, int64_t, double, bool, double*, int64_t*, int);

void nnls_exact(const double* gram, const double* cross, double* w, int64_t n, int64_t r, double tol, double* residual,
                int64_t* status, int threads) {
  const int64_t parts = std::min<int64_t>(n, 64 * threads);
  std::vector<int64_t> steps(parts, 0), bad(parts, -1);
  parallel_for(parts, n * r * r < 1 << 16 ? 1 : threads, [&](int64_t part) {
    Aligned<double> scratch(checked_sum({checked_product({r, r}), checked_product({5, r})}));
    const Range range = part_of(n, part, parts);
    for (int64_t i = range.begin; i < range.end && bad[part] < 0; ++i) {
      if (finite(cross + i * r, r) && finite(w + i * r, r))
        steps[part] = std::max(steps[part], nnls_simd().active_set(
                                                {gram, cross + i * r, w + i * r, scratch.data(), r}, tol, residual + i));
      else bad[part] = i;
      if (!finite(w + i * r, r)) bad[part] = i;
    }
  });
  write_status(bad, steps, status);
}

}  // namespace npeff

// The inner loops of nnls.cpp, for each instruction set.
#pragma once

#include "common/isa.h"

namespace npeff {

// Some rows of an nnls problem, at most `vectors` vectors of them; see nnls.h and simd.cpp.
template <class T>
struct NnlsTile {
  int64_t n, r, padded;       // rows, coordinates, coordinates up to a multiple of the block
  const T* panels;            // (padded / block, r, block): gram by blocks of columns, zero beyond r
  const T* inverse_diagonal;  // (padded,): 1 / gram_jj, 0 where gram_jj ≤ 0 and beyond r
  const T* cross;             // (n, r)
  T* w;                       // (n, r), in and out
  T* residual;                // (n,), in and out
  T* scratch;                 // 64-byte aligned: 2·padded·`vectors` vectors and padded / 8 + 8 bytes
  int64_t max_sweeps;
  T tol;
  bool kkt;                   // whether residual gets those at the result
};

// One row of an nnls problem, to be solved exactly.
struct NnlsRow {
  const double *gram, *cross;  // (r, r), (r,)
  double* w;                   // (r,), in: where to start; out: the solution
  double* scratch;             // r² + 5r
  int64_t r;
};

struct NnlsSimd {
  int block, vectors, vector_bytes;  // columns of a panel; vectors of rows in a tile; bytes of a vector
  // Return the sweeps made.
  int64_t (*tile_f32)(const NnlsTile<float>& tile);
  int64_t (*tile_f64)(const NnlsTile<double>& tile);
  // Returns the active-set steps made.
  int64_t (*active_set)(const NnlsRow& row, double tol, double* residual);
};
NPEFF_SIMD(NnlsSimd, nnls_simd)

}  // namespace npeff

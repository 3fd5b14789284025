// Sparse Johnson–Lindenstrauss transforms: d numbers whose inner products are those of the long rows, up to noise of
// variance at most (‖x‖²‖y‖² + ⟨x, y⟩²) / d. The maps are those of hash.h.
//
// Sums are kept in float64 and added to in the order of the input, bucket by bucket: their bits do not depend on the
// number of threads, nor on the instruction set, nor on how an input that comes in order is cut into calls.
#pragma once

#include "common/csr.h"
#include "sketch/hash.h"

namespace npeff {

// sums[target of row i] += the sketch of row x[i] (n_rows, width), `stride` floats apart, whose column 0 has the flat index
// bases[i]. The rows of a target are taken in the order given: by ascending base.
//   sums (targets, d)
void sketch_rows(const SketchMap& map, const float* x, int64_t n_rows, int64_t width, int64_t stride, const int64_t* bases,
                 const RowOrder& rows, double* sums, int threads);

// ---- two-sided maps of matrices; d a power of two -----------------------------------------------------------------

// sums[target of row i] += weight · the sketch of the rows of a matrix from first[i] on that x[i] holds, end to end.
//   x (n_rows, width), `stride` floats apart, width a multiple of columns; row_places (matrix rows,), column_places (columns,)
void sketch_matrix(int64_t d, double weight, const float* x, int64_t n_rows, int64_t width, int64_t columns, int64_t stride,
                   const uint32_t* row_places, const uint32_t* column_places, const int64_t* first, const RowOrder& rows,
                   double* sums, int threads);

// sums[i, c] += weight · the sketch of Σ_t delta[i, t, c] ⊗ input[i, t], without the outer products: the Walsh–Hadamard
// transforms of the factors' sketches are multiplied and summed over t, and transformed back once (float32).
//   delta (b, t, columns, n_delta), input (b, t, n_input), sums (b, columns, d); places (n_delta,), (n_input,)
void sketch_outer(int64_t d, double weight, const float* delta, const float* input, int64_t b, int64_t t, int64_t columns,
                  int64_t n_delta, int64_t n_input, const uint32_t* delta_places, const uint32_t* input_places,
                  double* sums, int threads);

}  // namespace npeff

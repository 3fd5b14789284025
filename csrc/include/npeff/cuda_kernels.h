// The kernels on CUDA devices: names, shapes and results as in the headers of the CPU's, all pointers to device memory.
//
// Every call is put on the caller's stream of the caller's device, and returns without waiting; nothing is allocated;
// the sequence of launches depends on shapes alone, so that it can be captured in a CUDA graph. What a kernel finds out
// (non-finite values) it writes to `status` on the device. A launch that fails throws std::runtime_error, with the
// kernel's name and CUDA's reason.
#pragma once

#include <cstdint>

#include "npeff/half_types.h"
#include "npeff/sketch.h"
#include "npeff/spmm.h"

namespace npeff {

struct Selectors;
struct Push;

namespace cuda {

struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

// topk_blocks.h
void topk_reset(const Stream& stream, const Selectors& selectors);
void topk_push(const Stream& stream, const Selectors& selectors, const Push& push);
void topk_finish(const Stream& stream, const Selectors& selectors, int64_t* counts, int64_t* indices, float* values);

// nnls.h; T: float, double. workspace: nnls_workspace() of T. status (2,): the first row with a non-finite value, or
// INT64_MAX; the most sweeps that a row took. kkt may be null.
int64_t nnls_workspace(const Stream& stream, int64_t n, int64_t r);
template <class T>
void nnls(const Stream& stream, const T* gram, const T* cross, T* w, int64_t n, int64_t r, int64_t max_sweeps, T tol,
          T* kkt, T* workspace, int64_t* status);

// spmm.h; Dense: float, Half, Bfloat16 with values of float, or double with double; sums and out as the values.
template <class Index, class Dense, class Value>
void spmm(const Stream& stream, int64_t n_rows, const int64_t* indptr, const Index* indices, const Value* values,
          int64_t nnz, const Dense* dense, int64_t r, Value* out);

// sparse_gram.h
template <class Index>
void gram_panel(const Stream& stream, const Csr<Index>& a, float* k);
void mirror(const Stream& stream, float* k, int64_t n);

// fisher_norms.h
template <class Index>
void fisher_norms(const Stream& stream, const Csr<Index>& a, const int64_t* offsets, int64_t n, double* out);

// segments.h; T: float, double, Half, Bfloat16; out: float, or double for double.
template <class T, class Sum>
void cross(const Stream& stream, const T* p, const int64_t* offsets, int64_t n, int64_t r, Sum* out);
template <class T, class Sum>
void spread_multiply(const Stream& stream, const T* w, const T* p, const int64_t* offsets, int64_t n, int64_t r, Sum* out);

// sketch.h, the flat map; T: float, Half, Bfloat16. order, starts: the rows by target, and within a target by base.
// workspace: sketch_workspace() floats. bad (1,): the lowest row with a non-finite value, if below what is there.
template <class T>
int64_t sketch_workspace(const Stream& stream, const SketchMap& map, int64_t n_rows, int64_t width);
template <class T>
void sketch_rows(const Stream& stream, const SketchMap& map, const T* x, int64_t n_rows, int64_t width, int64_t stride,
                 const int64_t* bases, const int64_t* order, const int64_t* starts, int64_t n_targets, float* workspace,
                 double* sums);
template <class Index>
void sketch_csr(const Stream& stream, const SketchMap& map, const Csr<Index>& a, double* sums);
// sketch.h, the two-sided map; first (n_rows,): the matrix row that each row of x begins with; order by target and first.
template <class T>
int64_t sketch_matrix_workspace(const Stream& stream, int64_t d, int64_t n_rows, int64_t width);
template <class T>
void sketch_matrix(const Stream& stream, int64_t d, double weight, const T* x, int64_t n_rows, int64_t width,
                   int64_t stride, int64_t columns, const uint32_t* row_places, const uint32_t* column_places,
                   const int64_t* first, const int64_t* order, const int64_t* starts, int64_t n_targets,
                   float* workspace, double* sums);
void sketch_finish(const Stream& stream, const double* sums, int64_t n_rows, int64_t d, double scale, float* out, int64_t* bad);

}  // namespace cuda
}  // namespace npeff

#include "npeff/sketch_matrix_blocks.h"
#include "queue.h"

namespace npeff::cuda {

template <class T>
int64_t sketch_workspace(const Stream& stream, const SketchMap& map, int64_t n_rows, int64_t width) {
  const Queue queue(stream, "sketch_workspace");
  return sketch_plan<Queue, T>(queue, SketchKeys(map), n_rows, width).workspace;
}

template <class T>
void sketch_rows(const Stream& stream, const SketchMap& map, const T* x, int64_t n_rows, int64_t width, int64_t stride,
                 const int64_t* bases, const int64_t* order, const int64_t* starts, int64_t n_targets, float* workspace,
                 double* sums) {
  Queue queue(stream, "sketch_rows");
  sketch_rows_by_blocks(queue, SketchKeys(map), x, n_rows, width, stride, bases, order, starts, n_targets, workspace, sums);
}

template <class Index>
void sketch_csr(const Stream& stream, const SketchMap& map, const Csr<Index>& a, double* sums) {
  Queue queue(stream, "sketch_csr");
  sketch_csr_by_blocks(queue, SketchKeys(map), a, sums);
}

void sketch_finish(const Stream& stream, const double* sums, int64_t n_rows, int64_t d, double scale, float* out, int64_t* bad) {
  Queue queue(stream, "sketch_finish");
  sketch_finish_by_blocks(queue, sums, n_rows, d, scale, out, bad);
}

template <class T>
int64_t sketch_matrix_workspace(const Stream& stream, int64_t d, int64_t n_rows, int64_t width) {
  const Queue queue(stream, "sketch_matrix_workspace");
  return sketch_matrix_plan<Queue, T>(queue, d, n_rows, width).workspace;
}

template <class T>
void sketch_matrix(const Stream& stream, int64_t d, double weight, const T* x, int64_t n_rows, int64_t width,
                   int64_t stride, int64_t columns, const uint32_t* row_places, const uint32_t* column_places,
                   const int64_t* first, const int64_t* order, const int64_t* starts, int64_t n_targets,
                   float* workspace, double* sums) {
  Queue queue(stream, "sketch_matrix");
  sketch_matrix_by_blocks(queue, d, weight, x, n_rows, width, stride, columns, row_places, column_places, first, order,
                          starts, n_targets, workspace, sums);
}

#define NPEFF_SKETCH(T)                                                                                              \
  template int64_t sketch_workspace<T>(const Stream&, const SketchMap&, int64_t, int64_t);                          \
  template void sketch_rows(const Stream&, const SketchMap&, const T*, int64_t, int64_t, int64_t, const int64_t*,   \
                            const int64_t*, const int64_t*, int64_t, float*, double*);                              \
  template int64_t sketch_matrix_workspace<T>(const Stream&, int64_t, int64_t, int64_t);                            \
  template void sketch_matrix(const Stream&, int64_t, double, const T*, int64_t, int64_t, int64_t, int64_t,         \
                              const uint32_t*, const uint32_t*, const int64_t*, const int64_t*, const int64_t*,     \
                              int64_t, float*, double*);
NPEFF_SKETCH(float)
NPEFF_SKETCH(Half)
NPEFF_SKETCH(Bfloat16)
template void sketch_csr(const Stream&, const SketchMap&, const Csr<int32_t>&, double*);
template void sketch_csr(const Stream&, const SketchMap&, const Csr<int64_t>&, double*);

}  // namespace npeff::cuda

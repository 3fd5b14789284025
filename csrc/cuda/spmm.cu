#include "npeff/spmm_blocks.h"
#include "queue.h"

namespace npeff::cuda {

template <class Index, class Dense, class Value>
void spmm(const Stream& stream, int64_t n_rows, const int64_t* indptr, const Index* indices, const Value* values,
          int64_t nnz, const Dense* dense, int64_t r, Value* out) {
  Queue queue(stream, "spmm");
  spmm_by_blocks(queue, n_rows, indptr, indices, values, nnz, dense, r, out);
}

#define NPEFF_SPMM(Index, Dense, Value)                                                                            \
  template void spmm(const Stream&, int64_t, const int64_t*, const Index*, const Value*, int64_t, const Dense*,    \
                     int64_t, Value*);
NPEFF_SPMM(int32_t, float, float)
NPEFF_SPMM(int64_t, float, float)
NPEFF_SPMM(int32_t, Half, float)
NPEFF_SPMM(int64_t, Half, float)
NPEFF_SPMM(int32_t, Bfloat16, float)
NPEFF_SPMM(int64_t, Bfloat16, float)
NPEFF_SPMM(int32_t, double, double)
NPEFF_SPMM(int64_t, double, double)

}  // namespace npeff::cuda

#include "npeff/fisher_norms_blocks.h"
#include "queue.h"

namespace npeff::cuda {

template <class Index>
void fisher_norms(const Stream& stream, const Csr<Index>& a, const int64_t* offsets, int64_t n, double* out) {
  Queue queue(stream, "fisher_norms");
  fisher_norms_by_blocks(queue, a, offsets, n, out);
}

template void fisher_norms(const Stream&, const Csr<int32_t>&, const int64_t*, int64_t, double*);
template void fisher_norms(const Stream&, const Csr<int64_t>&, const int64_t*, int64_t, double*);

}  // namespace npeff::cuda

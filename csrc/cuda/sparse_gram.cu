#include "npeff/gram_blocks.h"
#include "queue.h"

namespace npeff::cuda {

template <class Index>
void gram_panel(const Stream& stream, const Csr<Index>& a, float* k) {
  Queue queue(stream, "gram_panel");
  gram_panel_by_blocks(queue, a, k);
}

void mirror(const Stream& stream, float* k, int64_t n) {
  Queue queue(stream, "mirror");
  mirror_by_blocks(queue, k, n);
}

template void gram_panel(const Stream&, const Csr<int32_t>&, float*);
template void gram_panel(const Stream&, const Csr<int64_t>&, float*);

}  // namespace npeff::cuda

#include "npeff/topk_blocks.h"
#include "queue.h"

namespace npeff::cuda {

void topk_reset(const Stream& stream, const Selectors& selectors) {
  Queue queue(stream, "topk_reset");
  npeff::topk_reset(queue, selectors);
}

void topk_push(const Stream& stream, const Selectors& selectors, const Push& push) {
  Queue queue(stream, "topk_push");
  npeff::topk_push(queue, selectors, push);
}

void topk_finish(const Stream& stream, const Selectors& selectors, int64_t* counts, int64_t* indices, float* values) {
  Queue queue(stream, "topk_finish");
  npeff::topk_finish(queue, selectors, counts, indices, values);
}

}  // namespace npeff::cuda

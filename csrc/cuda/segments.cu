#include "npeff/segment_blocks.h"
#include "queue.h"

namespace npeff::cuda {

template <class T, class Sum>
void cross(const Stream& stream, const T* p, const int64_t* offsets, int64_t n, int64_t r, Sum* out) {
  Queue queue(stream, "cross");
  run_segments<CrossBlocks, T>(queue, offsets, n, r, out, p);
}

template <class T, class Sum>
void spread_multiply(const Stream& stream, const T* w, const T* p, const int64_t* offsets, int64_t n, int64_t r, Sum* out) {
  Queue queue(stream, "spread_multiply");
  run_segments<SpreadMultiplyBlocks, T>(queue, offsets, n, r, out, w, p);
}

#define NPEFF_SEGMENTS(T, Sum)                                                                        \
  template void cross(const Stream&, const T*, const int64_t*, int64_t, int64_t, Sum*);               \
  template void spread_multiply(const Stream&, const T*, const T*, const int64_t*, int64_t, int64_t, Sum*);
NPEFF_SEGMENTS(float, float)
NPEFF_SEGMENTS(double, double)
NPEFF_SEGMENTS(Half, float)
NPEFF_SEGMENTS(Bfloat16, float)

}  // namespace npeff::cuda

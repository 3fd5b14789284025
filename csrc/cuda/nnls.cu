#include "npeff/nnls_blocks.h"
#include "queue.h"

namespace npeff::cuda {

int64_t nnls_workspace(const Stream& stream, int64_t n, int64_t r) {
  const Queue queue(stream, "nnls_workspace");
  return NnlsProblem<float>::workspace(r, nnls_slots(queue, n));
}

template <class T>
void nnls(const Stream& stream, const T* gram, const T* cross, T* w, int64_t n, int64_t r, int64_t max_sweeps, T tol,
          T* kkt, T* workspace, int64_t* status) {
  Queue queue(stream, "nnls");
  NnlsProblem<T> problem{gram, cross, w, kkt, status, n, r, nnls_slots(queue, n), nullptr, nullptr, nullptr};
  nnls_by_blocks(queue, problem, workspace, max_sweeps, tol);
}

template void nnls(const Stream&, const float*, const float*, float*, int64_t, int64_t, int64_t, float, float*, float*, int64_t*);
template void nnls(const Stream&, const double*, const double*, double*, int64_t, int64_t, int64_t, double, double*, double*,
                   int64_t*);

}  // namespace npeff::cuda

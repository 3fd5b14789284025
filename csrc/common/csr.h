// Matrices as compressed sparse rows (CSR), and rows by target.
//
//   indptr  (n_rows + 1,)  row i holds entries indptr[i] … indptr[i+1] − 1
//   indices (nnz,)         column of each entry; Index: int32_t or int64_t
//   values  (nnz,)
#pragma once

#include <vector>

#include "common/host_device.h"

namespace npeff {

template <class Index, class Value = float>
struct Csr {
  int64_t n_rows, n_columns, nnz;
  const int64_t* indptr;
  const Index* indices;
  const Value* values;
  bool ascending = false;  // known: columns ascend within each row, none comes twice
};

// What is wrong with a matrix, found in one pass: the first row whose indptr descends or that holds a column outside
// [0, n_columns), and the first row whose columns do not ascend or that holds one twice; −1 when there is none.
// All kernels expect that there is no bad row; those that need ascending columns say so.
struct CsrCheck { int64_t bad_row, unsorted_row; };
template <class Index>
CsrCheck csr_check(const Csr<Index>& a, int threads);

// Bounds of at most `parts` runs of rows with about as many entries (plus rows) each: bounds[p] … bounds[p+1] − 1.
std::vector<int64_t> parts_by_entries(const int64_t* indptr, int64_t n_rows, int64_t parts);

// The first entry in [from, end) whose column is ≥ limit, columns ascending; in steps that double, then halving.
template <class Index>
NPEFF_INLINE int64_t seek(const Index* indices, int64_t from, int64_t end, int64_t limit) {
  int64_t step = 8, to = from;
  while (to < end && indices[to] < limit) {
    from = to;
    to += step;
    step *= 2;
  }
  to = to < end ? to : end;
  while (from < to) {
    const int64_t middle = from + (to - from) / 2;
    if (indices[middle] < limit) from = middle + 1;
    else to = middle;
  }
  return from;
}

// The rows of a block by the targets (selectors, sketches) that they go to.
struct RowOrder {
  const int64_t* order;   // (n_rows,) rows by target
  const int64_t* starts;  // (n_targets + 1,) where each target's rows begin in order
  int64_t n_targets;

  // The targets that have rows.
  std::vector<int64_t> used() const {
    std::vector<int64_t> targets;
    for (int64_t t = 0; t < n_targets; ++t)
      if (starts[t] < starts[t + 1]) targets.push_back(t);
    return targets;
  }
};

}  // namespace npeff

// A CSR matrix from Python: its three arrays, held. What the arrays of the processor hold is checked once; arrays on a
// device are checked by the caller, because looking at them means waiting.
#pragma once

#include "common/csr.h"
#include "common/tensor_view.h"

namespace npeff {

class CsrView {
 public:
  CsrView(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, Access access = read)
      : indptr(indptr, "indptr", access), indices(indices, "indices", access), values(values, "values", access),
        n_columns_(n_columns) {
    if (n_columns < 0 || n_columns > int64_t{1} << 62)
      fail("n_columns: expected 0 … 2^62, got " + std::to_string(n_columns));
    if (this->indptr.ndim() != 1 || this->indptr.shape(0) < 1) fail("indptr: expected shape (rows + 1,)");
    if (this->indices.ndim() != 1) fail("indices: expected shape (nnz,)");
  }

  // Refuses a matrix whose structure is broken.
  void check_structure(int threads) {
    check_threads(threads);
    visit([&](const auto& csr) { check_ = csr_check(csr, threads); });
    if (check_.bad_row >= 0)
      fail("indptr, indices: row " + std::to_string(check_.bad_row) + " is broken: expected indptr to ascend from 0 to " +
           std::to_string(nnz()) + ", and indices within 0 … " + std::to_string(n_columns_ - 1));
  }

  int64_t n_rows() const { return indptr.shape(0) - 1; }
  int64_t n_columns() const { return n_columns_; }
  int64_t nnz() const { return indices.shape(0); }

  // Refuses a matrix whose columns do not ascend within its rows, or come twice in one.
  void require_ascending() const {
    if (check_.unsorted_row >= 0)
      fail("indices: expected columns that ascend within a row, each once, but row " + std::to_string(check_.unsorted_row) +
           " differs; sort them and add up what has the same place (scipy: sum_duplicates)");
  }

  template <class Index, class Value = float>
  Csr<Index, Value> as() const {
    return {n_rows(), n_columns_, nnz(), indptr.as<const int64_t>({any}), indices.as<const Index>({any}),
            values.as<const Value>({nnz()})};
  }

  // body(csr), without the GIL, for either index type.
  template <class Value = float, class Body>
  void visit(Body body) const {
    by_dtype<int32_t, int64_t>(indices.dtype(), [&](auto index) {
      const auto csr = as<decltype(index), Value>();
      const py::gil_scoped_release release;
      body(csr);
    });
  }

  const TensorView indptr, indices, values;

 private:
  const int64_t n_columns_;
  CsrCheck check_{-1, -1};
};

}  // namespace npeff

// The three arrays of a CSR matrix from Python, held and checked.
#pragma once

#include "npeff/spmm.h"
#include "tensor_view.h"

namespace npeff {

class CsrView {
 public:
  CsrView(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, int threads)
      : indptr_(indptr, "indptr", Access::read), indices_(indices, "indices", Access::read),
        values_(values, "values", Access::read), n_columns_(n_columns) {
    if (indptr_.ndim() != 1 || indptr_.shape(0) < 1) fail("indptr: expected shape (rows + 1,)");
    if (narrow()) check<int32_t>(threads);
    else check<int64_t>(threads);
  }

  bool narrow() const { return indices_.dtype() == "int32"; }
  int64_t n_rows() const { return indptr_.shape(0) - 1; }
  int64_t nnz() const { return indices_.shape(0); }

  template <class Index>
  Csr<Index> as() const {
    return {n_rows(), n_columns_, indptr_.as<const int64_t>({any}), indices_.as<const Index>({any}),
            values_.as<const float>({nnz()})};
  }

 private:
  template <class Index>
  void check(int threads) const {
    const Csr<Index> a = as<Index>();
    int64_t bad;
    {
      const py::gil_scoped_release release;
      bad = csr_bad_row(a, nnz(), threads);
    }
    if (bad >= 0)
      fail("indptr, indices: row " + std::to_string(bad) + " is broken: expected indptr to ascend from 0 to " +
           std::to_string(nnz()) + ", and indices within 0 … " + std::to_string(n_columns_ - 1));
  }

  TensorView indptr_, indices_, values_;
  int64_t n_columns_;
};

}  // namespace npeff

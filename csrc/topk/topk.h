// Exact streaming selection of the k entries of largest |value|, ties to the lower flat index.
//
// A Selector keeps candidates and a running threshold: what does not beat the threshold is passed over at the speed of
// memory; what does is appended; when the buffer is full, the k best are selected and the threshold rises to the worst
// of them. A long push first guesses a threshold from a sample; if fewer than k entries reach it, the push is redone
// without (so the guess decides the time, never the answer).
//
// Magnitudes are compared as integers (the bits of |x|), in which NaN and ±inf stand above all numbers: they cannot
// be missed, and cost nothing to look for.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "common/csr.h"
#include "topk/order.h"

namespace npeff {

// A stretch of one selector's input.
struct Piece {
  const float* data;  // (length,)
  int64_t length;
  int64_t base;  // flat index of data[0]; base + length ≤ 2^62
};

// An outer product: entry (i, j) is rows[i]·columns[j] in float32, with the flat index base + i·n_columns + j ≤ 2^62.
struct Outer {
  const float* rows;  // (n_rows,)
  int64_t n_rows;
  const float* columns;  // (n_columns,)
  int64_t n_columns;
  int64_t base;
};

class Selector {
 public:
  Selector(int64_t k, bool keep_zeros);

  // Takes in pieces, any number of times, in any order; flat indices must not repeat.
  // Returns the lowest flat index of this push's non-finite values, or −1. After one, only reset() makes sense.
  int64_t push(const Piece* pieces, int64_t n_pieces, int threads);

  // The same with the entries of outer products of one shape, formed in the cache, and only in rows that can reach the
  // threshold: |rows[i]|·max|columns| bounds a row, after rounding, too.
  int64_t push(const Outer* outers, int64_t n_outers);

  // Entries with |value| below it are not among the k largest, whatever follows.
  float threshold() const { return bit_cast<float>(threshold_.magnitude); }

  // Narrows to the best min(k, entries seen) and sorts them by index. Push may go on afterwards.
  void finish();

  // After finish(): number of entries, and the entries. Ordered by index, or by descending |value| (ties by index).
  int64_t count() const { return size_; }
  void copy_to(int64_t* indices, float* values, bool by_magnitude) const;

  // Empty again; keeps its memory.
  void reset();

 private:
  bool take_in(const float* x, int64_t length, int64_t base);
  bool scan(const Piece* pieces, int64_t n_pieces);
  bool scan(const Outer* outers, int64_t n_outers);
  bool scan_split(const Piece* pieces, int64_t n_pieces, int threads);
  void note_nonfinite(int64_t from);
  template <class Bits, class Scan> int64_t push_entries(int64_t length, const Bits& bits_at, const Scan& scan);
  template <class Bits, class Scan> bool push_with_guess(int64_t length, const Bits& bits_at, const Scan& scan);
  void select(bool exact);
  int64_t most_kept() const { return k_ + k_ / 16; }  // after an inexact selection
  void reserve(int64_t size);

  int64_t k_, limit_;
  bool keep_zeros_;

  // Candidates: bits (size_,) as float, sign included; index (size_,).
  std::unique_ptr<uint32_t[]> bits_;
  std::unique_ptr<int64_t[]> index_;
  int64_t size_ = 0, capacity_ = 0;
  int64_t seen_ = 0;  // entries pushed so far

  Threshold threshold_;
  int64_t nonfinite_;  // lowest flat index seen in this push, or −1
};

// Rows x[i] (n_rows, width), `stride` floats apart, into their selectors, with flat index bases[i] of column 0.
// Returns the first row that holds a non-finite value, and the flat index in it.
using Nonfinite = std::optional<std::pair<int64_t, int64_t>>;
Nonfinite push_rows(std::vector<Selector>& selectors, const float* x, int64_t n_rows, int64_t width, int64_t stride,
                    const int64_t* bases, const RowOrder& rows, int threads);

// Example e's outer products delta[e, c] ⊗ inputs[e] into selectors[first + e], column c's with the flat index
// base + c·column_stride of its first entry; turned: inputs[e] ⊗ delta[e, c].
//   delta (b, columns, n), inputs (b, k)
// Returns the first example with a non-finite product, and the flat index in it.
struct Outers {
  const float *delta, *inputs;
  int64_t b, columns, n, k, first, base, column_stride;
  bool turned;
};
Nonfinite push_outers(std::vector<Selector>& selectors, const Outers& x, int threads);

// All rows of x (n_rows, width) at once, zeros included: indices and values (n_rows, k), k ≤ width, ordered as by
// Selector::copy_to. Non-finite values as above; indices and values are then undefined.
Nonfinite topk_rows(const float* x, int64_t n_rows, int64_t width, int64_t stride, int64_t k, bool by_magnitude,
                    int64_t* indices, float* values, int threads);

}  // namespace npeff

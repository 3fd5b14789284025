#include "topk/topk.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <utility>

#include "common/parallel.h"
#include "topk/simd.h"
#include "topk/sort.h"

namespace npeff {
namespace {

int64_t total_length(const Piece* pieces, int64_t n_pieces) {
  int64_t total = 0;
  for (int64_t p = 0; p < n_pieces; ++p) total += pieces[p].length;
  return total;
}

// A magnitude that a little more than k of all entries reach, most probably; 0 when the input is too short for a guess to pay.
//   bits_at(position): an entry as bits, position < total; asked for ascending positions
template <class Bits>
uint32_t guess_threshold(int64_t total, int64_t k, const Bits& bits_at) {
  if (!guess_pays(total, k)) return 0;
  const int64_t size = sample_size(total, k), rank = sample_rank(size, total, k);
  if (rank == 0) return 0;
  std::vector<uint32_t> sample(size);
  for (int64_t i = 0; i < size; ++i) sample[i] = bits_at(sample_place(i, size, total)) & topk_magnitude;
  std::nth_element(sample.begin(), sample.begin() + (rank - 1), sample.end(), std::greater<>());
  return sample[rank - 1] < topk_infinity ? sample[rank - 1] : 0;
}

// Candidates by buckets of magnitude, to find the one that holds the k-th largest.
struct Buckets {
  uint32_t least;       // smallest magnitude of the bucket, and how many magnitudes it spans
  uint32_t width;
  int64_t above, count; // candidates in higher buckets (fewer than k), and in this one
};

Buckets find_bucket(const uint32_t* bits, int64_t n, int64_t k) {
  constexpr uint32_t buckets = 2048;
  const Magnitudes range = topk_simd().magnitudes(bits, n);
  int shift = 0;
  while ((range.largest - range.least) >> shift >= buckets) ++shift;
  // Two tables: neighbours often fall into one bucket, and would wait for each other's increment.
  std::array<std::array<uint32_t, buckets>, 2> counts{};
  const auto bucket_of = [&](int64_t i) { return ((bits[i] & topk_magnitude) - range.least) >> shift; };
  for (int64_t i = 0; i + 1 < n; i += 2) {
    ++counts[0][bucket_of(i)];
    ++counts[1][bucket_of(i + 1)];
  }
  if (n % 2) ++counts[0][bucket_of(n - 1)];
  uint32_t bucket = buckets - 1;
  int64_t above = 0;
  for (;; --bucket) {
    const int64_t count = int64_t{counts[0][bucket]} + counts[1][bucket];
    if (above + count >= k) return {range.least + (bucket << shift), uint32_t{1} << shift, above, count};
    above += count;
  }
}

// The candidate of that rank (from 1) within the bucket, by descending magnitude, ties by ascending index.
Threshold find_in_bucket(const Buckets& bucket, const uint32_t* bits, const int64_t* index, int64_t n, int64_t rank) {
  std::vector<Threshold> entries(bucket.count + 1);
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t m = bits[i] & topk_magnitude;
    entries[found] = {m, index[i]};
    found += m - bucket.least < bucket.width;
  }
  entries.pop_back();
  std::nth_element(entries.begin(), entries.begin() + (rank - 1), entries.end(),
                   [](const Threshold& a, const Threshold& b) { return admits(b, a.magnitude, a.index); });
  return entries[rank - 1];
}

}  // namespace

Selector::Selector(int64_t k, bool keep_zeros) : k_(k), limit_(2 * k + std::max<int64_t>(k / 16, 8192)), keep_zeros_(keep_zeros) {
  reset();
}

void Selector::reset() {
  size_ = seen_ = 0;
  threshold_ = first_threshold(keep_zeros_);
  nonfinite_ = -1;
}

void Selector::reserve(int64_t size) {
  if (size + scan_slack <= capacity_) return;
  const int64_t capacity = std::max(size, std::min(2 * capacity_, limit_ + scan_chunk)) + scan_slack;
  std::unique_ptr<uint32_t[]> bits(new uint32_t[capacity]);
  std::unique_ptr<int64_t[]> index(new int64_t[capacity]);
  std::copy_n(bits_.get(), size_, bits.get());
  std::copy_n(index_.get(), size_, index.get());
  bits_ = std::move(bits);
  index_ = std::move(index);
  capacity_ = capacity;
}

// Narrows to the k best (or, unless it must be exact, to a few more, for less work), and raises the threshold.
void Selector::select(bool exact) {
  const Buckets bucket = find_bucket(bits_.get(), size_, k_);
  threshold_ = !exact && bucket.above + bucket.count <= most_kept()
                   ? Threshold{bucket.least, topk_anywhere}
                   : find_in_bucket(bucket, bits_.get(), index_.get(), size_, k_ - bucket.above);
  size_ = topk_simd().keep(bits_.get(), index_.get(), size_, threshold_.magnitude, threshold_.index);
}

void Selector::note_nonfinite(int64_t from) {
  if (topk_simd().magnitudes(bits_.get() + from, size_ - from).largest < topk_infinity) return;
  for (int64_t i = from; i < size_; ++i)
    if ((bits_[i] & topk_magnitude) >= topk_infinity && (nonfinite_ < 0 || index_[i] < nonfinite_)) nonfinite_ = index_[i];
}

// Appends what beats the threshold, selecting whenever the buffer is full. True when it was. At most scan_chunk entries.
bool Selector::take_in(const float* x, int64_t n, int64_t base) {
  const auto scan_run = topk_simd().scan;
  const int64_t before = size_;
  reserve(size_ + n);
  // Ties with the threshold are admitted below its index only.
  const int64_t below = std::clamp<int64_t>(threshold_.index - base, 0, n);
  const auto floor = static_cast<int32_t>(threshold_.magnitude);
  size_ += scan_run(x, below, base, floor - 1, bits_.get() + size_, index_.get() + size_);
  size_ += scan_run(x + below, n - below, base + below, floor, bits_.get() + size_, index_.get() + size_);
  if (size_ > before) note_nonfinite(before);
  if (size_ < limit_) return false;
  select(false);
  return true;
}

bool Selector::scan(const Piece* pieces, int64_t n_pieces) {
  bool selected = false;
  for (int64_t p = 0; p < n_pieces; ++p) {
    const Piece& piece = pieces[p];
    for (int64_t at = 0; at < piece.length; at += scan_chunk)
      selected |= take_in(piece.data + at, std::min(scan_chunk, piece.length - at), piece.base + at);
  }
  return selected;
}

bool Selector::scan(const Outer* outers, int64_t n_outers) {
  alignas(64) float products[scan_chunk];
  bool selected = false;
  for (int64_t o = 0; o < n_outers; ++o) {
    const Outer& outer = outers[o];
    // NaN and infinities stand above all magnitudes, so that rows which meet them are never passed over.
    const float largest = bit_cast<float>(topk_simd().magnitudes(reinterpret_cast<const uint32_t*>(outer.columns), outer.n_columns).largest);
    for (int64_t i = 0; i < outer.n_rows; ++i) {
      const float row = outer.rows[i];
      const uint32_t bound = bit_cast<uint32_t>(row * largest) & topk_magnitude;
      const int64_t base = outer.base + i * outer.n_columns;
      if (!admits(threshold_, bound, base)) continue;
      for (int64_t at = 0; at < outer.n_columns; at += scan_chunk) {
        const int64_t n = std::min(scan_chunk, outer.n_columns - at);
        topk_simd().multiply(row, outer.columns + at, n, products);
        selected |= take_in(products, n, base + at);
      }
    }
  }
  return selected;
}

// As scan(), each thread with a selector of its own over a part of the input.
bool Selector::scan_split(const Piece* pieces, int64_t n_pieces, int threads) {
  if (threads == 1) return scan(pieces, n_pieces);
  const int64_t total = total_length(pieces, n_pieces);
  std::vector<Selector> parts;
  for (int t = 0; t < threads; ++t) {
    parts.emplace_back(k_, keep_zeros_);
    parts.back().threshold_ = threshold_;
  }
  std::vector<char> selected(threads, 0);
  parallel_for(threads, threads, [&](int64_t t) {
    const Range range = part_of(total, t, threads);
    std::vector<Piece> mine;
    int64_t start = 0;
    for (int64_t p = 0; p < n_pieces; start += pieces[p++].length) {
      const int64_t from = std::max<int64_t>(range.begin - start, 0);
      const int64_t to = std::min(range.end - start, pieces[p].length);
      if (from < to) mine.push_back({pieces[p].data + from, to - from, pieces[p].base + from});
    }
    selected[t] = parts[t].scan(mine.data(), static_cast<int64_t>(mine.size()));
  });
  for (const Selector& part : parts) {
    reserve(size_ + part.size_);
    std::copy_n(part.bits_.get(), part.size_, bits_.get() + size_);
    std::copy_n(part.index_.get(), part.size_, index_.get() + size_);
    size_ += part.size_;
    if (part.nonfinite_ >= 0 && (nonfinite_ < 0 || part.nonfinite_ < nonfinite_)) nonfinite_ = part.nonfinite_;
  }
  return std::find(selected.begin(), selected.end(), 1) != selected.end();
}

// bits_at(position) is one of the `length` entries, asked for ascending positions; scan() appends what beats the
// threshold, and tells whether a selection was made.
template <class Bits, class Scan>
int64_t Selector::push_entries(int64_t length, const Bits& bits_at, const Scan& scan) {
  nonfinite_ = -1;
  const int64_t seen = seen_;
  seen_ += length;
  // A guess costs about as much as k candidates too many. Among `length` new entries as large as those seen, about
  // k·length/seen will beat the threshold.
  if (length < seen || !push_with_guess(length, bits_at, scan)) scan();
  if (size_ >= limit_) select(false);
  return nonfinite_;
}

// A threshold guessed for what is held and what comes, together. It is a true one if k entries reach it; if not,
// nothing has happened.
template <class Bits, class Scan>
bool Selector::push_with_guess(int64_t length, const Bits& bits_at, const Scan& scan) {
  const auto any_bits = [&](int64_t at) { return at < length ? bits_at(at) : bits_[at - length]; };
  const uint32_t guess = guess_threshold(length + size_, k_, any_bits);
  if (guess <= threshold_.magnitude) return false;
  if (size_ > most_kept()) select(false);
  const int64_t before = size_;
  const Threshold threshold_before = threshold_;
  threshold_ = {guess, topk_anywhere};
  // A full buffer holds k new entries, which all reach the guess.
  if (scan() || nonfinite_ >= 0) return true;
  int64_t reach = size_ - before;
  for (int64_t i = 0; i < before; ++i) reach += (bits_[i] & topk_magnitude) >= guess;
  if (reach >= k_) return true;
  size_ = before;
  threshold_ = threshold_before;
  return false;
}

int64_t Selector::push(const Piece* pieces, int64_t n_pieces, int threads) {
  int64_t piece = 0, start = 0;
  const auto bits_at = [&](int64_t at) {
    while (at - start >= pieces[piece].length) start += pieces[piece++].length;
    return bit_cast<uint32_t>(pieces[piece].data[at - start]);
  };
  return push_entries(total_length(pieces, n_pieces), bits_at, [&] { return scan_split(pieces, n_pieces, threads); });
}

int64_t Selector::push(const Outer* outers, int64_t n_outers) {
  const int64_t size = n_outers == 0 ? 0 : outers[0].n_rows * outers[0].n_columns;
  int64_t outer = 0;
  const auto bits_at = [&](int64_t at) {
    while (at - outer * size >= size) ++outer;
    const Outer& x = outers[outer];
    const int64_t within = at - outer * size, row = within / x.n_columns;
    return bit_cast<uint32_t>(x.rows[row] * x.columns[within - row * x.n_columns]);
  };
  return push_entries(size * n_outers, bits_at, [&] { return scan(outers, n_outers); });
}

void Selector::finish() {
  if (size_ > k_) select(true);
  if (!sort_runs(bits_.get(), index_.get(), size_))
    radix_sort(bits_.get(), index_.get(), size_, [](uint32_t, int64_t i) { return static_cast<uint64_t>(i); });
}

void Selector::copy_to(int64_t* indices, float* values, bool by_magnitude) const {
  if (size_ == 0) return;
  std::copy_n(index_.get(), size_, indices);
  if (!by_magnitude) {
    std::memcpy(values, bits_.get(), sizeof(float) * size_);
    return;
  }
  std::vector<uint32_t> bits(bits_.get(), bits_.get() + size_);
  radix_sort(bits.data(), indices, size_, [](uint32_t b, int64_t) { return uint64_t{topk_magnitude - (b & topk_magnitude)}; });
  std::memcpy(values, bits.data(), sizeof(float) * size_);
}

// ---- many rows ------------------------------------------------------------------------------------------------------

namespace {

// How many of n groups go to one thread each, as long as that keeps all threads busy; the last few are split among
// all threads, when they are long enough.
int64_t whole_groups(int64_t n, int64_t length, int threads) {
  return length >= 1 << 18 && n < 8 * threads ? n / threads * threads : n;
}

}  // namespace

Nonfinite push_rows(std::vector<Selector>& selectors, const float* x, int64_t n_rows, int64_t width, int64_t stride,
                    const int64_t* bases, const RowOrder& rows, int threads) {
  const std::vector<int64_t> targets = rows.used();
  const auto n_targets = static_cast<int64_t>(targets.size());
  std::vector<Piece> pieces(n_rows);
  for (int64_t i = 0; i < n_rows; ++i) pieces[i] = {x + rows.order[i] * stride, width, bases[rows.order[i]]};

  std::vector<int64_t> bad(n_targets, -1);
  const auto push = [&](int64_t g, int n_threads) {
    const int64_t from = rows.starts[targets[g]], to = rows.starts[targets[g] + 1];
    bad[g] = selectors[targets[g]].push(pieces.data() + from, to - from, n_threads);
  };
  if (n_rows * width < 1 << 14) threads = 1;
  const int64_t whole = n_targets == 0 ? 0 : whole_groups(n_targets, width * n_rows / n_targets, threads);
  parallel_for(whole, threads, [&](int64_t g) { push(g, 1); });
  for (int64_t g = whole; g < n_targets; ++g) push(g, threads);

  Nonfinite first;
  for (int64_t g = 0; g < n_targets; ++g) {
    if (bad[g] < 0) continue;
    for (int64_t i = rows.starts[targets[g]]; i < rows.starts[targets[g] + 1]; ++i) {
      const int64_t row = rows.order[i], within = bad[g] - bases[row];
      if (within >= 0 && within < width && (!first || row < first->first)) first = {row, bad[g]};
    }
  }
  return first;
}

Nonfinite push_outers(std::vector<Selector>& selectors, const Outers& x, int threads) {
  std::vector<int64_t> bad(x.b, -1);
  parallel_for(x.b, threads, [&](int64_t e) {
    const float *delta = x.delta + e * x.columns * x.n, *inputs = x.inputs + e * x.k;
    std::vector<Outer> outers(x.columns);
    for (int64_t c = 0; c < x.columns; ++c, delta += x.n) {
      const int64_t base = x.base + c * x.column_stride;
      outers[c] = x.turned ? Outer{inputs, x.k, delta, x.n, base} : Outer{delta, x.n, inputs, x.k, base};
    }
    bad[e] = selectors[x.first + e].push(outers.data(), x.columns);
  });
  for (int64_t e = 0; e < x.b; ++e)
    if (bad[e] >= 0) return {{e, bad[e]}};
  return {};
}

Nonfinite topk_rows(const float* x, int64_t n_rows, int64_t width, int64_t stride, int64_t k, bool by_magnitude,
                    int64_t* indices, float* values, int threads) {
  const int64_t whole = whole_groups(n_rows, width, threads);
  std::vector<int64_t> bad(n_rows, -1);
  const auto select = [&](Selector& selector, int64_t row, int n_threads) {
    const Piece piece{x + row * stride, width, 0};
    selector.reset();
    bad[row] = selector.push(&piece, 1, n_threads);
    if (bad[row] >= 0) return;
    selector.finish();
    selector.copy_to(indices + row * k, values + row * k, by_magnitude);
  };
  std::atomic<int64_t> next{0};
  parallel_for(threads, n_rows * width < 1 << 14 ? 1 : threads, [&](int64_t) {
    Selector selector(k, true);  // one per thread: its buffer stays in that thread's cache
    for (int64_t row; (row = next.fetch_add(1)) < whole;) select(selector, row, 1);
  });
  Selector selector(k, true);
  for (int64_t row = whole; row < n_rows; ++row) select(selector, row, threads);

  for (int64_t row = 0; row < n_rows; ++row)
    if (bad[row] >= 0) return {{row, bad[row]}};
  return {};
}

}  // namespace npeff

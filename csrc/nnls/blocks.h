// nnls.h by blocks: a thread owns a row of the problem from the first sweep to the last. The coefficients lie transposed,
// so that a warp's accesses are neighbours, and gram comes by panels that all threads read at the same place: both in
// shared memory where they fit, or else in the workspace, where cross lies. As in simd.cpp, a panel's gradients are
// computed afresh; then its coordinates change one after the other, and each change is added to the panel's gradients.
#pragma once

#include "common/block.h"
#include "nnls/nnls.h"

namespace npeff {

template <class T>
struct NnlsProblem {
  static constexpr int panel = 8;
  const T *gram, *cross;  // (r, r), (n, r)
  T* w;                   // (n, r) in and out
  T* residual;            // (n,) in and out
  int64_t* status;        // (2,): first row with a non-finite value (or nnls_all_finite), and the most sweeps
  int64_t n, r, slots;    // slots: rows under way at a time
  T* panels;              // workspace: (padded / panel, r, panel),
  T* inverse_diagonal;    // (padded,),
  T* columns;             // (2, r, slots): w and cross, transposed

  NPEFF_INLINE int64_t padded() const { return (r + panel - 1) / panel * panel; }
};

template <class T>
struct NnlsPack {
  NnlsProblem<T> p;

  template <class Block>
  NPEFF_INLINE void at(int64_t i) const {
    if (i < p.padded() * p.r) p.panels[i] = nnls_packed(p.gram, p.r, p.panel, i);
    if (i < p.padded()) p.inverse_diagonal[i] = i < p.r ? nnls_inverse(p.gram[i * p.r + i]) : T{0};
    if (i < 2) p.status[i] = i == 0 ? nnls_all_finite : 0;
  }
};

template <class T>
struct NnlsSweeps {
  static constexpr int threads = 32, panel = NnlsProblem<T>::panel;  // few: many blocks share out the rows evenly
  static constexpr int together = 16 / sizeof(T);
  struct Shared {
    int64_t bad, sweeps;
    uint32_t going;
    alignas(16) T numbers[together];  // where they fit: a panel (r, panel), and the coefficients (r, threads)
  };
  // What a thread knows of its row between two steps.
  struct Row {
    T scale, worst;
    int64_t sweeps;
    bool there, going;
  };
  NnlsProblem<T> p;
  int64_t max_sweeps;
  T tol;
  bool kkt, in_shared;
  static int64_t most_shared_bytes(int64_t r) {
    return static_cast<int64_t>(sizeof(Shared)) + r * (panel + threads) * static_cast<int64_t>(sizeof(T));
  }
  int64_t shared_bytes() const { return in_shared ? most_shared_bytes(p.r) : static_cast<int64_t>(sizeof(Shared)); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    typename Block::template Local<Row> rows(block);
    once(block, [&] {
      s.bad = nnls_all_finite;
      s.sweeps = 0;
    });
    for (int64_t first = id * threads; first < p.n; first += p.slots) {
      block.each([&](int t) { rows[t] = begin(s, first + t, id * threads + t, t); });
      for (int64_t sweep = 0; sweep < max_sweeps; ++sweep) {
        once(block, [&] { s.going = 0; });
        block.each([&](int t) {
          rows[t].going = rows[t].there && rows[t].worst / rows[t].scale > tol;
          if (!rows[t].going) return;
          Block::add(&s.going, 1u);
          rows[t].worst = 0;
          ++rows[t].sweeps;
        });
        if (block.uniform(s.going) == 0) break;
        pass<true>(block, s, id, rows);
      }
      if (kkt) {
        block.each([&](int t) {
          rows[t].worst = 0;
          rows[t].going = rows[t].there;
        });
        pass<false>(block, s, id, rows);
      }
      block.each([&](int t) {
        const int64_t i = first + t;
        if (i >= p.n || id * threads + t >= p.slots) return;
        if (!rows[t].there) return Block::lower(&s.bad, i);
        const Coefficients own = coefficients(s, id * threads + t, t);
        for (int64_t j = 0; j < p.r; ++j) p.w[i * p.r + j] = own.w[j * own.stride];
        p.residual[i] = rows[t].worst / rows[t].scale;
        Block::raise(&s.sweeps, rows[t].sweeps);
      });
    }
    once(block, [&] {
      Block::lower(&p.status[0], s.bad);
      Block::raise(&p.status[1], s.sweeps);
    });
  }

 private:
  struct Coefficients {
    T* w;  // `stride` entries apart
    int64_t stride;
    T* cross;  // p.slots entries apart
  };

  NPEFF_INLINE Coefficients coefficients(Shared& s, int64_t slot, int t) const {
    T* const cross = p.columns + p.r * p.slots + slot;
    if (in_shared) return {s.numbers + p.r * panel + t, threads, cross};
    return {p.columns + slot, p.slots, cross};
  }

  NPEFF_INLINE Row begin(Shared& s, int64_t i, int64_t slot, int t) const {
    if (i >= p.n || slot >= p.slots) return {1, 0, 0, false, false};
    const Coefficients own = coefficients(s, slot, t);
    T scale = 0, zero = 0;
    for (int64_t j = 0; j < p.r; ++j) {
      const T start = p.w[i * p.r + j], c = p.cross[i * p.r + j];
      zero += start * 0 + c * 0;
      own.w[j * own.stride] = nnls_start(start, p.inverse_diagonal[j]);
      own.cross[j * p.slots] = c;
      scale = larger(scale, size_of(c));
    }
    if (!(scale > 0)) scale = 1;
    return {scale, p.residual[i] * scale, 0, zero == 0, false};
  }

  // One sweep over the rows that are going (or, without update, a look): the largest violation met on the way.
  template <bool update, class Block>
  NPEFF_INLINE void pass(const Block& block, Shared& s, int64_t id, typename Block::template Local<Row>& rows) const {
    for (int64_t start = 0; start < p.r; start += panel) {
      const T* columns = p.panels + start * p.r;
      if (in_shared) {
        block.each([&](int t) {
NPEFF_UNROLL_4
          for (int64_t i = t * together; i < p.r * panel; i += threads * together) {
            T entries[together];
            load_together<together>(columns + i, entries);
            store_together<together>(entries, s.numbers + i);
          }
        });
        columns = s.numbers;
      }
      block.each([&](int t) {
        if (rows[t].going) rows[t].worst = larger(rows[t].worst, descend<update>(coefficients(s, id * threads + t, t), columns, start));
      });
    }
  }

  // Coordinates start … start + panel of a row: the largest violation among them.
  template <bool update>
  NPEFF_INLINE T descend(const Coefficients& own, const T* columns, int64_t start) const {
    T gradient[panel], worst = 0;
NPEFF_UNROLL
    for (int b = 0; b < panel; ++b) gradient[b] = start + b < p.r ? -own.cross[(start + b) * p.slots] : T{0};
NPEFF_UNROLL_4
    for (int64_t l = 0; l < p.r; ++l) {
      const T w = own.w[l * own.stride];
      T line[panel];
NPEFF_UNROLL
      for (int b = 0; b < panel; b += together) load_together<together>(columns + l * panel + b, line + b);
NPEFF_UNROLL
      for (int b = 0; b < panel; ++b) gradient[b] += w * line[b];
    }
NPEFF_UNROLL
    for (int b = 0; b < panel; ++b) {
      const int64_t j = start + b;
      if (j >= p.r) break;
      const T inverse = p.inverse_diagonal[j];
      if (!(inverse > 0)) continue;
      const T old = own.w[j * own.stride];
      worst = larger(worst, nnls_violation(old, gradient[b]));
      if (!update) continue;
      const T step = nnls_moved(old, gradient[b], inverse) - old;
      own.w[j * own.stride] = old + step;
NPEFF_UNROLL
      for (int c = 0; c < panel; ++c) gradient[c] += step * columns[j * panel + c];
    }
    return worst;
  }
};

template <class T, class Queue>
void nnls(const T* gram, const T* cross, T* w, int64_t n, int64_t r, int64_t max_sweeps, T tol, bool kkt,
          T* residual, int64_t* status, Queue& queue) {
  const int64_t most = queue.processors() * 1024;
  NnlsProblem<T> problem{gram, cross, w, residual, status, n, r, n < most ? n : most, nullptr, nullptr, nullptr};
  const int64_t padded = problem.padded();
  problem.panels = queue.template scratch<T>(padded * r + padded + 2 * r * problem.slots);
  problem.inverse_diagonal = problem.panels + padded * r;
  problem.columns = problem.inverse_diagonal + padded;
  run_elements(queue, larger<int64_t>(padded * r, 2), NnlsPack<T>{problem});
  queue.run(ceil_div<int64_t>(problem.slots, NnlsSweeps<T>::threads),
            NnlsSweeps<T>{problem, max_sweeps, tol, kkt, NnlsSweeps<T>::most_shared_bytes(r) <= queue.most_shared_bytes()});
}

}  // namespace npeff

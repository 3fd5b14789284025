// nnls.h by blocks: a thread owns a row of the problem from the first sweep to the last and never waits for another.
// The coefficients lie transposed, so that a warp's accesses are neighbours: in shared memory where they fit, or else in
// the workspace, where cross lies. gram comes by panels that all threads read at the same place. As in isa/nnls_tile.cpp, a panel's gradients are computed afresh, and
// then its coordinates move one after the other while the rest of the panel hears of it.
#pragma once

#include "npeff/block.h"
#include "npeff/half_types.h"
#include "npeff/nnls_step.h"

namespace npeff {

constexpr int64_t nnls_all_finite = INT64_MAX;

template <class T>
struct NnlsProblem {
  static constexpr int panel = 8;
  const T *gram, *cross;  // (r, r), (n, r)
  T* w;                   // (n, r) in and out
  T* kkt;                 // (n,) or null
  int64_t* status;        // (2,): first row with a non-finite value (or nnls_all_finite), and the most sweeps
  int64_t n, r, slots;    // slots: rows under way at a time
  T* panels;              // workspace: (padded / panel, r, panel),
  T* inverse_diagonal;    // (padded,),
  T* columns;             // (2, r, slots): w and cross, transposed

  NPEFF_INLINE int64_t padded() const { return (r + panel - 1) / panel * panel; }
  static NPEFF_INLINE int64_t workspace(int64_t r, int64_t slots) {  // in T
    const int64_t padded = (r + panel - 1) / panel * panel;
    return padded * r + padded + 2 * r * slots;
  }
  NPEFF_INLINE void place(T* workspace) {
    panels = workspace;
    inverse_diagonal = panels + padded() * r;
    columns = inverse_diagonal + padded();
  }
};

template <class T>
struct NnlsPack {
  static constexpr int threads = 256;
  struct Shared { char none; };
  NnlsProblem<T> p;
  int64_t shared_bytes() const { return sizeof(Shared); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared&, int64_t id) const {
    block.each([&](int t) {
      const int64_t at = id * threads + t;
      if (at < p.padded() * p.r) p.panels[at] = nnls_packed(p.gram, p.r, p.panel, at);
      if (at < p.padded()) p.inverse_diagonal[at] = at < p.r ? nnls_inverse(p.gram[at * p.r + at]) : T{0};
      if (at < 2) p.status[at] = at == 0 ? nnls_all_finite : 0;
    });
  }
};

template <class T>
struct NnlsSweeps {
  static constexpr int threads = 32, panel = NnlsProblem<T>::panel;  // few: many blocks share out the rows evenly
  struct Shared {
    int64_t bad, sweeps;
    T w[1];  // (r, threads), where they fit
  };
  NnlsProblem<T> p;
  int64_t max_sweeps;
  T tol;
  bool in_shared;
  static int64_t most_shared_bytes(int64_t r) { return static_cast<int64_t>(sizeof(Shared)) + r * threads * static_cast<int64_t>(sizeof(T)); }
  int64_t shared_bytes() const { return in_shared ? most_shared_bytes(p.r) : static_cast<int64_t>(sizeof(Shared)); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    block.each([&](int t) {
      if (t > 0) return;
      s.bad = nnls_all_finite;
      s.sweeps = 0;
    });
    block.each([&](int t) {
      const int64_t slot = id * threads + t;
      for (int64_t i = slot; slot < p.slots && i < p.n; i += p.slots) {
        const int64_t sweeps = in_shared ? row(i, slot, s.w + t, threads) : row(i, slot, p.columns + slot, p.slots);
        if (sweeps < 0) Block::lower(&s.bad, i);
        else Block::raise(&s.sweeps, sweeps);
      }
    });
    block.each([&](int t) {
      if (t > 0) return;
      Block::lower(&p.status[0], s.bad);
      Block::raise(&p.status[1], s.sweeps);
    });
  }

 private:
  static constexpr int together = 16 / sizeof(T);

  // Sweeps made on row i, or −1 when it holds a non-finite value; w: its coefficients, `stride` entries apart.
  NPEFF_INLINE int64_t row(int64_t i, int64_t slot, T* w, int64_t stride) const {
    const int64_t r = p.r;
    T* const cross = p.columns + r * p.slots + slot;
    T scale = 0, zero = 0;
    for (int64_t j = 0; j < r; ++j) {
      const T start = p.w[i * r + j], c = p.cross[i * r + j];
      zero += start * 0 + c * 0;
      w[j * stride] = nnls_start(start, p.inverse_diagonal[j]);
      cross[j * p.slots] = c;
      scale = larger(scale, size_of(c));
    }
    if (!(zero == 0)) return -1;
    if (!(scale > 0)) scale = 1;
    int64_t sweep = 0;
    for (bool going = true; going && sweep < max_sweeps; ++sweep) going = pass<true>(w, stride, cross) / scale > tol;
    for (int64_t j = 0; j < r; ++j) p.w[i * r + j] = w[j * stride];
    if (p.kkt) p.kkt[i] = pass<false>(w, stride, cross) / scale;
    return sweep;
  }

  // One sweep (or, without update, none): the largest violation met on the way.
  template <bool update>
  NPEFF_INLINE T pass(T* w, int64_t stride, const T* cross) const {
    const int64_t r = p.r;
    T worst = 0;
    for (int64_t start = 0; start < r; start += panel) {
      const T* const columns = p.panels + start * r;
      T gradient[panel];
NPEFF_UNROLL
      for (int b = 0; b < panel; ++b) gradient[b] = start + b < r ? -cross[(start + b) * p.slots] : T{0};
NPEFF_UNROLL_4
      for (int64_t l = 0; l < r; ++l) {
        const T own = w[l * stride];
        T line[panel];
NPEFF_UNROLL
        for (int b = 0; b < panel; b += together) load_together<together>(columns + l * panel + b, line + b);
NPEFF_UNROLL
        for (int b = 0; b < panel; ++b) gradient[b] += own * line[b];
      }
NPEFF_UNROLL
      for (int b = 0; b < panel; ++b) {
        const int64_t j = start + b;
        if (j >= r) break;
        const T inverse = p.inverse_diagonal[j];
        if (!(inverse > 0)) continue;
        const T old = w[j * stride];
        worst = larger(worst, nnls_violation(old, gradient[b]));
        if (!update) continue;
        const T step = nnls_moved(old, gradient[b], inverse) - old;
        w[j * stride] = old + step;
NPEFF_UNROLL
        for (int c = 0; c < panel; ++c) gradient[c] += step * columns[j * panel + c];
      }
    }
    return worst;
  }
};

template <class Queue>
int64_t nnls_slots(const Queue& queue, int64_t n) {
  const int64_t most = queue.processors() * 1024;
  return n < most ? n : most;
}

template <class Queue, class T>
void nnls_by_blocks(Queue& queue, NnlsProblem<T> problem, T* workspace, int64_t max_sweeps, T tol) {
  problem.place(workspace);
  const int64_t entries = larger<int64_t>(problem.padded() * problem.r, 2);
  queue.run(ceil_div<int64_t>(entries, NnlsPack<T>::threads), NnlsPack<T>{problem});
  if (problem.n > 0)
    queue.run(ceil_div<int64_t>(problem.slots, NnlsSweeps<T>::threads),
              NnlsSweeps<T>{problem, max_sweeps, tol, NnlsSweeps<T>::most_shared_bytes(problem.r) <= queue.most_shared_bytes()});
}

}  // namespace npeff

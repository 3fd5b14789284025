// The functions that are compiled once per instruction set, and the choice among them.
#pragma once

#include <cstdint>

namespace npeff {

constexpr int64_t scan_chunk = 4096;  // most entries of one scan(): 16 KiB, within L1
constexpr int64_t scan_slack = 64;    // entries that scan() may write beyond its result

struct Magnitudes { uint32_t least, largest; };

// Some rows of an nnls problem, at most nnls_vectors vectors of them; see nnls.h and isa/nnls_tile.cpp.
template <class T>
struct NnlsTile {
  int64_t n, r, padded;       // rows, coordinates, coordinates up to a multiple of the block
  const T* panels;            // (padded / block, r, block): gram by blocks of columns, zero beyond r
  const T* inverse_diagonal;  // (padded,): 1 / gram_jj, 0 where gram_jj ≤ 0 and beyond r
  const T* cross;             // (n, r)
  T* w;                       // (n, r), in and out
  T* kkt;                     // (n,) or null
  T* scratch;                 // 64-byte aligned: 2·padded·nnls_vectors vectors and padded / 8 + 8 bytes
  int64_t max_sweeps;
  T tol;
  bool (*stop)(void* context);  // asked before every sweep: whether to give up
  void* context;
};

// One row of an nnls problem, to be solved exactly.
struct NnlsRow {
  const double *gram, *cross;  // (r, r), (r,)
  double* w;                   // (r,), in: where to start; out: the solution
  double* scratch;             // r² + 5r
  int64_t r;
};

// A stretch of one row on its way into a sketch; see sketch.h.
struct SketchRun {
  const float* x;        // (n,)
  int64_t n, base;       // flat index of x[0]
  const uint64_t* keys;  // (copies,): streams of the hash
  int copies;
  uint32_t groups;       // groups of buckets per copy
  double* sums;          // (copies · groups · 16,), added to
  uint32_t begin, end;   // only blocks that fall on these groups
};

// Sums over positions of inputs under one kernel row times vectors of δ; see convolution.cpp.
struct PatchRun {
  const float* panel;             // (rows · width, vectors · lanes)
  const float* inputs;            // under the first tap at the first position
  int64_t rows, width;            // positions
  int64_t row_step, step;         // elements of inputs from one row of positions, one position, to the next
  int64_t dilation;               // and from one tap to the next
  int taps, vectors;              // at most 7, patch_vectors(taps)
  float* sums;                    // (taps, stride): out, the first vectors · lanes of each row
  int64_t stride;
  bool add;                       // to what is there
};

struct Kernels {
  const char* name;  // base, avx2, avx512

  // topk: appends the entries of x (n ≤ scan_chunk,) with |x|'s bits > floor to bits and index (base + position);
  // returns their number.
  int64_t (*scan)(const float* x, int64_t n, int64_t base, int32_t floor, uint32_t* bits, int64_t* index);
  // topk: range of the magnitudes of bits (n,).
  Magnitudes (*magnitudes)(const uint32_t* bits, int64_t n);
  // topk: keeps, in place and in order, the candidates above threshold, and those at it with index ≤ last.
  int64_t (*keep)(uint32_t* bits, int64_t* index, int64_t n, uint32_t threshold, int64_t last);

  // topk: out[i] = factor · x[i], both (n,).
  void (*multiply)(float factor, const float* x, int64_t n, float* out);

  // nnls: columns of a panel; vectors of rows in a tile; bytes of a vector. The tiles return the sweeps made.
  int nnls_block, nnls_vectors, vector_bytes;
  int64_t (*nnls_tile_f32)(const NnlsTile<float>& tile);
  int64_t (*nnls_tile_f64)(const NnlsTile<double>& tile);
  // nnls: returns the active-set steps made.
  int64_t (*nnls_active_set)(const NnlsRow& row, double tol, double* kkt);

  // spmm: out (width,) = (or +=, with add) Σ_e values[e] · dense[indices[e], :width], rows of dense `stride` apart.
  void (*spmm_row_i32)(const int32_t* indices, const float* values, int64_t n, const float* dense, int64_t stride,
                       int64_t width, float* out, bool add);
  void (*spmm_row_i64)(const int64_t* indices, const float* values, int64_t n, const float* dense, int64_t stride,
                       int64_t width, float* out, bool add);

  // convolution: vectors that a run of so many taps may have.
  int (*patch_vectors)(int taps);
  void (*patch_sums)(const PatchRun& run);
  // out[j · stride + i] = rows[i][j] for i < count ≤ lanes and j < n; a null row is zeros.
  void (*transpose_rows)(const float* const* rows, int count, int64_t n, float* out, int64_t stride);

  // sketch: adds a stretch of a row; the same bits whatever the instruction set.
  void (*sketch_run)(const SketchRun& run);
  // sketch: x (d,) becomes its Walsh–Hadamard transform, unnormalised; d a power of two.
  void (*walsh_hadamard)(float* x, int64_t d);
};

// The table in use: the fastest that this processor has, unless use_isa() chose another.
const Kernels& kernels();

// False when this build or this processor lacks it.
bool has_isa(const char* name);
bool use_isa(const char* name);

}  // namespace npeff

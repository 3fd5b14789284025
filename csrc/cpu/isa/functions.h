// What each instruction set defines; see isa.h for what the functions do.
#pragma once

#include "isa.h"

namespace npeff::NPEFF_ISA {

int64_t scan(const float* x, int64_t n, int64_t base, int32_t floor, uint32_t* bits, int64_t* index);
Magnitudes magnitudes(const uint32_t* bits, int64_t n);
int64_t keep(uint32_t* bits, int64_t* index, int64_t n, uint32_t threshold, int64_t last);
void multiply(float factor, const float* x, int64_t n, float* out);

// As many sums, nnls_block × nnls_vectors, as leave registers for the operands.
#if defined(__AVX512F__)
constexpr int nnls_block = 8, nnls_vectors = 3;
#elif defined(__AVX2__)
constexpr int nnls_block = 4, nnls_vectors = 3;
#else
constexpr int nnls_block = 4, nnls_vectors = 2;
#endif
int64_t nnls_tile(const NnlsTile<float>& tile);
int64_t nnls_tile(const NnlsTile<double>& tile);
int64_t nnls_active_set(const NnlsRow& row, double tol, double* kkt);

void spmm_row(const int32_t* indices, const float* values, int64_t n, const float* dense, int64_t stride,
              int64_t width, float* out, bool add);
void spmm_row(const int64_t* indices, const float* values, int64_t n, const float* dense, int64_t stride,
              int64_t width, float* out, bool add);

int patch_vectors(int taps);
void patch_sums(const PatchRun& run);
void transpose_rows(const float* const* rows, int count, int64_t n, float* out, int64_t stride);

void sketch_run(const SketchRun& run);
void walsh_hadamard(float* x, int64_t d);

}  // namespace npeff::NPEFF_ISA

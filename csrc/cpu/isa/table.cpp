#include "isa/functions.h"
#include "isa/simd.h"

#define NPEFF_STRING_(x) #x
#define NPEFF_STRING(x) NPEFF_STRING_(x)

namespace npeff::NPEFF_ISA {

extern const Kernels table;
const Kernels table = {
    NPEFF_STRING(NPEFF_ISA),
    scan,
    magnitudes,
    keep,
    multiply,
    nnls_block,
    nnls_vectors,
    vector_bytes,
    nnls_tile,
    nnls_tile,
    nnls_active_set,
    spmm_row,
    spmm_row,
    patch_vectors,
    patch_sums,
    transpose_rows,
    sketch_run,
    walsh_hadamard,
};

}  // namespace npeff::NPEFF_ISA

// Compiles every kernel for one instruction set: the including file is built with that set's flags and names it.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "team.h"

namespace headway {
namespace ISA {
#include "simd.h"

#include "gemm.h"
#include "rows.h"
#include "attention.h"
#include "step.h"
#include "operations.h"

extern const Kernels kernels = {ISA_NAME, run_step, op_linear, op_norm, op_rows, op_write_kv, op_attention, pack};
}  // namespace ISA
}  // namespace headway

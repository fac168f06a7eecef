// Compiles every kernel for one instruction set: the including file is built with that set's flags and names it.
// Nothing here may come from a standard template or an inline function outside the set's namespace: the linker would
// keep one set's code for all. (std::atomic is no exception: its members become single instructions.)
#include <linux/futex.h>
#include <omp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace headway {
namespace ISA {
#include "simd.h"
#include "team.h"

#include "gemm.h"
#include "rows.h"
#include "attention.h"
#include "sample.h"
#include "collective.h"
#include "step.h"
#include "operations.h"

extern const Kernels kernels = {ISA_NAME, run_step, op_linear, op_norm, op_rows, op_write_kv, op_attention, pack,
                                op_all_reduce, dequantise};
}  // namespace ISA
}  // namespace headway

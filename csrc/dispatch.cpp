// The C interface that ctypes sees. Kernels of every instruction set are in the library; one is chosen at run time.
#include <cstring>

#include "kernels.h"

namespace headway {
#define DECLARE(set) namespace set { extern const Kernels kernels; }
DECLARE(portable)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512bf16)
#endif

static const Kernels* find(const char* name) {
  const bool any = !std::strcmp(name, "auto");
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (bf16 && (any || !std::strcmp(name, "avx512bf16"))) return &avx512bf16::kernels;
  if (avx512 && (any || !std::strcmp(name, "avx512"))) return &avx512::kernels;
  if (avx2 && (any || !std::strcmp(name, "avx2"))) return &avx2::kernels;
#endif
  if (any || !std::strcmp(name, "portable")) return &portable::kernels;
  return nullptr;
}
}  // namespace headway

using namespace headway;

extern "C" {
// The kernels of one instruction set ("auto": the best this CPU has), or null where the CPU lacks it.
__attribute__((visibility("default"))) const Kernels* headway_kernels(const char* name) { return find(name); }
}

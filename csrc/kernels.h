// One instruction set's kernels, as function pointers.
#pragma once
#include "abi.h"

namespace headway {
struct Kernels {
  const char* name;
  int (*step)(const Program*, const Batch*, const Step*);
  void (*linear)(const Linear*, const void*, int64_t, int64_t, int32_t, int32_t, int32_t, void*, int64_t, int32_t);
  void (*norm)(const float*, int64_t, int64_t, int64_t, int32_t, const float*, const float*, float, int32_t, void*, int64_t,
               int32_t);
  void (*rows)(const Linear*, const int32_t*, int64_t, float*, int64_t);
  void (*write_kv)(const KvLayout*, int64_t, const void*, const void*, int64_t, int64_t, const int32_t*, int64_t);
  void (*attention)(const KvLayout*, int64_t, const Runs*, int64_t, const void*, int64_t, void*, int64_t, float, int64_t,
                    int32_t);
  void (*pack)(Linear*, const void*, int32_t, int64_t, float*, int32_t*, int32_t);
  int (*all_reduce)(Group*, float*, int64_t, int32_t);
  void (*dequantise)(const void*, int32_t, int64_t, int32_t, void*, int32_t);
};
}  // namespace headway

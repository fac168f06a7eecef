// The same kernels one at a time, for models without a program, and the packing of weights.

static void op_linear(const Linear* w, const void* a, int64_t stride, int64_t rows, int32_t dtype, int32_t mode, int32_t act,
                      void* out, int64_t out_stride, int32_t threads) {
  region(threads, 1, [&](Team team) {
    if (dtype == BF16) linear<Bf16Words>(team, a, stride, rows, *w, mode, act, out, out_stride);
    else linear<F32Words>(team, a, stride, rows, *w, mode, act, out, out_stride);
  });
}

static void op_norm(const float* x, int64_t stride, int64_t rows, int64_t width, int32_t kind, const float* weight,
                    const float* bias, float eps, int32_t dtype, void* out, int64_t out_stride, int32_t threads) {
  region(threads, 1, [&](Team team) {
    team.each(rows, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const float* row = x + i * stride;
        if (dtype == BF16)
          norm_row<Bf16Words>(row, width, kind, weight, bias, eps, nullptr, (uint16_t*)out + i * out_stride);
        else norm_row<F32Words>(row, width, kind, weight, bias, eps, nullptr, (float*)out + i * out_stride);
      }
    });
  });
}

static void op_rows(const Linear* w, const int32_t* ids, int64_t count, float* out, int64_t stride) {
  for (int64_t i = 0; i < count; i++) {
    if (w->dtype == F32) packed_row<F32Words>(*w, ids[i], out + i * stride);
    else packed_row<Bf16Words>(*w, ids[i], out + i * stride);
  }
}

static void op_write_kv(const KvLayout* kv, int64_t layer, const void* k, const void* v, int64_t k_stride, int64_t v_stride,
                        const int32_t* slots, int64_t tokens) {
  char* base = (char*)kv->base + layer * kv->layer_stride;
  const int64_t g = kv->kv_heads, d = kv->head_dim;
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t j = 0; j < g; j++) {
      const int64_t block = slots[t] / kv->block_size, offset = slots[t] % kv->block_size;
      if (kv->dtype == BF16)
        write_kv<Bf16Words>(*kv, base, block, offset, j, (const uint16_t*)k + t * k_stride + j * d,
                            (const uint16_t*)v + t * v_stride + j * d);
      else
        write_kv<F32Words>(*kv, base, block, offset, j, (const float*)k + t * k_stride + j * d,
                           (const float*)v + t * v_stride + j * d);
    }
  }
}

static void op_attention(const KvLayout* kv, int64_t layer, const Runs* runs, int64_t heads, const void* q,
                         int64_t q_stride, void* out, int64_t out_stride, float scale, int64_t window, int32_t threads) {
  Array<int32_t> tasks(2 * (runs->tokens + runs->count));
  const int64_t n = plan_attention(*runs, heads / kv->kv_heads, tasks.data());
  region(threads, 1, [&](Team team) {
    if (kv->dtype == BF16)
      attention<Bf16Words>(team, *kv, layer, *runs, tasks.data(), n, heads, q, q_stride, out, out_stride, scale, window);
    else
      attention<F32Words>(team, *kv, layer, *runs, tasks.data(), n, heads, q, q_stride, out, out_stride, scale, window);
  });
}

// Blocks of 32 quantised weights, as GGUF files hold them: d (and m) in float16, then the numbers.
// Q4: byte i has number i in its low half, number i + 16 in its high half.
INLINE void dequantise_block(const uint8_t* block, int32_t kind, v16& first, v16& second) {
  uint16_t d, m = 0;
  memcpy(&d, block, 2);
  if (kind == Q8_0) {
    first = __builtin_convertvector(*(const v16s8_any*)(block + 2), v16);
    second = __builtin_convertvector(*(const v16s8_any*)(block + 18), v16);
  } else {
    if (kind == Q4_1) memcpy(&m, block + 2, 2);
    const v16b q = *(const v16b_any*)(block + (kind == Q4_1 ? 4 : 2));
    first = __builtin_convertvector(q & 15, v16), second = __builtin_convertvector(q >> 4, v16);
    if (kind == Q4_0) first -= 8.f, second -= 8.f;
  }
  const float scale = half_to_float(d), least = half_to_float(m);
  first = first * scale + least, second = second * scale + least;  // the products are exact
}

static void dequantise(const void* source, int32_t kind, int64_t blocks, int32_t dtype, void* out, int32_t threads) {
  const int64_t size = kind == Q4_0 ? 18 : kind == Q4_1 ? 20 : 34;
  region(threads, 1, [&](Team team) {
    team.each(blocks, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) {
        v16 first, second;
        dequantise_block((const uint8_t*)source + b * size, kind, first, second);
        if (dtype == BF16)
          Bf16Words::store16((uint16_t*)out + b * 32, first), Bf16Words::store16((uint16_t*)out + b * 32 + 16, second);
        else store((float*)out + b * 32, first), store((float*)out + b * 32 + 16, second);
      }
    });
  });
}

// A row of any float type as float32; null is a row of zeros.
INLINE void read_row(float* row, const void* from, int32_t dtype, int64_t k) {
  if (!from) memset(row, 0, k * sizeof(float));
  else if (dtype == F32) memcpy(row, from, k * sizeof(float));
  else if (dtype == BF16) for (int64_t i = 0; i < k; i++) row[i] = bf16_to_float(((const uint16_t*)from)[i]);
  else for (int64_t i = 0; i < k; i++) row[i] = half_to_float(((const uint16_t*)from)[i]);
}

// The model's row for column c of a panel, or -1 for padding.
INLINE int64_t source_row(const Linear& w, int64_t panel, int64_t c) {
  if (!w.gated) return panel * 32 + c < w.n ? panel * 32 + c : -1;
  const int64_t half = w.n / 2, i = panel * 16 + c % 16;
  return i >= half ? -1 : c < 16 ? i : half + i;
}

// Nothing to convert: words change places, 16 groups of the 32 columns at a time, which the first-level cache holds.
INLINE void pack_bf16_panel(const Linear& w, int64_t panel, const uint16_t* source, int64_t stride) {
  uint32_t* words = (uint32_t*)const_cast<void*>(w.words) + panel * w.groups * 32;
  for (int64_t first = 0; first < w.groups; first += 16) {
    const int64_t last = first + 16 < w.groups ? first + 16 : w.groups;
    for (int64_t c = 0; c < 32; c++) {
      const int64_t from = source_row(w, panel, c);
      for (int64_t g = first; g < last && from >= 0; g++) memcpy(words + g * 32 + c, source + from * stride + 2 * g, 4);
    }
  }
}

// source: [n, k], row stride in elements. scale and offset are written for int8.
static void pack(Linear* w, const void* source, int32_t source_dtype, int64_t stride, float* scale, int32_t* offset,
                 int32_t threads) {
  const int64_t size = source_dtype == F32 ? 4 : 2;
  region(threads, 1, [&](Team team) {
    team.each(w->panels, 4, [&](int64_t begin, int64_t end) {
      Array<float> row(w->groups * 4);
      for (int64_t p = begin; p < end; p++) {
        if (w->dtype == BF16 && source_dtype == BF16 && w->k % 2 == 0) {
          pack_bf16_panel(*w, p, (const uint16_t*)source, stride);
          continue;
        }
        for (int64_t c = 0; c < 32; c++) {
          const int64_t from = source_row(*w, p, c);
          const void* in = (const char*)source + from * stride * size;
          read_row(row.data(), from >= 0 ? in : nullptr, source_dtype, w->k);
          uint32_t* words = (uint32_t*)const_cast<void*>(w->words) + p * w->groups * 32 + c;
          if (w->dtype == F32) {
            for (int64_t g = 0; g < w->groups; g++) __builtin_memcpy(words + g * 32, &row[g], 4);
          } else if (w->dtype == BF16) {
            for (int64_t g = 0; g < w->groups; g++)
              words[g * 32] = float_to_bf16(row[2 * g]) | (uint32_t)float_to_bf16(row[2 * g + 1]) << 16;
          } else {
            pack_int8_column(row.data(), w->groups, words, scale + p * 32 + c, offset + p * 32 + c);
          }
        }
      }
    });
  });
}

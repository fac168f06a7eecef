// What happens to one row at a time: embedding, normalisation, rotary embedding and the write to the cache.

// Row `id` of a packed weight, as float32 (a tied head is the embedding).
template <class D>
INLINE void packed_row(const Linear& w, int64_t id, float* out) {
  const int64_t panel = id / 32, lane = id % 32;
  if (w.dtype == INT8) {
    const int8_t* p = (const int8_t*)w.words + panel * w.groups * 128 + lane * 4;
    for (int64_t k = 0; k < w.k; k++) out[k] = w.scale[id] * p[k / 4 * 128 + k % 4];
    return;
  }
  const typename D::Element* p = (const typename D::Element*)w.words + panel * w.groups * 32 * D::P + lane * D::P;
  for (int64_t k = 0; k < w.k; k++) out[k] = D::get(p[k / D::P * 32 * D::P + k % D::P]);
}

template <class D>
void norm_row(const float* x, int64_t width, int32_t kind, const float* weight, const float* bias, float eps, float* keep,
              typename D::Element* out) {
  v16 sum = splat(0.f), square = splat(0.f);
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) sum += load(x + i);
  float mean = hsum(sum);
  for (; i < width; i++) mean += x[i];
  mean = kind == NORM_LAYER ? mean / width : 0.f;
  for (i = 0; i + 16 <= width; i += 16) {
    v16 d = load(x + i) - mean;
    square += d * d;
  }
  float variance = hsum(square);
  for (; i < width; i++) variance += (x[i] - mean) * (x[i] - mean);
  const float scale = kind == NORM_NONE ? 1.f : 1.f / __builtin_sqrtf(variance / width + eps);
  for (i = 0; i + 16 <= width; i += 16) {
    v16 y = (load(x + i) - mean) * scale;
    if (weight) y *= load(weight + i);
    if (bias) y += load(bias + i);
    if (keep) store(keep + i, y);
    D::store16(out + i, y);
  }
  for (; i < width; i++) {
    float y = (x[i] - mean) * scale;
    if (weight) y *= weight[i];
    if (bias) y += bias[i];
    if (keep) keep[i] = y;
    out[i] = D::put(y);
  }
}

// Rotates the first dim elements of one head, halves against each other.
template <class D>
INLINE void rotate_head(typename D::Element* x, const float* cos_sin, int64_t dim) {
  const int64_t half = dim / 2;
  int64_t i = 0;
  for (; i + 16 <= half; i += 16) {
    v16 c = load(cos_sin + i), s = load(cos_sin + half + i);
    v16 a = D::load16(x + i), b = D::load16(x + half + i);
    D::store16(x + i, a * c - b * s), D::store16(x + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    float a = D::get(x[i]), b = D::get(x[half + i]);
    x[i] = D::put(a * cos_sin[i] - b * cos_sin[half + i]), x[half + i] = D::put(b * cos_sin[i] + a * cos_sin[half + i]);
  }
}

template <class D>
INLINE void norm_head(typename D::Element* x, int64_t dim, const float* weight, float eps) {
  float square = 0;
  for (int64_t i = 0; i < dim; i++) square += D::get(x[i]) * D::get(x[i]);
  const float scale = 1.f / __builtin_sqrtf(square / dim + eps);
  for (int64_t i = 0; i < dim; i++) x[i] = D::put(D::get(x[i]) * scale * weight[i]);
}

// The lines that write_kv will touch, on their way into the cache.
template <class D>
INLINE void prefetch_kv(const KvLayout& kv, const char* layer, int64_t block, int64_t offset) {
  const int64_t d = kv.head_dim, s = kv.block_size, size = sizeof(typename D::Element);
  for (int64_t head = 0; head < kv.kv_heads; head++) {
    const char* key = layer + (block * kv.kv_heads + head) * 2 * d * s * size;
    const char* value = key + (d * s + offset / D::P * D::P * d) * size;
    for (int64_t i = 0; i < d / D::P; i++) __builtin_prefetch(key + (i * s + offset) * 4, 1);
    for (int64_t i = 0; i < d * 4; i += 64) __builtin_prefetch(value + i, 1);
  }
}

// Writes one token's key and value of one head. The first token of a block clears the values behind it: they are
// multiplied by probabilities of zero, and zero times an old infinity would not be zero.
template <class D>
INLINE void write_kv(const KvLayout& kv, char* layer, int64_t block, int64_t offset, int64_t head,
                     const typename D::Element* k, const typename D::Element* v) {
  typedef typename D::Element E;
  const int64_t d = kv.head_dim, s = kv.block_size;
  E* key = (E*)layer + (block * kv.kv_heads + head) * 2 * d * s;
  E* value = key + d * s;
  if (offset == 0) __builtin_memset(value, 0, d * s * sizeof(E));
  if constexpr (D::P == 1) {
    for (int64_t i = 0; i < d; i++) key[i * s + offset] = k[i];
    __builtin_memcpy(value + offset * d, v, d * sizeof(E));
  } else {
    uint32_t* words = (uint32_t*)key + offset;
    const uint32_t* pairs = (const uint32_t*)k;
    for (int64_t i = 0; i < d / 2; i++) words[i * s] = pairs[i];
    E* to = value + offset / 2 * 2 * d + offset % 2;
    for (int64_t i = 0; i < d; i++) to[2 * i] = v[i];
  }
}

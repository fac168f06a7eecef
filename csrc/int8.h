// Weight-only int8, one scale a column. Activations keep 16 bits: a row becomes s * (256 * (h - 128) + l) with unsigned
// bytes h and l, each of which the byte dot product takes as it is; the -128 is a constant of the column.

static constexpr int ROWS8 = ROWS > 1 ? ROWS / 2 : 1;  // two accumulators, high and low, for what one takes in bfloat16

// Quantises one column of groups * 4 weights (a multiple of 16) into words 32 apart. offset: -128 * the sum of what it
// rounds to.
INLINE void pack_int8_column(const float* row, int64_t groups, uint32_t* words, float* scale, int32_t* offset) {
  v16 peaks = splat(0.f);
  for (int64_t k = 0; k < groups * 4; k += 16) {
    v16 x = load(row + k);
    peaks = vmax(peaks, x < 0.f ? -x : x);
  }
  const float peak = hmax(peaks), inverse = peak > 0 ? 127.f / peak : 0.f;
  *scale = peak / 127.f;
  int32_t sum = 0;
  for (int64_t k = 0; k < groups * 4; k += 16) {
    const v16i q = __builtin_convertvector(round_even(load(row + k) * inverse), v16i);
    const v16b bytes = __builtin_convertvector(q & 255, v16b);
    for (int j = 0; j < 16; j++) sum += q[j];
    for (int g = 0; g < 4; g++) memcpy(words + (k / 4 + g) * 32, (const char*)&bytes + 4 * g, 4);
  }
  *offset = -128 * sum;
}

// A block of rows as bytes: high plane, then low plane, groups words each; the row's scale apart.
struct ByteRows {
  Array<uint32_t> words;
  Array<float> scale;

  template <class D>
  void quantise(const typename D::Element* a, int64_t stride, int64_t rows, int64_t k, int64_t groups) {
    words.resize(rows * 2 * groups), scale.resize(rows);
    for (int64_t r = 0; r < rows; r++) {
      const typename D::Element* row = a + r * stride;
      v16 peak = splat(0.f);
      for (int64_t i = 0; i < k; i += 16) {
        v16 x = at<D>(row, i, k);
        peak = vmax(peak, x < 0.f ? -x : x);
      }
      const float top = hmax(peak);
      scale[r] = top / 32767.f;
      const float inverse = top > 0 ? 32767.f / top : 0.f;
      uint8_t *high = (uint8_t*)&words[r * 2 * groups], *low = high + groups * 4;
      for (int64_t i = 0; i < groups * 4; i += 16) {
        v16i q = __builtin_convertvector(round_even((i < k ? at<D>(row, i, k) : splat(0.f)) * inverse), v16i) + 32768;
        *(v16b_any*)(high + i) = __builtin_convertvector(q >> 8, v16b);
        *(v16b_any*)(low + i) = __builtin_convertvector(q & 255, v16b);
      }
    }
  }

 private:
  template <class D>
  static INLINE v16 at(const typename D::Element* row, int64_t i, int64_t k) {
    if (i + 16 <= k) return D::load16(row + i);
    v16 x = splat(0.f);
    for (int64_t j = i; j < k; j++) x[j - i] = D::get(row[j]);
    return x;
  }
};

INLINE v16i dot_bytes(v16i acc, uint32_t a, v16u w) {
#ifdef __AVX512VNNI__
  return (v16i)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)splat_u(a), (__m512i)w);
#else
  for (int j = 0; j < 4; j++) acc += (int32_t)(a >> (8 * j) & 255) * ((v16i)(w << (24 - 8 * j)) >> 24);
  return acc;
#endif
}

template <class Epilogue>
struct BytePanelTile {
  const ByteRows& a;
  const uint32_t* w;
  const Linear& linear;
  int64_t panel, row0;
  Epilogue& out;

  template <int M>
  __attribute__((noinline)) void run(int64_t row) {
    const int64_t groups = linear.groups;
    v16i high[M][2], low[M][2];
    for (int r = 0; r < M; r++)
      for (int c = 0; c < 2; c++) {
        high[r][c] = (v16i)load_u(linear.offset + panel * 32 + c * 16);
        low[r][c] = (v16i)splat_u(0);
      }
    const uint32_t *rows = a.words.data() + row * 2 * groups, *at = w;
    for (int64_t g = 0; g < groups; g++, at += 32) {
      const v16u w0 = load_u(at), w1 = load_u(at + 16);
      __builtin_prefetch(at + AHEAD), __builtin_prefetch(at + AHEAD + 16);
#pragma GCC unroll 16
      for (int r = 0; r < M; r++) {
        const uint32_t h = rows[r * 2 * groups + g], l = rows[(r * 2 + 1) * groups + g];
        high[r][0] = dot_bytes(high[r][0], h, w0), high[r][1] = dot_bytes(high[r][1], h, w1);
        low[r][0] = dot_bytes(low[r][0], l, w0), low[r][1] = dot_bytes(low[r][1], l, w1);
      }
    }
    for (int r = 0; r < M; r++) {
      v16 c[2];
      for (int i = 0; i < 2; i++) {
        c[i] = __builtin_convertvector(high[r][i], v16) * 256.f + __builtin_convertvector(low[r][i], v16);
        c[i] *= load(linear.scale + panel * 32 + i * 16) * a.scale[row + r];
        if (linear.bias) c[i] += load(linear.bias + panel * 32 + i * 16);
      }
      out(row0 + row + r, panel, c[0], c[1]);
    }
  }
};

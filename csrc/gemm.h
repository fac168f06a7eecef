// Products with packed weights, and the register tile that attention shares.

#if defined(__AVX512F__)
static constexpr int ROWS = 12;  // 24 accumulators, two weight registers, one broadcast
#elif defined(__AVX2__)
static constexpr int ROWS = 2;
#else
static constexpr int ROWS = 1;
#endif
static constexpr int64_t ROW_BLOCK = 96;  // rows that pass over a weight panel while it is in cache
static constexpr int64_t AHEAD = 16 * 32;  // words between a weight and its prefetch

// acc[r][v] += a[r] . b[v] over groups of k. Rows of b are stride words apart; p[v] is prefetched alongside.
template <class D, int M, int V>
INLINE void dot_tile(v16 (&acc)[M][V], const uint32_t* a, int64_t lda, const uint32_t* const (&b)[V], int64_t stride,
                     int64_t groups, const uint32_t* const (&p)[V]) {
  for (int64_t g = 0; g < groups; g++) {
    v16u w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) w[v] = load_u(b[v] + g * stride), __builtin_prefetch(p[v] + g * stride);
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) {
      const uint32_t x = a[r * lda + g];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] = D::dot(acc[r][v], x, w[v]);
    }
  }
}

// Splits rows into as few tiles as fit the registers, evened out, and calls f<M>(first row).
template <class F, int M>
INLINE void call_tile(int m, int64_t row, F& f) {
  if constexpr (M == 1) {
    f.template run<1>(row);
  } else {
    if (m == M) f.template run<M>(row);
    else call_tile<F, M - 1>(m, row, f);
  }
}
template <int M = ROWS, class F>
INLINE void for_tiles(int64_t rows, F f) {
  int64_t tiles = (rows + M - 1) / M;
  for (int64_t t = 0, row = 0; t < tiles; t++) {
    int m = (int)((rows - row) / (tiles - t));
    call_tile<F, M>(m, row, f);
    row += m;
  }
}

template <class D, class Epilogue>
struct PanelTile {
  const uint32_t* a;
  int64_t lda;
  const uint32_t* w;
  int64_t groups, panel, row0;
  Epilogue& out;
  v16 bias0, bias1;

  template <int M>
  __attribute__((noinline)) void run(int64_t row) {
    v16 acc[M][2];
    for (int r = 0; r < M; r++) acc[r][0] = bias0, acc[r][1] = bias1;
    dot_tile<D, M, 2>(acc, a + row * lda, lda, {w, w + 16}, 32, groups, {w + AHEAD, w + AHEAD + 16});
    for (int r = 0; r < M; r++) out(row0 + row + r, panel, acc[r][0], acc[r][1]);
  }
};

#include "int8.h"

// out(row, panel, columns 0-15, columns 16-31) for every row of a and panel of the weight.
template <class D, class Epilogue>
void gemm(Team& team, const void* a, int64_t stride, int64_t rows, const Linear& w, Epilogue out) {
  const int64_t lda = stride / D::P;
  const int64_t blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  const int64_t per_block = (rows + blocks - 1) / (blocks ? blocks : 1);
  // Few rows: memory decides, long stretches stream best. Many rows: arithmetic decides, small items end together.
  const int64_t grain = rows < 8 ? (w.panels + 4 * team.threads - 1) / (4 * team.threads) : w.panels / (64 * team.threads) + 1;
  const int64_t chunks = (w.panels + grain - 1) / grain;
  static thread_local ByteRows bytes;
  int64_t quantised = -1;
  team.each(blocks * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      int64_t row0 = item / chunks * per_block, m = rows - row0 < per_block ? rows - row0 : per_block;
      if (w.dtype == INT8 && quantised != row0) {  // each thread for itself: cheaper than waiting for one to do it
        bytes.quantise<D>((const typename D::Element*)a + row0 * stride, stride, m, w.k, w.groups);
        quantised = row0;
      }
      int64_t p0 = item % chunks * grain, p1 = p0 + grain < w.panels ? p0 + grain : w.panels;
      for (int64_t p = p0; p < p1; p++) {
        const uint32_t* words = (const uint32_t*)w.words + p * w.groups * 32;
        if (w.dtype == INT8) {
          for_tiles<ROWS8>(m, BytePanelTile<Epilogue>{bytes, words, w, p, row0, out});
          continue;
        }
        v16 b0 = w.bias ? load(w.bias + p * 32) : splat(0.f), b1 = w.bias ? load(w.bias + p * 32 + 16) : splat(0.f);
        for_tiles(m, PanelTile<D, Epilogue>{(const uint32_t*)a + row0 * lda, lda, words, w.groups, p, row0, out, b0, b1});
      }
    }
  });
}

template <class D>
struct StoreOut {
  typename D::Element* out;
  int64_t stride;
  int32_t act;
  INLINE void operator()(int64_t row, int64_t panel, v16 c0, v16 c1) const {
    typename D::Element* p = out + row * stride + panel * 32;
    if (act) c0 = activate<D::FAST>(c0, act), c1 = activate<D::FAST>(c1, act);
    D::store16(p, c0), D::store16(p + 16, c1);
  }
};
struct AddOut {
  float* out;
  int64_t stride;
  bool set;
  INLINE void operator()(int64_t row, int64_t panel, v16 c0, v16 c1) const {
    float* p = out + row * stride + panel * 32;
    if (!set) c0 += load(p), c1 += load(p + 16);
    store(p, c0), store(p + 16, c1);
  }
};
template <class D>
struct GatedOut {
  typename D::Element* out;
  int64_t stride;
  int32_t act;
  INLINE void operator()(int64_t row, int64_t panel, v16 gate, v16 up) const {
    D::store16(out + row * stride + panel * 16, activate<D::FAST>(gate, act) * up);
  }
};

// The best column so far, per thread and row; the lowest column wins ties.
struct Best {
  float value;
  int32_t column;
};
struct HeadOut {
  float* logits;
  int64_t stride, vocab;
  const int32_t* want;
  Best* best;  // this thread's, one a row
  INLINE void operator()(int64_t row, int64_t panel, v16 c0, v16 c1) const {
    if (want[row]) {
      float* p = logits + row * stride + panel * 32;
      store(p, c0), store(p + 16, c1);
      return;
    }
    int64_t first = panel * 32, limit = vocab - first < 32 ? vocab - first : 32;
    Best& b = best[row];
    if (limit == 32 && !(hmax(vmax(c0, c1)) >= b.value)) return;
    float column[32];
    store(column, c0), store(column + 16, c1);
    for (int i = 0; i < limit; i++)
      if (column[i] > b.value || (column[i] == b.value && first + i < b.column)) b = {column[i], (int32_t)(first + i)};
  }
};

// One projection of the step, by the weight's dtype.
template <class D>
void linear(Team& team, const void* a, int64_t stride, int64_t rows, const Linear& w, int32_t mode, int32_t act,
            void* out, int64_t out_stride) {
  if (mode == LIN_STORE) gemm<D>(team, a, stride, rows, w, StoreOut<D>{(typename D::Element*)out, out_stride, act});
  else if (mode == LIN_GATED) gemm<D>(team, a, stride, rows, w, GatedOut<D>{(typename D::Element*)out, out_stride, act});
  else gemm<D>(team, a, stride, rows, w, AddOut{(float*)out, out_stride, mode == LIN_SET});
}

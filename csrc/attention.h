// Causal attention over the paged cache, for prefill and decode alike: a task is one run, one kv head and a few of the
// run's tokens; its rows are the query heads of the group for each token. Keys pass in chunks of 64 with a running
// softmax, in the same order whatever else is in the batch: a row's result depends on its own sequence only.

static constexpr int64_t CHUNK = 64;
static constexpr int64_t MAX_ROWS = 48;
static constexpr int64_t MAX_HEAD = 256;

template <class D>
struct AttentionState {
  alignas(64) uint32_t q[MAX_ROWS * MAX_HEAD / D::P];
  alignas(64) float scores[MAX_ROWS * CHUNK];
  alignas(64) typename D::Element p[MAX_ROWS * CHUNK];
  alignas(64) float out[MAX_ROWS * MAX_HEAD];
  float top[MAX_ROWS], sum[MAX_ROWS], decay[MAX_ROWS];
  const uint32_t* key[CHUNK / 16];         // 16 keys each: this chunk's, and what is prefetched meanwhile
  const uint32_t* value[CHUNK / 16];
  const uint32_t* next_key[CHUNK / 16];
  const uint32_t* next_value[CHUNK / 16];
};

template <class D>
struct ScoreTile {
  AttentionState<D>& s;
  int64_t groups, key_stride, group16;  // 16-key group (and the one after it, or itself again)
  int64_t second;
  template <int M>
  INLINE void run(int64_t row) {
    v16 acc[M][2];
    for (int r = 0; r < M; r++) acc[r][0] = acc[r][1] = splat(0.f);
    dot_tile<D, M>(acc, s.q + row * groups, groups, s.key[group16], s.key[second], key_stride, groups,
                   s.next_key[group16], s.next_key[second]);
    for (int r = 0; r < M; r++) {
      store(s.scores + (row + r) * CHUNK + group16 * 16, acc[r][0]);
      store(s.scores + (row + r) * CHUNK + second * 16, acc[r][1]);
    }
  }
};

template <class D>
struct ValueTile {
  AttentionState<D>& s;
  int64_t head_dim, column, second, groups16;
  template <int M>
  INLINE void run(int64_t row) {
    v16 acc[M][2];
    for (int r = 0; r < M; r++) {
      v16 decay = splat(s.decay[row + r]);
      acc[r][0] = load(s.out + (row + r) * head_dim + column) * decay;
      acc[r][1] = load(s.out + (row + r) * head_dim + second) * decay;
    }
    for (int64_t g = 0; g < groups16; g++)
      dot_tile<D, M>(acc, (const uint32_t*)(s.p + row * CHUNK) + g * 16 / D::P, CHUNK / D::P, s.value[g] + column,
                     s.value[g] + second, head_dim, 16 / D::P, s.next_value[g] + column, s.next_value[g] + second);
    for (int r = 0; r < M; r++) {
      store(s.out + (row + r) * head_dim + column, acc[r][0]);
      store(s.out + (row + r) * head_dim + second, acc[r][1]);
    }
  }
};

template <class D>
INLINE void softmax_rows(AttentionState<D>& s, int64_t rows, int64_t heads, int64_t first_key, int64_t groups16,
                         int64_t first_position, int64_t window, float scale) {
  static const v16i lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t r = 0; r < rows; r++) {
    const int64_t position = first_position + r / heads;
    const int32_t last = (int32_t)(position - first_key);
    const int32_t first = window ? (int32_t)(position - window + 1 - first_key) : INT32_MIN;
    const bool masked = last < groups16 * 16 - 1 || first > 0;
    v16 x[CHUNK / 16], peak = splat(-1e30f);
    for (int64_t g = 0; g < groups16; g++) {
      x[g] = load(s.scores + r * CHUNK + g * 16) * scale;
      if (masked) {
        v16i key = lanes + (int32_t)(g * 16);
        x[g] = (key <= last) & (key >= first) ? x[g] : splat(-1e30f);
      }
      peak = vmax(peak, x[g]);
    }
    const float top = s.top[r] > hmax(peak) ? s.top[r] : hmax(peak);
    v16 total = splat(0.f);
    for (int64_t g = 0; g < groups16; g++) {
      v16 p = vexp(x[g] - top);
      if (masked) p = x[g] > -5e29f ? p : splat(0.f);
      total += p;
      D::store16(s.p + r * CHUNK + g * 16, p);
    }
    float drop = s.top[r] - top;
    s.decay[r] = drop == 0.f ? 1.f : drop < -87.f ? 0.f : __builtin_expf(drop);
    s.sum[r] = s.sum[r] * s.decay[r] + hsum(total);
    s.top[r] = top;
  }
}

// Query heads first_head .. + heads, which share kv head `head`, of `count` tokens of a run. q and out point at token 0 of the step; strides in elements.
template <class D>
void attend(AttentionState<D>& s, const KvLayout& kv, const char* layer, const Runs& runs, int64_t run, int64_t head,
            int64_t token, int64_t count, int64_t first_head, int64_t heads, const typename D::Element* q,
            int64_t q_stride, typename D::Element* out, int64_t out_stride, float scale, int64_t window) {
  const int64_t d = kv.head_dim, size = kv.block_size, groups = d / D::P, rows = count * heads;
  const int64_t first_position = runs.context[run] - runs.start[run + 1] + runs.start[run] + token;
  const int64_t row0 = runs.start[run] + token;
  const int32_t* table = runs.table + (runs.table_row ? runs.table_row[run] : run) * runs.table_stride;
  for (int64_t r = 0; r < rows; r++) {
    const typename D::Element* from = q + (row0 + r / heads) * q_stride + (first_head + r % heads) * d;
    __builtin_memcpy(s.q + r * groups, from, d * sizeof(typename D::Element));
    s.top[r] = -1e30f, s.sum[r] = 0.f;
    for (int64_t i = 0; i < d; i += 16) store(s.out + r * d + i, splat(0.f));
  }
  const int64_t keys = first_position + count;
  int64_t begin = window && first_position - window + 1 > 0 ? (first_position - window + 1) / CHUNK * CHUNK : 0;
  auto locate = [&](int64_t first, const uint32_t** key, const uint32_t** value) {
    int64_t n = keys - first > CHUNK ? CHUNK : keys - first;
    for (int64_t g = 0; g * 16 < n; g++) {
      int64_t position = first + g * 16, offset = position % size;
      const char* block = layer + (table[position / size] * kv.kv_heads + head) * 2 * d * size * sizeof(typename D::Element);
      key[g] = (const uint32_t*)block + offset;
      value[g] = (const uint32_t*)block + groups * size + offset / D::P * d;
    }
    return n > 0 ? (n + 15) / 16 : 0;
  };
  int64_t groups16 = locate(begin, s.key, s.value);
  for (int64_t first = begin; first < keys; first += CHUNK) {
    for (int g = 0; g < CHUNK / 16; g++) s.next_key[g] = s.key[g], s.next_value[g] = s.value[g];
    int64_t next16 = locate(first + CHUNK, s.next_key, s.next_value);
    for (int64_t g = 0; g < groups16; g += 2)
      for_tiles(rows, ScoreTile<D>{s, groups, size, g, g + 1 < groups16 ? g + 1 : g});
    softmax_rows<D>(s, rows, heads, first, groups16, first_position, window, scale);
    for (int64_t c = 0; c < d; c += 32)
      for_tiles(rows, ValueTile<D>{s, d, c, c + 16 < d ? c + 16 : c, groups16});
    for (int g = 0; g < CHUNK / 16; g++) s.key[g] = s.next_key[g], s.value[g] = s.next_value[g];
    groups16 = next16;
  }
  for (int64_t r = 0; r < rows; r++) {
    typename D::Element* to = out + (row0 + r / heads) * out_stride + (first_head + r % heads) * d;
    const float inverse = 1.f / s.sum[r];
    for (int64_t i = 0; i < d; i += 16) D::store16(to + i, load(s.out + r * d + i) * inverse);
  }
}

// Tasks of every run: [run, first token] pairs; returns how many. A task has at most MAX_ROWS rows.
inline int64_t plan_attention(const Runs& runs, int64_t group, int32_t* tasks) {
  const int64_t step = group >= MAX_ROWS ? 1 : MAX_ROWS / group;
  int64_t n = 0;
  for (int64_t r = 0; r < runs.count; r++)
    for (int64_t t = 0; t < runs.start[r + 1] - runs.start[r]; t += step)
      tasks[2 * n] = (int32_t)r, tasks[2 * n + 1] = (int32_t)t, n++;
  return n;
}

template <class D>
void attention(Team& team, const KvLayout& kv, int64_t layer, const Runs& runs, const int32_t* tasks, int64_t num_tasks,
               int64_t heads, const void* q, int64_t q_stride, void* out, int64_t out_stride, float scale, int64_t window) {
  typedef typename D::Element E;
  const int64_t group = heads / kv.kv_heads, step = group >= MAX_ROWS ? 1 : MAX_ROWS / group;
  const int64_t parts = (group + MAX_ROWS - 1) / MAX_ROWS, per_task = kv.kv_heads * parts;  // parts: 1, but for huge groups
  const int64_t items = num_tasks * per_task;
  int64_t grain = items / (16 * team.threads);
  alignas(64) AttentionState<D> state;
  team.each(items, grain > 1 ? grain : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t run = tasks[i / per_task * 2], token = tasks[i / per_task * 2 + 1];
      const int64_t head = i % per_task / parts, part = i % parts * MAX_ROWS;
      const int64_t left = runs.start[run + 1] - runs.start[run] - token;
      attend<D>(state, kv, (const char*)kv.base + layer * kv.layer_stride, runs, run, head, token, left < step ? left : step,
                head * group + part, group - part < MAX_ROWS ? group - part : MAX_ROWS, (const E*)q, q_stride, (E*)out,
                out_stride, scale, window);
    }
  });
}

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

// Tiles are 4 vectors wide: a chunk of keys, or 64 dimensions of value. Vectors past the end repeat the last one.
static constexpr int TILE_ROWS = ROWS > 1 ? ROWS / 2 : 1;

template <class D>
struct ScoreTile {
  AttentionState<D>& s;
  int64_t groups, key_stride;
  template <int M>
  INLINE void run(int64_t row) {
    v16 acc[M][4];
    for (int r = 0; r < M; r++)
      for (int v = 0; v < 4; v++) acc[r][v] = splat(0.f);
    dot_tile<D, M, 4>(acc, s.q + row * groups, groups, s.key, key_stride, groups, s.next_key);
    for (int r = 0; r < M; r++)
      for (int v = 0; v < 4; v++) store(s.scores + (row + r) * CHUNK + v * 16, acc[r][v]);
  }
};

template <class D>
struct ValueTile {
  AttentionState<D>& s;
  int64_t head_dim, groups16;
  int64_t column[4];
  template <int M>
  INLINE void run(int64_t row) {
    v16 acc[M][4];
    for (int r = 0; r < M; r++)
      for (int v = 0; v < 4; v++) acc[r][v] = load(s.out + (row + r) * head_dim + column[v]) * s.decay[row + r];
    for (int64_t g = 0; g < groups16; g++) {
      const uint32_t *b = s.value[g], *p = s.next_value[g];
      dot_tile<D, M, 4>(acc, (const uint32_t*)(s.p + row * CHUNK) + g * 16 / D::P, CHUNK / D::P,
                        {b + column[0], b + column[1], b + column[2], b + column[3]}, head_dim, 16 / D::P,
                        {p + column[0], p + column[1], p + column[2], p + column[3]});
    }
    for (int r = 0; r < M; r++)
      for (int v = 0; v < 4; v++) store(s.out + (row + r) * head_dim + column[v], acc[r][v]);
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

// One task: query heads first_head .. + heads, which share kv head `head`, of `count` tokens of a run from `token` on.
struct Task {
  int64_t run, head, first_head, heads, token, count;
};

// The cache of one layer, as tasks see it.
template <class D>
struct PagedKeys {
  const KvLayout& kv;
  const char* layer;
  const Runs& runs;
  int64_t window;

  int64_t position(const Task& t) const { return runs.context[t.run] - runs.start[t.run + 1] + runs.start[t.run] + t.token; }
  // The first chunk that any of the task's tokens sees.
  int64_t begin(const Task& t) const {
    const int64_t first = position(t) - window + 1;
    return window && first > 0 ? first / CHUNK * CHUNK : 0;
  }
  // Where the chunk at position `first` lies; returns its number of 16-key groups, 0 past the end.
  int64_t locate(const Task& t, int64_t first, const uint32_t** key, const uint32_t** value) const {
    const int64_t d = kv.head_dim, size = kv.block_size, left = position(t) + t.count - first;
    if (left <= 0) return 0;
    const int32_t* table = runs.table + (runs.table_row ? runs.table_row[t.run] : t.run) * runs.table_stride;
    const int64_t groups16 = left > CHUNK ? CHUNK / 16 : (left + 15) / 16;
    for (int64_t g = 0; g < CHUNK / 16; g++) {
      const int64_t at = first + (g < groups16 ? g : groups16 - 1) * 16, offset = at % size;
      const char* block = layer + (table[at / size] * kv.kv_heads + t.head) * 2 * d * size * sizeof(typename D::Element);
      key[g] = (const uint32_t*)block + offset;
      value[g] = (const uint32_t*)block + d / D::P * size + offset / D::P * d;
    }
    return groups16;
  }
};

// q and out point at token 0 of the step; strides in elements. next: whose first chunk to prefetch at the end, or null.
template <class D>
void attend(AttentionState<D>& s, const PagedKeys<D>& keys, const Task& task, const Task* next,
            const typename D::Element* q, int64_t q_stride, typename D::Element* out, int64_t out_stride, float scale) {
  const int64_t d = keys.kv.head_dim, size = keys.kv.block_size, groups = d / D::P, rows = task.count * task.heads;
  const int64_t row0 = keys.runs.start[task.run] + task.token, position = keys.position(task);
  for (int64_t r = 0; r < rows; r++) {
    const typename D::Element* from = q + (row0 + r / task.heads) * q_stride + (task.first_head + r % task.heads) * d;
    __builtin_memcpy(s.q + r * groups, from, d * sizeof(typename D::Element));
    s.top[r] = -1e30f, s.sum[r] = 0.f;
    for (int64_t i = 0; i < d; i += 16) store(s.out + r * d + i, splat(0.f));
  }
  int64_t first = keys.begin(task);
  int64_t groups16 = keys.locate(task, first, s.key, s.value);
  for (; groups16; first += CHUNK) {
    int64_t next16 = keys.locate(task, first + CHUNK, s.next_key, s.next_value);
    if (!next16 && !(next && keys.locate(*next, keys.begin(*next), s.next_key, s.next_value)))
      for (int g = 0; g < CHUNK / 16; g++) s.next_key[g] = s.key[g], s.next_value[g] = s.value[g];
    for_tiles<TILE_ROWS>(rows, ScoreTile<D>{s, groups, size});
    softmax_rows<D>(s, rows, task.heads, first, groups16, position, keys.window, scale);
    for (int64_t c = 0; c < d; c += 64) {
      auto column = [&](int64_t v) { return c + v * 16 < d ? c + v * 16 : d - 16; };
      for_tiles<TILE_ROWS>(rows, ValueTile<D>{s, d, groups16, {c, column(1), column(2), column(3)}});
    }
    for (int g = 0; g < CHUNK / 16; g++) s.key[g] = s.next_key[g], s.value[g] = s.next_value[g];
    groups16 = next16;
  }
  for (int64_t r = 0; r < rows; r++) {
    typename D::Element* to = out + (row0 + r / task.heads) * out_stride + (task.first_head + r % task.heads) * d;
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
  const int64_t grain = items / (4 * team.threads);  // the first chunk of a range comes from memory unannounced
  const PagedKeys<D> keys{kv, (const char*)kv.base + layer * kv.layer_stride, runs, window};
  auto task = [&](int64_t i) {
    const int64_t run = tasks[i / per_task * 2], token = tasks[i / per_task * 2 + 1];
    const int64_t head = i % per_task / parts, part = i % parts * MAX_ROWS;
    const int64_t left = runs.start[run + 1] - runs.start[run] - token;
    return Task{run, head, head * group + part, group - part < MAX_ROWS ? group - part : MAX_ROWS, token,
                left < step ? left : step};
  };
  alignas(64) AttentionState<D> state;
  team.each(items, grain > 1 ? grain : 1, [&](int64_t begin, int64_t end) {
    Task now = task(begin);
    for (int64_t i = begin; i < end; i++) {
      const Task next = i + 1 < end ? task(i + 1) : now;
      attend<D>(state, keys, now, i + 1 < end ? &next : nullptr, (const E*)q, q_stride, (E*)out, out_stride, scale);
      now = next;
    }
  });
}

// A whole step: the compiled list of operations, walked by every thread of one parallel region.

// What the walk derives from the batch before the region opens. All of it lives in the program's scratch.
struct StepPlan {
  int32_t *start, *context, *tokens, *positions, *segments, *tasks, *rows;
  int64_t num_tokens, num_segments, num_tasks;
};

// Layout of scratch: [runs + 1] start, [runs] context, [T] token ids, [T] positions, [2 (T + runs)] write segments,
// [2 (T + runs)] attention tasks, [rows] token index of each sampled row.
INLINE void plan_step(const Program& p, const Batch& b, const Step& s, StepPlan& o) {
  int32_t* at = p.scratch;
  o.start = at, at += p.max_runs + 1;
  o.context = at, at += p.max_runs;
  o.tokens = at, at += p.max_tokens;
  o.positions = at, at += p.max_tokens;
  o.segments = at, at += 2 * (p.max_tokens + p.max_runs);
  o.tasks = at, at += 2 * (p.max_tokens + p.max_runs);
  o.rows = at;
  int64_t t = 0, segments = 0;
  o.start[0] = 0;
  for (int64_t r = 0; r < s.runs; r++) {
    const int64_t slot = s.run_slots[r], n = s.run_tokens[r], first = b.computed[slot];
    __builtin_memcpy(o.tokens + t, b.tokens + slot * b.token_stride + first, n * sizeof(int32_t));
    for (int64_t i = 0; i < n; i++) o.positions[t + i] = (int32_t)(first + i);
    for (int64_t i = 0; i < n;) {  // a segment never crosses a block, so that no two threads write into one
      const int64_t room = p.kv.block_size - (first + i) % p.kv.block_size;
      o.segments[2 * segments] = (int32_t)r, o.segments[2 * segments + 1] = (int32_t)(t + i), segments++;
      i += room;
    }
    t += n;
    o.start[r + 1] = (int32_t)t;
    o.context[r] = (int32_t)(first + n);
  }
  for (int64_t i = 0; i < s.rows; i++) o.rows[i] = o.start[s.row_runs[i] + 1] - 1;
  o.num_tokens = t, o.num_segments = segments;
}

template <class D>
void embed_rows(Team& team, const Program& p, const Op& op, const StepPlan& plan, float* x) {
  typedef typename D::Element E;
  team.each(plan.num_tokens, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* to = x + t * p.strides[BUF_X];
      const int64_t row = plan.tokens[t] - op.first;
      if ((op.linear || op.table) && (row < 0 || row >= op.count)) {
        memset(to, 0, op.width * sizeof(float));
      } else if (op.linear) {
        packed_row<D>(*op.linear, row, to);
      } else if (op.table) {
        const E* from = (const E*)op.table + row * op.width;
        for (int64_t i = 0; i < op.width; i++) to[i] = D::get(from[i]);
      }
      if (!op.positions) continue;
      const float* position = (const float*)op.positions + (plan.positions[t] + op.position_offset) * op.width;
      for (int64_t i = 0; i < op.width; i++) to[i] += position[i];
    }
  });
}

template <class D>
void norm_rows(Team& team, const Program& p, const Op& op, int64_t rows) {
  typedef typename D::Element E;
  team.each(rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      float* from = (float*)p.buffers[op.src] + i * p.strides[op.src];
      norm_row<D>(from, op.width, op.mode, op.weight, op.bias, op.eps, op.flags & NORM_KEEP ? from : nullptr,
                  (E*)p.buffers[op.dst] + i * p.strides[op.dst]);
    }
  });
}

// The rows that want a token, from src to dst.
INLINE void gather_rows(Team& team, const Program& p, const Op& op, const StepPlan& plan, int64_t rows) {
  const int64_t size = p.dtype == BF16 && op.src != BUF_X ? 2 : 4;
  team.each(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      memcpy((char*)p.buffers[op.dst] + i * p.strides[op.dst] * size,
             (const char*)p.buffers[op.src] + plan.rows[i] * p.strides[op.src] * size, op.width * size);
  });
}

// A token's heads that this rank attends to, from those of all.
template <class D>
INLINE void take_heads(const Program& p, const Op& op, int64_t t, typename D::Element* to) {
  typedef typename D::Element E;
  const int64_t d = p.kv.head_dim, group = p.num_heads / p.kv.kv_heads, kv = p.kv.kv_heads * d;
  const E* all = (const E*)p.buffers[BUF_ALL_QKV] + t * p.strides[BUF_ALL_QKV];
  const E* keys = all + (op.count * group + op.first) * d;
  memcpy(to, all + op.first * group * d, kv * group * sizeof(E));
  memcpy(to + kv * group, keys, kv * sizeof(E));
  memcpy(to + kv * (group + 1), keys + op.count * d, kv * sizeof(E));
}

template <class D>
void rotary_kv(Team& team, const Program& p, const Batch& b, const Step& s, const Op& op, const StepPlan& plan) {
  typedef typename D::Element E;
  const int64_t d = p.kv.head_dim, h = p.num_heads, g = p.kv.kv_heads, size = p.kv.block_size;
  char* layer = (char*)p.kv.base + op.layer * p.kv.layer_stride;
  const int64_t grain = plan.num_segments / (4 * team.threads);
  team.each(plan.num_segments, grain > 1 ? grain : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t run = plan.segments[2 * i], first = plan.segments[2 * i + 1];
      const int32_t* table = b.block_table + s.run_slots[run] * b.table_stride;
      if (i + 1 < end) {
        const int64_t position = plan.positions[plan.segments[2 * i + 3]], next = plan.segments[2 * i + 2];
        prefetch_kv<D>(p.kv, layer, b.block_table[s.run_slots[next] * b.table_stride + position / size], position % size);
      }
      for (int64_t t = first; t < plan.start[run + 1] && (t == first || plan.positions[t] % size); t++) {
        E* q = (E*)p.buffers[BUF_QKV] + t * p.strides[BUF_QKV];
        E *k = q + h * d, *v = k + g * d;
        if (op.src == BUF_ALL_QKV) take_heads<D>(p, op, t, q);
        const int64_t position = plan.positions[t];
        if (op.weight) for (int64_t j = 0; j < h; j++) norm_head<D>(q + j * d, d, op.weight, op.eps);
        if (op.bias) for (int64_t j = 0; j < g; j++) norm_head<D>(k + j * d, d, op.bias, op.eps);
        if (p.rotary_dim) {
          const float* cs = p.cos_sin + position * p.rotary_dim;
          for (int64_t j = 0; j < h + g; j++) rotate_head<D>(q + j * d, cs, p.rotary_dim);
        }
        for (int64_t j = 0; j < g; j++)
          write_kv<D>(p.kv, layer, table[position / size], position % size, j, k + j * d, v + j * d);
      }
    }
  });
}

// X from every rank's PART.
INLINE void all_reduce(Team& team, const Program& p, const Op& op, int64_t rows, uint32_t exchange) {
  publish(*p.group, exchange);
  wait_for_ranks(*p.group, exchange);
  const int64_t grain = rows / (4 * team.threads);
  team.each(rows, grain > 1 ? grain : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      reduce_row(*p.group, exchange, i * p.strides[BUF_PART], op.width, op.mode == LIN_ADD,
                 (float*)p.buffers[op.dst] + i * p.strides[op.dst]);
  });
}

// What the head leaves in a part: the best column of each row, then the logits of this rank's columns.
INLINE Best* best_part(const Program& p, uint32_t exchange, int64_t rank) {
  return (Best*)part(*p.group, exchange, rank);
}
INLINE float* logits_part(const Program& p, uint32_t exchange, int64_t rank) {
  return (float*)(part(*p.group, exchange, rank) + (p.max_rows * sizeof(Best) + 63) / 64 * 64);
}

template <class D>
void head_rows(Team& team, const Program& p, const Op& op, const Step& s, Best* best, uint32_t exchange) {
  float* logits = p.group ? logits_part(p, exchange, p.group->rank) : p.logits;
  HeadOut out{logits, p.logits_stride, op.linear->n, s.want, best + team.thread * s.rows};
  gemm<D>(team, p.buffers[op.src], p.strides[op.src], s.rows, *op.linear, out);
}

INLINE Best better(const Best& a, const Best& b) {
  return b.value > a.value || (b.value == a.value && b.column < a.column) ? b : a;
}
// Of a row, over the threads.
INLINE Best best_here(const Team& team, const Step& s, const Best* best, int64_t row) {
  Best winner = best[row];
  for (int t = 1; t < team.threads; t++) winner = better(winner, best[t * s.rows + row]);
  return winner;
}
INLINE int32_t token_of(const Best& best) {
  return best.column == INT32_MAX ? 0 : best.column;  // a model that yields nothing but NaN
}
INLINE int32_t sample(const Program& p, const Batch& b, const Step& s, int64_t row) {
  static thread_local SampleScratch scratch;
  const int64_t slot = s.run_slots[s.row_runs[row]];
  const float u = uniform(b.seed[slot], (uint64_t)(b.length[slot] - b.prompt_len[slot]));
  const Sampling how{b.temperature[slot], b.top_p[slot], b.min_p[slot], b.top_k[slot]};
  return sample_row(p.logits + row * p.logits_stride, p.vocab, how, u, scratch);
}

INLINE void choose_rows(Team& team, const Program& p, const Batch& b, const Step& s, const Best* best) {
  team.each(s.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      if (s.want[i] == 0) s.token[i] = token_of(best_here(team, s, best, i));
      if (s.want[i] == 1) s.token[i] = sample(p, b, s, i);
    }
  });
  team.sync();
}

// The same where each rank has some columns. Rows to sample are dealt out and their tokens exchanged; rows that want
// logits come together on every rank. Returns the exchange after its own.
INLINE uint32_t choose_rows_together(Team& team, const Program& p, const Batch& b, const Step& s, const Best* best,
                                     uint32_t exchange) {
  Group& g = *p.group;
  team.each(s.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      Best& mine = best_part(p, exchange, g.rank)[i];
      mine = best_here(team, s, best, i);
      if (mine.column != INT32_MAX) mine.column += (int32_t)p.vocab_start[g.rank];
    }
  });
  team.sync();
  publish(g, exchange);
  wait_for_ranks(g, exchange);
  bool samples = false;
  for (int64_t i = 0; i < s.rows; i++) samples |= s.want[i] == 1;
  team.each(s.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      Best winner = best_part(p, exchange, 0)[i];
      for (int64_t rank = 1; rank < g.size; rank++) winner = better(winner, best_part(p, exchange, rank)[i]);
      if (s.want[i] == 0) s.token[i] = token_of(winner);
      if (s.want[i] == 0 || (s.want[i] == 1 && i % g.size != g.rank)) continue;
      for (int64_t rank = 0; rank < g.size; rank++)
        memcpy(p.logits + i * p.logits_stride + p.vocab_start[rank], logits_part(p, exchange, rank) + i * p.logits_stride,
               (p.vocab_start[rank + 1] - p.vocab_start[rank]) * sizeof(float));
      if (s.want[i] == 1) ((int32_t*)part(g, exchange + 1, g.rank))[i] = sample(p, b, s, i);
    }
  });
  team.sync();
  if (!samples) return exchange + 1;
  publish(g, exchange + 1);
  wait_for_ranks(g, exchange + 1);
  team.each(s.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      if (s.want[i] == 1) s.token[i] = ((const int32_t*)part(g, exchange + 1, i % g.size))[i];
  });
  team.sync();
  return exchange + 2;
}

template <class D>
void walk(Team team, const Program& p, const Batch& b, const Step& s, const StepPlan& plan, const Runs& runs, Best* best,
          uint32_t exchange) {
  auto target = [&](const Op& op) {
    return op.dst == BUF_PART ? (void*)part(*p.group, exchange, p.group->rank) : p.buffers[op.dst];
  };
  for (int64_t i = 0; i < p.num_ops; i++) {
    const Op& op = p.ops[i];
    const int64_t rows = op.flags & SAMPLED ? s.rows : plan.num_tokens;
    switch (op.code) {
      case OP_EMBED: embed_rows<D>(team, p, op, plan, (float*)target(op)); break;
      case OP_NORM: norm_rows<D>(team, p, op, rows); break;
      case OP_GATHER: gather_rows(team, p, op, plan, s.rows); break;
      case OP_LINEAR:
        linear<D>(team, p.buffers[op.src], p.strides[op.src], rows, *op.linear, op.mode, op.act, target(op), p.strides[op.dst]);
        break;
      case OP_ROTARY_KV: rotary_kv<D>(team, p, b, s, op, plan); break;
      case OP_ATTENTION:
        attention<D>(team, p.kv, op.layer, runs, plan.tasks, plan.num_tasks, p.num_heads, p.buffers[BUF_QKV],
                     p.strides[BUF_QKV], p.buffers[BUF_ATTN], p.strides[BUF_ATTN], p.attention_scale, p.window);
        break;
      case OP_HEAD: head_rows<D>(team, p, op, s, best, exchange); break;
      case OP_MEET: publish(*p.group, exchange), wait_for_ranks(*p.group, exchange++); break;
      case OP_ALL_REDUCE: all_reduce(team, p, op, rows, exchange++); break;
    }
    team.sync();
  }
  if (!p.group) return choose_rows(team, p, b, s, best);
  if (s.rows) exchange = choose_rows_together(team, p, b, s, best, exchange);  // as many on every rank
  if (team.thread == 0) p.group->exchanges = exchange - 1;
}

INLINE void advance_batch(const Batch& b, const Step& s) {
  for (int64_t r = 0; r < s.runs; r++) b.computed[s.run_slots[r]] += s.run_tokens[r];
  for (int64_t i = 0; i < s.rows; i++) {
    const int64_t slot = s.run_slots[s.row_runs[i]];
    b.tokens[slot * b.token_stride + b.length[slot]++] = s.token[i];
  }
}

static int run_step(const Program* program, const Batch* batch, const Step* step) {
  const Program& p = *program;
  StepPlan plan;
  plan_step(p, *batch, *step, plan);
  Runs runs{step->runs, plan.num_tokens, plan.start, plan.context, batch->block_table, step->run_slots, batch->table_stride};
  plan.num_tasks = plan_attention(runs, p.num_heads / p.kv.kv_heads, plan.tasks);
  Array<Best> best(step->rows * p.threads);
  for (int64_t i = 0; i < step->rows * p.threads; i++) best[i] = {-__builtin_inff(), INT32_MAX};
  // The next exchange. Not for threads to look up: one may enter the region when another has walked through it.
  const uint32_t exchange = p.group ? p.group->exchanges + 1 : 0;
  region(p.threads, p.num_ops + 3, [&](Team team) {
    if (p.dtype == BF16) walk<Bf16Words>(team, p, *batch, *step, plan, runs, best.data(), exchange);
    else walk<F32Words>(team, p, *batch, *step, plan, runs, best.data(), exchange);
  });
  if (p.group && p.group->lost >= 0) return 1 + p.group->lost;
  if (step->advance) advance_batch(*batch, *step);
  return 0;
}

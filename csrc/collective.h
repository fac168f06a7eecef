// What tensor parallel ranks of one node tell each other, through memory that they share: a Signal of each rank, then the
// parts, two of each rank. An exchange is: write your part, publish, wait for the others, read theirs. The two parts take
// turns: who writes one again has seen everybody publish the exchange after it, so nobody still reads it.
struct Signal {  // 128 bytes: two cache lines, which are fetched in pairs
  alignas(128) std::atomic<uint32_t> published;  // the last exchange
  std::atomic<uint32_t> sleepers;                // how many threads of other ranks wait for the next one
  std::atomic<uint32_t> closed;
  int32_t pid;
};

INLINE Signal& signal_of(const Group& g, int64_t rank) { return ((Signal*)g.memory)[rank]; }
INLINE char* part(const Group& g, uint32_t exchange, int64_t rank) {
  return g.memory + g.first_part + (2 * rank + exchange % 2) * g.part_bytes;
}

// By any thread, or several, that has seen the whole part written.
INLINE void publish(const Group& g, uint32_t exchange) {
  Signal& mine = signal_of(g, g.rank);
  uint32_t before = exchange - 1;
  if (mine.published.compare_exchange_strong(before, exchange) && mine.sleepers.load())
    syscall(SYS_futex, &mine.published, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

INLINE bool has_ended(const Group& g, int64_t rank) {
  if (signal_of(g, rank).closed.load()) return true;
  struct pollfd process = {g.pidfd[rank], POLLIN, 0};  // readable once the process has ended
  return g.pidfd[rank] >= 0 && poll(&process, 1, 0) > 0;
}

// Returns when every rank has published; at once from then on when one has ended, which its sleepers see within 0.1 s.
INLINE void wait_for_ranks(Group& g, uint32_t exchange) {
  for (int64_t rank = 0; rank < g.size; rank++) {
    Signal& other = signal_of(g, rank);
    auto here = [&] { return (int32_t)(other.published.load(std::memory_order_acquire) - exchange) >= 0; };
    for (int spin = 0; spin < 2000 && !here(); spin++) cpu_relax();  // longer takes the core that the other may need
    if (here()) continue;
    other.sleepers.fetch_add(1);
    while (!here() && __atomic_load_n(&g.lost, __ATOMIC_RELAXED) < 0) {
      const struct timespec limit = {0, 100000000};
      const uint32_t seen = other.published.load();
      if ((int32_t)(seen - exchange) < 0) syscall(SYS_futex, &other.published, FUTEX_WAIT, seen, &limit, nullptr, 0);
      if (!here() && has_ended(g, rank) && !here()) __atomic_store_n(&g.lost, (int32_t)rank, __ATOMIC_RELAXED);
    }
    other.sleepers.fetch_sub(1);
  }
}

// to[0 .. width - 1] = or += the ranks' parts from offset (elements) on, in rank order: the same bits on every rank.
INLINE void reduce_row(const Group& g, uint32_t exchange, int64_t offset, int64_t width, bool add, float* to) {
  const float* first = (const float*)part(g, exchange, 0) + offset;
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) {
    v16 sum = load(first + i);
    if (add) sum += load(to + i);
    for (int64_t rank = 1; rank < g.size; rank++) sum += load((const float*)part(g, exchange, rank) + offset + i);
    store(to + i, sum);
  }
  for (; i < width; i++) {
    float sum = add ? first[i] + to[i] : first[i];
    for (int64_t rank = 1; rank < g.size; rank++) sum += ((const float*)part(g, exchange, rank))[offset + i];
    to[i] = sum;
  }
}

// x = the sum of the ranks' x. Returns 0, or 1 + the rank that has ended.
static int op_all_reduce(Group* group, float* x, int64_t count, int32_t threads) {
  Group& g = *group;
  const int64_t most = g.part_bytes / (int64_t)sizeof(float), grain = 4096;
  for (int64_t from = 0; from < count && g.lost < 0; from += most) {
    const int64_t size = count - from < most ? count - from : most, pieces = (size + grain - 1) / grain;
    const uint32_t exchange = ++g.exchanges;
    auto length = [&](int64_t piece) { return size - piece * grain < grain ? size - piece * grain : grain; };
    region(threads, 2, [&](Team team) {
      team.each(pieces, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
          memcpy((float*)part(g, exchange, g.rank) + i * grain, x + from + i * grain, length(i) * sizeof(float));
      });
      team.sync();
      publish(g, exchange);
      wait_for_ranks(g, exchange);
      team.each(pieces, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) reduce_row(g, exchange, i * grain, length(i), false, x + from + i * grain);
      });
      team.sync();
    });
  }
  return g.lost + 1;
}

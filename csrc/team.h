// The threads of one step: a region that the caller's OpenMP pool opens once (the pool torch uses, so that there is only
// one), and counters from which threads claim work.
inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// A zeroed array that grows. Not std::vector: its code would be merged over instruction sets by the linker.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t size) { resize(size); }
  Array(const Array&) = delete;
  ~Array() { free(data_); }
  void resize(int64_t size) {
    if (size <= room_) return;
    free(data_);
    data_ = (T*)aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64);
    memset((void*)data_, 0, size * sizeof(T));
    room_ = size;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t room_ = 0;
};

// An operation's items: how many were claimed, how many are done, and who sleeps until all are.
struct alignas(64) Counter {
  std::atomic<int64_t> next;
  alignas(64) std::atomic<int32_t> done;
  std::atomic<int32_t> sleepers;

  void finish(int64_t items, int64_t total) {
    const int64_t before = done.fetch_add((int32_t)items, std::memory_order_seq_cst);
    if (before + items == total && sleepers.load(std::memory_order_seq_cst)) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
  }
  // Spins for about 20 us, then sleeps: cheap when every thread has a core, harmless when a neighbour takes one.
  void wait(int64_t total) {
    for (int spin = 0; spin < 2000; spin++) {
      if (done.load(std::memory_order_acquire) == total) return;
      cpu_relax();
    }
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    for (int32_t seen; (seen = done.load(std::memory_order_seq_cst)) != total;) futex(FUTEX_WAIT_PRIVATE, seen);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  void futex(int op, int32_t value) { syscall(SYS_futex, &done, op, value, nullptr, nullptr, 0); }
};

// One thread's view of the region: for every operation, each() and then sync(). Threads wait for work to be done, not
// for each other: one that the system has taken off its core holds nobody up unless it was in the middle of an item.
struct Team {
  Counter* counter;  // one an operation, so that nobody waits to reset one
  int threads;
  int thread;
  int64_t items = 0;

  // Hands out ranges [begin, end) of items until none are left.
  template <class Body>
  void each(int64_t count, int64_t grain, Body body) {
    items = count;
    if (threads == 1) {
      if (items > 0) body(0, items);
      return;
    }
    for (;;) {
      const int64_t begin = counter->next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= items) return;
      const int64_t end = begin + grain < items ? begin + grain : items;
      body(begin, end);
      counter->finish(end - begin, items);
    }
  }
  // Returns when every item is done.
  void sync() {
    if (threads > 1) counter->wait(items);
    counter++;
    items = 0;  // of the next operation, which may have none
  }
};

// Runs body(team) on every thread of the caller's OpenMP pool.
template <class Body>
void region(int threads, int64_t counters, Body body) {
  Array<Counter> counter(counters);
#pragma omp parallel num_threads(threads)
  {
    Team team{counter.data(), threads, omp_get_thread_num()};
    body(team);
  }
}

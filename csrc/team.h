// The threads of one step: a region that the caller's OpenMP pool opens once (the pool torch uses, so that there is only
// one), a barrier between operations, and counters from which threads claim work.
inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Spins for about 20 us, then sleeps: cheap when every thread has a core, harmless when a neighbour takes one.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.fetch_add(1, std::memory_order_acq_rel);
      if (sleepers_.load(std::memory_order_seq_cst)) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
      return;
    }
    for (int spin = 0; spin < 2000; spin++) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      cpu_relax();
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (phase_.load(std::memory_order_seq_cst) == phase) futex(FUTEX_WAIT_PRIVATE, phase);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  void futex(int op, uint32_t value) { syscall(SYS_futex, &phase_, op, value, nullptr, nullptr, 0); }

  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<int> sleepers_{0};
};

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

struct alignas(64) Counter {
  std::atomic<int64_t> next{0};
};

// One thread's view of the region. each() hands out [begin, end) ranges of items until none are left; every operation
// has a counter of its own, so that no thread waits to reset one.
struct Team {
  Barrier& barrier;
  Counter* counter;
  int threads;
  int thread;

  template <class Body>
  void each(int64_t items, int64_t grain, Body body) {
    Counter& mine = *counter++;
    if (threads == 1) {
      if (items > 0) body(0, items);
      return;
    }
    for (;;) {
      int64_t begin = mine.next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= items) return;
      body(begin, begin + grain < items ? begin + grain : items);
    }
  }
  void sync() {
    if (threads > 1) barrier.wait();
  }
};

// Runs body(team) on every thread of the caller's OpenMP pool.
template <class Body>
void region(int threads, int64_t counters, Body body) {
  Array<Counter> counter(counters);
  Barrier barrier(threads);
#pragma omp parallel num_threads(threads)
  {
    Team team{barrier, counter.data(), threads, omp_get_thread_num()};
    body(team);
  }
}

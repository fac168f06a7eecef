// Sampling of one row as worker/sampler.py documents it: temperature, top-k, top-p, min-p, then one uniform through the
// inverse of the cumulative distribution over the kept tokens in ascending id.

INLINE uint64_t mix(uint64_t z) {
  z += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
// In [0, 1); depends on the request's seed and the token's index only.
INLINE float uniform(uint64_t seed, uint64_t index) { return (float)(mix(seed ^ mix(index)) >> 40) * 0x1p-24f; }

struct Sampling {
  float temperature, top_p, min_p;
  int32_t top_k;  // 0 keeps all
};

struct SampleScratch {
  Array<float> weights, candidates, peaks;
};

// The largest value v for which the values >= v add up to target: each counts 1, or by_mass its own value. Reorders them.
static float select_from_top(float* values, int64_t n, double target, bool by_mass) {
  double above = 0;
  for (;;) {
    const float a = values[0], b = values[n / 2], c = values[n - 1];
    const float pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
    int64_t greater = 0, equal = 0;
    double mass = 0;
    for (int64_t i = 0; i < n; i++) {  // [greater | equal | smaller]
      const float x = values[i];
      if (x < pivot) continue;
      values[i] = values[greater + equal];
      if (x > pivot) {
        values[greater + equal] = values[greater];
        values[greater++] = x;
        mass += by_mass ? x : 1;
      } else {
        values[greater + equal++] = x;
      }
    }
    const double reached = above + mass + equal * (by_mass ? (double)pivot : 1);
    if (greater && above + mass >= target) n = greater;
    else if (reached >= target || greater + equal == n) return pivot;
    else above = reached, values += greater + equal, n -= greater + equal;
  }
}

INLINE int64_t collect(const float* x, int64_t n, float least, float* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++) {
    out[count] = x[i];
    count += x[i] >= least;
  }
  return count;
}

// The k-th largest logit. The k-th largest of the peaks of 64 is a lower bound, and few logits pass it.
static float kth_largest(const float* logits, int64_t vocab, int64_t k, SampleScratch& s) {
  const int64_t blocks = (vocab + 63) / 64;
  s.peaks.resize(blocks), s.candidates.resize(vocab + 1);
  float least = -__builtin_inff();
  if (k <= blocks) {
    for (int64_t b = 0; b < blocks; b++) {
      float peak = logits[b * 64];
      for (int64_t i = b * 64; i < vocab && i < b * 64 + 64; i++) peak = logits[i] > peak ? logits[i] : peak;
      s.peaks[b] = peak;
    }
    least = select_from_top(s.peaks.data(), blocks, (double)k, false);
  }
  const int64_t n = collect(logits, vocab, least, s.candidates.data());
  return select_from_top(s.candidates.data(), n, (double)k, false);
}

static int32_t sample_row(const float* logits, int64_t vocab, const Sampling& how, float u, SampleScratch& s) {
  const int64_t padded = (vocab + 15) / 16 * 16;
  s.weights.resize(padded), s.candidates.resize(vocab + 1);
  float* weights = s.weights.data();
  v16 peaks = splat(-1e30f);
  int64_t i = 0;
  for (; i + 16 <= vocab; i += 16) peaks = vmax(peaks, load(logits + i));
  float top = hmax(peaks);
  for (; i < vocab; i++) top = logits[i] > top ? logits[i] : top;

  const float inverse = 1.f / how.temperature;
  const float least = how.top_k ? kth_largest(logits, vocab, how.top_k, s) : -__builtin_inff();
  double total = 0;
  for (i = 0; i < padded; i += 16) {
    v16 x = splat(-1e30f);
    if (i + 16 <= vocab) x = load(logits + i);
    else for (int64_t j = i; j < vocab; j++) x[j - i] = logits[j];
    v16 w = vexp((x - top) * inverse);
    w = (x >= least) & (x > -5e29f) ? w : splat(0.f);
    store(weights + i, w);
    total += hsum(w);
  }
  float threshold = how.min_p;
  if (how.top_p < 1.f) {  // tokens below the first bound hold less than 1 - top_p together
    const double target = how.top_p * total;
    const int64_t n = collect(weights, vocab, (float)((total - target) / vocab), s.candidates.data());
    const float nucleus = select_from_top(s.candidates.data(), n, target, true);
    threshold = nucleus > threshold ? nucleus : threshold;
  }
  if (threshold > 0.f) {
    total = 0;
    for (i = 0; i < padded; i += 16) {
      v16 w = load(weights + i);
      w = w >= threshold ? w : splat(0.f);
      store(weights + i, w);
      total += hsum(w);
    }
  }
  const double target = u * total;
  double seen = 0;
  for (i = 0; i + 16 < padded; i += 16) {
    const double next = seen + hsum(load(weights + i));
    if (next > target) break;
    seen = next;
  }
  for (int64_t j = i; j < vocab; j++) {
    seen += weights[j];
    if (seen > target && weights[j] > 0.f) return (int32_t)j;
  }
  for (int64_t j = vocab - 1; j > 0; j--)  // u is next to 1 and the two ways of summing differ
    if (weights[j] > 0.f) return (int32_t)j;
  return 0;
}

// Sixteen lanes, whatever the machine has: GCC and clang vectors that the compiler splits where registers are narrower.
// Included once per instruction set, inside that set's namespace.
typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef float v16_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t v16u_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t v16h __attribute__((vector_size(32)));
typedef uint16_t v16h_any __attribute__((vector_size(32), aligned(2), may_alias));

typedef uint8_t v16b __attribute__((vector_size(16)));
typedef int8_t v16s8_any __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t v16b_any __attribute__((vector_size(16), aligned(1), may_alias));

#define INLINE inline __attribute__((always_inline))

INLINE v16 splat(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16u splat_u(uint32_t x) { return v16u{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16 load(const float* p) { return *(const v16_any*)p; }
INLINE v16u load_u(const void* p) { return *(const v16u_any*)p; }
INLINE void store(float* p, v16 x) { *(v16_any*)p = x; }
INLINE v16 vmax(v16 a, v16 b) { return a > b ? a : b; }
INLINE v16 vmin(v16 a, v16 b) { return a < b ? a : b; }

INLINE float hsum(v16 x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float s[8], t[4];
  for (int i = 0; i < 8; i++) s[i] = x[i] + x[i + 8];
  for (int i = 0; i < 4; i++) t[i] = s[i] + s[i + 4];
  return (t[0] + t[2]) + (t[1] + t[3]);
}
INLINE float hmax(v16 x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

// bfloat16 <-> float32, round to nearest even.
INLINE v16 from_bf16(v16h h) { return (v16)(__builtin_convertvector(h, v16u) << 16); }
INLINE v16 load_bf16(const uint16_t* p) { return from_bf16(*(const v16h_any*)p); }
INLINE v16h to_bf16(v16 x) {
#ifdef __AVX512BF16__
  return (v16h)_mm512_cvtneps_pbh((__m512)x);
#else
  v16u u = (v16u)x;
  u += 0x7fff + ((u >> 16) & 1);
  return __builtin_convertvector(u >> 16, v16h);
#endif
}
INLINE float bf16_to_float(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
INLINE uint16_t float_to_bf16(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// To the nearest integer, ties to even where the machine does; |x| below 2^31.
INLINE v16 round_even(v16 x) {
#ifdef __AVX512F__
  return (v16)_mm512_roundscale_ps((__m512)x, 0);
#else
  return __builtin_convertvector(__builtin_convertvector(x + (x > 0.f ? splat(0.5f) : splat(-0.5f)), v16i), v16);
#endif
}

// e^x, relative error below 2e-7. Below -87 it is 0.
INLINE v16 vexp(v16 x) {
  x = vmax(x, splat(-87.3f));
  x = vmin(x, splat(88.3f));
  v16 t = x * 1.44269504088896341f;
  v16 n = round_even(t);
  v16 f = x - n * 0.693359375f;
  f = f + n * 2.12194440e-4f;
  v16 p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  v16i e = (__builtin_convertvector(n, v16i) + 127) << 23;
  return p * (v16)e;
}

template <bool FAST>
INLINE v16 reciprocal(v16 x) {
#ifdef __AVX512F__
  if (FAST) return (v16)_mm512_rcp14_ps((__m512)x);  // 2^-14, below bfloat16's own rounding
#endif
  return 1.0f / x;
}

template <bool FAST>
INLINE v16 vsigmoid(v16 x) { return reciprocal<FAST>(1.0f + vexp(-x)); }

// erf, absolute error below 1.5e-7 (Abramowitz and Stegun 7.1.26).
INLINE v16 verf(v16 x) {
  v16 a = x < 0.f ? -x : x;
  v16 t = 1.0f / (1.0f + 0.3275911f * a);
  v16 p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  v16 y = 1.0f - p * t * vexp(-a * a);
  return x < 0.f ? -y : y;
}

template <bool FAST>
INLINE v16 activate(v16 x, int32_t act) {
  switch (act) {
    case ACT_SILU: return x * vsigmoid<FAST>(x);
    case ACT_GELU: return 0.5f * x * (1.0f + verf(x * 0.70710678118654752f));
    case ACT_GELU_TANH: return x * vsigmoid<FAST>(1.5957691216057308f * (x + 0.044715f * x * x * x));
    case ACT_RELU: return vmax(x, splat(0.f));
    default: return x;
  }
}

// How a dtype lives in 32-bit words, and what one word of activations does to 16 words of weights.
struct F32Words {
  typedef float Element;
  static constexpr int P = 1;
  static constexpr bool FAST = false;
  static INLINE v16 dot(v16 acc, uint32_t a, v16u b) {
    float f;
    __builtin_memcpy(&f, &a, 4);
    return acc + f * (v16)b;
  }
  static INLINE v16 load16(const float* p) { return load(p); }
  static INLINE void store16(float* p, v16 x) { store(p, x); }
  static INLINE float get(float x) { return x; }
  static INLINE float put(float x) { return x; }
};

struct Bf16Words {
  typedef uint16_t Element;
  static constexpr int P = 2;
  static constexpr bool FAST = true;
  static INLINE v16 dot(v16 acc, uint32_t a, v16u b) {
#ifdef __AVX512BF16__
    return (v16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)splat_u(a), (__m512bh)b);
#else
    float lo = bf16_to_float((uint16_t)a), hi = bf16_to_float((uint16_t)(a >> 16));
    acc += lo * (v16)(b << 16);
    return acc + hi * (v16)(b & 0xffff0000u);
#endif
  }
  static INLINE v16 load16(const uint16_t* p) { return load_bf16(p); }
  static INLINE void store16(uint16_t* p, v16 x) { *(v16h_any*)p = to_bf16(x); }
  static INLINE float get(uint16_t x) { return bf16_to_float(x); }
  static INLINE uint16_t put(float x) { return float_to_bf16(x); }
};

INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 0) return (sign ? -1.f : 1.f) * (float)mantissa * 0x1p-24f;
  uint32_t u = sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | mantissa << 13;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

// Vectors of float, wide as the machine's registers, in the compiler's portable extension:
// the same source becomes AVX2, AVX-512 or NEON. Intrinsics only where g++ 12 was seen to
// emit several instructions for what the chip does in one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tongyun {

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};

inline vf splat(float x) { return x - vf{}; }

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even, as PyTorch does; the values stored here are never NaN.
inline void store(bf16* p, vf v) {
  vu u = (vu)v;
  u = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vh h = __builtin_convertvector(u, vh);
  std::memcpy(p, &h, sizeof h);
}

// Keeps a loaded vector in its register: g++ otherwise loads it again for every use, and a
// tile is then bound by loads instead of multiply-adds.
inline void pin(vf& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
// The first n < W elements, zeros behind them.
template <class T>
inline vf load_tail(const T* p, int n) {
  T tmp[W] = {};
  std::memcpy(tmp, p, n * sizeof(T));
  return load(tmp);
}

typedef float v4 __attribute__((vector_size(16)));

// The sums of four vectors, each added in the same order wherever it stands: neighbours,
// then pairs of neighbours, then the quarters of the register.
inline v4 sum4(vf a, vf b, vf c, vf d) {
#if defined(__AVX512F__)
  const auto half = [](vf v) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  };
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  return (v4)_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
#elif defined(__AVX2__)
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  return (v4)_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
#else
  v4 s{};
  const vf all[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    for (int q = 0; q < W; q += 4) s[i] += (all[i][q] + all[i][q + 1]) + (all[i][q + 2] + all[i][q + 3]);
  return s;
#endif
}

inline float sum(vf v) { return sum4(v, vf{}, vf{}, vf{})[0]; }

inline float largest(vf v) {
  float m = v[0];
  for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }

// The largest of n ≥ 1 elements.
inline float largest(const float* p, long n) {
  float most = p[0];
  long i = 0;
  if (n >= W) {
    vf all = load(p);
    for (i = W; i + W <= n; i += W) all = max(all, load(p + i));
    most = largest(all);
  }
  for (; i < n; ++i) most = p[i] > most ? p[i] : most;
  return most;
}

// e^x to about 2 ulp: 2^n × polynomial on [-ln2/2, ln2/2] (coefficients: Cephes' expf).
// Below -87.3 the result is e^-87.3, which every caller adds to something far larger.
inline vf exp(vf x) {
  x = max(min(x, splat(88.0f)), splat(-87.3f));
  vf shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 × 2^23 rounds to a whole number
  vf n = shifted - 12582912.0f;
  x = x - n * 0.693359375f;
  x = x + n * 2.12194440e-4f;
  vf y = x * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * (x * x) + x + 1.0f;
  vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
  return y * (vf)scale;
}

inline vf silu(vf x) { return x / (1.0f + exp(-x)); }

// y = silu(gate) × up over n elements; the tail goes through the same vectors, so that an
// element's value does not depend on where it stands.
inline void gated(const float* gate, const float* up, float* y, long n) {
  long i = 0;
  for (; i + W <= n; i += W) store(y + i, silu(load(gate + i)) * load(up + i));
  if (i < n) {
    float t[W];
    store(t, silu(load_tail(gate + i, int(n - i))) * load_tail(up + i, int(n - i)));
    std::memcpy(y + i, t, (n - i) * sizeof(float));
  }
}

}  // namespace tongyun

// Dot products of rows with rows: the one shape of arithmetic behind projections,
// experts and attention scores.
//
// Every single product is summed in the same order whatever tile it falls in: W partial
// sums over a block of KB elements, added pairwise, blocks added in order. A row's result
// therefore does not depend on the rows beside it, nor on how many there are.
#pragma once
#include <algorithm>
#include <vector>

#include "simd.h"

namespace tongyun {

constexpr int KB = 1024;
constexpr int LINE = 32;  // bf16 elements of a cache line
constexpr int MR = 4;     // rows of x in a tile: 4 × 3 sums and their operands fill 16 registers

// acc[m * ld + n] += x[m] · w[n] over one block of k elements. With `keep` the rows of w
// are also left there as floats, KB apart, for the next tile of x.
template <int M, int N, bool KEEP, class T>
inline void dot_tile(const float* const* x, const T* w, long ldw, int k, float* acc, long ld, float* keep) {
  vf s[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) s[m][n] = vf{};
  int i = 0;
  for (; i + W <= k; i += W) {
    // Streams of a row's length are too short for the hardware to foresee the next rows.
    if (sizeof(T) == 2 && i % LINE == 0)
      for (int n = 0; n < N; ++n) __builtin_prefetch(w + (N + n) * ldw + i);
    vf b[N];
    for (int n = 0; n < N; ++n) {
      b[n] = load(w + n * ldw + i);
      if (KEEP) store(keep + n * KB + i, b[n]);
    }
    for (int m = 0; m < M; ++m) {
      vf a = load(x[m] + i);
      for (int n = 0; n < N; ++n) s[m][n] += a * b[n];
    }
  }
  if (i < k)
    for (int n = 0; n < N; ++n) {
      vf b = load_tail(w + n * ldw + i, k - i);
      if (KEEP)
        for (int j = i; j < k; ++j) keep[n * KB + j] = widen(w[n * ldw + j]);
      for (int m = 0; m < M; ++m) s[m][n] += load_tail(x[m] + i, k - i) * b;
    }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m * ld + n] += sum(s[m][n]);
}

// Columns of w beside each other in a tile of M rows: enough independent sums to hide
// the latency of a multiply-add, few enough to stay in registers.
constexpr int columns(int m) { return m == 1 ? 8 : m == 2 ? 6 : m == 3 ? 4 : 3; }

template <int M, class T>
inline void dot_rows(const float* const* x, const T* w, long ldw, int k, long rows, float* acc, long ld) {
  constexpr int N = columns(M);
  long n = 0;
  for (; n + N <= rows; n += N) dot_tile<M, N, false>(x, w + n * ldw, ldw, k, acc + n, ld, nullptr);
  for (; n + 2 <= rows; n += 2) dot_tile<M, 2, false>(x, w + n * ldw, ldw, k, acc + n, ld, nullptr);
  for (; n < rows; ++n) dot_tile<M, 1, false>(x, w + n * ldw, ldw, k, acc + n, ld, nullptr);
}

// acc[m][n] += x[m] · w[n] for 1 … MR rows of x and `rows` rows of w, one block of k.
template <class T>
inline void dot_block(int m, const float* const* x, const T* w, long ldw, int k, long rows, float* acc, long ld) {
  switch (m) {
    case 1: return dot_rows<1>(x, w, ldw, k, rows, acc, ld);
    case 2: return dot_rows<2>(x, w, ldw, k, rows, acc, ld);
    case 3: return dot_rows<3>(x, w, ldw, k, rows, acc, ld);
    default: return dot_rows<4>(x, w, ldw, k, rows, acc, ld);
  }
}

template <int N, class T>
inline void dot_keep(int m, const float* const* x, const T* w, long ldw, int k, float* acc, long ld, float* keep) {
  switch (m) {
    case 1: return dot_tile<1, N, true>(x, w, ldw, k, acc, ld, keep);
    case 2: return dot_tile<2, N, true>(x, w, ldw, k, acc, ld, keep);
    case 3: return dot_tile<3, N, true>(x, w, ldw, k, acc, ld, keep);
    default: return dot_tile<4, N, true>(x, w, ldw, k, acc, ld, keep);
  }
}

template <int N>
inline void dot_kept(int m, const float* const* x, const float* keep, int k, float* acc, long ld) {
  switch (m) {
    case 1: return dot_tile<1, N, false>(x, keep, KB, k, acc, ld, nullptr);
    case 2: return dot_tile<2, N, false>(x, keep, KB, k, acc, ld, nullptr);
    case 3: return dot_tile<3, N, false>(x, keep, KB, k, acc, ld, nullptr);
    default: return dot_tile<4, N, false>(x, keep, KB, k, acc, ld, nullptr);
  }
}

// Rows of x cut into the fewest tiles, as even as can be: 5 is 3 + 2, not 4 + 1.
struct Tiles {
  explicit Tiles(long rows) : rows(rows), count((rows + MR - 1) / MR) {}
  long begin(long tile) const { return rows * tile / count; }
  int size(long tile) const { return int(begin(tile + 1) - begin(tile)); }
  long rows, count;
};

inline void offset_rows(const float* const* x, int m, long by, const float** out) {
  for (int i = 0; i < m; ++i) out[i] = x[i] + by;
}

inline float* scratch(std::vector<float>& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

// Beyond this many rows of x the weights are turned to floats a panel at a time.
constexpr long FEW = 32;

// Products of all rows of x with one panel of weights: `segments` runs of `rows` rows,
// run s starting at w[s]. `emit(m0, m, acc)` receives finished rows m0 … m0+m of x, in
// an array of segments × rows sums a row.
template <class T, class Emit>
void dot_panel(const float* const* x, long M, const T* const* w, int segments, long rows, long K, const Emit& emit) {
  static thread_local std::vector<float> sums, floats;
  const long ld = segments * rows;
  const float* at[MR];
  Tiles tiles(M);
  if (M <= FEW) {
    float* acc = scratch(sums, M * ld);
    std::fill(acc, acc + M * ld, 0.0f);
    float* keep = scratch(floats, 4 * KB);
    for (int s = 0; s < segments; ++s)
      for (long k0 = 0; k0 < K; k0 += KB) {
        const int k = int(std::min<long>(KB, K - k0));
        if (M <= MR || sizeof(T) == 4) {
          for (long t = 0; t < tiles.count; ++t) {
            offset_rows(x + tiles.begin(t), tiles.size(t), k0, at);
            dot_block(tiles.size(t), at, w[s] + k0, K, k, rows, acc + tiles.begin(t) * ld + s * rows, ld);
          }
          continue;
        }
        auto group = [&](auto columns, long n) {
          constexpr int N = decltype(columns)::value;
          for (long t = 0; t < tiles.count; ++t) {
            offset_rows(x + tiles.begin(t), tiles.size(t), k0, at);
            float* to = acc + tiles.begin(t) * ld + s * rows + n;
            if (t == 0)
              dot_keep<N>(tiles.size(t), at, w[s] + n * K + k0, K, k, to, ld, keep);
            else
              dot_kept<N>(tiles.size(t), at, keep, k, to, ld);
          }
        };
        long n = 0;
        for (; n + 3 <= rows; n += 3) group(std::integral_constant<int, 3>{}, n);
        for (; n < rows; ++n) group(std::integral_constant<int, 1>{}, n);
      }
    emit(0L, M, acc);
    return;
  }
  const float* panel = nullptr;
  if constexpr (sizeof(T) == 2) {
    float* to = scratch(floats, ld * K);
    panel = to;
    for (int s = 0; s < segments; ++s) {
      const T* from = w[s];
      long i = 0, n = rows * K;
      for (; i + W <= n; i += W) store(to + i, load(from + i));
      for (; i < n; ++i) to[i] = widen(from[i]);
      to += n;
    }
  }
  float* acc = scratch(sums, MR * ld);
  for (long t = 0; t < tiles.count; ++t) {
    const int m = tiles.size(t);
    std::fill(acc, acc + m * ld, 0.0f);
    for (long k0 = 0; k0 < K; k0 += KB) {
      const int k = int(std::min<long>(KB, K - k0));
      offset_rows(x + tiles.begin(t), m, k0, at);
      if constexpr (sizeof(T) == 2)
        dot_block(m, at, panel + k0, K, k, ld, acc, ld);
      else
        for (int s = 0; s < segments; ++s)
          dot_block(m, at, (const float*)w[s] + k0, K, k, rows, acc + s * rows, ld);
    }
    emit(tiles.begin(t), m, acc);
  }
}

// Weight rows of a panel: long enough streams for few rows of x, an L2-sized panel of
// floats for many.
inline long panel_rows(long M, long K) {
  if (M <= FEW) return std::clamp(49152 / K / 12 * 12, 12L, 96L);
  return std::clamp(65536 / K / 12 * 12, 12L, 96L);
}

}  // namespace tongyun

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

constexpr int KB = 1024;  // four rows of x and three of w, as floats, share a first-level cache
constexpr int LINE = 32;  // bf16 elements of a cache line
constexpr int MR = 4;     // rows of x in a tile: 4 × 3 sums and their operands fill 16 registers

// Weights to fetch while a tile is computed, so that memory and arithmetic overlap: the
// lines `phase`, `phase + step`, … of the rows at `rows`, which have the shape of this
// tile's own. Rows are too short for the hardware to foresee the next ones.
template <class T>
struct Ahead {
  const T* rows = nullptr;
  int phase = 0, step = 1;
};

// acc[m * ld + n] += x[m] · w[n] over one block of k elements. With `keep` the rows of w
// are also left there as floats, KB apart, for the next tile of x.
// Not inlined: amid a caller's variables g++ no longer keeps the sums in registers.
template <int M, int N, bool KEEP, class T, class A>
__attribute__((noinline)) void dot_tile(const float* const* x, const T* w, long ldw, int k, float* acc, long ld, float* keep,
                     Ahead<A> ahead, long lda) {
  vf s[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) s[m][n] = vf{};
  int i = 0, line = ahead.rows ? ahead.phase * LINE : k;
  for (; i + W <= k; i += W) {
    if (i >= line) {
      for (int n = 0; n < N; ++n) __builtin_prefetch(ahead.rows + n * lda + line);
      line += ahead.step * LINE;
    }
    vf b[N];
    for (int n = 0; n < N; ++n) {
      b[n] = load(w + n * ldw + i);
      pin(b[n]);
      if (KEEP) store(keep + n * KB + i, b[n]);
    }
    for (int m = 0; m < M; ++m) {
      vf a = load(x[m] + i);
      if (N > 1) pin(a);
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
    for (int n = 0; n < N; n += 4) {
      const auto at = [&](int i) { return n + i < N ? s[m][n + i < N ? n + i : 0] : vf{}; };
      const v4 four = sum4(at(0), at(1), at(2), at(3));
      float* to = acc + m * ld + n;
      if (n + 4 <= N) {
        v4 old;
        std::memcpy(&old, to, sizeof old);
        old += four;
        std::memcpy(to, &old, sizeof old);
      } else {
        for (int i = 0; n + i < N; ++i) to[i] += four[i];
      }
    }
}

// Columns of w beside each other in a tile of M rows: enough independent sums to hide
// the latency of a multiply-add, few enough to stay in registers.
constexpr int columns(int m) { return m == 1 ? 8 : m == 4 ? 3 : 4; }

// x[m] · w[n] for M rows of x and `rows` whole rows of w, in the order they lie in memory;
// `ahead` are the rows of the next such call, in case these are the last ones.
template <int M, class T>
inline void dot_rows(const float* const* x, const T* w, long ldw, long K, long rows, float* acc, long ld,
                     Ahead<T> ahead) {
  constexpr int N = columns(M);
  auto group = [&](auto columns, long n) {
    constexpr int C = decltype(columns)::value;
    const float* at[M];
    for (long k0 = 0; k0 < K; k0 += KB) {
      for (int m = 0; m < M; ++m) at[m] = x[m] + k0;
      const T* from = w + n * ldw + k0;
      const Ahead<T> next{ahead.rows ? ahead.rows + n * ldw + k0 : nullptr, ahead.phase, ahead.step};
      dot_tile<M, C, false>(at, from, ldw, int(std::min<long>(KB, K - k0)), acc + n, ld, nullptr, next, ldw);
    }
  };
  long n = 0;
  for (; n + N <= rows; n += N) group(std::integral_constant<int, N>{}, n);
  for (; n + 4 <= rows; n += 4) group(std::integral_constant<int, 4>{}, n);
  for (; n < rows; ++n) group(std::integral_constant<int, 1>{}, n);
}

// acc[m][n] += x[m] · w[n] for 1 … MR rows of x and `rows` rows of w.
template <class T>
inline void dot_block(int m, const float* const* x, const T* w, long ldw, long K, long rows, float* acc, long ld,
                      Ahead<T> ahead) {
  switch (m) {
    case 1: return dot_rows<1>(x, w, ldw, K, rows, acc, ld, ahead);
    case 2: return dot_rows<2>(x, w, ldw, K, rows, acc, ld, ahead);
    case 3: return dot_rows<3>(x, w, ldw, K, rows, acc, ld, ahead);
    default: return dot_rows<4>(x, w, ldw, K, rows, acc, ld, ahead);
  }
}

template <int N, bool KEEP, class T, class A>
inline void dot_tile_of(int m, const float* const* x, const T* w, long ldw, int k, float* acc, long ld, float* keep,
                        Ahead<A> ahead, long lda) {
  switch (m) {
    case 1: return dot_tile<1, N, KEEP>(x, w, ldw, k, acc, ld, keep, ahead, lda);
    case 2: return dot_tile<2, N, KEEP>(x, w, ldw, k, acc, ld, keep, ahead, lda);
    case 3: return dot_tile<3, N, KEEP>(x, w, ldw, k, acc, ld, keep, ahead, lda);
    default: return dot_tile<4, N, KEEP>(x, w, ldw, k, acc, ld, keep, ahead, lda);
  }
}

// Rows of x cut into the fewest tiles, as even as can be: 5 is 3 + 2, not 4 + 1.
struct Tiles {
  explicit Tiles(long rows, long most = MR) : rows(rows), count((rows + most - 1) / most) {}
  long begin(long tile) const { return rows * tile / count; }
  int size(long tile) const { return int(begin(tile + 1) - begin(tile)); }
  long rows, count;
};

inline void offset_rows(const float* const* x, int m, long by, const float** out) {
  for (int i = 0; i < m; ++i) out[i] = x[i] + by;
}

// Memory of a thread that grows and is reused; on a cache line, so that no vector of it
// lies across two.
class Scratch {
 public:
  float* floats(size_t size) {
    if (buffer_.size() < size + 16) buffer_.resize(size + 16);
    return (float*)(((uintptr_t)buffer_.data() + 63) & ~uintptr_t(63));
  }

 private:
  std::vector<float> buffer_;
};

// Beyond this many rows of x the weights are turned to floats a panel at a time.
constexpr long FEW = 32;

// A few rows of x with one run of weight rows: three rows of w are turned to floats by the
// first tile and used by the others while the next three are on their way.
template <class T>
void dot_few(const float* const* x, const Tiles& tiles, const T* w, long rows, long K, float* acc, long ld,
             float* keep) {
  const float* at[MR];
  for (long k0 = 0; k0 < K; k0 += KB) {
    const int k = int(std::min<long>(KB, K - k0));
    auto group = [&](auto columns, long n) {
      constexpr int N = decltype(columns)::value;
      const T* from = w + n * K + k0;
      // After the last group of this block of k the first of the next one follows.
      const T* next = n + N < rows ? from + N * K : w + k0 + KB;
      for (long t = 0; t < tiles.count; ++t) {
        const int m = tiles.size(t);
        offset_rows(x + tiles.begin(t), m, k0, at);
        float* to = acc + tiles.begin(t) * ld + n;
        const Ahead<T> ahead{next, int(t), int(tiles.count)};
        if (t == 0)
          dot_tile_of<N, true>(m, at, from, K, k, to, ld, keep, ahead, K);
        else
          dot_tile_of<N, false>(m, at, (const float*)keep, KB, k, to, ld, nullptr, ahead, K);
      }
    };
    long n = 0;
    for (; n + 3 <= rows; n += 3) group(std::integral_constant<int, 3>{}, n);
    for (; n < rows; ++n) group(std::integral_constant<int, 1>{}, n);
  }
}

// Products of all rows of x with one panel of weights: `segments` runs of `rows` rows,
// run s starting at w[s]. `emit(m0, m, acc)` receives finished rows m0 … m0+m of x, in
// an array of segments × rows sums a row. `next` is how far ahead this thread's next
// panel probably lies.
template <class T, class Emit>
void dot_panel(const float* const* x, long M, const T* const* w, int segments, long rows, long K, long next,
               const Emit& emit) {
  static thread_local Scratch sums, panels;
  const long ld = segments * rows;
  Tiles tiles(M);
  if (M <= FEW) {
    float* acc = sums.floats(M * ld);
    std::fill(acc, acc + M * ld, 0.0f);
    float* keep = panels.floats(4 * KB);
    for (int s = 0; s < segments; ++s)
      if (M > MR && sizeof(T) == 2)
        dot_few(x, tiles, w[s], rows, K, acc + s * rows, ld, keep);
      else
        for (long t = 0; t < tiles.count; ++t)
          dot_block(tiles.size(t), x + tiles.begin(t), w[s], K, K, rows, acc + tiles.begin(t) * ld + s * rows, ld,
                    Ahead<T>{sizeof(T) == 2 ? w[s] + columns(tiles.size(t)) * K : nullptr});
    emit(0L, M, acc);
    return;
  }
  const long length = rows * K;
  const float* from[2] = {(const float*)w[0], (const float*)w[segments - 1]};
  if constexpr (sizeof(T) == 2) {
    float* to = panels.floats(segments * length);
    for (int s = 0; s < segments; ++s, to += length) {
      from[s] = to;
      long i = 0;
      for (; i + W <= length; i += W) store(to + i, load(w[s] + i));
      for (; i < length; ++i) to[i] = widen(w[s][i]);
    }
  }
  float* acc = sums.floats(MR * ld);
  for (long t = 0; t < tiles.count; ++t) {
    const int m = tiles.size(t);
    std::fill(acc, acc + m * ld, 0.0f);
    for (int s = 0; s < segments; ++s) {
      for (long i = length * t / tiles.count; i < length * (t + 1) / tiles.count; i += 64 / sizeof(T))
        __builtin_prefetch(w[s] + next + i, 0, 2);
      dot_block(m, x + tiles.begin(t), from[s], K, K, rows, acc + s * rows, ld, Ahead<float>{});
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

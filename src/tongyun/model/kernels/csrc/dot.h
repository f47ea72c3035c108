// Dot products of rows with rows: the one shape of arithmetic behind projections,
// experts and attention scores.
//
// Every single product is summed in the same order whatever tile it falls in: W partial
// sums from the first element to the last, then added up as in `sum4`. A row's result
// therefore does not depend on the rows beside it, nor on how many there are.
#pragma once
#include <algorithm>
#include <vector>

#include "simd.h"

namespace tongyun {

constexpr int MR = 4;  // rows of x in a tile: 4 × 3 sums and their operands fill 16 registers

// Weights to fetch while a tile is computed, so that memory and arithmetic overlap: the
// lines `phase`, `phase + step`, … of the rows at `rows`, which have the shape of this
// tile's own. Rows are too short for the hardware to foresee the next ones.
template <class T>
struct Ahead {
  const T* rows = nullptr;
  int phase = 0, step = 1;
};

// acc[m * ld + n] += x[m] · w[n] over k elements. Narrow weights are widened anew for every
// tile of x: beside twelve multiply-adds that costs nothing, and it halves what is read
// from the caches.
// Not inlined: amid a caller's variables g++ no longer keeps the sums in registers.
template <int M, int N, class T>
__attribute__((noinline)) void dot_tile(const float* const* x, const T* w, long ldw, int k, float* acc, long ld,
                                        Ahead<T> ahead) {
  vf s[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) s[m][n] = vf{};
  constexpr int LINE = 64 / sizeof(T);
  int i = 0, line = ahead.rows ? ahead.phase * LINE : k;
  for (; i + W <= k; i += W) {
    if (i >= line) {
      for (int n = 0; n < N; ++n) __builtin_prefetch(ahead.rows + n * ldw + line);
      line += ahead.step * LINE;
    }
    vf b[N];
    for (int n = 0; n < N; ++n) {
      b[n] = load(w + n * ldw + i);
      pin(b[n]);
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
    const Ahead<T> next{ahead.rows ? ahead.rows + n * ldw : nullptr, ahead.phase, ahead.step};
    dot_tile<M, C>(x, w + n * ldw, ldw, int(K), acc + n, ld, next);
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

// Rows of x cut into the fewest tiles, as even as can be: 5 is 3 + 2, not 4 + 1.
struct Tiles {
  explicit Tiles(long rows, long most = MR) : rows(rows), count((rows + most - 1) / most) {}
  long begin(long tile) const { return rows * tile / count; }
  int size(long tile) const { return int(begin(tile + 1) - begin(tile)); }
  long rows, count;
};

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

// Up to so many rows of x, all of them meet twelve rows of weights while those are in the
// first-level cache; beyond, tiles of x meet a panel that stays in the second.
constexpr long FEW = 32;
constexpr long FEW_ROWS = 12;

// Products of all rows of x with one panel of weights: `segments` runs of `rows` rows,
// run s starting at w[s]. `emit(m0, m, acc)` receives finished rows m0 … m0+m of x, in
// an array of segments × rows sums a row. `next` is how far ahead this thread's next
// panel probably lies.
template <class T, class Emit>
void dot_panel(const float* const* x, long M, const T* const* w, int segments, long rows, long K, long next,
               const Emit& emit) {
  static thread_local Scratch sums;
  const long ld = segments * rows;
  const Tiles tiles(M);
  if (M > FEW) {
    float* acc = sums.floats(MR * ld);
    for (long t = 0; t < tiles.count; ++t) {
      std::fill(acc, acc + tiles.size(t) * ld, 0.0f);
      for (int s = 0; s < segments; ++s)
        dot_block(tiles.size(t), x + tiles.begin(t), w[s], K, K, rows, acc + s * rows, ld,
                  Ahead<T>{w[s] + next, int(t), int(tiles.count)});
      emit(tiles.begin(t), tiles.size(t), acc);
    }
    return;
  }
  float* acc = sums.floats(M * ld);
  std::fill(acc, acc + M * ld, 0.0f);
  const long few = M > MR ? FEW_ROWS : columns(int(M));
  for (int s = 0; s < segments; ++s)
    for (long r = 0; r < rows; r += few)
      for (long t = 0; t < tiles.count; ++t)
        dot_block(tiles.size(t), x + tiles.begin(t), w[s] + r * K, K, K, std::min(few, rows - r),
                  acc + tiles.begin(t) * ld + s * rows + r, ld,
                  Ahead<T>{w[s] + (r + few) * K, int(t), int(tiles.count)});
  emit(0L, M, acc);
}

// Weight rows of a panel: long enough to be worth fetching an item, and for many rows of
// x as much as a second-level cache holds beside x.
template <class T>
inline long panel_rows(long K) {
  return std::clamp(98304 / K / long(sizeof(T)) / 12 * 12, 12L, 96L);
}

}  // namespace tongyun

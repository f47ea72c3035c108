#include <cmath>

#include "dot.h"
#include "kernels.h"
#include "parallel.h"

// Attention straight on cache blocks. The context is cut into spans of SPAN tokens at fixed
// places; a query's span gives a partial softmax, and partials are merged in order. Prefill,
// decode, chunk boundaries and the number of threads thus change nothing in a query's sums.
namespace tongyun {

constexpr long SPAN = 512;
constexpr long TILE_ROWS = 32;

namespace {

// Query rows (tokens × heads of one key/value head) that are worked on together.
struct Tile {
  long piece, kv_head, token, tokens;  // first token within the piece, and how many
};

struct Partial {  // of one row: largest score, sum of weights, weighted values
  static long floats(long width) { return width + 2; }
};

template <class T>
struct Pages {
  const T *keys, *values;
  const int32_t* blocks;
  long kv_head;
  PageShape s;
  const T* at(const T* cache, long token) const {
    return cache + ((long(blocks[token / s.block]) * s.kv_heads + kv_head) * s.block + token % s.block) * s.width;
  }
  long run(long token, long end) const { return std::min(end, (token / s.block + 1) * s.block) - token; }
};

// Context tokens that lie together.
template <class T>
struct Run {
  const T* at;
  long tokens;
};

// out[m] = Σ p[m][t] v[t] over all runs, for N registers' worth of columns. Not inlined for
// the reason given at dot_tile.
template <int M, int N, class T>
__attribute__((noinline)) void weigh_slab(const float* p, long ldp, const std::vector<Run<T>>& runs, long column,
                                          long width, float* out, long ldo) {
  vf acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < N; ++j) acc[m][j] = vf{};
  for (size_t r = 0; r < runs.size(); ++r) {
    const T* v = runs[r].at + column;
    const T* next = r + 1 < runs.size() ? runs[r + 1].at + column : v;
    for (long t = 0; t < runs[r].tokens; ++t, v += width, next += width, ++p) {
      __builtin_prefetch(next);
      vf b[N];
      for (int j = 0; j < N; ++j) {
        b[j] = load(v + j * W);
        pin(b[j]);
      }
      for (int m = 0; m < M; ++m) {
        vf a = splat(p[m * ldp]);
        for (int j = 0; j < N; ++j) acc[m][j] += a * b[j];
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < N; ++j) store(out + m * ldo + j * W, acc[m][j]);
}

template <int M, class T>
inline void weigh_rows(const float* p, long ldp, const std::vector<Run<T>>& runs, long width, float* out, long ldo) {
  constexpr int N = M == 1 ? 8 : M == 2 ? 4 : 2;
  long d = 0;
  for (; d + N * W <= width; d += N * W) weigh_slab<M, N>(p, ldp, runs, d, width, out + d, ldo);
  for (; d < width; d += W) weigh_slab<M, 1>(p, ldp, runs, d, width, out + d, ldo);
}

template <class T>
inline void weigh(long m, const float* p, long ldp, const std::vector<Run<T>>& runs, long width, float* out,
                  long ldo) {
  switch (m) {
    case 1: return weigh_rows<1>(p, ldp, runs, width, out, ldo);
    case 2: return weigh_rows<2>(p, ldp, runs, width, out, ldo);
    case 3: return weigh_rows<3>(p, ldp, runs, width, out, ldo);
    case 4: return weigh_rows<4>(p, ldp, runs, width, out, ldo);
    case 5: return weigh_rows<5>(p, ldp, runs, width, out, ldo);
    default: return weigh_rows<6>(p, ldp, runs, width, out, ldo);
  }
}

// exp((p - most) × scale) over the first n of `padded` scores, zeros behind; returns the sum.
inline float soften(float* p, long n, long padded, float most, float scale) {
  vf total{};
  for (long i = 0; i < n; i += W) {
    vf e = exp((load(p + i) - most) * scale);
    if (i + W > n) {
      float t[W] = {};
      std::memcpy(t, &e, (n - i) * sizeof(float));
      std::memcpy(&e, t, sizeof e);
    }
    store(p + i, e);
    total += e;
  }
  for (long i = (n + W - 1) / W * W; i < padded; ++i) p[i] = 0.0f;
  return sum(total);
}

// Partials of every row of a tile over context tokens [begin, end). `limit(r)` is the
// number of context tokens row r may see.
template <class T, class Limit>
void attend_span(const float* const* q, long rows, const Pages<T>& pages, long begin, long end, const Limit& limit,
                 float* partials) {
  static thread_local Scratch buffer;
  const long width = pages.s.width, length = end - begin, ld = SPAN + W;
  const long each = Partial::floats(width);
  float* p = buffer.floats(rows * ld);
  for (long r = 0; r < rows; ++r) std::fill(p + r * ld, p + r * ld + length, 0.0f);
  // Scores. Tiles of three rows and four tokens: blocks hold a multiple of four, usually.
  Tiles tiles(rows, 3);
  for (long t = begin; t < end;) {
    const long n = pages.run(t, end);
    const T* next = t + n < end ? pages.at(pages.keys, t + n) : pages.at(pages.values, begin);
    for (long i = 0; i < tiles.count; ++i)
      dot_block(tiles.size(i), q + tiles.begin(i), pages.at(pages.keys, t), width, width, n,
                p + tiles.begin(i) * ld + (t - begin), ld, Ahead<T>{next, int(i), int(tiles.count)});
    t += n;
  }
  const float scale = 1.0f / std::sqrt(float(width));
  for (long r = 0; r < rows; ++r) {
    const long n = std::clamp(limit(r) - begin, 0L, length);
    float* part = partials + r * each;
    const float most = n ? largest(p + r * ld, n) : 0.0f;
    part[0] = most * scale;
    part[1] = soften(p + r * ld, n, length, most, scale);
  }
  std::vector<Run<T>> runs;
  for (long t = begin; t < end;) {
    runs.push_back({pages.at(pages.values, t), pages.run(t, end)});
    t += runs.back().tokens;
  }
  Tiles sums(rows, 6);
  for (long i = 0; i < sums.count; ++i) {
    const long r = sums.begin(i);
    weigh(sums.size(i), p + r * ld, ld, runs, width, partials + r * each + 2, each);
  }
}

// into ← into ⊕ part, where a sum of zero is the neutral element.
void merge(float* into, const float* part, long width) {
  if (part[1] == 0.0f) return;
  if (into[1] == 0.0f) {
    std::copy(part, part + Partial::floats(width), into);
    return;
  }
  const float most = std::max(into[0], part[0]);
  const float a = std::exp(into[0] - most), b = std::exp(part[0] - most);
  into[0] = most;
  into[1] = into[1] * a + part[1] * b;
  for (long d = 2; d < width + 2; ++d) into[d] = into[d] * a + part[d] * b;
}

void finish(const float* part, float* out, long width) {
  const float scale = 1.0f / part[1];
  for (long d = 0; d < width; ++d) out[d] = part[2 + d] * scale;
}

template <class T>
void write_pages(const float* k, const float* v, T* keys, T* values, const int64_t* slots, const PageShape& s) {
  parallel(s.tokens, 2.0 * s.tokens * s.kv_heads * s.width, [&](long t) {
    for (long h = 0; h < s.kv_heads; ++h) {
      const long to = ((slots[t] / s.block * s.kv_heads + h) * s.block + slots[t] % s.block) * s.width;
      for (long d = 0; d < s.width; d += W) {
        store(keys + to + d, load(k + t * s.k_stride + h * s.width + d));
        store(values + to + d, load(v + t * s.v_stride + h * s.width + d));
      }
    }
  });
}

}  // namespace

template <class T>
void paged_attention(const float* q, const float* k, const float* v, T* keys, T* values, const int64_t* slots,
                     const int32_t* rows, const int32_t* starts, const int32_t* blocks, float* out, PageShape s) {
  write_pages(k, v, keys, values, slots, s);
  const long group = s.heads / s.kv_heads, each = Partial::floats(s.width);
  const long tile_tokens = std::max(1L, TILE_ROWS / group);
  std::vector<Tile> tiles;
  double cost = 0;
  long longest = 1;
  for (long p = 0; p < s.pieces; ++p) {
    const long tokens = rows[p + 1] - rows[p], context = starts[p] + tokens;
    cost += 2.0 * tokens * (starts[p] + tokens / 2 + 1) * s.heads * s.width;
    longest = std::max(longest, (context + SPAN - 1) / SPAN);
    // Last tokens first: they see the most context, and long items should not come last.
    for (long t = (tokens - 1) / tile_tokens * tile_tokens; t >= 0; t -= tile_tokens)
      for (long h = 0; h < s.kv_heads; ++h) tiles.push_back({p, h, t, std::min(tile_tokens, tokens - t)});
  }

  auto span = [&](const Tile& tile, long index, float* partials) {
    const long begin = index * SPAN, row = rows[tile.piece] + tile.token;
    const long first = starts[tile.piece] + tile.token;  // context tokens before the tile
    const long end = std::min(begin + SPAN, first + tile.tokens);
    std::vector<const float*> from(tile.tokens * group);
    for (long r = 0; r < tile.tokens * group; ++r)
      from[r] = q + (row + r / group) * s.q_stride + (tile.kv_head * group + r % group) * s.width;
    Pages<T> pages{keys, values, blocks + tile.piece * s.row_blocks, tile.kv_head, s};
    attend_span(from.data(), long(from.size()), pages, begin, end, [&](long r) { return first + r / group + 1; },
                partials);
  };
  auto spans = [&](const Tile& tile) { return (starts[tile.piece] + tile.token + tile.tokens + SPAN - 1) / SPAN; };
  auto write = [&](const Tile& tile, const float* sums) {
    for (long r = 0; r < tile.tokens * group; ++r) {
      const long token = rows[tile.piece] + tile.token + r / group, head = tile.kv_head * group + r % group;
      finish(sums + r * each, out + (token * s.heads + head) * s.width, s.width);
    }
  };
  auto merge_tile = [&](const Tile& tile, float* sums, const float* partials) {
    for (long r = 0; r < tile.tokens * group; ++r) merge(sums + r * each, partials + r * each, s.width);
  };

  const long tile_floats = tile_tokens * group * each;
  if (longest == 1 || long(tiles.size()) >= 2L * thread_count()) {
    parallel(long(tiles.size()), cost, [&](long i) {
      static thread_local Scratch sums_buffer, partial_buffer;
      float *sums = sums_buffer.floats(tile_floats), *partials = partial_buffer.floats(tile_floats);
      std::fill(sums, sums + tile_floats, 0.0f);
      for (long j = 0; j < spans(tiles[i]); ++j) {
        span(tiles[i], j, partials);
        merge_tile(tiles[i], sums, partials);
      }
      write(tiles[i], sums);
    });
    return;
  }
  // Few queries with long contexts: spans in parallel, merged afterwards in the same order.
  static thread_local Scratch all_buffer;
  float* all = all_buffer.floats(tiles.size() * longest * tile_floats);
  parallel(long(tiles.size()) * longest, cost, [&](long i) {
    const Tile& tile = tiles[i / longest];
    if (i % longest < spans(tile)) span(tile, i % longest, all + i * tile_floats);
  });
  parallel(long(tiles.size()), double(tiles.size()) * longest * tile_floats, [&](long i) {
    float* sums = all + i * longest * tile_floats;  // the first span's partial becomes the sum
    for (long j = 1; j < spans(tiles[i]); ++j) merge_tile(tiles[i], sums, sums + j * tile_floats);
    write(tiles[i], sums);
  });
}

template void paged_attention<float>(const float*, const float*, const float*, float*, float*, const int64_t*,
                                     const int32_t*, const int32_t*, const int32_t*, float*, PageShape);
template void paged_attention<bf16>(const float*, const float*, const float*, bf16*, bf16*, const int64_t*,
                                    const int32_t*, const int32_t*, const int32_t*, float*, PageShape);

}  // namespace tongyun

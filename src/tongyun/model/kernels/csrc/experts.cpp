#include <atomic>
#include <cmath>

#include "dot.h"
#include "kernels.h"
#include "parallel.h"

namespace tongyun {

// A (token, choice) pair is a slot. Slots are grouped by expert; every expert's slots are
// the rows of two small products, and a token's outputs are added in the order of its
// choices, whoever else chose the same experts.
template <class T>
void experts(const float* x, const T* gate_up, const T* down, const int64_t* chosen, const float* weight, float* y,
             ExpertShape s) {
  const long D = s.hidden, I = s.inner, slots = s.tokens * s.per_token;
  std::vector<long> first(s.experts + 1, 0), slot(slots);
  for (long i = 0; i < slots; ++i) ++first[chosen[i] + 1];
  for (long e = 0; e < s.experts; ++e) first[e + 1] += first[e];
  std::vector<long> next(first.begin(), first.end() - 1);
  for (long i = 0; i < slots; ++i) slot[next[chosen[i]]++] = i;

  static thread_local Scratch inner_buffer, out_buffer;
  float* inner = inner_buffer.floats(slots * I);
  float* out = out_buffer.floats(slots * D);
  std::vector<const float*> from(slots), middle(slots);
  for (long i = 0; i < slots; ++i) {
    from[i] = x + slot[i] / s.per_token * D;
    middle[i] = inner + i * I;
  }

  struct Item {
    long expert, row;
  };
  std::vector<Item> items;
  auto cut = [&](long rows, long panel) {
    items.clear();
    for (long e = 0; e < s.experts; ++e)
      if (first[e + 1] > first[e])
        for (long r = 0; r < rows; r += panel) items.push_back({e, r});
  };

  const long P = 48;
  cut(I, P / 2);
  parallel(long(items.size()), 2.0 * slots * I * D, [&](long index) {
    const auto [e, i0] = items[index];
    const long n = std::min(P / 2, I - i0), at = first[e], m = first[e + 1] - at;
    const T* w[2] = {gate_up + (e * 2 * I + i0) * D, gate_up + (e * 2 * I + I + i0) * D};
    dot_panel(from.data() + at, m, w, 2, n, D, n * D, [&](long m0, long rows, const float* acc) {
      for (long i = 0; i < rows; ++i)
        gated(acc + i * 2 * n, acc + i * 2 * n + n, inner + (at + m0 + i) * I + i0, n);
    });
  });

  cut(D, P);
  parallel(long(items.size()), 1.0 * slots * I * D, [&](long index) {
    const auto [e, o] = items[index];
    const long n = std::min(P, D - o), at = first[e], m = first[e + 1] - at;
    const T* w[1] = {down + (e * D + o) * I};
    dot_panel(middle.data() + at, m, w, 1, n, I, n * I, [&](long m0, long rows, const float* acc) {
      for (long i = 0; i < rows; ++i)
        std::copy(acc + i * n, acc + (i + 1) * n, out + slot[at + m0 + i] * D + o);
    });
  });

  parallel(s.tokens, 1.0 * slots * D, [&](long t) {
    float* to = y + t * D;
    std::fill(to, to + D, 0.0f);
    for (long n = 0; n < s.per_token; ++n) {
      const float* add = out + (t * s.per_token + n) * D;
      const float scale = weight[t * s.per_token + n];
      for (long d = 0; d < D; ++d) to[d] += scale * add[d];
    }
  });
}

template void experts<bf16>(const float*, const bf16*, const bf16*, const int64_t*, const float*, float*, ExpertShape);
template void experts<float>(const float*, const float*, const float*, const int64_t*, const float*, float*,
                             ExpertShape);

void choose(const float* scores, int64_t* chosen, float* weight, long T, long E, long N, bool normalise) {
  parallel(T, 8.0 * T * E * N, [&](long t) {
    const float* s = scores + t * E;
    const float most = *std::max_element(s, s + E);
    float total = 0.0f, kept = 0.0f;
    for (long e = 0; e < E; ++e) total += std::exp(s[e] - most);
    for (long n = 0; n < N; ++n) {
      long best = -1;
      for (long e = 0; e < E; ++e) {
        bool taken = false;
        for (long j = 0; j < n; ++j) taken |= chosen[t * N + j] == e;
        if (!taken && (best < 0 || s[e] > s[best])) best = e;
      }
      chosen[t * N + n] = best;
      weight[t * N + n] = std::exp(s[best] - most) / total;
      kept += weight[t * N + n];
    }
    if (normalise)
      for (long n = 0; n < N; ++n) weight[t * N + n] /= kept;
  });
}

}  // namespace tongyun

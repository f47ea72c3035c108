#include "dot.h"
#include "kernels.h"
#include "parallel.h"

namespace tongyun {

static std::vector<const float*> row_pointers(const float* x, long M, long K) {
  std::vector<const float*> rows(M);
  for (long m = 0; m < M; ++m) rows[m] = x + m * K;
  return rows;
}

template <class T>
void linear(const float* x, const T* w, const float* add, float* y, long M, long O, long K) {
  const auto rows = row_pointers(x, M, K);
  const long P = panel_rows<T>(K);
  parallel((O + P - 1) / P, double(M) * O * K, [&](long item) {
    const long o = item * P, n = std::min(P, O - o);
    const T* from[1] = {w + o * K};
    dot_panel(rows.data(), M, from, 1, n, K, thread_count() * P * K, [&](long m0, long m, const float* acc) {
      for (long i = 0; i < m; ++i) {
        float* to = y + (m0 + i) * O + o;
        const float* a = acc + i * n;
        if (add) {
          const float* plus = add + (m0 + i) * O + o;
          for (long j = 0; j < n; ++j) to[j] = plus[j] + a[j];
        } else {
          std::copy(a, a + n, to);
        }
      }
    });
  });
}

template <class T>
void linear_swiglu(const float* x, const T* w, float* y, long M, long I, long K) {
  const auto rows = row_pointers(x, M, K);
  const long P = std::max(12L, panel_rows<T>(K) / 2 / 12 * 12);
  parallel((I + P - 1) / P, 2.0 * M * I * K, [&](long item) {
    const long i0 = item * P, n = std::min(P, I - i0);
    const T* from[2] = {w + i0 * K, w + (I + i0) * K};
    dot_panel(rows.data(), M, from, 2, n, K, thread_count() * P * K, [&](long m0, long m, const float* acc) {
      for (long i = 0; i < m; ++i) gated(acc + i * 2 * n, acc + i * 2 * n + n, y + (m0 + i) * I + i0, n);
    });
  });
}

template void linear<bf16>(const float*, const bf16*, const float*, float*, long, long, long);
template void linear<float>(const float*, const float*, const float*, float*, long, long, long);
template void linear_swiglu<bf16>(const float*, const bf16*, float*, long, long, long);
template void linear_swiglu<float>(const float*, const float*, float*, long, long, long);

}  // namespace tongyun

#include <atomic>
#include <cmath>

#include "kernels.h"
#include "parallel.h"

namespace tongyun {

// y = x / rms(x) × w over one row; y may be x.
template <class T>
static void norm_row(const float* x, const T* w, float* y, long width, float eps) {
  vf squares{};
  long i = 0;
  for (; i + W <= width; i += W) {
    vf a = load(x + i);
    squares += a * a;
  }
  float total = sum(squares);
  for (long j = i; j < width; ++j) total += x[j] * x[j];
  const float scale = 1.0f / std::sqrt(total / width + eps);
  for (i = 0; i + W <= width; i += W) store(y + i, load(w + i) * (load(x + i) * scale));
  for (; i < width; ++i) y[i] = widen(w[i]) * (x[i] * scale);
}

template <class T>
void rms_norm(const float* x, const T* w, float* y, long rows, long width, float eps) {
  parallel(rows, 2.0 * rows * width, [&](long r) { norm_row(x + r * width, w, y + r * width, width, eps); });
}

// Split-half rotary embedding of one head, in place.
static void rotate_row(float* x, const float* cos, const float* sin, long width) {
  const long half = width / 2;
  long i = 0;
  for (; i + W <= half; i += W) {
    vf left = load(x + i), right = load(x + half + i);
    store(x + i, left * load(cos + i) - right * load(sin + i));
    store(x + half + i, right * load(cos + half + i) + left * load(sin + half + i));
  }
  for (; i < half; ++i) {
    const float left = x[i], right = x[half + i];
    x[i] = left * cos[i] - right * sin[i];
    x[half + i] = right * cos[half + i] + left * sin[half + i];
  }
}

template <class T>
void attention_inputs(float* qkv, const T* q_weight, const T* k_weight, const float* cos, const float* sin, long T_,
                      HeadShape s, float eps) {
  const long row = (s.heads + 2 * s.kv_heads) * s.width;
  parallel(T_, 4.0 * T_ * row, [&](long t) {
    for (long h = 0; h < s.heads + s.kv_heads; ++h) {
      float* x = qkv + t * row + h * s.width;
      norm_row(x, h < s.heads ? q_weight : k_weight, x, s.width, eps);
      rotate_row(x, cos + t * s.width, sin + t * s.width, s.width);
    }
  });
}

void swiglu(const float* x, float* y, long rows, long inner) {
  parallel(rows, 8.0 * rows * inner, [&](long r) {
    gated(x + r * 2 * inner, x + r * 2 * inner + inner, y + r * inner, inner);
  });
}

// The first index of the largest value, as PyTorch gives it.
void argmax(const float* x, int64_t* out, long rows, long width) {
  parallel(rows, 0.25 * rows * width, [&](long r) {
    const float* p = x + r * width;
    const float best = largest(p, width);
    long at = 0;
    while (at < width && p[at] != best) ++at;
    out[r] = at < width ? at : 0;
  });
}

template void rms_norm<bf16>(const float*, const bf16*, float*, long, long, float);
template void rms_norm<float>(const float*, const float*, float*, long, long, float);
template void attention_inputs<bf16>(float*, const bf16*, const bf16*, const float*, const float*, long, HeadShape,
                                     float);
template void attention_inputs<float>(float*, const float*, const float*, const float*, const float*, long,
                                      HeadShape, float);

double read_bytes(const char* data, long bytes) {
  const long piece = 1 << 20, pieces = bytes / piece;
  std::atomic<long> guard{0};
  parallel(pieces, 1e12, [&](long p) {
    const float* from = (const float*)(data + p * piece);
    vf a[8] = {};
    for (long i = 0; i < piece / 4; i += 8 * W)
      for (int j = 0; j < 8; ++j) a[j] += load(from + i + j * W);
    vf all = a[0];
    for (int j = 1; j < 8; ++j) all += a[j];
    if (sum(all) == 42.0f) guard.fetch_add(1);  // keeps the loads from being optimised away
  });
  return double(pieces) * piece + double(guard.load()) * 0.0;
}

double multiply_adds(long each) {
  const long threads = thread_count();
  std::atomic<long> guard{0};
  parallel(threads, 1e12, [&](long t) {
    vf a[12];
    for (int j = 0; j < 12; ++j) a[j] = splat(float(t + j));
    const vf x = splat(0.999f), y = splat(1e-3f);
    for (long i = 0; i < each; ++i)
      for (int j = 0; j < 12; ++j) a[j] = a[j] * x + y;
    vf all = a[0];
    for (int j = 1; j < 12; ++j) all += a[j];
    if (sum(all) == 42.0f) guard.fetch_add(1);
  });
  return double(threads) * each * 12 * W * 2 + double(guard.load()) * 0.0;
}

}  // namespace tongyun

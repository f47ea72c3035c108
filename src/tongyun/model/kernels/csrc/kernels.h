// The kernels as plain functions over pointers; `bindings.cpp` is the only file that knows tensors.
#pragma once
#include <cstdint>

#include "simd.h"

namespace tongyun {

// y[M, O] = x[M, K] · w[O, K]ᵀ (+ add[M, O])
template <class T>
void linear(const float* x, const T* w, const float* add, float* y, long M, long O, long K);

// y[M, I] = silu(x · gateᵀ) × (x · upᵀ); w[2I, K] holds gate, then up
template <class T>
void linear_swiglu(const float* x, const T* w, float* y, long M, long I, long K);

struct ExpertShape {
  long tokens, hidden, experts, inner, per_token;
};
template <class T>
void experts(const float* x, const T* gate_up, const T* down, const int64_t* chosen, const float* weight,
             float* y, ExpertShape shape);

// softmax over E, the N largest (lowest index first among equals), divided by their sum if asked
void choose(const float* scores, int64_t* chosen, float* weight, long T, long E, long N, bool normalise);

template <class T>
void rms_norm(const float* x, const T* w, float* y, long rows, long width, float eps);

struct HeadShape {
  long heads, kv_heads, width;
};
// In place on qkv[T, (H + 2K) d]: queries and keys normalised and rotated, values left alone.
template <class T>
void attention_inputs(float* qkv, const T* q_weight, const T* k_weight, const float* cos, const float* sin,
                      long T_, HeadShape shape, float eps);

void swiglu(const float* x, float* y, long rows, long inner);
void argmax(const float* x, int64_t* out, long rows, long width);

struct PageShape {
  long tokens, pieces, heads, kv_heads, width, block, row_blocks;
  long q_stride, k_stride, v_stride;  // elements between tokens
};
template <class T>
void paged_attention(const float* q, const float* k, const float* v, T* keys, T* values, const int64_t* slots,
                     const int32_t* rows, const int32_t* starts, const int32_t* blocks, float* out,
                     PageShape shape);

// Bounds that benchmarks hold the kernels against.
double read_bytes(const char* data, long bytes);
double multiply_adds(long each);

}  // namespace tongyun

// From tensors to pointers: checks types and shapes, allocates results, calls the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "kernels.h"
#include "parallel.h"

namespace tongyun {

namespace {

using at::Tensor;

// Checks that come before any arithmetic.
#define REQUIRE(condition, ...) TORCH_CHECK(condition, "tongyun kernels: ", __VA_ARGS__)

// A kernel of some length lets other Python threads run; a short one keeps the lock,
// because waiting to get it back can take longer than the kernel.
struct Unlock {
  explicit Unlock(double multiply_adds) {
    if (multiply_adds > 4e6) released.emplace();
  }
  std::optional<pybind11::gil_scoped_release> released;
};

const float* floats(const Tensor& x) {
  REQUIRE(x.scalar_type() == at::kFloat && x.is_contiguous(), "expected contiguous float32");
  return x.const_data_ptr<float>();
}

// Calls `run` with the pointer in the type the tensor is stored in.
template <class Run>
void stored(const Tensor& w, const Run& run) {
  REQUIRE(w.is_contiguous(), "expected contiguous weights");
  if (w.scalar_type() == at::kBFloat16)
    run((const bf16*)w.const_data_ptr());
  else if (w.scalar_type() == at::kFloat)
    run(w.const_data_ptr<float>());
  else
    REQUIRE(false, "weights must be bfloat16 or float32, not ", w.scalar_type());
}

Tensor py_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& add) {
  const long M = x.size(0), K = x.size(1), O = w.size(0);
  REQUIRE(w.dim() == 2 && w.size(1) == K, "x is ", x.sizes(), " and weight ", w.sizes());
  REQUIRE(!add || (add->size(0) == M && add->size(1) == O), "what is added must be ", M, " × ", O);
  Tensor y = at::empty({M, O}, x.options());
  Unlock unlock(double(M) * K * O);
  stored(w, [&](auto* p) { linear(floats(x), p, add ? floats(*add) : nullptr, y.data_ptr<float>(), M, O, K); });
  return y;
}

Tensor py_linear_swiglu(const Tensor& x, const Tensor& w) {
  const long M = x.size(0), K = x.size(1), I = w.size(0) / 2;
  REQUIRE(w.dim() == 2 && w.size(1) == K && w.size(0) == 2 * I, "x is ", x.sizes(), " and weight ", w.sizes());
  Tensor y = at::empty({M, I}, x.options());
  Unlock unlock(2.0 * M * K * I);
  stored(w, [&](auto* p) { linear_swiglu(floats(x), p, y.data_ptr<float>(), M, I, K); });
  return y;
}

Tensor py_experts(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& chosen,
                  const Tensor& weight) {
  const ExpertShape s{x.size(0), x.size(1), gate_up.size(0), down.size(2), chosen.size(1)};
  REQUIRE(gate_up.size(1) == 2 * s.inner && gate_up.size(2) == s.hidden && down.size(0) == s.experts &&
              down.size(1) == s.hidden,
          "gate_up is ", gate_up.sizes(), " and down ", down.sizes());
  REQUIRE(chosen.scalar_type() == at::kLong && chosen.is_contiguous() && chosen.sizes() == weight.sizes() &&
              chosen.size(0) == s.tokens,
          "chosen experts must be int64 and as many as their weights");
  REQUIRE(gate_up.scalar_type() == down.scalar_type() && down.is_contiguous(), "experts differ in type");
  Tensor y = at::empty_like(x);
  Unlock unlock(3.0 * s.tokens * s.per_token * s.hidden * s.inner);
  stored(gate_up, [&](auto* p) {
    experts(floats(x), p, (decltype(p))down.const_data_ptr(), chosen.const_data_ptr<int64_t>(), floats(weight),
            y.data_ptr<float>(), s);
  });
  return y;
}

std::tuple<Tensor, Tensor> py_choose(const Tensor& scores, int64_t n, bool normalise) {
  REQUIRE(n <= scores.size(1), "more experts chosen than there are");
  Tensor chosen = at::empty({scores.size(0), n}, scores.options().dtype(at::kLong));
  Tensor weight = at::empty({scores.size(0), n}, scores.options());
  choose(floats(scores), chosen.data_ptr<int64_t>(), weight.data_ptr<float>(), scores.size(0), scores.size(1), n,
         normalise);
  return {chosen, weight};
}

Tensor py_rms_norm(const Tensor& x, const Tensor& w, double eps) {
  Tensor y = at::empty_like(x);
  const long width = x.size(-1);
  REQUIRE(w.numel() == width, "weight has ", w.numel(), " elements for rows of ", width);
  stored(w, [&](auto* p) { rms_norm(floats(x), p, y.data_ptr<float>(), x.numel() / width, width, float(eps)); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> py_attention_inputs(Tensor qkv, const Tensor& q_weight, const Tensor& k_weight,
                                                       const Tensor& cos, const Tensor& sin, int64_t kv_heads,
                                                       double eps) {
  const long width = q_weight.numel(), T = qkv.size(0), all = qkv.size(1), heads = all - 2 * kv_heads;
  REQUIRE(qkv.dim() == 3 && qkv.size(2) == width && cos.size(0) == T && cos.size(1) == width && k_weight.numel() == width &&
              q_weight.scalar_type() == k_weight.scalar_type() && heads > 0,
          "projection is ", qkv.sizes(), " for heads of ", width);
  floats(qkv);
  stored(q_weight, [&](auto* p) {
    attention_inputs(qkv.data_ptr<float>(), p, (decltype(p))k_weight.const_data_ptr(), floats(cos), floats(sin), T,
                     HeadShape{heads, kv_heads, width}, float(eps));
  });
  const long row = qkv.stride(0);
  auto part = [&](long first, long count) {
    return qkv.as_strided({T, count, width}, {row, width, 1}, qkv.storage_offset() + first * width);
  };
  return {part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads)};
}

Tensor py_swiglu(const Tensor& x) {
  const long inner = x.size(-1) / 2;
  auto sizes = x.sizes().vec();
  sizes.back() = inner;
  Tensor y = at::empty(sizes, x.options());
  swiglu(floats(x), y.data_ptr<float>(), x.numel() / (2 * inner), inner);
  return y;
}

Tensor py_argmax(const Tensor& x) {
  Tensor y = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  argmax(floats(x), y.data_ptr<int64_t>(), x.size(0), x.size(1));
  return y;
}

const float* heads_of(const Tensor& x, long width) {
  REQUIRE(x.dim() == 3 && x.size(2) == width && x.stride(2) == 1 && x.stride(1) == width &&
              x.scalar_type() == at::kFloat,
          "heads must lie together as float32 in every token's row");
  return x.const_data_ptr<float>();
}

Tensor py_paged_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys,
                          const Tensor& values, const Tensor& slots, const Tensor& rows, const Tensor& starts,
                          const Tensor& blocks) {
  const long T = q.size(0), width = q.size(2), kv_heads = k.size(1);
  REQUIRE(keys.sizes() == values.sizes() && keys.size(1) == kv_heads && keys.size(3) == width && width % W == 0 &&
              keys.is_contiguous() && values.is_contiguous(),
          "cache is ", keys.sizes(), " for heads of ", width);
  REQUIRE(slots.scalar_type() == at::kLong && rows.scalar_type() == at::kInt && starts.scalar_type() == at::kInt &&
              blocks.scalar_type() == at::kInt && blocks.is_contiguous() && slots.numel() == T,
          "layout has the wrong types");
  const PageShape s{T,           starts.size(0), q.size(1),   kv_heads,    width,
                    keys.size(2), blocks.size(1), q.stride(0), k.stride(0), v.stride(0)};
  Tensor out = at::empty({T, q.size(1), width}, q.options());
  auto run = [&](auto* p) {
    using S = std::remove_pointer_t<decltype(p)>;
    paged_attention<S>(heads_of(q, width), heads_of(k, width), heads_of(v, width), (S*)keys.data_ptr(),
                       (S*)values.data_ptr(), slots.const_data_ptr<int64_t>(), rows.const_data_ptr<int32_t>(),
                       starts.const_data_ptr<int32_t>(), blocks.const_data_ptr<int32_t>(), out.data_ptr<float>(), s);
  };
  Unlock unlock(double(T) * blocks.size(1) * s.block * s.heads * width);
  if (keys.scalar_type() == at::kBFloat16)
    run((bf16*)nullptr);
  else {
    REQUIRE(keys.scalar_type() == at::kFloat, "cache must be bfloat16 or float32");
    run((float*)nullptr);
  }
  return out;
}

double py_read_bytes(const Tensor& data) {
  pybind11::gil_scoped_release release;
  return read_bytes((const char*)data.const_data_ptr(), long(data.nbytes()));
}

}  // namespace
}  // namespace tongyun

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace tongyun;
  m.def("linear", &py_linear);
  m.def("linear_swiglu", &py_linear_swiglu);
  m.def("experts", &py_experts);
  m.def("choose", &py_choose);
  m.def("rms_norm", &py_rms_norm);
  m.def("attention_inputs", &py_attention_inputs);
  m.def("swiglu", &py_swiglu);
  m.def("argmax", &py_argmax);
  m.def("paged_attention", &py_paged_attention);
  m.def("read_bytes", &py_read_bytes);
  m.def("multiply_adds", &multiply_adds, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("set_threads", &set_threads);
  m.def("thread_count", &thread_count);
  m.attr("lanes") = W;
}

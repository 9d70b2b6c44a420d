// The product of float activations with int8 weights as a torch operator.
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "checks.h"

namespace fxq {
namespace {

constexpr int64_t kBrainRows = 8;  // fewer rows cost less than what makes pairs of their weights

// All rows of x as FloatGemm::pairs; nothing where a sum or product of theirs might overflow or be denormal, which
// vdpbf16ps treats otherwise: it takes numbers between 2**-100 and 2**100, and zeros.
std::vector<uint32_t> pairs_of(const c10::BFloat16* x, int64_t rows, const FloatGemm& g) {
  const int64_t stride = ceil_div(g.k, 2);
  std::vector<uint32_t> pairs(rows * stride);
  std::atomic<bool> fits{true};
  parallel(rows, std::max<int64_t>(1, kElementGrain / (g.k + 1)), [&](int64_t begin, int64_t end) {
    bool all = true;
    const auto bits = [&](uint16_t v) {
      const uint32_t magnitude = v & 0x7FFF;
      all &= magnitude == 0 || (magnitude >= (127 - 100) << 7 && magnitude < (127 + 100) << 7);
      return uint32_t(v);
    };
    for (int64_t row = begin; row < end; ++row) {
      const c10::BFloat16* from = x + row * g.x_stride;
      uint32_t* to = pairs.data() + row * stride;
      for (int64_t k = 0; k + 2 <= g.k; k += 2) to[k / 2] = bits(from[k].x) << 16 | bits(from[k + 1].x);
      if (g.k % 2) to[g.k / 2] = bits(from[g.k - 1].x) << 16;
    }
    if (!all) fits = false;
  });
  if (!fits) pairs.clear();
  return pairs;
}
std::vector<uint32_t> pairs_of(const c10::Half*, int64_t, const FloatGemm&) { return {}; }

[[gnu::always_inline]] inline uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}
[[gnu::always_inline]] inline float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

// Numbers of 16 bits, widened exactly and rounded to nearest, ties to even, without branches, so that loops of them are
// vectors: torch's own conversions, made for one number, take longer than the products of few channels.
[[gnu::always_inline]] inline float widened(c10::BFloat16 v) { return float_of(uint32_t(v.x) << 16); }
[[gnu::always_inline]] inline float widened(c10::Half v) {
  const uint32_t sign = uint32_t(v.x & 0x8000) << 16, magnitude = uint32_t(v.x & 0x7FFF) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);  // denormals become normal
  return float_of((magnitude >= 0x0F800000 ? magnitude | 0x7F800000 : finite) | sign);
}
[[gnu::always_inline]] inline void round_to(c10::BFloat16& y, float v) {
  const uint32_t bits = bits_of(v), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  y.x = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}
[[gnu::always_inline]] inline void round_to(c10::Half& y, float v) {
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;  // in steps of 2**-24, the last bit of 0.5
  const uint32_t normal = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? denormal : normal;
  const uint32_t nonfinite = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  y.x = uint16_t((magnitude >= 0x47800000 ? nonfinite : finite) | sign);
}

#if defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED [[gnu::optimize("O3")]]  // at -O2 GCC leaves loops of unknown length as they are, Clang does not
#else
#define VECTORIZED
#endif

template <class T>
VECTORIZED void widen(const T* x, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widened(x[i]);
}
template <class T>
VECTORIZED void round_all(const float* x, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) round_to(to[i], x[i]);
}

// All rows of x, widened or as pairs; and the result, rounded. Activations only: no float weight is ever made.
template <class T>
void run_narrow(const T* x, T* y, int64_t rows, FloatGemm& g) {
  std::vector<float> wide, sums(rows * g.n);
  std::vector<uint32_t> pairs;
  if (rows >= kBrainRows && brain_gemm()) pairs = pairs_of(x, rows, g);
  if (pairs.empty()) {
    wide.resize(rows * g.k);
    parallel(rows, std::max<int64_t>(1, kElementGrain / (g.k + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) widen(x + row * g.x_stride, wide.data() + row * g.k, g.k);
    });
    g.x = wide.data();
    g.x_stride = g.k;
  } else {
    g.pairs = pairs.data();
    g.x_stride = ceil_div(g.k, 2);
  }
  g.y = sums.data();
  run_float_gemm(g, rows);
  parallel(rows * g.n, kElementGrain, [&](int64_t begin, int64_t end) {
    round_all(sums.data() + begin, y + begin, end - begin);
  });
}

Tensor linear_weight_only(const Tensor& x, const Tensor& weight, const Tensor& scale,
                          const std::optional<Tensor>& bias,
                          const std::optional<torch::headeronly::ScalarType>& expected) {
  constexpr const char* op = "linear_weight_only";
  const int32_t dtype = x.dtype();
  if (expected && int32_t(*expected) != dtype) fail(op, ": x has the wrong dtype, expected that of the examples");
  const bool brain = dtype == aoti_torch_dtype_bfloat16(), half = dtype == aoti_torch_dtype_float16();
  if (!brain && !half) expect_dtype(op, "x", x, aoti_torch_dtype_float32(), "float32, bfloat16 or float16");
  expect_dtype(op, "weight", weight, aoti_torch_dtype_int8(), "int8 (packed)");
  expect_dtype(op, "scale", scale, aoti_torch_dtype_float32(), "float32");
  const Shape shape = x.shape();
  if (shape.dim == 0) fail(op, ": x is a scalar, expected [..., K]");
  FloatGemm g;
  g.k = shape.sizes[shape.dim - 1];
  g.n = scale.numel();
  if (scale.dim() != 1) fail(op, ": scale", scale.shape(), ", expected [N]");
  if (weight.numel() != packed_size(g.n, g.k) || weight.dim() != 1)
    fail(op, ": weight", weight.shape(), ", expected [", packed_size(g.n, g.k), "], the packed size of N = ", g.n,
         " (scale) and K = ", g.k, " (x", shape, ")");
  const Contiguous w(weight), s(scale);
  g.weight = w.data<int8_t>();
  g.scale = s.data<float>();
  std::optional<Contiguous> b;
  if (bias) {
    expect_dtype(op, "bias", *bias, aoti_torch_dtype_float32(), "float32");
    if (bias->dim() != 1 || bias->numel() != g.n) fail(op, ": bias", bias->shape(), ", expected [", g.n, "]");
    g.bias = b.emplace(*bias).data<float>();
  }
  std::optional<Tensor> copy;
  if (!is_rows(x, &g.x_stride)) {
    copy.emplace(x.contiguous());
    g.x_stride = g.k;
  }
  const Tensor& in_rows = copy ? *copy : x;

  int64_t sizes[Tensor::kMaxDim], rows = 1;
  for (int64_t i = 0; i < shape.dim - 1; ++i) rows *= sizes[i] = shape.sizes[i];
  sizes[shape.dim - 1] = g.n;
  Tensor y = Tensor::empty({sizes, shape.dim}, dtype);
  g.y_stride = g.n;
  if (brain) {
    run_narrow(in_rows.data<c10::BFloat16>(), y.data<c10::BFloat16>(), rows, g);
  } else if (half) {
    run_narrow(in_rows.data<c10::Half>(), y.data<c10::Half>(), rows, g);
  } else {
    g.x = in_rows.data<float>();
    g.y = y.data<float>();
    run_float_gemm(g, rows);
  }
  return y;
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) { m.impl("linear_weight_only", fxq::boxed<fxq::linear_weight_only>); }

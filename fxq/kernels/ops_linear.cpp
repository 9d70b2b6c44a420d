// The products as torch operators.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "broadcast.h"
#include "program.h"

namespace fxq {
namespace {

Tensor linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
              const Tensor* addend, Gemm& g);

// `linear` with an addend that has not the shape of the result: both are written out in the shape that they share.
Tensor broadcast_linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias,
                        const Tensor& multiplier, const Tensor& addend, Gemm& g) {
  int64_t sizes[Tensor::kMaxDim], dim;
  if (!broadcast_rows(x.shape(), addend.shape(), g.n, sizes, &dim))
    fail(op, ": addend", addend.shape(), " and x", x.shape(), " with N = ", g.n, " (bias) have no common shape");
  sizes[dim - 1] = g.k;
  const Tensor rows = g.dynamic ? repeated<float>(x, {sizes, dim}) : repeated<uint8_t>(x, {sizes, dim});
  sizes[dim - 1] = g.n;
  const Tensor added = repeated<float>(addend, {sizes, dim});
  return linear(op, rows, weight, bias, multiplier, &added, g);
}

// What the linear operators share: checks, the output, the operands of `g`; the caller has set the epilogue.
Tensor linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
              const Tensor* addend, Gemm& g) {
  if (g.dynamic)
    expect_dtype(op, "x", x, aoti_torch_dtype_float32(), "float32");
  else
    expect_dtype(op, "x", x, aoti_torch_dtype_uint8(), "uint8");
  expect_dtype(op, "weight", weight, aoti_torch_dtype_int8(), "int8 (packed)");
  expect_dtype(op, "bias", bias, aoti_torch_dtype_int32(), "int32");
  const bool fixed = g.output == Output::kFixed;
  if (fixed)
    expect_dtype(op, "multiplier", multiplier, aoti_torch_dtype_int32(), "int32");
  else
    expect_dtype(op, "multiplier", multiplier, aoti_torch_dtype_float32(), "float32");
  const Shape shape = x.shape();
  if (shape.dim == 0) fail(op, ": x is a scalar, expected [..., K]");
  g.k = shape.sizes[shape.dim - 1];
  g.n = bias.numel();
  if (weight.numel() != packed_size(g.n, g.k) || weight.dim() != 1)
    fail(op, ": weight", weight.shape(), ", expected [", packed_size(g.n, g.k), "], the packed size of N = ", g.n,
         " (bias) and K = ", g.k, " (x", shape, ")");
  if (bias.dim() != 1 || multiplier.dim() != 1 || multiplier.numel() != g.n)
    fail(op, ": multiplier", multiplier.shape(), " and bias", bias.shape(), ", expected both of one size [N]");
  bool one_row = false;
  if (addend) {
    expect_dtype(op, "addend", *addend, aoti_torch_dtype_float32(), "float32");
    const Shape own = addend->shape();
    one_row = own.dim == 1 && own.sizes[0] == g.n;
    if (!one_row && !(own.dim == shape.dim && own.sizes[own.dim - 1] == g.n &&
                      std::equal(own.sizes, own.sizes + own.dim - 1, shape.sizes)))
      return broadcast_linear(op, x, weight, bias, multiplier, *addend, g);
  }

  const Contiguous w(weight), b(bias), m(multiplier);
  std::optional<Tensor> copy;
  if (!is_rows(x, &g.x_stride)) {
    copy.emplace(x.contiguous());
    g.x_stride = g.k;
  }
  if (g.dynamic)
    g.float_x = (copy ? *copy : x).data<float>();
  else
    g.x = (copy ? *copy : x).data<uint8_t>();
  g.weight = w.data<int8_t>();
  g.bias = b.data<int32_t>();
  if (fixed)
    g.fixed = m.data<int32_t>();
  else
    g.multiplier = m.data<float>();

  int64_t sizes[Tensor::kMaxDim], count = 1;
  for (int64_t i = 0; i < shape.dim - 1; ++i) count *= sizes[i] = shape.sizes[i];
  sizes[shape.dim - 1] = g.n;
  const bool is_float = g.output == Output::kFloat || g.output == Output::kActivation;
  Tensor y = Tensor::empty({sizes, shape.dim}, is_float ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8());
  g.y = y.data<void>();
  g.y_stride = g.n;

  std::optional<Contiguous> added;
  if (addend) {
    g.addend = added.emplace(*addend).data<float>();
    g.addend_stride = one_row ? 0 : g.n;
  }
  run_gemm(g, count);
  return y;
}

Tensor qlinear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier, int64_t zero_point,
               int64_t low, int64_t high) {
  expect_range("qlinear", zero_point, low, high);
  Gemm g;
  g.zero_point = int32_t(zero_point);
  g.low = int32_t(low);
  g.high = int32_t(high);
  return linear("qlinear", x, weight, bias, multiplier, nullptr, g);
}

Tensor qlinear_float(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                     const std::optional<Tensor>& addend) {
  Gemm g;
  g.output = Output::kFloat;
  return linear("qlinear_float", x, weight, bias, multiplier, addend ? &*addend : nullptr, g);
}

Tensor qlinear_act(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                   const std::string& activation, const std::optional<Tensor>& addend) {
  Gemm g;
  g.output = Output::kActivation;
  g.activation = activation_named("qlinear_act", activation);
  return linear("qlinear_act", x, weight, bias, multiplier, addend ? &*addend : nullptr, g);
}

Tensor qlinear_act_quantize(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                            const std::string& activation, double scale, int64_t zero_point,
                            const std::optional<Tensor>& factor) {
  expect_range("qlinear_act_quantize", zero_point, 0, 255);
  Gemm g;
  g.output = Output::kActivationUint8;
  g.activation = activation_named("qlinear_act_quantize", activation);
  g.inverse = 1.0f / float(scale);
  g.zero_point = int32_t(zero_point);
  std::optional<Contiguous> factors;
  if (factor) {
    expect_dtype("qlinear_act_quantize", "factor", *factor, aoti_torch_dtype_float32(), "float32");
    if (factor->dim() != 1 || factor->numel() != bias.numel())
      fail("qlinear_act_quantize: factor", factor->shape(), ", expected the shape of bias", bias.shape());
    g.factor = factors.emplace(*factor).data<float>();
  }
  return linear("qlinear_act_quantize", x, weight, bias, multiplier, nullptr, g);
}

// An optional argument of one int32 per channel; `held` keeps it alive.
const int32_t* channels(const char* op, const char* name, const Tensor& t, const Tensor& bias,
                        std::optional<Contiguous>& held) {
  expect_dtype(op, name, t, aoti_torch_dtype_int32(), "int32");
  if (t.dim() != 1 || t.numel() != bias.numel())
    fail(op, ": ", name, t.shape(), ", expected the shape of bias", bias.shape());
  return held.emplace(t).data<int32_t>();
}

Tensor qlinear_fixed(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                     const Tensor& shift, int64_t zero_point, int64_t low, int64_t high, const std::string& rounding,
                     const std::optional<Tensor>& zero_w) {
  constexpr const char* op = "qlinear_fixed";
  expect_range(op, zero_point, low, high);
  std::optional<Contiguous> shifts, zeros, rows;
  Gemm g;
  g.output = Output::kFixed;
  g.twice = rounds_twice(op, rounding);
  g.zero_point = int32_t(zero_point);
  g.low = int32_t(low);
  g.high = int32_t(high);
  g.shift = shifts_of(op, shift, bias.numel(), shifts);
  std::vector<int32_t> sums;
  if (zero_w) {
    g.zero_w = channels(op, "zero_w", *zero_w, bias, zeros);
    expect_dtype(op, "x", x, aoti_torch_dtype_uint8(), "uint8");
    const uint8_t* values = rows.emplace(x).data<uint8_t>();
    const int64_t k = x.dim() ? x.shape().sizes[x.dim() - 1] : 0;
    sums.resize(k ? x.numel() / k : 0);
    for (int32_t& sum : sums)
      for (int64_t i = 0; i < k; ++i) sum += *values++;
    g.row_sums = sums.data();
    if (k == 0) g.zero_w = nullptr;  // sums over nothing
  }
  return linear(op, x, weight, bias, multiplier, nullptr, g);
}

Tensor qlinear_dynamic(const Tensor& x, const Tensor& weight, const Tensor& column_sums, const Tensor& scale,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& addend,
                       const std::string& activation, std::optional<double> low, std::optional<double> high) {
  constexpr const char* op = "qlinear_dynamic";
  Gemm g;
  g.dynamic = true;
  g.output = activation.empty() ? Output::kFloat : Output::kActivation;
  if (!activation.empty()) g.activation = activation_named(op, activation);
  if (low) g.clamp_low = float(*low);
  if (high) g.clamp_high = float(*high);
  std::optional<Contiguous> own_bias;
  if (bias) {
    expect_dtype(op, "bias", *bias, aoti_torch_dtype_float32(), "float32");
    if (bias->dim() != 1 || bias->numel() != column_sums.numel())
      fail(op, ": bias", bias->shape(), ", expected [", column_sums.numel(), "]");
    g.float_bias = own_bias.emplace(*bias).data<float>();
  }
  return linear(op, x, weight, column_sums, scale, addend ? &*addend : nullptr, g);
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) {
  fxq::serve<fxq::qlinear>(m, "qlinear");
  fxq::serve<fxq::qlinear_float>(m, "qlinear_float");
  fxq::serve<fxq::qlinear_fixed>(m, "qlinear_fixed");
  fxq::serve<fxq::qlinear_act>(m, "qlinear_act");
  fxq::serve<fxq::qlinear_act_quantize>(m, "qlinear_act_quantize");
  fxq::serve<fxq::qlinear_dynamic>(m, "qlinear_dynamic");
}

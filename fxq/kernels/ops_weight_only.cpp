// The product of float activations with int8 weights as a torch operator.
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "checks.h"

namespace fxq {
namespace {

constexpr int64_t kBrainRows = 8;  // fewer rows cost less than what makes pairs of their weights

// take(row) for all of `rows` rows of k numbers.
template <class Take>
void each_row(int64_t rows, int64_t k, const Take& take) {
  parallel(rows, std::max<int64_t>(1, kElementGrain / (k + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) take(row);
  });
}

// Gives g all rows of x as pairs, or where it takes none or one is not fit for them, widened. Activations only: no float
// weight is ever made.
void prepare(FloatGemm& g, const uint16_t* x, int64_t rows) {
  const Kernels& kernels = active();
  const int64_t x_stride = g.x_stride;
  if (g.type == Real::kBfloat16 && rows >= kBrainRows && brain_gemm()) {
    g.x_stride = ceil_div(g.k, 2);
    auto* const pairs = static_cast<uint32_t*>(scratch(rows * g.x_stride * 4, Holder::kOperator));
    std::atomic<bool> fit{true};
    each_row(rows, g.k, [&](int64_t row) {
      if (!kernels.pair_brains(x + row * x_stride, pairs + row * g.x_stride, g.k)) fit = false;
    });
    g.pairs = pairs;
    if (fit) return;
  }
  auto* const wide = static_cast<float*>(scratch(rows * g.k * 4, Holder::kOperator));
  each_row(rows, g.k, [&](int64_t row) { kernels.widen_reals(g.type, x + row * x_stride, wide + row * g.k, g.k); });
  g.x = wide;
  g.pairs = nullptr;
  g.x_stride = g.k;
}

Tensor linear_weight_only(const Tensor& x, const Tensor& weight, const Tensor& scale,
                          const std::optional<Tensor>& bias,
                          const std::optional<torch::headeronly::ScalarType>& expected) {
  constexpr const char* op = "linear_weight_only";
  const int32_t dtype = x.dtype();
  if (expected && int32_t(*expected) != dtype) fail(op, ": x has the wrong dtype, expected that of the examples");
  FloatGemm g;
  if (dtype == aoti_torch_dtype_bfloat16())
    g.type = Real::kBfloat16;
  else if (dtype == aoti_torch_dtype_float16())
    g.type = Real::kFloat16;
  else
    expect_dtype(op, "x", x, aoti_torch_dtype_float32(), "float32, bfloat16 or float16");
  expect_dtype(op, "weight", weight, aoti_torch_dtype_int8(), "int8 (packed)");
  expect_dtype(op, "scale", scale, aoti_torch_dtype_float32(), "float32");
  const Shape shape = x.shape();
  if (shape.dim == 0) fail(op, ": x is a scalar, expected [..., K]");
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
  g.y = y.data<void>();
  if (g.type == Real::kFloat32)
    g.x = in_rows.data<float>();
  else
    prepare(g, in_rows.data<uint16_t>(), rows);
  run_float_gemm(g, rows);
  return y;
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) { m.impl("linear_weight_only", fxq::boxed<fxq::linear_weight_only>); }

// Several linears of one input as one torch operator.
#include <string>
#include <vector>

#include "checks.h"

namespace fxq {
namespace {

std::vector<Tensor> qlinears(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                             const std::vector<Tensor>& multipliers, const std::vector<int64_t>& zero_points,
                             const std::vector<int64_t>& lows, const std::vector<int64_t>& highs) {
  constexpr const char* op = "qlinears";
  const std::size_t parts = weights.size();
  if (biases.size() != parts || multipliers.size() != parts || zero_points.size() != parts || lows.size() != parts ||
      highs.size() != parts)
    fail(op, ": ", parts, " weights, and not as many of each other operand");
  expect_dtype(op, "x", x, aoti_torch_dtype_uint8(), "uint8");
  const Shape shape = x.shape();
  if (shape.dim == 0) fail(op, ": x is a scalar, expected [..., K]");
  const int64_t k = shape.sizes[shape.dim - 1];
  int64_t sizes[Tensor::kMaxDim], rows = 1, stride = 0;
  for (int64_t i = 0; i < shape.dim - 1; ++i) rows *= sizes[i] = shape.sizes[i];
  std::optional<Tensor> copy;
  if (!is_rows(x, &stride)) {
    copy.emplace(x.contiguous());
    stride = k;
  }
  std::vector<Tensor> results;
  std::vector<Contiguous> held;  // what lies in memory otherwise has copies
  std::vector<Gemm> gemms(parts);
  held.reserve(3 * parts);
  for (std::size_t i = 0; i < parts; ++i) {
    const Tensor &weight = weights[i], &bias = biases[i], &multiplier = multipliers[i];
    expect_dtype(op, "weight", weight, aoti_torch_dtype_int8(), "int8 (packed)");
    expect_dtype(op, "bias", bias, aoti_torch_dtype_int32(), "int32");
    expect_dtype(op, "multiplier", multiplier, aoti_torch_dtype_float32(), "float32");
    expect_range(op, zero_points[i], lows[i], highs[i]);
    Gemm& g = gemms[i];
    g.x = (copy ? *copy : x).data<uint8_t>();
    g.x_stride = stride;
    g.k = k;
    g.n = bias.numel();
    if (weight.numel() != packed_size(g.n, k) || weight.dim() != 1)
      fail(op, ": weight", weight.shape(), ", expected [", packed_size(g.n, k), "], the packed size of N = ", g.n,
           " (bias) and K = ", k, " (x", shape, ")");
    if (bias.dim() != 1 || multiplier.dim() != 1 || multiplier.numel() != g.n)
      fail(op, ": multiplier", multiplier.shape(), " and bias", bias.shape(), ", expected both of one size [N]");
    g.weight = held.emplace_back(weight).data<int8_t>();
    g.bias = held.emplace_back(bias).data<int32_t>();
    g.multiplier = held.emplace_back(multiplier).data<float>();
    g.zero_point = int32_t(zero_points[i]);
    g.low = int32_t(lows[i]);
    g.high = int32_t(highs[i]);
    sizes[shape.dim - 1] = g.n;
    results.push_back(Tensor::empty({sizes, shape.dim}, aoti_torch_dtype_uint8()));
    g.y = results.back().data<void>();
    g.y_stride = g.n;
  }
  run_gemms(gemms.data(), int64_t(parts), rows);
  return results;
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) { m.impl("qlinears", fxq::boxed<fxq::qlinears>); }

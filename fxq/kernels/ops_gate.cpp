// Squeeze and excite as one torch operator.
#include <string>
#include <vector>

#include "channels_last.h"
#include "program.h"

namespace fxq {
namespace {

constexpr const char* kGate = "qgate";

// One of the two products, a linear of the means; it holds what `g` points to.
struct GateProduct {
  Contiguous weight, bias, multiplier;
  std::vector<uint8_t> y;
  Gemm g;

  GateProduct(const Tensor& weight_, const Tensor& bias_, const Tensor& multiplier_, const uint8_t* x, int64_t rows,
         int64_t k, const std::string& activation, double scale, int64_t zero_point, int64_t low, int64_t high)
      : weight(weight_), bias(bias_), multiplier(multiplier_), y(rows * bias_.numel()) {
    expect_dtype(kGate, "weight", weight_, aoti_torch_dtype_int8(), "int8 (packed)");
    expect_dtype(kGate, "bias", bias_, aoti_torch_dtype_int32(), "int32");
    expect_dtype(kGate, "multiplier", multiplier_, aoti_torch_dtype_float32(), "float32");
    expect_range(kGate, zero_point, low, high);
    const int64_t n = bias_.numel();
    if (weight_.dim() != 1 || weight_.numel() != packed_size(n, k))
      fail(kGate, ": a packed weight of shape ", weight_.shape(), ", expected [", packed_size(n, k), "] for N = ", n,
           " and K = ", k);
    if (bias_.dim() != 1 || multiplier_.dim() != 1 || multiplier_.numel() != n)
      fail(kGate, ": multiplier", multiplier_.shape(), " and bias", bias_.shape(), ", expected both of one size [N]");
    g.x = x;
    g.x_stride = g.k = k;
    g.y_stride = g.n = n;
    g.weight = weight.data<int8_t>();
    g.bias = bias.data<int32_t>();
    g.multiplier = multiplier.data<float>();
    g.y = y.data();
    g.zero_point = int32_t(zero_point);
    g.low = int32_t(low);
    g.high = int32_t(high);
    if (!activation.empty()) {
      g.output = Output::kActivationUint8;
      g.activation = activation_named(kGate, activation);
      g.inverse = 1.0f / float(scale);
    }
    run_gemm(g, rows);
  }
};

Tensor qgate(const Tensor& t, int64_t z_x, double mean, int64_t z_mean, const Tensor& weight, const Tensor& bias,
             const Tensor& multiplier, const std::string& activation, double scale, int64_t z_hidden, int64_t low_hidden,
             int64_t high_hidden, const Tensor& weight_2, const Tensor& bias_2, const Tensor& multiplier_2,
             const std::string& gate, double scale_2, int64_t z_gate, double m, int64_t zero_point, int64_t low,
             int64_t high) {
  expect_dtype(kGate, "x", t, aoti_torch_dtype_uint8(), "uint8");
  expect_range(kGate, z_x, 0, 255);
  expect_range(kGate, z_mean, 0, 255);
  expect_range(kGate, zero_point, low, high);
  const Shape shape = t.shape();
  const ChannelsLast<uint8_t> x(kGate, t, shape.dim - 2);
  Tensor y = Tensor::empty_channels_last(shape, aoti_torch_dtype_uint8());

  // An image as runs of pixels that follow one another: one run, or its rows.
  const bool one = x.is_dense();
  const int64_t pixels = one ? x.size[0] * x.size[1] * x.size[2] : x.size[2];
  std::vector<int64_t> runs;
  for (int64_t d = 0; d < (one ? 1 : x.size[0]); ++d)
    for (int64_t h = 0; h < (one ? 1 : x.size[1]); ++h) runs.push_back(d * x.step[1] + h * x.step[2]);
  const int64_t count = pixels * int64_t(runs.size());
  std::vector<uint8_t> means(x.batch * x.channels);
  for (int64_t b = 0; b < x.batch; ++b)
    active().mean_of(x.data + b * x.step[0], runs.data(), int64_t(runs.size()), pixels, x.step[3], int32_t(z_x),
                     float(mean / double(count)), means.data() + b * x.channels, x.channels, int32_t(z_mean), 0, 255);
  const GateProduct hidden(weight, bias, multiplier, means.data(), x.batch, x.channels, activation, scale, z_hidden,
                      low_hidden, high_hidden);
  const GateProduct gates(weight_2, bias_2, multiplier_2, hidden.y.data(), x.batch, hidden.g.n, gate, scale_2, z_gate, 0, 255);
  if (gates.g.n != x.channels) fail(kGate, ": ", gates.g.n, " gates for x", shape);

  uint8_t* to = y.data<uint8_t>();
  const int64_t grain = std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, x.channels));
  for (int64_t b = 0; b < x.batch; ++b) {
    const Term factor = {gates.y.data() + b * x.channels, int32_t(z_gate), 1};
    for (const int64_t run : runs) {
      const uint8_t* const from = x.data + b * x.step[0] + run;
      const bool adjacent = pixels == 1 || x.step[3] == x.channels;
      parallel(pixels, grain, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p += adjacent ? end - begin : 1)
          active().multiply({from + p * x.step[3], int32_t(z_x), float(m)}, factor, to + p * x.channels,
                            adjacent ? end - begin : 1, x.channels, int32_t(zero_point), int32_t(low), int32_t(high));
      });
      to += pixels * x.channels;
    }
  }
  return y;
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) { fxq::serve<fxq::qgate>(m, "qgate"); }

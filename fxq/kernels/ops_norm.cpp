// Normalisation of rows as torch operators.
#include <algorithm>
#include <optional>
#include <string>

#include "checks.h"

namespace fxq {
namespace {

// What the three operators share: checks, and the operands of `norm`.
struct Operands {
  Norm norm{};
  const Contiguous x;
  std::optional<Contiguous> weight, bias, factor;
  const char* op;

  Operands(const char* op, const Tensor& x, const std::string& kind, const std::optional<Tensor>& weight,
           const std::optional<Tensor>& bias, double eps)
      : x(x), op(op) {
    expect_dtype(op, "x", x, aoti_torch_dtype_float32(), "float32");
    if (x.dim() == 0) fail(op, ": x is a scalar, expected [..., K]");
    if (kind != "layer_norm" && kind != "rms_norm") fail(op, ": kind '", kind, "', expected layer_norm or rms_norm");
    norm.k = x.shape().sizes[x.dim() - 1];
    norm.centred = kind == "layer_norm";
    norm.eps = float(eps);
    norm.weight = row("weight", weight, this->weight);
    norm.bias = row("bias", bias, this->bias);
  }

  void quantized(double scale, int64_t zero_point, const std::optional<Tensor>& factor) {
    expect_range(op, zero_point, 0, 255);
    norm.factor = row("factor", factor, this->factor);
    norm.inverse = 1.0f / float(scale);
    norm.zero_point = int32_t(zero_point);
  }

  void run(int64_t count, float* y, uint8_t* q) const {
    if (!count) return;
    const int64_t k = norm.k;
    const float* from = x.data<float>();
    parallel(count / k, std::max<int64_t>(1, kElementGrain / 4 / k), [&](int64_t begin, int64_t end) {
      active().norm(norm, from + begin * k, y ? y + begin * k : y, q ? q + begin * k : q, end - begin);
    });
  }

 private:
  const float* row(const char* name, const std::optional<Tensor>& t, std::optional<Contiguous>& kept) const {
    if (!t) return nullptr;
    expect_dtype(op, name, *t, aoti_torch_dtype_float32(), "float32");
    if (t->dim() != 1 || t->numel() != norm.k)
      fail(op, ": ", name, " has shape ", t->shape(), ", expected [", norm.k, "], the last dimension of x");
    return kept.emplace(*t).data<float>();
  }
};

Tensor norm(const Tensor& x, const std::string& kind, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias, double eps) {
  const Operands operands("norm", x, kind, weight, bias, eps);
  Tensor y = Tensor::empty(x.shape(), aoti_torch_dtype_float32());
  operands.run(x.numel(), y.data<float>(), nullptr);
  return y;
}

Tensor norm_quantize(const Tensor& x, const std::string& kind, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& bias, double eps, double scale, int64_t zero_point,
                     const std::optional<Tensor>& factor) {
  Operands operands("norm_quantize", x, kind, weight, bias, eps);
  operands.quantized(scale, zero_point, factor);
  Tensor q = Tensor::empty(x.shape(), aoti_torch_dtype_uint8());
  operands.run(x.numel(), nullptr, q.data<uint8_t>());
  return q;
}

std::pair<Tensor, Tensor> norm_and_quantize(const Tensor& x, const std::string& kind,
                                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                            double eps, double scale, int64_t zero_point,
                                            const std::optional<Tensor>& factor) {
  Operands operands("norm_and_quantize", x, kind, weight, bias, eps);
  operands.quantized(scale, zero_point, factor);
  Tensor y = Tensor::empty(x.shape(), aoti_torch_dtype_float32());
  Tensor q = Tensor::empty(x.shape(), aoti_torch_dtype_uint8());
  operands.run(x.numel(), y.data<float>(), q.data<uint8_t>());
  return {std::move(y), std::move(q)};
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) {
  m.impl("norm", fxq::boxed<fxq::norm>);
  m.impl("norm_quantize", fxq::boxed<fxq::norm_quantize>);
  m.impl("norm_and_quantize", fxq::boxed<fxq::norm_and_quantize>);
}

// Normalisation of rows as torch operators.
#include <algorithm>
#include <optional>
#include <string>

#include "norm_rows.h"
#include "steps.h"

namespace fxq {

// Rows of float32 to y and q, of which either may be null.
static void run_norm(const Norm& norm, const float* x, float* y, uint8_t* q, int64_t rows) {
  const int64_t k = norm.k;
  parallel(rows, std::max<int64_t>(1, kElementGrain / 4 / k), [&](int64_t begin, int64_t end) {
    active().norm(norm, x + begin * k, y ? y + begin * k : y, q ? q + begin * k : q, end - begin);
  });
}

namespace {

// What the three operators share: x beside the operands of `norm`.
struct NormOperands : NormRows {
  const Contiguous x;

  NormOperands(const char* op, const Tensor& x, const std::string& kind, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, double eps)
      : NormRows(op, width(op, x), kind, weight, bias, eps), x(x) {}

  void run(int64_t count, float* y, uint8_t* q) const {
    if (count) run_norm(norm, x.data<float>(), y, q, count / norm.k);
  }

 private:
  static int64_t width(const char* op, const Tensor& x) {
    expect_dtype(op, "x", x, aoti_torch_dtype_float32(), "float32");
    if (x.dim() == 0) fail(op, ": x is a scalar, expected [..., K]");
    return x.shape().sizes[x.dim() - 1];
  }
};

Tensor norm(const Tensor& x, const std::string& kind, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias, double eps) {
  const NormOperands operands("norm", x, kind, weight, bias, eps);
  Tensor y = Tensor::empty(x.shape(), aoti_torch_dtype_float32());
  operands.run(x.numel(), y.data<float>(), nullptr);
  return y;
}

Tensor norm_quantize(const Tensor& x, const std::string& kind, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& bias, double eps, double scale, int64_t zero_point,
                     const std::optional<Tensor>& factor) {
  NormOperands operands("norm_quantize", x, kind, weight, bias, eps);
  operands.quantized(scale, zero_point, factor);
  Tensor q = Tensor::empty(x.shape(), aoti_torch_dtype_uint8());
  operands.run(x.numel(), nullptr, q.data<uint8_t>());
  return q;
}

std::pair<Tensor, Tensor> norm_and_quantize(const Tensor& x, const std::string& kind,
                                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                            double eps, double scale, int64_t zero_point,
                                            const std::optional<Tensor>& factor) {
  NormOperands operands("norm_and_quantize", x, kind, weight, bias, eps);
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

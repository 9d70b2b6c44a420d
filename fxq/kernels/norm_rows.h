// The operands of a norm, checked: what the operators that normalise rows share.
#pragma once
#include <optional>
#include <string>

#include "checks.h"

namespace fxq {

struct NormRows {
  Norm norm{};
  const char* op;
  std::optional<Contiguous> weight, bias, factor;

  NormRows(const char* op, int64_t k, const std::string& kind, const std::optional<Tensor>& weight,
           const std::optional<Tensor>& bias, double eps)
      : op(op) {
    if (kind != "layer_norm" && kind != "rms_norm") fail(op, ": kind '", kind, "', expected layer_norm or rms_norm");
    norm.k = k;
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

 private:
  const float* row(const char* name, const std::optional<Tensor>& t, std::optional<Contiguous>& kept) const {
    if (!t) return nullptr;
    expect_dtype(op, name, *t, aoti_torch_dtype_float32(), "float32");
    if (t->dim() != 1 || t->numel() != norm.k)
      fail(op, ": ", name, " has shape ", t->shape(), ", expected [", norm.k, "], the last dimension of x");
    return kept.emplace(*t).data<float>();
  }
};

}  // namespace fxq

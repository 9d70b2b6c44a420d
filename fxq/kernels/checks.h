// What the torch operators share: errors, checks of arguments, threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "tensor.h"

namespace fxq {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "fxq::";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void expect_dtype(const char* op, const char* name, const Tensor& t, int32_t dtype, const char* expected) {
  if (t.dtype() != dtype) fail(op, ": ", name, " has the wrong dtype, expected ", expected);
}

inline void expect_range(const char* op, int64_t zero_point, int64_t low, int64_t high) {
  if (zero_point < 0 || zero_point > 255 || low < 0 || low > high || high > 255)
    fail(op, ": zero_point = ", zero_point, ", low = ", low, ", high = ", high, ", expected 0 <= low <= high <= 255");
}

// Whether `rounding` is TFLite's, in two steps.
inline bool rounds_twice(const char* op, const std::string& rounding) {
  if (rounding != "single" && rounding != "tflite") fail(op, ": rounding '", rounding, "', expected single or tflite");
  return rounding == "tflite";
}

// The shifts of a fixed-point op, one for each of `count` channels; `held` keeps them alive.
inline const int32_t* shifts_of(const char* op, const Tensor& shift, int64_t count, std::optional<Contiguous>& held) {
  expect_dtype(op, "shift", shift, aoti_torch_dtype_int32(), "int32");
  if (shift.dim() != 1 || shift.numel() != count) fail(op, ": shift", shift.shape(), ", expected [", count, "]");
  const int32_t* own = held.emplace(shift).data<int32_t>();
  for (int64_t n = 0; n < count; ++n)
    if (own[n] < 0 || own[n] > 62) fail(op, ": shift of channel ", n, " is ", own[n], ", expected 0..62");
  return own;
}

inline Activation activation_named(const char* op, const std::string& name) {
  constexpr const char* kNames[] = {"gelu", "gelu_tanh", "silu",        "tanh",
                                    "sigmoid", "relu", "hardsigmoid", "hardswish"};
  for (int i = 0; i < 8; ++i)
    if (name == kNames[i]) return Activation(i);
  fail(op, ": activation '", name, "', expected one of fxq.numerics.ACTIVATIONS");
}

// f(begin, end) over [0, count) in parts of at least `grain`; on this thread alone where there is one part.
template <class Function>
void parallel(int64_t count, int64_t grain, const Function& f) {
  if (count <= grain)
    f(int64_t(0), count);
  else
    torch::stable::parallel_for(0, count, grain, f);
}

constexpr int64_t kElementGrain = 1 << 16;  // elements that are worth a thread
constexpr int64_t kProductGrain = 200'000;  // multiply-adds that are worth a thread

// threads.cpp: all rows of a product, shared among threads by panels of channels or by tiles of rows.
void run_gemm(const Gemm& g, int64_t rows);
void run_gemms(const Gemm* parts, int64_t count, int64_t rows);  // of one x, as one piece of work
void run_float_gemm(const FloatGemm& g, int64_t rows);

}  // namespace fxq

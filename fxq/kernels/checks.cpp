#include "checks.h"

#include <stdexcept>

namespace fxq {

void Part::append_to(std::string& message) const {
  if (text_) {
    message += text_;
  } else if (shape_.dim < 0) {
    message += std::to_string(number_);
  } else {
    message += '[';
    for (int64_t i = 0; i < shape_.dim; ++i) message += (i ? ", " : "") + std::to_string(shape_.sizes[i]);
    message += ']';
  }
}

void fail_with(const Part* parts, size_t count) {
  std::string message = "fxq::";
  for (size_t i = 0; i < count; ++i) parts[i].append_to(message);
  throw std::runtime_error(message);
}

void expect_dtype(const char* op, const char* name, const Tensor& t, int32_t dtype, const char* expected) {
  if (t.dtype() != dtype) fail(op, ": ", name, " has the wrong dtype, expected ", expected);
}

void expect_range(const char* op, int64_t zero_point, int64_t low, int64_t high) {
  if (zero_point < 0 || zero_point > 255 || low < 0 || low > high || high > 255)
    fail(op, ": zero_point = ", zero_point, ", low = ", low, ", high = ", high, ", expected 0 <= low <= high <= 255");
}

void expect_entries(const char* op, const char* name, const std::vector<int64_t>& list, size_t count, int64_t least) {
  if (list.size() != count) fail(op, ": ", name, " has ", list.size(), " entries, expected ", count);
  for (const int64_t entry : list)
    if (entry < least || entry > INT32_MAX) fail(op, ": ", name, " holds ", entry, ", expected ", least, "..2**31 - 1");
}

bool rounds_twice(const char* op, const std::string& rounding) {
  if (rounding != "single" && rounding != "tflite") fail(op, ": rounding '", rounding, "', expected single or tflite");
  return rounding == "tflite";
}

const int32_t* shifts_of(const char* op, const Tensor& shift, int64_t count, std::optional<Contiguous>& held) {
  expect_dtype(op, "shift", shift, aoti_torch_dtype_int32(), "int32");
  if (shift.dim() != 1 || shift.numel() != count) fail(op, ": shift", shift.shape(), ", expected [", count, "]");
  const int32_t* own = held.emplace(shift).data<int32_t>();
  for (int64_t n = 0; n < count; ++n)
    if (own[n] < 0 || own[n] > 62) fail(op, ": shift of channel ", n, " is ", own[n], ", expected 0..62");
  return own;
}

Activation activation_named(const char* op, const std::string& name) {
  constexpr const char* kNames[] = {"gelu", "gelu_tanh", "silu",        "tanh",
                                    "sigmoid", "relu", "hardsigmoid", "hardswish"};
  for (int i = 0; i < 8; ++i)
    if (name == kNames[i]) return Activation(i);
  fail(op, ": activation '", name, "', expected one of fxq.numerics.ACTIVATIONS");
}

}  // namespace fxq

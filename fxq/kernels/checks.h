// What the torch operators share: errors, checks of arguments, threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "kernels.h"
#include "tensor.h"

namespace fxq {

// A word, a number or a shape in an error message.
class Part {
 public:
  Part(const char* text) : text_(text) {}
  Part(const std::string& text) : text_(text.c_str()) {}
  Part(Shape shape) : shape_(shape) {}
  template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>
  Part(Integer number) : number_(int64_t(number)) {}
  void append_to(std::string& message) const;

 private:
  const char* text_ = nullptr;
  Shape shape_ = {nullptr, -1};
  int64_t number_ = 0;
};

[[noreturn]] void fail_with(const Part* parts, size_t count);

// Throws "fxq::" and the parts, one after the other.
template <class... Parts>
[[noreturn, gnu::noinline]] void fail(const Parts&... parts) {
  const Part all[] = {parts...};
  fail_with(all, sizeof...(parts));
}

void expect_dtype(const char* op, const char* name, const Tensor& t, int32_t dtype, const char* expected);
void expect_range(const char* op, int64_t zero_point, int64_t low, int64_t high);

// A list of `count` entries, none below `least` or beyond int32.
void expect_entries(const char* op, const char* name, const std::vector<int64_t>& list, size_t count, int64_t least);

// Whether `rounding` is TFLite's, in two steps.
bool rounds_twice(const char* op, const std::string& rounding);

// The shifts of a fixed-point op, one for each of `count` channels; `held` keeps them alive.
const int32_t* shifts_of(const char* op, const Tensor& shift, int64_t count, std::optional<Contiguous>& held);

Activation activation_named(const char* op, const std::string& name);

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
void run_gemm(const Gemm& g, int64_t rows, int64_t index, int64_t count);  // on this thread, of `count` the one `index`
void run_gemms(const Gemm* parts, int64_t count, int64_t rows);  // of one x, as one piece of work
void run_float_gemm(const FloatGemm& g, int64_t rows);

}  // namespace fxq

// A run of operations on the rows of a transformer as one torch operator: the program that fxq/ops/block.py writes.
#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "steps.h"

namespace fxq::block {
namespace {

constexpr const char* kOp = "qblock";
constexpr int64_t kMagic = 0x6b636f6c62717866;  // "fxqblock"
constexpr int64_t kMostPerRow = 1 << 24;  // bytes of memory
// What the values of the rows that go through all steps together may take: more come back from memory, fewer read the
// weights more often.
constexpr int64_t kSliceBytes = 2 << 20;
constexpr const char* kNames[] = {"gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "relu", "hardsigmoid", "hardswish",
                                  "layer_norm", "rms_norm"};

enum class Step { kPart, kLinear, kLinearFloat, kLinearAct, kLinearActQuantize, kLinears, kAttention, kNorm,
                  kNormQuantize, kNormAndQuantize, kFeedForward };
enum class Tag { kNone, kInteger, kReal, kName, kValue, kConstant, kList };

// Rows of `width` values, or several such from `first` on among `parts`.
struct Value {
  const void* data = nullptr;
  int64_t width = -1;  // -1: no rows
  bool is_float = false;
  int64_t first = -1, count = 0;
};

// Words of a program, each argument after its tag; what is not there is refused, never read.
class Words {
 public:
  Words(const int64_t* words, int64_t count) : at_(words), end_(words + count) {}
  int64_t word() {
    if (at_ == end_) fail(kOp, ": the program is cut off");
    return *at_++;
  }
  int64_t of(Tag tag) {
    const int64_t found = word();
    if (found != int64_t(tag)) fail(kOp, ": the program has an argument of kind ", found, ", expected ", int64_t(tag));
    return word();
  }
  bool none() {
    if (at_ == end_ || *at_ != int64_t(Tag::kNone)) return false;
    at_ += 2;
    if (at_ > end_) fail(kOp, ": the program is cut off");
    return true;
  }
  double real() {
    const int64_t bits = of(Tag::kReal);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  std::string name() {
    const int64_t i = of(Tag::kName);
    if (i < 0 || i >= int64_t(std::size(kNames))) fail(kOp, ": the program has name ", i);
    return kNames[i];
  }
  int64_t byte() {
    const int64_t value = of(Tag::kInteger);
    if (value < 0 || value > 255) fail(kOp, ": ", value, " in the program, expected 0..255");
    return value;
  }

 private:
  const int64_t *at_, *end_;
};

class Block {
 public:
  Block(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants, const Tensor& program,
        const std::vector<int64_t>& widths)
      : inputs_(inputs), constants_(constants), program_(program), words_(open(program)) {
    const int64_t steps = words_.word(), rows_of = words_.word();
    per_row_ = words_.word();
    const bool fits = steps >= 0 && steps <= program.numel() && per_row_ >= 0 && per_row_ <= kMostPerRow && per_row_ % 64 == 0;
    if (inputs.empty() || rows_of < 1 || rows_of > int64_t(inputs.size()) || !fits)
      fail(kOp, ": the program's head is damaged");
    const Shape shape = inputs[0].shape();
    if (shape.dim != 3) fail(kOp, ": the first input is ", shape, ", expected [B, T, K]");
    batch_ = shape.sizes[0];
    tokens_ = shape.sizes[1];
    held_.reserve(rows_of);
    for (int64_t i = 0; i < rows_of; ++i) take(inputs[i]);
    for (int64_t width : widths) {
      const int64_t sizes[3] = {batch_, tokens_, width < 0 ? -width : width};
      results_.push_back(Tensor::empty({sizes, 3}, width < 0 ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8()));
    }
    written_.resize(widths.size());
    const int64_t most = std::max<int64_t>(1, kSliceBytes / std::max<int64_t>(1, per_row_ * tokens_));
    const int64_t slices = std::max<int64_t>(1, ceil_div(batch_, most)), slice = ceil_div(batch_, slices);
    arena_ = static_cast<uint8_t*>(scratch(slice * tokens_ * per_row_ + 64, Holder::kOperator));
    values_.reserve(inputs.size() + steps);
    const Words body = words_;
    for (int64_t i = 0; i < slices; ++i) {
      first_ = std::min(i * slice, batch_);
      count_ = std::min(slice, batch_ - first_);
      rows_ = count_ * tokens_;
      words_ = body;
      parts_.clear();
      values_ = taken_;
      for (Value& value : values_) value.data = static_cast<const uint8_t*>(value.data) + offset(value);
      values_.resize(inputs.size());  // masks have no rows
      for (int64_t j = 0; j < steps; ++j) step();
    }
    for (bool written : written_)
      if (!written) fail(kOp, ": the program leaves a result without its numbers");
  }
  std::vector<Tensor> results() { return std::move(results_); }

 private:
  Words open(const Tensor& program) {
    expect_dtype(kOp, "program", program, aoti_torch_dtype_int64(), "int64");
    Words words(program_.data<int64_t>(), program.numel());
    if (words.word() != kMagic) fail(kOp, ": the program does not begin as one");
    return words;
  }

  void take(const Tensor& input) {
    const Shape shape = input.shape();
    if (shape.dim != 3 || shape.sizes[0] != batch_ || shape.sizes[1] != tokens_)
      fail(kOp, ": an input is ", shape, ", expected [", batch_, ", ", tokens_, ", K] as the first");
    Value value;
    value.is_float = input.dtype() == aoti_torch_dtype_float32();
    if (!value.is_float) expect_dtype(kOp, "an input", input, aoti_torch_dtype_uint8(), "uint8 or float32");
    value.width = shape.sizes[2];
    value.data = held_.emplace_back(input).data<void>();
    taken_.push_back(value);
  }
  // Bytes from the rows of the whole batch to those of this slice.
  int64_t offset(const Value& value) const {
    return first_ * tokens_ * value.width * (value.is_float ? int64_t(sizeof(float)) : 1);
  }

  const Value& value() {
    const int64_t i = words_.of(Tag::kValue);
    if (i < 0 || i >= int64_t(values_.size())) fail(kOp, ": the program reads value ", i, " of ", values_.size());
    return values_[i];
  }
  Value rows(bool is_float) {
    const Value& found = value();
    if (found.width < 0 || found.is_float != is_float)
      fail(kOp, ": a step reads what are no rows of ", is_float ? "float32" : "uint8");
    return found;
  }
  template <class T>
  const T* rows(bool is_float, int64_t width) {
    const Value found = rows(is_float);
    if (found.width != width) fail(kOp, ": a step reads rows of ", found.width, " values, expected ", width);
    return static_cast<const T*>(found.data);
  }

  const Tensor& constant() {
    const int64_t i = words_.of(Tag::kConstant);
    if (i < 0 || i >= int64_t(constants_.size())) fail(kOp, ": the program reads constant ", i, " of ", constants_.size());
    return constants_[i];
  }
  template <class T>
  const T* constant(int32_t dtype, int64_t size) {
    const Tensor& found = constant();
    if (found.dtype() != dtype || found.numel() != size || !found.is_contiguous())
      fail(kOp, ": a constant is ", found.shape(), ", or not contiguous, or of another dtype; expected ", size, " elements");
    return found.data<T>();
  }
  const float* row(int64_t k) { return words_.none() ? nullptr : constant<float>(aoti_torch_dtype_float32(), k); }

  // Where a step writes `width` values a row: a result of the block, or its memory.
  void* write(int64_t width, bool is_float) {
    const int64_t place = words_.word(), bytes = width * (is_float ? int64_t(sizeof(float)) : 1);
    Value value;
    value.width = width;
    value.is_float = is_float;
    void* data;
    if (place < 0) {
      const std::size_t i = std::size_t(-1 - place);
      const int32_t dtype = is_float ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8();
      if (i >= results_.size() || results_[i].shape().sizes[2] != width || results_[i].dtype() != dtype)
        fail(kOp, ": a step writes what is no result of the block");
      written_[i] = true;
      data = static_cast<uint8_t*>(results_[i].data<void>()) + offset(value);
    } else {
      if (place % 64 || place + bytes > per_row_) fail(kOp, ": a step writes beyond the block's memory");
      data = arena_ + rows_ * place;
    }
    value.data = data;
    made_.push_back(value);
    return data;
  }
  // The value of a step: the one that it has written, or all of them.
  void finish() {
    if (made_.size() == 1)
      values_.push_back(made_[0]);
    else {
      Value several;
      several.first = int64_t(parts_.size());
      several.count = int64_t(made_.size());
      parts_.insert(parts_.end(), made_.begin(), made_.end());
      values_.push_back(several);
    }
    made_.clear();
  }

  Gemm gemm(int64_t k, const Tensor& weight, const Tensor& bias, const Tensor& multiplier) {
    Gemm g;
    g.k = g.x_stride = k;
    g.n = g.y_stride = bias.numel();
    const bool contiguous = weight.is_contiguous() && bias.is_contiguous() && multiplier.is_contiguous();
    if (weight.dtype() != aoti_torch_dtype_int8() || weight.numel() != packed_size(g.n, k) || multiplier.numel() != g.n ||
        bias.dtype() != aoti_torch_dtype_int32() || multiplier.dtype() != aoti_torch_dtype_float32() || !contiguous)
      fail(kOp, ": weight", weight.shape(), ", bias", bias.shape(), " and multiplier", multiplier.shape(),
           " of a step are not what rows of ", k, " values take");
    g.weight = weight.data<int8_t>();
    g.bias = bias.data<int32_t>();
    g.multiplier = multiplier.data<float>();
    return g;
  }
  Gemm gemm(const Value& x) {
    const Tensor &weight = constant(), &bias = constant(), &multiplier = constant();
    Gemm g = gemm(x.width, weight, bias, multiplier);
    g.x = static_cast<const uint8_t*>(x.data);
    return g;
  }
  void set_addend(Gemm& g) {
    if (words_.none()) return;
    g.addend = rows<float>(true, g.n);
    g.addend_stride = g.n;
  }
  void set_rounding(Gemm& g, int64_t zero_point, int64_t low, int64_t high) {
    expect_range(kOp, zero_point, low, high);
    g.zero_point = int32_t(zero_point);
    g.low = int32_t(low);
    g.high = int32_t(high);
  }

  void step() {
    const int64_t code = words_.word();
    switch (Step(code)) {
      case Step::kPart: return part();
      case Step::kLinear:
      case Step::kLinearFloat:
      case Step::kLinearAct:
      case Step::kLinearActQuantize: linear(Step(code)); break;
      case Step::kLinears: linears(); break;
      case Step::kAttention: attention(); break;
      case Step::kNorm:
      case Step::kNormQuantize:
      case Step::kNormAndQuantize: norm(Step(code)); break;
      case Step::kFeedForward: feed_forward(); break;
      default: fail(kOp, ": the program has step ", code);
    }
    finish();
  }

  void part() {
    const Value whole = value();
    const int64_t i = words_.of(Tag::kInteger);
    if (i < 0 || i >= whole.count) fail(kOp, ": the program takes part ", i, " of ", whole.count);
    values_.push_back(parts_[whole.first + i]);
  }

  void linear(Step step) {
    Gemm g = gemm(rows(false));
    bool is_float = false;
    if (step == Step::kLinear) {
      const int64_t zero_point = words_.byte(), low = words_.byte(), high = words_.byte();
      set_rounding(g, zero_point, low, high);
    } else if (step == Step::kLinearFloat) {
      g.output = Output::kFloat;
      set_addend(g);
      is_float = true;
    } else {
      g.activation = activation_named(kOp, words_.name());
      if (step == Step::kLinearAct) {
        g.output = Output::kActivation;
        set_addend(g);
        is_float = true;
      } else {
        g.output = Output::kActivationUint8;
        g.inverse = 1.0f / float(words_.real());
        g.zero_point = int32_t(words_.byte());
        g.factor = row(g.n);
      }
    }
    g.y = write(g.n, is_float);
    run_gemm(g, rows_);
  }

  void linears() {
    const Value x = rows(false);
    const int64_t count = words_.of(Tag::kList);
    if (count < 1 || count > 64) fail(kOp, ": ", count, " linears of one input");
    std::vector<const Tensor*> operands;
    std::vector<int64_t> numbers;
    for (int64_t list = 0; list < 3; ++list) {
      if (list && words_.of(Tag::kList) != count) fail(kOp, ": lists of several lengths");
      for (int64_t i = 0; i < count; ++i) operands.push_back(&constant());
    }
    for (int64_t list = 0; list < 3; ++list) {
      if (words_.of(Tag::kList) != count) fail(kOp, ": lists of several lengths");
      for (int64_t i = 0; i < count; ++i) numbers.push_back(words_.byte());
    }
    std::vector<Gemm> gemms;
    for (int64_t i = 0; i < count; ++i) {
      Gemm g = gemm(x.width, *operands[i], *operands[count + i], *operands[2 * count + i]);
      g.x = static_cast<const uint8_t*>(x.data);
      set_rounding(g, numbers[i], numbers[count + i], numbers[2 * count + i]);
      g.y = write(g.n, false);
      gemms.push_back(g);
    }
    run_gemms(gemms.data(), count, rows_);
  }

  void attention() {
    const Value q = rows(false), k = rows(false), v = rows(false);
    Attention a;
    const Tensor* mask = nullptr;
    if (!words_.none()) {
      const int64_t i = words_.of(Tag::kValue);
      if (i < 0 || i >= int64_t(inputs_.size())) fail(kOp, ": a mask is no input");
      mask = &inputs_[i];
    }
    a.is_causal = words_.of(Tag::kInteger);
    const std::optional<double> scale = words_.none() ? std::optional<double>() : words_.real();
    a.q_zero_point = int32_t(words_.byte());
    a.v_zero_point = int32_t(words_.byte());
    const double s_qk = words_.real();
    a.v_multiplier = float(words_.real());
    a.zero_point = int32_t(words_.byte());
    a.masked = float(words_.byte());
    a.heads = words_.of(Tag::kInteger);
    a.depth = a.heads > 0 ? q.width / a.heads : 0;
    a.kv_heads = a.depth > 0 ? k.width / a.depth : 0;
    a.width = a.kv_heads > 0 ? v.width / a.kv_heads : 0;
    if (a.width == 0 || a.heads * a.depth != q.width || a.kv_heads * a.depth != k.width || a.kv_heads * a.width != v.width ||
        a.heads % a.kv_heads)
      fail(kOp, ": rows of ", q.width, ", ", k.width, " and ", v.width, " values do not hold ", a.heads, " heads");
    if (tokens_ > kMaxKeys) fail(kOp, ": ", tokens_, " keys, expected at most ", kMaxKeys);
    const auto place = [&](const Value& x, int64_t depth, const uint8_t** data, int64_t* stride) {
      *data = static_cast<const uint8_t*>(x.data);
      stride[0] = tokens_ * x.width;
      stride[1] = depth;
      stride[2] = x.width;
    };
    place(q, a.depth, &a.q, a.q_stride);
    place(k, a.depth, &a.k, a.k_stride);
    place(v, a.width, &a.v, a.v_stride);
    a.queries = a.keys = tokens_;
    a.multiplier = attention_multiplier(s_qk, scale, a.depth);
    if (mask) {
      set_mask(a, *mask, batch_, true);
      a.mask = static_cast<const uint8_t*>(a.mask) + first_ * a.mask_stride[0] * (a.mask_is_float ? sizeof(float) : 1);
    }
    a.y = write(a.heads * a.width, false);
    run_attention(a, count_);
  }

  void norm(Step step) {
    const Value x = rows(true);
    Norm n{};
    n.k = x.width;
    const std::string kind = words_.name();
    if (kind != "layer_norm" && kind != "rms_norm") fail(kOp, ": a norm of kind ", kind);
    n.centred = kind == "layer_norm";
    n.weight = row(n.k);
    n.bias = row(n.k);
    n.eps = float(words_.real());
    if (step != Step::kNorm) {
      n.inverse = 1.0f / float(words_.real());
      n.zero_point = int32_t(words_.byte());
      n.factor = row(n.k);
    }
    float* y = step == Step::kNormQuantize ? nullptr : static_cast<float*>(write(n.k, true));
    uint8_t* q = step == Step::kNorm ? nullptr : static_cast<uint8_t*>(write(n.k, false));
    if (n.k) run_norm(n, static_cast<const float*>(x.data), y, q, rows_);
  }

  void feed_forward() {
    Gemm wide = gemm(rows(false));
    wide.output = Output::kActivation;
    wide.activation = activation_named(kOp, words_.name());
    const Tensor &weight = constant(), &sums = constant(), &scale = constant();
    Gemm narrow = gemm(wide.n, weight, sums, scale);
    narrow.output = Output::kFloat;
    narrow.dynamic = true;
    narrow.float_bias = row(narrow.n);
    set_addend(narrow);
    narrow.y = write(narrow.n, true);
    run_feed_forward(wide, narrow, rows_);
  }

  const std::vector<Tensor>&inputs_, &constants_;
  const Contiguous program_;
  Words words_;
  int64_t per_row_ = 0, batch_ = 0, tokens_ = 0;
  int64_t first_ = 0, count_ = 0, rows_ = 0;  // of the batch, those that go through all steps now
  uint8_t* arena_ = nullptr;
  std::vector<Contiguous> held_;
  std::vector<Tensor> results_;
  std::vector<bool> written_;
  std::vector<Value> taken_, values_, parts_, made_;
};

std::vector<Tensor> qblock(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants,
                           const Tensor& program, const std::vector<int64_t>& widths) {
  return Block(inputs, constants, program, widths).results();
}

}  // namespace
}  // namespace fxq::block

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) { m.impl("qblock", fxq::boxed<fxq::block::qblock>); }

// Reading the program of a block: its steps, checked.
#include "block.h"

#include <algorithm>
#include <optional>
#include <string>

#include "checks.h"
#include "steps.h"
#include "words.h"

namespace fxq::block {
namespace {

constexpr int64_t kMagic = 0x6b636f6c62717866;  // "fxqblock"
constexpr int64_t kMostPerRow = 1 << 24;        // bytes of memory
constexpr int64_t kMostParts = 64;              // linears of one input
enum class Code { kPart, kLinear, kLinearFloat, kLinearAct, kLinearActQuantize, kLinears, kAttention, kNorm,
                  kNormQuantize, kNormAndQuantize, kFeedForward };

// A constant: `count` elements from `data` on.
struct Constant {
  enum Dtype { kInt8, kInt32, kFloat };  // as `_DTYPES` in fxq/ops/block.py
  const void* data;
  int64_t dtype, count;
  template <class T>
  const T* of(Dtype expected, int64_t elements) const {
    if (dtype != expected || count != elements)
      fail(kOp, ": a constant of dtype ", dtype, " has ", count, " elements, expected ", elements, " of dtype ",
           int64_t(expected));
    return static_cast<const T*>(data);
  }
};

// The memory of all constants, and of each in three words of the program the bytes before it, its dtype and elements.
class Constants {
 public:
  Constants(const Tensor& memory, Words& words)
      : memory_(memory.data<uint8_t>()), bytes_(memory.numel()), count_(words.word()), places_(words.triples(count_)) {
    expect_dtype(kOp, "constants", memory, aoti_torch_dtype_uint8(), "uint8");
    if (!memory.is_contiguous() || uintptr_t(memory_) % alignof(float))
      fail(kOp, ": constants", memory.shape(), " are not contiguous, or begin between two numbers");
  }
  Constant operator[](int64_t i) const {
    if (i < 0 || i >= count_) fail(kOp, ": the program reads constant ", i, " of ", count_);
    const int64_t begin = places_[3 * i], dtype = places_[3 * i + 1], count = places_[3 * i + 2];
    const int64_t element = dtype == Constant::kInt8 ? 1 : 4;
    const bool is_line = begin >= 0 && begin <= bytes_ && begin % 64 == 0;
    const bool is_known = dtype >= Constant::kInt8 && dtype <= Constant::kFloat;
    if (!is_known || !is_line || count < 0 || count > (bytes_ - begin) / element)
      fail(kOp, ": constants of ", bytes_, " bytes hold none of dtype ", dtype, " with ", count, " elements at ", begin);
    return {memory_ + begin, dtype, count};
  }

 private:
  const uint8_t* const memory_;
  const int64_t bytes_, count_;
  const int64_t* const places_;
};

class Reader {
 public:
  Reader(const std::vector<Tensor>& inputs, const Tensor& program, const Tensor& constants,
         const std::vector<int64_t>& widths)
      : inputs_(inputs), program_(program), words_(open(program)), constants_(constants, words_) {
    const int64_t steps = words_.word(), rows_of = words_.word();
    block_.slice_bytes = words_.word();
    block_.own_bytes = words_.word();
    const auto fits = [](int64_t bytes) { return bytes >= 0 && bytes <= kMostPerRow && bytes % 64 == 0; };
    const bool sound = steps >= 0 && steps <= program.numel() && fits(block_.slice_bytes) && fits(block_.own_bytes);
    if (inputs.empty() || rows_of < 1 || rows_of > int64_t(inputs.size()) || !sound)
      fail(kOp, ": the program's head is damaged");
    const Shape shape = inputs[0].shape();
    if (shape.dim != 3) fail(kOp, ": the first input is ", shape, ", expected [B, T, K]");
    block_.batch = shape.sizes[0];
    block_.tokens = shape.sizes[1];
    block_.inputs.reserve(rows_of);
    for (int64_t i = 0; i < rows_of; ++i) take(inputs[i]);
    values_.reserve(inputs.size() + steps);
    values_.resize(inputs.size());  // masks have no rows
    for (int64_t width : widths) {
      const int64_t sizes[3] = {block_.batch, block_.tokens, width < 0 ? -width : width};
      const int32_t dtype = width < 0 ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8();
      block_.results.push_back(Tensor::empty({sizes, 3}, dtype));
    }
    written_.resize(widths.size());
    block_.steps.reserve(steps);
    for (int64_t i = 0; i < steps; ++i) read();
    for (bool written : written_)
      if (!written) fail(kOp, ": the program leaves a result without its numbers");
  }

  Block block() { return std::move(block_); }

 private:
  Words open(const Tensor& program) {
    expect_dtype(kOp, "program", program, aoti_torch_dtype_int64(), "int64");
    Words words(program_.data<int64_t>(), program.numel());
    if (words.word() != kMagic) fail(kOp, ": the program does not begin as one");
    return words;
  }

  void take(const Tensor& input) {
    const Shape shape = input.shape();
    if (shape.dim != 3 || shape.sizes[0] != block_.batch || shape.sizes[1] != block_.tokens)
      fail(kOp, ": an input is ", shape, ", expected [", block_.batch, ", ", block_.tokens, ", K] as the first");
    Value value;
    value.is_float = input.dtype() == aoti_torch_dtype_float32();
    if (!value.is_float) expect_dtype(kOp, "an input", input, aoti_torch_dtype_uint8(), "uint8 or float32");
    value.width = shape.sizes[2];
    value.data = block_.inputs.emplace_back(input).data<uint8_t>();
    values_.push_back(value);
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

  Constant constant() { return constants_[words_.of(Tag::kConstant)]; }
  const float* row(int64_t k) { return words_.none() ? nullptr : constant().of<float>(Constant::kFloat, k); }

  // Where a step writes `width` values a row: a result of the block, or its memory.
  Value write(int64_t width, bool is_float) {
    const int64_t place = words_.word();
    Value value;
    value.width = width;
    value.is_float = is_float;
    if (place < 0) {
      const std::size_t i = std::size_t(-1 - place);
      const int32_t dtype = is_float ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8();
      const std::vector<Tensor>& results = block_.results;
      if (i >= results.size() || results[i].shape().sizes[2] != width || results[i].dtype() != dtype)
        fail(kOp, ": a step writes what is no result of the block");
      written_[i] = true;
      value.data = results[i].data<uint8_t>();
    } else {
      const bool shared = place < block_.slice_bytes;
      value.home = shared ? Home::kSlice : Home::kThread;
      value.place = shared ? place : place - block_.slice_bytes;
      if (place % 64 || value.bytes() > (shared ? block_.slice_bytes : block_.own_bytes) - value.place)
        fail(kOp, ": a step writes beyond the block's memory");
    }
    made_.push_back(value);
    return value;
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

  Gemm gemm(int64_t k, const Constant& weight, const Constant& bias, const Constant& multiplier) {
    Gemm g;
    g.k = g.x_stride = k;
    g.n = g.y_stride = bias.count;
    g.weight = weight.of<int8_t>(Constant::kInt8, packed_size(g.n, k));
    g.bias = bias.of<int32_t>(Constant::kInt32, g.n);
    g.multiplier = multiplier.of<float>(Constant::kFloat, g.n);
    return g;
  }
  Gemm gemm(int64_t k) {
    const Constant weight = constant(), bias = constant(), multiplier = constant();
    return gemm(k, weight, bias, multiplier);
  }
  std::optional<Value> addend(Gemm& g) {
    if (words_.none()) return {};
    const Value found = rows(true);
    if (found.width != g.n) fail(kOp, ": a step adds rows of ", found.width, " values, expected ", g.n);
    g.addend_stride = g.n;
    return found;
  }
  void set_rounding(Gemm& g, int64_t zero_point, int64_t low, int64_t high) {
    expect_range(kOp, zero_point, low, high);
    g.zero_point = int32_t(zero_point);
    g.low = int32_t(low);
    g.high = int32_t(high);
  }
  // `g` with its rows.
  static Gemm placed(Gemm g, const Rows& rows, const Value& x, const Value& y, const std::optional<Value>& addend) {
    g.x = at(x, rows);
    g.y = to(y, rows);
    if (addend) g.addend = reinterpret_cast<const float*>(at(*addend, rows));
    return g;
  }

  void read() {
    const Code code = Code(words_.word());
    Step step;
    step.is_attention = code == Code::kAttention;
    switch (code) {
      case Code::kPart: return part();
      case Code::kLinear:
      case Code::kLinearFloat:
      case Code::kLinearAct:
      case Code::kLinearActQuantize: linear(code, step); break;
      case Code::kLinears: linears(step); break;
      case Code::kAttention: attention(step); break;
      case Code::kNorm:
      case Code::kNormQuantize:
      case Code::kNormAndQuantize: norm(code, step); break;
      case Code::kFeedForward: feed_forward(step); break;
      default: fail(kOp, ": the program has step ", int64_t(code));
    }
    block_.steps.push_back(std::move(step));
    finish();
  }

  void part() {
    const Value whole = value();
    const int64_t i = words_.of(Tag::kInteger);
    if (i < 0 || i >= whole.count) fail(kOp, ": the program takes part ", i, " of ", whole.count);
    values_.push_back(parts_[whole.first + i]);
  }

  void linear(Code code, Step& step) {
    const Value x = rows(false);
    Gemm g = gemm(x.width);
    step.work = g.n * g.k;
    std::optional<Value> added;
    if (code == Code::kLinear) {
      const int64_t zero_point = words_.byte(), low = words_.byte(), high = words_.byte();
      set_rounding(g, zero_point, low, high);
    } else if (code == Code::kLinearFloat) {
      g.output = Output::kFloat;
      added = addend(g);
    } else {
      g.activation = activation_named(kOp, words_.name());
      if (code == Code::kLinearAct) {
        g.output = Output::kActivation;
        added = addend(g);
      } else {
        g.output = Output::kActivationUint8;
        g.inverse = 1.0f / float(words_.real());
        g.zero_point = int32_t(words_.byte());
        g.factor = row(g.n);
      }
    }
    const Value y = write(g.n, code == Code::kLinearFloat || code == Code::kLinearAct);
    step.run = [=](const Rows& rows, const Share& share) {
      run_gemm(placed(g, rows, x, y, added), rows.count, share.index, share.count);
    };
  }

  void linears(Step& step) {
    const Value x = rows(false);
    const int64_t count = words_.of(Tag::kList);
    if (count < 1 || count > kMostParts) fail(kOp, ": ", count, " linears of one input");
    Constant operands[3 * kMostParts];
    int64_t numbers[3 * kMostParts], read = 0;
    for (int64_t list = 0; list < 3; ++list) {
      if (list && words_.of(Tag::kList) != count) fail(kOp, ": lists of several lengths");
      for (int64_t i = 0; i < count; ++i) operands[read++] = constant();
    }
    read = 0;
    for (int64_t list = 0; list < 3; ++list) {
      if (words_.of(Tag::kList) != count) fail(kOp, ": lists of several lengths");
      for (int64_t i = 0; i < count; ++i) numbers[read++] = words_.byte();
    }
    std::vector<std::pair<Gemm, Value>> parts;
    parts.reserve(count);
    int64_t panels = 0;
    for (int64_t i = 0; i < count; ++i) {
      Gemm g = gemm(x.width, operands[i], operands[count + i], operands[2 * count + i]);
      set_rounding(g, numbers[i], numbers[count + i], numbers[2 * count + i]);
      step.work += g.n * g.k;
      panels += panel_count(g.n);
      parts.emplace_back(g, write(g.n, false));
    }
    step.run = [x, panels, parts = std::move(parts)](const Rows& rows, const Share& share) {
      const bool few = panels < 4 * share.count;  // too few to share those of all parts evenly
      int64_t begin = share.begin(panels), end = share.end(panels);
      for (const auto& [g, y] : parts) {
        const Gemm own = placed(g, rows, x, y, {});
        const int64_t panels = panel_count(g.n);
        if (few)
          run_gemm(own, rows.count, share.index, share.count);
        else if (begin < panels && end > 0)
          active().gemm(own, 0, rows.count, std::max<int64_t>(begin, 0), std::min(end, panels));
        begin -= panels;
        end -= panels;
      }
    };
  }

  void attention(Step& step) {
    const Value q = rows(false), k = rows(false), v = rows(false);
    for (const Value* x : {&q, &k, &v})
      if (x->home == Home::kThread) fail(kOp, ": an attention reads what is a thread's own");
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
    if (block_.tokens > kMaxKeys) fail(kOp, ": ", block_.tokens, " keys, expected at most ", kMaxKeys);
    const auto set_strides = [&](const Value& x, int64_t depth, int64_t* stride) {
      stride[0] = block_.tokens * x.width;
      stride[1] = depth;
      stride[2] = x.width;
    };
    set_strides(q, a.depth, a.q_stride);
    set_strides(k, a.depth, a.k_stride);
    set_strides(v, a.width, a.v_stride);
    a.queries = a.keys = block_.tokens;
    a.multiplier = attention_multiplier(s_qk, scale, a.depth);
    if (mask) set_mask(a, *mask, block_.batch, true);
    const Value y = write(a.heads * a.width, false);
    if (y.home == Home::kThread) fail(kOp, ": an attention writes what is a thread's own");
    step.run = [=](const Rows& rows, const Share& share) {
      Attention own = a;
      own.q = at(q, rows);
      own.k = at(k, rows);
      own.v = at(v, rows);
      if (a.mask)
        own.mask = static_cast<const uint8_t*>(a.mask) +
                   rows.slice.first * a.mask_stride[0] * (a.mask_is_float ? sizeof(float) : 1);
      own.y = to(y, rows);
      if (share.is_all()) return run_attention(own, rows.slice.count);
      const AttentionPieces pieces(own, rows.slice.count, share.count);
      pieces.run(share.begin(pieces.count), share.end(pieces.count));
    };
  }

  void norm(Code code, Step& step) {
    const Value x = rows(true);
    Norm n{};
    n.k = x.width;
    const std::string kind = words_.name();
    if (kind != "layer_norm" && kind != "rms_norm") fail(kOp, ": a norm of kind ", kind);
    n.centred = kind == "layer_norm";
    n.weight = row(n.k);
    n.bias = row(n.k);
    n.eps = float(words_.real());
    if (code != Code::kNorm) {
      n.inverse = 1.0f / float(words_.real());
      n.zero_point = int32_t(words_.byte());
      n.factor = row(n.k);
    }
    std::optional<Value> y, q;
    if (code != Code::kNormQuantize) y = write(n.k, true);
    if (code != Code::kNorm) q = write(n.k, false);
    step.run = [=](const Rows& rows, const Share& share) {
      const int64_t begin = share.begin(rows.count), first = begin * n.k;
      const auto* const from = reinterpret_cast<const float*>(at(x, rows)) + first;
      auto* const normalised = y ? reinterpret_cast<float*>(to(*y, rows)) + first : nullptr;
      uint8_t* const quantized = q ? to(*q, rows) + first : nullptr;
      if (n.k) active().norm(n, from, normalised, quantized, share.end(rows.count) - begin);
    };
  }

  void feed_forward(Step& step) {
    const Value x = rows(false);
    Gemm wide = gemm(x.width);
    wide.output = Output::kActivation;
    wide.activation = activation_named(kOp, words_.name());
    Gemm narrow = gemm(wide.n);
    narrow.output = Output::kFloat;
    narrow.dynamic = true;
    narrow.float_bias = row(narrow.n);
    step.work = wide.n * wide.k + narrow.n * narrow.k;
    step.phases = 2;
    step.between = wide.n;
    const std::optional<Value> added = addend(narrow);
    const Value y = write(narrow.n, true);
    step.run = [=](const Rows& rows, const Share& share) {
      Gemm first = wide, second = placed(narrow, rows, x, y, added);
      first.x = at(x, rows);
      first.y = rows.between;
      second.float_x = rows.between;
      if (share.is_all()) return fxq::feed_forward(first, second, 0, rows.count);
      run_gemm(share.phase == 0 ? first : second, rows.count, share.index, share.count);
    };
  }

  const std::vector<Tensor>& inputs_;
  const Contiguous program_;
  Words words_;
  const Constants constants_;
  Block block_;
  std::vector<bool> written_;
  std::vector<Value> values_, parts_, made_;
};

}  // namespace

Block read(const std::vector<Tensor>& inputs, const Tensor& program, const Tensor& constants,
           const std::vector<int64_t>& widths) {
  return Reader(inputs, program, constants, widths).block();
}

}  // namespace fxq::block

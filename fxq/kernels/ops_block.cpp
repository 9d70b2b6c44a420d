// A run of operations on the rows of a transformer as one torch operator: the program that fxq/ops/block.py writes.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "steps.h"
#include "words.h"

namespace fxq::block {
namespace {

constexpr int64_t kMagic = 0x6b636f6c62717866;  // "fxqblock"
constexpr int64_t kMostPerRow = 1 << 24;  // bytes of memory
// What the values of a slice may take: more come back from further away, fewer have threads wait for one another more
// often.
constexpr int64_t kSliceBytes = 8 << 20;
constexpr int64_t kMostParts = 64;  // linears of one input
constexpr int64_t kLooks = 10'000;  // at what another thread does, before the processor is offered to others
enum class Code { kPart, kLinear, kLinearFloat, kLinearAct, kLinearActQuantize, kLinears, kAttention, kNorm,
                  kNormQuantize, kNormAndQuantize, kFeedForward };

// Where the rows of a value lie: in a tensor of the whole batch, in the memory of a slice, or in that of a thread.
enum class Home { kTensor, kSlice, kThread };

// Rows of `width` values, or several such from `first` on among `parts`.
struct Value {
  Home home = Home::kTensor;
  const uint8_t* data = nullptr;  // kTensor
  int64_t place = 0;        // the others: bytes of a row before those of this value
  int64_t width = -1;       // -1: no rows
  bool is_float = false;
  int64_t first = -1, count = 0;
  int64_t bytes() const { return width * (is_float ? int64_t(sizeof(float)) : 1); }
};

// The rows of a slice that a step works on, and where the values of the thread, or threads, that work on them lie.
struct Rows {
  int64_t begin, count;
  uint8_t* own = nullptr;
  float* between = nullptr;  // of the two products of a feed-forward, where threads share each
};

// What of a step's work on its rows a thread does: all of it, or of one phase the share `index` of `count`.
struct Share {
  int64_t phase, index = 0, count = 1;
  bool is_all() const { return count == 1; }
  int64_t begin(int64_t pieces) const { return pieces * index / count; }
  int64_t end(int64_t pieces) const { return pieces * (index + 1) / count; }
};

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

// A step, read and checked: its work on some rows. An attention works on those of whole sequences.
struct Step {
  std::function<void(const Rows&, const Share&)> run;
  bool is_attention;
  int64_t work = 0;     // products for each row
  int64_t phases = 1;   // each begins when all threads are done with the one before
  int64_t between = 0;  // values for each row between its phases
};

// A phase of a step that threads share: how many shares are taken, how many done.
struct alignas(64) Turn {
  std::atomic<int64_t> taken{0}, done{0};
};
// Counts a share as done however it ends: the others would wait for ever for one that threw.
struct Done {
  std::atomic<int64_t>& count;
  ~Done() { count.fetch_add(1, std::memory_order_release); }
};

class Block {
 public:
  Block(const std::vector<Tensor>& inputs, const Tensor& program, const Tensor& constants,
        const std::vector<int64_t>& widths)
      : inputs_(inputs), program_(program), words_(open(program)), constants_(constants, words_) {
    const int64_t steps = words_.word(), rows_of = words_.word();
    slice_bytes_ = words_.word();
    own_bytes_ = words_.word();
    const auto fits = [](int64_t bytes) { return bytes >= 0 && bytes <= kMostPerRow && bytes % 64 == 0; };
    const bool sound = steps >= 0 && steps <= program.numel() && fits(slice_bytes_) && fits(own_bytes_);
    if (inputs.empty() || rows_of < 1 || rows_of > int64_t(inputs.size()) || !sound)
      fail(kOp, ": the program's head is damaged");
    const Shape shape = inputs[0].shape();
    if (shape.dim != 3) fail(kOp, ": the first input is ", shape, ", expected [B, T, K]");
    batch_ = shape.sizes[0];
    tokens_ = shape.sizes[1];
    held_.reserve(rows_of);
    for (int64_t i = 0; i < rows_of; ++i) take(inputs[i]);
    values_.reserve(inputs.size() + steps);
    values_.resize(inputs.size());  // masks have no rows
    for (int64_t width : widths) {
      const int64_t sizes[3] = {batch_, tokens_, width < 0 ? -width : width};
      results_.push_back(Tensor::empty({sizes, 3}, width < 0 ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8()));
    }
    written_.resize(widths.size());
    steps_.reserve(steps);
    for (int64_t i = 0; i < steps; ++i) read();
    for (bool written : written_)
      if (!written) fail(kOp, ": the program leaves a result without its numbers");
  }

  void run() {
    if (tokens_ == 0) return;
    const int64_t most = std::max<int64_t>(1, kSliceBytes / std::max<int64_t>(1, (slice_bytes_ + own_bytes_) * tokens_));
    const int64_t slices = std::max<int64_t>(1, ceil_div(batch_, most)), slice = ceil_div(batch_, slices);
    capacity_ = slice * tokens_;
    memory_ = static_cast<uint8_t*>(scratch(capacity_ * slice_bytes_ + 64, Holder::kOperator));
    for (first_ = 0; first_ < batch_; first_ += slice) {
      count_ = std::min(slice, batch_ - first_);
      if (together()) continue;
      for (std::size_t i = 0, end; i < steps_.size(); i = end) {
        for (end = i + 1; !steps_[i].is_attention && end < steps_.size() && !steps_[end].is_attention;) ++end;
        if (steps_[i].is_attention)
          steps_[i].run({0, count_ * tokens_}, {0});
        else
          row_by_row(i, end);
      }
    }
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
    value.data = held_.emplace_back(input).data<uint8_t>();
    values_.push_back(value);
  }

  // The steps [i, end), none of them an attention. Rows know nothing of one another there: each thread takes its share of
  // them through all steps.
  void row_by_row(std::size_t i, std::size_t end) {
    const int64_t rows = count_ * tokens_, tiles = ceil_div(rows, kMaxRows);
    int64_t work = 0;
    for (std::size_t step = i; step < end; ++step) work += rows * steps_[step].work;
    const int64_t threads = work < 2 * kProductGrain ? 1 : torch::stable::get_num_threads();
    if (threads == 1) return through(i, end, {0, rows});
    torch::stable::parallel_for(0, tiles, ceil_div(tiles, threads), [&](int64_t begin, int64_t tiles_end) {
      begin *= kMaxRows;
      through(i, end, {begin, std::min(tiles_end * kMaxRows, rows) - begin});
    });
  }
  void through(std::size_t i, std::size_t end, Rows rows) const {
    rows.own = static_cast<uint8_t*>(scratch(rows.count * own_bytes_ + 64, Holder::kRows));
    for (; i < end; ++i) steps_[i].run(rows, {0});
  }
  // Rows so few that threads have little to share go through step by step, attentions among them, and the threads share
  // the work of each. Returns whether they are so few. One call of all threads for all steps: to begin and end one for
  // each takes as long as many a step. Whoever is there takes the next share of a phase, and goes on when all shares are
  // done: nobody waits for a thread that has not begun, as where the caller is itself one of several threads.
  bool together() const {
    Rows rows{0, count_ * tokens_};
    int64_t work = 0, phases = 0, between = 0;
    for (const Step& step : steps_) {
      work += rows.count * step.work;
      phases += step.phases;
      between = std::max(between, step.between);
    }
    // A phase begins and ends within the time of half a grain.
    const int64_t pay = 2 * work / std::max<int64_t>(1, phases * kProductGrain);
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), pay);
    if (threads < 2 || ceil_div(rows.count, kMaxRows) >= 4 * threads) return false;
    const int64_t own = rows.count * own_bytes_;
    rows.own = static_cast<uint8_t*>(scratch(own + rows.count * between * int64_t(sizeof(float)) + 64, Holder::kRows));
    rows.between = reinterpret_cast<float*>(rows.own + own);
    std::vector<Turn> turns(phases);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Turn* turn = turns.data();
      for (const Step& step : steps_)
        for (int64_t phase = 0; phase < step.phases; ++phase, ++turn) {
          for (int64_t share; (share = turn->taken.fetch_add(1, std::memory_order_relaxed)) < threads;) {
            const Done counted{turn->done};
            step.run(rows, {phase, share, threads});
          }
          for (int64_t looks = 0; turn->done.load(std::memory_order_acquire) < threads; ++looks)
            if (looks > kLooks) std::this_thread::yield();
        }
    });
    return true;
  }

  const uint8_t* at(const Value& value, const Rows& rows) const {
    switch (value.home) {
      case Home::kTensor: return value.data + (first_ * tokens_ + rows.begin) * value.bytes();
      case Home::kSlice: return memory_ + capacity_ * value.place + rows.begin * value.bytes();
      default: return rows.own + rows.count * value.place;
    }
  }
  // Of what a step writes: a result of the block, or its memory.
  uint8_t* to(const Value& value, const Rows& rows) const { return const_cast<uint8_t*>(at(value, rows)); }

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
      if (i >= results_.size() || results_[i].shape().sizes[2] != width || results_[i].dtype() != dtype)
        fail(kOp, ": a step writes what is no result of the block");
      written_[i] = true;
      value.data = results_[i].data<uint8_t>();
    } else {
      value.home = place < slice_bytes_ ? Home::kSlice : Home::kThread;
      value.place = place < slice_bytes_ ? place : place - slice_bytes_;
      if (place % 64 || value.bytes() > (place < slice_bytes_ ? slice_bytes_ : own_bytes_) - value.place)
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
  Gemm placed(Gemm g, const Rows& rows, const Value& x, const Value& y, const std::optional<Value>& addend) const {
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
    steps_.push_back(std::move(step));
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
    step.run = [this, x, panels, parts = std::move(parts)](const Rows& rows, const Share& share) {
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
    if (tokens_ > kMaxKeys) fail(kOp, ": ", tokens_, " keys, expected at most ", kMaxKeys);
    const auto set_strides = [&](const Value& x, int64_t depth, int64_t* stride) {
      stride[0] = tokens_ * x.width;
      stride[1] = depth;
      stride[2] = x.width;
    };
    set_strides(q, a.depth, a.q_stride);
    set_strides(k, a.depth, a.k_stride);
    set_strides(v, a.width, a.v_stride);
    a.queries = a.keys = tokens_;
    a.multiplier = attention_multiplier(s_qk, scale, a.depth);
    if (mask) set_mask(a, *mask, batch_, true);
    const Value y = write(a.heads * a.width, false);
    if (y.home == Home::kThread) fail(kOp, ": an attention writes what is a thread's own");
    step.run = [=](const Rows& rows, const Share& share) {
      Attention own = a;
      own.q = at(q, rows);
      own.k = at(k, rows);
      own.v = at(v, rows);
      if (a.mask)
        own.mask = static_cast<const uint8_t*>(a.mask) + first_ * a.mask_stride[0] * (a.mask_is_float ? sizeof(float) : 1);
      own.y = to(y, rows);
      if (share.is_all()) return run_attention(own, count_);
      const AttentionPieces pieces(own, count_, share.count);
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
  int64_t slice_bytes_ = 0, own_bytes_ = 0;  // for each row: the memory of a slice, and that of a thread
  int64_t batch_ = 0, tokens_ = 0;
  std::vector<Contiguous> held_;
  std::vector<Tensor> results_;
  std::vector<bool> written_;
  std::vector<Value> values_, parts_, made_;
  std::vector<Step> steps_;
  // Of the slice at hand: its first sequence, how many there are, and the memory for `capacity_` rows.
  int64_t first_ = 0, count_ = 0, capacity_ = 0;
  uint8_t* memory_ = nullptr;
};

std::vector<Tensor> qblock(const std::vector<Tensor>& inputs, const Tensor& program, const Tensor& constants,
                           const std::vector<int64_t>& widths) {
  Block block(inputs, program, constants, widths);
  block.run();
  return block.results();
}

}  // namespace
}  // namespace fxq::block

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) { m.impl("qblock", fxq::boxed<fxq::block::qblock>); }

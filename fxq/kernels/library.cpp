// The kernels as torch operators: checks, outputs, threads. Built on torch's stable ABI, so that one binary serves
// later torch releases; the operators' schemas are defined in Python (fxq.kernels.define).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "chain.h"
#include "kernels.h"
#include "tensor.h"

namespace fxq {
namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "fxq::";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

void expect_dtype(const char* op, const char* name, const Tensor& t, int32_t dtype, const char* expected) {
  if (t.dtype() != dtype) fail(op, ": ", name, " has the wrong dtype, expected ", expected);
}

void expect_range(const char* op, int64_t zero_point, int64_t low, int64_t high) {
  if (zero_point < 0 || zero_point > 255 || low < 0 || low > high || high > 255)
    fail(op, ": zero_point = ", zero_point, ", low = ", low, ", high = ", high, ", expected 0 <= low <= high <= 255");
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

Tensor quantize(const Tensor& x, double scale, int64_t zero_point) {
  expect_dtype("quantize", "x", x, aoti_torch_dtype_float32(), "float32");
  expect_range("quantize", zero_point, 0, 255);
  const Contiguous from(x);
  Tensor y = Tensor::empty(x.shape(), aoti_torch_dtype_uint8());
  const float* source = from.data<float>();
  uint8_t* target = y.data<uint8_t>();
  parallel(x.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    active().quantize(source + begin, target + begin, end - begin, 1.0f / float(scale), int32_t(zero_point));
  });
  return y;
}

Tensor quantize_scaled(const Tensor& x, const Tensor& factor, double scale, int64_t zero_point) {
  expect_dtype("quantize_scaled", "x", x, aoti_torch_dtype_float32(), "float32");
  expect_dtype("quantize_scaled", "factor", factor, aoti_torch_dtype_float32(), "float32");
  expect_range("quantize_scaled", zero_point, 0, 255);
  const int64_t k = factor.numel();
  if (factor.dim() != 1 || x.dim() < 1 || x.shape().sizes[x.dim() - 1] != k)
    fail("quantize_scaled: factor has shape ", factor.shape(), ", x ", x.shape());
  const Contiguous from(x), by(factor);
  Tensor y = Tensor::empty(x.shape(), aoti_torch_dtype_uint8());
  if (!x.numel()) return y;
  const float *source = from.data<float>(), *factors = by.data<float>();
  uint8_t* target = y.data<uint8_t>();
  parallel(x.numel() / k, std::max<int64_t>(1, kElementGrain / k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      active().quantize_scaled(source + row * k, factors, target + row * k, k, 1.0f / float(scale),
                               int32_t(zero_point));
  });
  return y;
}

Tensor dequantize(const Tensor& q, double scale, int64_t zero_point) {
  expect_dtype("dequantize", "q", q, aoti_torch_dtype_uint8(), "uint8");
  expect_range("dequantize", zero_point, 0, 255);
  const Contiguous from(q);
  Tensor y = Tensor::empty(q.shape(), aoti_torch_dtype_float32());
  const uint8_t* source = from.data<uint8_t>();
  float* target = y.data<float>();
  parallel(q.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    active().dequantize({source + begin, int32_t(zero_point), float(scale)}, target + begin, end - begin);
  });
  return y;
}

Tensor requantize(const Tensor& q, int64_t z_x, double multiplier, int64_t zero_point, int64_t low, int64_t high) {
  expect_dtype("requantize", "q", q, aoti_torch_dtype_uint8(), "uint8");
  expect_range("requantize", zero_point, low, high);
  expect_range("requantize (z_x)", z_x, 0, 255);
  const Contiguous from(q);
  Tensor y = Tensor::empty(q.shape(), aoti_torch_dtype_uint8());
  const uint8_t* source = from.data<uint8_t>();
  uint8_t* target = y.data<uint8_t>();
  parallel(q.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    active().requantize({source + begin, int32_t(z_x), float(multiplier)}, target + begin, end - begin,
                        int32_t(zero_point), int32_t(low), int32_t(high));
  });
  return y;
}

// An operand of a broadcast: strides over the dimensions of the result, 0 where the operand repeats.
struct Broadcast {
  const uint8_t* q;
  int64_t strides[Tensor::kMaxDim];

  Broadcast(const Tensor& t, Shape result) : q(t.data<uint8_t>()) {
    const Shape own = t.shape();
    const int64_t* own_strides = t.strides();
    for (int64_t i = 0, missing = result.dim - own.dim; i < result.dim; ++i)
      strides[i] = i < missing || own.sizes[i - missing] == 1 ? 0 : own_strides[i - missing];
  }
  // `count` elements from `index` on in the innermost dimension: where they lie, or gathered into `buffer`.
  const uint8_t* row(int64_t offset, int64_t index, int64_t count, int64_t stride, uint8_t* buffer) const {
    const uint8_t* p = q + offset + index * stride;
    if (stride == 1) return p;
    for (int64_t i = 0; i < count; ++i) buffer[i] = p[i * stride];
    return buffer;
  }
};

void add_broadcast(const Broadcast& a, const Broadcast& b, Term term_a, Term term_b, uint8_t* y, Shape shape,
                   int32_t zero_point, int32_t low, int32_t high) {
  constexpr int64_t kChunk = 1024;
  uint8_t buffer_a[kChunk], buffer_b[kChunk];
  const int64_t dim = shape.dim;
  const int64_t* sizes = shape.sizes;
  const int64_t inner = sizes[dim - 1];
  int64_t rows = 1, index[Tensor::kMaxDim] = {}, offset_a = 0, offset_b = 0;
  for (int64_t d = 0; d < dim - 1; ++d) rows *= sizes[d];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0, count; i < inner; i += count, y += count) {
      count = std::min(inner - i, kChunk);
      term_a.q = a.row(offset_a, i, count, a.strides[dim - 1], buffer_a);
      term_b.q = b.row(offset_b, i, count, b.strides[dim - 1], buffer_b);
      active().add(term_a, term_b, y, count, zero_point, low, high);
    }
    for (int64_t d = dim - 2; d >= 0; --d) {  // an odometer over the outer dimensions
      offset_a += a.strides[d];
      offset_b += b.strides[d];
      if (++index[d] < sizes[d]) break;
      offset_a -= sizes[d] * a.strides[d];
      offset_b -= sizes[d] * b.strides[d];
      index[d] = 0;
    }
  }
}

Tensor qadd(const Tensor& a, const Tensor& b, double m_a, int64_t z_a, double m_b, int64_t z_b, int64_t zero_point,
            int64_t low, int64_t high) {
  expect_dtype("qadd", "a", a, aoti_torch_dtype_uint8(), "uint8");
  expect_dtype("qadd", "b", b, aoti_torch_dtype_uint8(), "uint8");
  expect_range("qadd", zero_point, low, high);
  expect_range("qadd (z_a)", z_a, 0, 255);
  expect_range("qadd (z_b)", z_b, 0, 255);
  const Shape shape_a = a.shape(), shape_b = b.shape();
  const int64_t dim = std::max(shape_a.dim, shape_b.dim);
  int64_t sizes[Tensor::kMaxDim];
  bool same = shape_a.dim == shape_b.dim;
  for (int64_t i = 1; i <= dim; ++i) {
    const int64_t size_a = i <= shape_a.dim ? shape_a.sizes[shape_a.dim - i] : 1;
    const int64_t size_b = i <= shape_b.dim ? shape_b.sizes[shape_b.dim - i] : 1;
    if (size_a != size_b && size_a != 1 && size_b != 1)
      fail("qadd: a", shape_a, " and b", shape_b, " do not broadcast");
    same = same && size_a == size_b;
    sizes[dim - i] = size_a == 1 ? size_b : size_a;
  }
  const Shape shape = {sizes, dim};
  Tensor y = Tensor::empty(shape, aoti_torch_dtype_uint8());
  uint8_t* target = y.data<uint8_t>();
  const Term term_a = {a.data<uint8_t>(), int32_t(z_a), float(m_a)};
  const Term term_b = {b.data<uint8_t>(), int32_t(z_b), float(m_b)};
  const int32_t zero = int32_t(zero_point), lo = int32_t(low), hi = int32_t(high);
  if (dim == 0 || (same && a.is_contiguous() && b.is_contiguous())) {
    parallel(y.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
      const Term part_a = {term_a.q + begin, term_a.zero_point, term_a.multiplier};
      const Term part_b = {term_b.q + begin, term_b.zero_point, term_b.multiplier};
      active().add(part_a, part_b, target + begin, end - begin, zero, lo, hi);
    });
  } else if (y.numel() > 0) {
    add_broadcast(Broadcast(a, shape), Broadcast(b, shape), term_a, term_b, target, shape, zero, lo, hi);
  }
  return y;
}

// Splits the output over threads: by panels of channels or by tiles of rows, whichever shares the work more evenly.
void run_gemm(const Gemm& g, int64_t rows) {
  if (rows == 0 || g.n == 0) return;
  const int64_t panels = panel_count(g.n), work = rows * g.n * g.k;
  const Kernels& kernels = active();
  int64_t threads = 1;
  if (work >= 2 * kProductGrain)
    threads = std::min<int64_t>(torch::stable::get_num_threads(), work / kProductGrain);
  if (threads == 1) return kernels.gemm(g, 0, rows, 0, panels);
  const int64_t tiles = ceil_div(rows, kMaxRows), share = ceil_div(panels, threads);
  // What the slowest thread does: `share` panels of all rows, or its share of the tiles over all channels.
  if (std::min(share * kPanel, g.n) * tiles <= ceil_div(tiles, threads) * g.n)
    torch::stable::parallel_for(0, panels, share,
                                [&](int64_t begin, int64_t end) { kernels.gemm(g, 0, rows, begin, end); });
  else
    torch::stable::parallel_for(0, tiles, ceil_div(tiles, threads), [&](int64_t begin, int64_t end) {
      kernels.gemm(g, begin * kMaxRows, std::min(end * kMaxRows, rows), 0, panels);
    });
}

// Whether x lies in rows of adjacent values, each at the same distance `stride` from the one before.
bool is_rows(const Tensor& x, int64_t* stride) {
  const int64_t *sizes = x.shape().sizes, *strides = x.strides();
  const int64_t last = x.dim() - 1;
  bool regular = strides[last] == 1 || sizes[last] <= 1;
  int64_t expected = -1;  // distance that the next dimension outwards must have
  *stride = sizes[last];
  for (int64_t i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (expected < 0)
      *stride = strides[i];
    else
      regular = regular && strides[i] == expected;
    expected = strides[i] * sizes[i];
  }
  return regular;
}

// What the four linear operators share: checks, the output, the operands of `g`; the caller has set the epilogue.
Tensor linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
              const Tensor* addend, Gemm& g) {
  expect_dtype(op, "x", x, aoti_torch_dtype_uint8(), "uint8");
  expect_dtype(op, "weight", weight, aoti_torch_dtype_int8(), "int8 (packed)");
  expect_dtype(op, "bias", bias, aoti_torch_dtype_int32(), "int32");
  expect_dtype(op, "multiplier", multiplier, aoti_torch_dtype_float32(), "float32");
  const Shape shape = x.shape();
  if (shape.dim == 0) fail(op, ": x is a scalar, expected [..., K]");
  g.k = shape.sizes[shape.dim - 1];
  g.n = bias.numel();
  if (weight.numel() != packed_size(g.n, g.k) || weight.dim() != 1)
    fail(op, ": weight", weight.shape(), ", expected [", packed_size(g.n, g.k), "], the packed size of N = ", g.n,
         " (bias) and K = ", g.k, " (x", shape, ")");
  if (bias.dim() != 1 || multiplier.dim() != 1 || multiplier.numel() != g.n)
    fail(op, ": multiplier", multiplier.shape(), " and bias", bias.shape(), ", expected both of one size [N]");

  const Contiguous w(weight), b(bias), m(multiplier);
  std::optional<Tensor> copy;
  if (!is_rows(x, &g.x_stride)) {
    copy.emplace(x.contiguous());
    g.x_stride = g.k;
  }
  g.x = (copy ? *copy : x).data<uint8_t>();
  g.weight = w.data<int8_t>();
  g.bias = b.data<int32_t>();
  g.multiplier = m.data<float>();

  int64_t sizes[Tensor::kMaxDim], count = 1;
  for (int64_t i = 0; i < shape.dim - 1; ++i) count *= sizes[i] = shape.sizes[i];
  sizes[shape.dim - 1] = g.n;
  const bool is_float = g.output == Output::kFloat || g.output == Output::kActivation;
  Tensor y = Tensor::empty({sizes, shape.dim}, is_float ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8());
  g.y = y.data<void>();
  g.y_stride = g.n;

  std::optional<Contiguous> added;
  if (addend) {
    expect_dtype(op, "addend", *addend, aoti_torch_dtype_float32(), "float32");
    const Shape own = addend->shape();
    const bool row = own.dim == 1 && own.sizes[0] == g.n;
    if (!row && !(own.dim == shape.dim && std::equal(sizes, sizes + shape.dim, own.sizes)))
      fail(op, ": addend", own, ", expected [", g.n, "] or the shape of the result");
    g.addend = added.emplace(*addend).data<float>();
    g.addend_stride = row ? 0 : g.n;
  }
  run_gemm(g, count);
  return y;
}

Tensor qlinear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier, int64_t zero_point,
               int64_t low, int64_t high) {
  expect_range("qlinear", zero_point, low, high);
  Gemm g;
  g.zero_point = int32_t(zero_point);
  g.low = int32_t(low);
  g.high = int32_t(high);
  return linear("qlinear", x, weight, bias, multiplier, nullptr, g);
}

Tensor qlinear_float(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                     const std::optional<Tensor>& addend) {
  Gemm g;
  g.output = Output::kFloat;
  return linear("qlinear_float", x, weight, bias, multiplier, addend ? &*addend : nullptr, g);
}

Activation activation_named(const char* op, const std::string& name) {
  constexpr const char* kNames[] = {"gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "relu"};
  for (int i = 0; i < 6; ++i)
    if (name == kNames[i]) return Activation(i);
  fail(op, ": activation '", name, "', expected gelu, gelu_tanh, silu, tanh, sigmoid or relu");
}

Tensor qlinear_act(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                   const std::string& activation, const std::optional<Tensor>& addend) {
  Gemm g;
  g.output = Output::kActivation;
  g.activation = activation_named("qlinear_act", activation);
  return linear("qlinear_act", x, weight, bias, multiplier, addend ? &*addend : nullptr, g);
}

Tensor qlinear_act_quantize(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                            const std::string& activation, double scale, int64_t zero_point) {
  expect_range("qlinear_act_quantize", zero_point, 0, 255);
  Gemm g;
  g.output = Output::kActivationUint8;
  g.activation = activation_named("qlinear_act_quantize", activation);
  g.inverse = 1.0f / float(scale);
  g.zero_point = int32_t(zero_point);
  return linear("qlinear_act_quantize", x, weight, bias, multiplier, nullptr, g);
}

void gemm_here(const Gemm& g, int64_t rows) { active().gemm(g, 0, rows, 0, panel_count(g.n)); }

// Each thread takes its rows through all layers; or, with few rows and many weights, all threads share each layer.
void run_chain(const Chain& chain, const void* x, int64_t rows, void* y) {
  const int64_t work = rows * chain.weight_bytes();
  const int64_t threads = work < 2 * kProductGrain ? 1 : torch::stable::get_num_threads();
  if (threads == 1) return chain.run(x, rows, y, chain.block_rows(), gemm_here);
  const int64_t tiles = ceil_div(rows, kMaxRows);
  if (tiles < threads || (tiles < 4 * threads && chain.weight_bytes() > (1 << 20)))
    return chain.run(x, rows, y, rows, run_gemm);
  const ChainHeader& header = chain.header();
  const int64_t x_row = chain.in_features() * (header.from_float ? sizeof(float) : 1);
  const int64_t y_row = chain.out_features() * (header.to_float ? sizeof(float) : 1);
  torch::stable::parallel_for(0, tiles, ceil_div(tiles, threads), [&](int64_t begin, int64_t end) {
    begin *= kMaxRows;
    end = std::min(end * kMaxRows, rows);
    chain.run(static_cast<const uint8_t*>(x) + begin * x_row, end - begin, static_cast<uint8_t*>(y) + begin * y_row,
              chain.block_rows(), gemm_here);
  });
}

Chain read_program(const char* op, const Tensor& program, const Contiguous& bytes) {
  try {
    return Chain(bytes.data<uint8_t>(), program.numel());
  } catch (const std::invalid_argument& error) {
    fail(op, ": program", program.shape(), " cannot be run: ", error.what());
  }
}

Tensor run_program(const char* op, const Tensor& x, const Tensor& program, bool to_float) {
  expect_dtype(op, "program", program, aoti_torch_dtype_uint8(), "uint8");
  const Contiguous bytes(program), source(x);
  const Chain chain = read_program(op, program, bytes);
  if (chain.header().from_float)
    expect_dtype(op, "x", x, aoti_torch_dtype_float32(), "float32 (the program begins with quantize)");
  else
    expect_dtype(op, "x", x, aoti_torch_dtype_uint8(), "uint8");
  const Shape shape = x.shape();
  if (shape.dim == 0 || shape.sizes[shape.dim - 1] != chain.in_features())
    fail(op, ": x", shape, ", expected [..., ", chain.in_features(), "]");
  const bool shaped = program.dim() == 2 && program.shape().sizes[0] == chain.out_features();
  if (!shaped || bool(chain.header().to_float) != to_float)
    fail(op, ": program", program.shape(), " gives [..., ", chain.out_features(), "] of ",
         chain.header().to_float ? "float32" : "uint8", ", which is not what its shape and the operator say");

  int64_t sizes[Tensor::kMaxDim], rows = 1;
  for (int64_t i = 0; i < shape.dim - 1; ++i) rows *= sizes[i] = shape.sizes[i];
  sizes[shape.dim - 1] = chain.out_features();
  Tensor y = Tensor::empty({sizes, shape.dim}, to_float ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8());
  if (rows > 0) run_chain(chain, source.data<void>(), rows, y.data<void>());
  return y;
}

Tensor qchain(const Tensor& x, const Tensor& program) { return run_program("qchain", x, program, false); }
Tensor qchain_float(const Tensor& x, const Tensor& program) { return run_program("qchain_float", x, program, true); }

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) {
  m.impl("quantize", fxq::boxed<fxq::quantize>);
  m.impl("quantize_scaled", fxq::boxed<fxq::quantize_scaled>);
  m.impl("dequantize", fxq::boxed<fxq::dequantize>);
  m.impl("requantize", fxq::boxed<fxq::requantize>);
  m.impl("qadd", fxq::boxed<fxq::qadd>);
  m.impl("qlinear", fxq::boxed<fxq::qlinear>);
  m.impl("qlinear_float", fxq::boxed<fxq::qlinear_float>);
  m.impl("qlinear_act", fxq::boxed<fxq::qlinear_act>);
  m.impl("qlinear_act_quantize", fxq::boxed<fxq::qlinear_act_quantize>);
  m.impl("qchain", fxq::boxed<fxq::qchain>);
  m.impl("qchain_float", fxq::boxed<fxq::qchain_float>);
}

// For fxq.kernels, through ctypes.
extern "C" __attribute__((visibility("default"))) int fxq_use_isa(const char* isa) { return fxq::use_isa(isa); }
extern "C" __attribute__((visibility("default"))) const char* fxq_isa() { return fxq::active().isa; }
extern "C" __attribute__((visibility("default"))) const char* fxq_isas() { return fxq::available_isas(); }

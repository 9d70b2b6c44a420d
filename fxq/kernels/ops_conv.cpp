// Convolutions as torch operators.
#include <string>
#include <vector>

#include "channels_last.h"
#include "checks.h"
#include "conv.h"
#include "program.h"
#include "window.h"

namespace fxq {
namespace {

struct Operands {
  const Tensor &x, &weight, &bias, &multiplier;
  int32_t multiplier_dtype = aoti_torch_dtype_float32();  // int32 in fixed point
};

// How many parts to cut the rows of one image's plane into, and the panels, for `threads` threads.
struct Split {
  int64_t bands, panel_parts;
};

Split split(const Conv& c, int64_t threads) {
  const int64_t images = c.batch * c.out[0], panels = c.panels();
  // What the windows of a band see should stay in the second-level cache beside a panel of weights.
  const int64_t row_bytes = c.kernel[0] * c.stride[1] * c.size[2] * c.channels + 1;
  const int64_t fit = std::max<int64_t>(1, 256 * 1024 / row_bytes);
  const int64_t tall = std::max<int64_t>(1, 96 / std::max<int64_t>(1, c.out[2]));  // rows that fill a block of pixels
  int64_t bands = std::min(ceil_div(c.out[1], std::max(fit, tall)), c.out[1]);
  if (threads == 1 || images * bands >= 4 * threads) return {bands, 1};
  const int64_t by_rows = std::min(ceil_div(threads, images), c.out[1]);
  // What the slowest thread does: its share of the rows, or of the panels.
  const int64_t rows_share = ceil_div(images * by_rows, threads) * ceil_div(c.out[1], by_rows) * panels;
  const int64_t panel_share = images * c.out[1] * ceil_div(panels, threads);
  if (rows_share <= panel_share) return {ceil_div(bands, by_rows) * by_rows, 1};
  return {bands, std::min(panels, threads)};
}

// By tiles. Each thread transforms the weights of its channels and the inputs of its tiles: threads share the channels
// where those are more.
void run_tiles(const Conv& c, int64_t threads) {
  const auto winograd = active().winograd;
  const int64_t n = c.product.n, tiles = c.tiles(), panels = c.panels();
  if (threads > 1 && panels % threads == 0 && n > tiles)
    return parallel(panels, panels / threads, [&](int64_t begin, int64_t end) {
      winograd(c, 0, tiles, begin * kPanel, end * kPanel);
    });
  parallel(tiles, ceil_div(tiles, threads), [&](int64_t begin, int64_t end) { winograd(c, begin, end, 0, n); });
}

void run(const Conv& c) {
  const int64_t outputs = c.batch * c.out[0] * c.out[1] * c.out[2];
  if (!outputs || !c.product.n) return;
  const int64_t work = outputs * c.groups * c.product.n * std::max<int64_t>(c.k(), 8);
  int64_t threads = 1;
  if (work >= 2 * kProductGrain)
    threads = std::min<int64_t>(torch::stable::get_num_threads(), work / kProductGrain);
  if (gains_by_tiles(c) && fits_tiles(c)) return run_tiles(c, threads);
  const Split parts = split(c, threads);
  const int64_t tasks = c.batch * c.out[0] * parts.bands * parts.panel_parts;
  const auto task = [&](int64_t i) {
    const int64_t part = i % parts.panel_parts, band = i / parts.panel_parts % parts.bands;
    const int64_t plane = i / parts.panel_parts / parts.bands, rows = ceil_div(c.out[1], parts.bands);
    const int64_t row = band * rows, row_end = std::min(row + rows, c.out[1]);
    const int64_t share = ceil_div(c.panels(), parts.panel_parts), panel = part * share;
    if (row < row_end && panel < c.panels())
      convolve(c, plane / c.out[0], plane % c.out[0], row, row_end, panel, std::min(panel + share, c.panels()));
  };
  if (threads == 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
  } else {
    torch::stable::parallel_for(0, tasks, ceil_div(tasks, threads), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(i);
    });
  }
}

// A matrix product of all pixels where every window is one pixel and they follow one another.
bool is_linear(const Conv& c, const ChannelsLast<uint8_t>& x) {
  for (int i = 0; i < 3; ++i)
    if (c.kernel[i] != 1 || c.stride[i] != 1 || c.before[i] != 0 || c.out[i] != c.size[i]) return false;
  return c.groups == 1 && x.is_dense();
}

void expect_operands(const char* op, const Operands& o) {
  expect_dtype(op, "x", o.x, aoti_torch_dtype_uint8(), "uint8");
  expect_dtype(op, "weight", o.weight, aoti_torch_dtype_int8(), "int8 (packed)");
  expect_dtype(op, "bias", o.bias, aoti_torch_dtype_int32(), "int32");
  expect_dtype(op, "multiplier", o.multiplier, o.multiplier_dtype,
               o.multiplier_dtype == aoti_torch_dtype_int32() ? "int32" : "float32");
}

// An addend or a residual: dense and channels-last, as the result is.
template <class T>
class Added {
 public:
  Added(const char* op, const Tensor& t, Shape result, int64_t rank) : own_(op, t, rank) {
    if (!std::equal(result.sizes, result.sizes + result.dim, t.shape().sizes))
      fail(op, ": addend", t.shape(), ", expected the shape of the result ", result);
    data_ = own_.data;
    if (own_.is_dense()) return;
    copy_.reset(new T[t.numel()]);
    T* to = copy_.get();
    for (int64_t b = 0; b < own_.batch; ++b)
      for (int64_t d = 0; d < own_.size[0]; ++d)
        for (int64_t h = 0; h < own_.size[1]; ++h)
          for (int64_t w = 0; w < own_.size[2]; ++w, to += own_.channels)
            std::copy_n(own_.data + b * own_.step[0] + d * own_.step[1] + h * own_.step[2] + w * own_.step[3],
                        own_.channels, to);
    data_ = copy_.get();
  }
  const T* data() const { return data_; }

 private:
  ChannelsLast<T> own_;
  std::unique_ptr<T[]> copy_;
  const T* data_;
};

void set_result(Conv& c, const Tensor& y) {
  c.product.y = y.data<void>();
  c.y_step[3] = c.product.n * c.groups;
  for (int i = 2; i >= 0; --i) c.y_step[i] = c.out[i] * c.y_step[i + 1];
}

// Sets addend and residual of the product, which are float32 [N] or of the shape of the result.
class Epilogue {
 public:
  Epilogue(const char* op, Gemm& g, const Tensor* addend, const Tensor* residual, Shape shape, int64_t n) {
    if (addend) {
      expect_dtype(op, "addend", *addend, aoti_torch_dtype_float32(), "float32");
      if (addend->dim() == 1 && addend->numel() == n) {
        g.addend = row_.emplace(*addend).data<float>();
        g.addend_stride = 0;
      } else {
        if (addend->dim() != shape.dim) fail(op, ": addend", addend->shape(), ", expected [N] or ", shape);
        g.addend = addend_.emplace(op, *addend, shape, shape.dim - 2).data();
        g.addend_stride = n;
      }
    }
    if (residual) {
      expect_dtype(op, "addend", *residual, aoti_torch_dtype_uint8(), "uint8");
      if (residual->dim() != shape.dim) fail(op, ": addend", residual->shape(), ", expected ", shape);
      g.residual = residual_.emplace(op, *residual, shape, shape.dim - 2).data();
      g.residual_stride = n;
    }
  }

 private:
  std::optional<Contiguous> row_;
  std::optional<Added<float>> addend_;
  std::optional<Added<uint8_t>> residual_;
};

int32_t result_dtype(const Gemm& g) {
  return g.output == Output::kFloat ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8();
}

// What the convolutions share; the caller has set the epilogue in c.product.
Tensor conv(const char* op, const Operands& o, const std::string& window, int64_t z_x, const Tensor* addend,
            const Tensor* residual, Conv c) {
  expect_operands(op, o);
  expect_range(op, z_x, 0, 255);
  const Window own(op, window);
  const int64_t rank = own.rank, groups = own.groups;
  const ChannelsLast<uint8_t> x(op, o.x, rank);
  const int64_t n = o.bias.numel();
  if (groups < 1 || x.channels % groups || n % groups)
    fail(op, ": groups = ", groups, " does not divide the channels of x", o.x.shape(), " and N = ", n);
  c.x = x.data;
  c.batch = x.batch;
  c.channels = x.channels;
  c.groups = groups;
  c.z_x = uint8_t(z_x);
  std::copy(x.size, x.size + 3, c.size);
  std::copy(x.step, x.step + 4, c.x_step);
  int64_t sizes[5] = {x.batch, n};
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t at = 3 - rank + i;
    c.kernel[at] = own.kernel[i];
    c.stride[at] = own.stride[i];
    c.before[at] = own.padding[2 * i];
    c.dilation[at] = own.dilation[i];
    const int64_t padded = c.size[at] + own.padding[2 * i] + own.padding[2 * i + 1];
    const int64_t room = padded - own.dilation[i] * (own.kernel[i] - 1) - 1;
    if (room < 0) fail(op, ": the kernel, dilated and without the padding, is larger than x", o.x.shape());
    sizes[2 + i] = c.out[at] = room / own.stride[i] + 1;
  }
  c.product.n = n / groups;
  if (o.weight.dim() != 1 || o.weight.numel() != c.weight_bytes())
    fail(op, ": a packed weight of shape ", o.weight.shape(), ", expected [", c.weight_bytes(), "] for N = ", n,
         " (bias), x", o.x.shape(), " and groups = ", groups);
  if (o.bias.dim() != 1 || o.multiplier.dim() != 1 || o.multiplier.numel() != n)
    fail(op, ": multiplier", o.multiplier.shape(), " and bias", o.bias.shape(), ", expected both of one size [N]");
  const Contiguous w(o.weight), b(o.bias), m(o.multiplier);
  c.product.weight = w.data<int8_t>();
  c.product.bias = b.data<int32_t>();
  if (c.product.output == Output::kFixed)
    c.product.fixed = m.data<int32_t>();
  else
    c.product.multiplier = m.data<float>();

  const Shape shape = {sizes, rank + 2};
  Tensor y = Tensor::empty_channels_last(shape, result_dtype(c.product));
  set_result(c, y);
  const Epilogue epilogue(op, c.product, addend, residual, shape, n);
  if (is_linear(c, x)) {
    Gemm g = c.product;
    g.x = c.x;
    g.x_stride = g.k = c.channels;
    g.y_stride = n;
    run_gemm(g, c.batch * c.out[0] * c.out[1] * c.out[2]);
  } else {
    run(c);
  }
  return y;
}

Conv requantized(const char* op, int64_t zero_point, int64_t low, int64_t high) {
  expect_range(op, zero_point, low, high);
  Conv c;
  c.product.zero_point = int32_t(zero_point);
  c.product.low = int32_t(low);
  c.product.high = int32_t(high);
  return c;
}

Tensor qconv(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
             const std::string& window, int64_t z_x, int64_t zero_point, int64_t low, int64_t high) {
  return conv("qconv", {x, weight, bias, multiplier}, window, z_x, nullptr, nullptr,
              requantized("qconv", zero_point, low, high));
}

Tensor qconv_fixed(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                   const Tensor& shift, const std::string& window, int64_t z_x, int64_t zero_point, int64_t low,
                   int64_t high, const std::string& rounding) {
  constexpr const char* op = "qconv_fixed";
  std::optional<Contiguous> shifts;
  Conv c = requantized(op, zero_point, low, high);
  c.product.output = Output::kFixed;
  c.product.twice = rounds_twice(op, rounding);
  c.product.shift = shifts_of(op, shift, bias.numel(), shifts);
  return conv(op, {x, weight, bias, multiplier, aoti_torch_dtype_int32()}, window, z_x, nullptr, nullptr, c);
}

Tensor qconv_float(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                   const std::string& window, int64_t z_x, const std::optional<Tensor>& addend) {
  Conv c;
  c.product.output = Output::kFloat;
  return conv("qconv_float", {x, weight, bias, multiplier}, window, z_x, addend ? &*addend : nullptr, nullptr, c);
}

Tensor qconv_act_quantize(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                          const std::string& window, int64_t z_x, const std::string& activation, double scale,
                          int64_t zero_point) {
  Conv c = requantized("qconv_act_quantize", zero_point, 0, 255);
  c.product.output = Output::kActivationUint8;
  c.product.activation = activation_named("qconv_act_quantize", activation);
  c.product.inverse = 1.0f / float(scale);
  return conv("qconv_act_quantize", {x, weight, bias, multiplier}, window, z_x, nullptr, nullptr, c);
}

Tensor qconv_add(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                 const std::string& window, int64_t z_x, const Tensor& addend, double m_b, int64_t z_b,
                 int64_t zero_point, int64_t low, int64_t high) {
  expect_range("qconv_add (z_b)", z_b, 0, 255);
  Conv c = requantized("qconv_add", zero_point, low, high);
  c.product.residual_zero_point = int32_t(z_b);
  c.product.residual_multiplier = float(m_b);
  return conv("qconv_add", {x, weight, bias, multiplier}, window, z_x, nullptr, &addend, c);
}

// Along one dimension: the outputs first, first + stride, ..., which all see the same taps, as an ordinary convolution.
struct Phase {
  int64_t first, count, taps, start, dilation;  // taps: how many; start: the input that the first window begins at
};

Phase phase_of(int64_t first, int64_t kernel, int64_t stride, int64_t before, int64_t dilation, int64_t out) {
  Phase phase = {first, out > first ? ceil_div(out - first, stride) : 0, 0, 0, 1};
  int64_t last = 0, gcd = stride;
  for (int64_t a = dilation % stride; a;) gcd = std::exchange(a, gcd % a);
  for (int64_t t = 0; t < kernel; ++t)
    if ((first + before - t * dilation) % stride == 0) ++phase.taps, last = t;
  phase.dilation = dilation / gcd;
  phase.start = phase.taps ? (first + before - last * dilation) / stride : 0;
  return phase;
}

Tensor conv_transpose(const char* op, const Operands& o, const std::string& window, int64_t z_x, const Tensor* addend,
                      Conv c) {
  expect_operands(op, o);
  expect_range(op, z_x, 0, 255);
  const Window own(op, window);
  const int64_t rank = own.rank, groups = own.groups;
  const ChannelsLast<uint8_t> x(op, o.x, rank);
  const int64_t n = o.multiplier.numel();
  if (groups < 1 || x.channels % groups || n % groups)
    fail(op, ": groups = ", groups, " does not divide the channels of x", o.x.shape(), " and N = ", n);
  int64_t full[3] = {1, 1, 1}, step[3] = {1, 1, 1}, sizes[5] = {x.batch, n}, phases = 1;
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t at = 3 - rank + i;
    step[at] = own.stride[i];
    phases *= own.stride[i];
    sizes[2 + i] = full[at] = (x.size[at] - 1) * own.stride[i] - own.padding[2 * i] - own.padding[2 * i + 1] +
                              own.dilation[i] * (own.kernel[i] - 1) + own.output_padding[i] + 1;
    if (full[at] < 0) fail(op, ": the result would have a negative size for x", o.x.shape());
  }
  if (o.multiplier.dim() != 1 || o.bias.dim() != 2 || o.bias.shape().sizes[0] != phases || o.bias.shape().sizes[1] != n)
    fail(op, ": bias", o.bias.shape(), " and multiplier", o.multiplier.shape(), ", expected [", phases,
         " phases of the stride, N] and [N]");
  c.x = x.data;
  c.batch = x.batch;
  c.channels = x.channels;
  c.groups = groups;
  c.z_x = uint8_t(z_x);
  std::copy(x.size, x.size + 3, c.size);
  std::copy(x.step, x.step + 4, c.x_step);
  c.product.n = n / groups;
  const Contiguous w(o.weight), b(o.bias), m(o.multiplier);
  const Shape shape = {sizes, rank + 2};
  Tensor y = Tensor::empty_channels_last(shape, result_dtype(c.product));
  const Epilogue epilogue(op, c.product, addend, nullptr, shape, n);
  const int64_t row = full[2] * n, plane = full[1] * row;
  const int64_t y_step[4] = {full[0] * plane, step[0] * plane, step[1] * row, step[2] * n};
  std::copy(y_step, y_step + 4, c.y_step);

  std::vector<Conv> parts;
  std::vector<int8_t> zeros;
  int64_t weight = 0;
  for (int64_t phase = 0; phase < phases; ++phase) {
    Conv part = c;
    int64_t rest = phase, offset = 0;
    bool empty = false;
    const int64_t distance[3] = {plane, row, n};
    for (int at = 2; at >= 0; --at) {
      const int64_t i = at + rank - 3;
      const Phase p = i < 0 ? Phase{0, 1, 1, 0, 1}
                            : phase_of(rest % step[at], own.kernel[i], step[at], own.padding[2 * i], own.dilation[i],
                                     full[at]);
      rest /= step[at];
      part.kernel[at] = p.taps;
      part.before[at] = -p.start;
      part.dilation[at] = p.dilation;
      part.out[at] = p.count;
      offset += p.first * distance[at];
      empty = empty || p.taps == 0;
    }
    part.product.bias = b.data<int32_t>() + phase * n;
    if (part.product.output == Output::kFixed)
      part.product.fixed = m.data<int32_t>();
    else
      part.product.multiplier = m.data<float>();
    const bool is_float = part.product.output == Output::kFloat;
    part.product.y = y.data<uint8_t>() + offset * (is_float ? sizeof(float) : 1);
    if (part.product.addend_stride) part.product.addend += offset;
    if (empty) {  // outputs that no tap reaches: a weight of zeros says so
      std::fill_n(part.kernel, 3, 1);
      zeros.resize(std::max<size_t>(zeros.size(), part.weight_bytes()));
    } else {
      part.product.weight = w.data<int8_t>() + weight;
      weight += part.weight_bytes();
    }
    parts.push_back(part);
  }
  if (o.weight.dim() != 1 || o.weight.numel() != weight)
    fail(op, ": a packed weight of shape ", o.weight.shape(), ", expected [", weight, "] for N = ", n, ", x",
         o.x.shape(), " and groups = ", groups);
  for (Conv& part : parts) {
    if (!part.product.weight) part.product.weight = zeros.data();
    run(part);
  }
  return y;
}

Tensor qconv_transpose(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                       const std::string& window, int64_t z_x, int64_t zero_point, int64_t low, int64_t high) {
  return conv_transpose("qconv_transpose", {x, weight, bias, multiplier}, window, z_x, nullptr,
                        requantized("qconv_transpose", zero_point, low, high));
}

Tensor qconv_transpose_fixed(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                             const Tensor& shift, const std::string& window, int64_t z_x, int64_t zero_point,
                             int64_t low, int64_t high, const std::string& rounding) {
  constexpr const char* op = "qconv_transpose_fixed";
  std::optional<Contiguous> shifts;
  Conv c = requantized(op, zero_point, low, high);
  c.product.output = Output::kFixed;
  c.product.twice = rounds_twice(op, rounding);
  c.product.shift = shifts_of(op, shift, multiplier.numel(), shifts);
  return conv_transpose(op, {x, weight, bias, multiplier, aoti_torch_dtype_int32()}, window, z_x, nullptr, c);
}

Tensor qconv_transpose_float(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                             const std::string& window, int64_t z_x, const std::optional<Tensor>& addend) {
  Conv c;
  c.product.output = Output::kFloat;
  return conv_transpose("qconv_transpose_float", {x, weight, bias, multiplier}, window, z_x,
                        addend ? &*addend : nullptr, c);
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) {
  fxq::serve<fxq::qconv>(m, "qconv");
  fxq::serve<fxq::qconv_fixed>(m, "qconv_fixed");
  fxq::serve<fxq::qconv_float>(m, "qconv_float");
  fxq::serve<fxq::qconv_act_quantize>(m, "qconv_act_quantize");
  fxq::serve<fxq::qconv_add>(m, "qconv_add");
  fxq::serve<fxq::qconv_transpose>(m, "qconv_transpose");
  fxq::serve<fxq::qconv_transpose_fixed>(m, "qconv_transpose_fixed");
  fxq::serve<fxq::qconv_transpose_float>(m, "qconv_transpose_float");
}

// Pooling and upsampling of channels-last images as torch operators.
#include <cmath>
#include <cstring>
#include <vector>

#include "channels_last.h"
#include "program.h"

namespace fxq {
namespace {

using Ints = std::vector<int64_t>;

constexpr int64_t kPart = 256;  // pixels that are transposed at a time

// Along one dimension: the part [begin, end) of the input that an output sees, and how many values it counts.
struct Window {
  int64_t begin, end, count;
};
using Windows = std::vector<Window>;

struct Image {
  ChannelsLast<uint8_t> x;
  int64_t out[3] = {1, 1, 1};
  int64_t shape[5];
  int64_t rank;

  Image(const char* op, const Tensor& t, int64_t rank) : x(op, t, rank), shape{x.batch, x.channels}, rank(rank) {}
  void set_out(int64_t i, int64_t size) { out[3 - rank + i] = shape[2 + i] = size; }
  int64_t in(int64_t i) const { return x.size[3 - rank + i]; }
  Tensor result() const { return Tensor::empty_channels_last({shape, rank + 2}, aoti_torch_dtype_uint8()); }
};

// f(image, plane, row, y) for every row of the result, y where it begins.
template <class Function>
void for_each_row(const Image& image, const Tensor& y, int64_t work, const Function& f) {
  const int64_t rows = image.x.batch * image.out[0] * image.out[1], bytes = image.out[2] * image.x.channels;
  uint8_t* target = y.data<uint8_t>();
  const int64_t grain = std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, bytes * work));
  parallel(rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      f(i / image.out[1] / image.out[0], i / image.out[1] % image.out[0], i % image.out[1], target + i * bytes);
  });
}

int64_t pooled_size(const char* op, int64_t size, int64_t k, int64_t s, int64_t p, int64_t d, bool ceil_mode) {
  const int64_t room = size + 2 * p - d * (k - 1) - 1;
  if (room < 0) fail(op, ": a window of ", k, " does not fit into ", size, " with padding ", p);
  const int64_t count = (ceil_mode ? ceil_div(room, s) : room / s) + 1;
  return ceil_mode && (count - 1) * s >= size + p ? count - 1 : count;
}

// What becomes of the sum of a window: s_x / s_y, as a float64 or in fixed point, and the bounds of the result.
struct Mean {
  double factor = 0;
  bool fixed = false, twice = false;
  int32_t multiplier = 0, shift = 0;
  int32_t z_x = 0, zero_point = 0, low = 0, high = 255;
};

Mean mean_to(const char* op, int64_t z_x, int64_t zero_point, int64_t low, int64_t high) {
  expect_range(op, z_x, 0, 255);
  expect_range(op, zero_point, low, high);
  Mean mean;
  mean.z_x = int32_t(z_x);
  mean.zero_point = int32_t(zero_point);
  mean.low = int32_t(low);
  mean.high = int32_t(high);
  return mean;
}

Mean fixed_mean(const char* op, int64_t z_x, int64_t multiplier, int64_t shift, int64_t zero_point, int64_t low,
                int64_t high, const std::string& rounding) {
  if (multiplier < 0 || multiplier > INT32_MAX || shift < 0 || shift > 62)
    fail(op, ": multiplier ", multiplier, ", shift ", shift, ", expected 0..2**31 - 1 and 0..62");
  Mean mean = mean_to(op, z_x, zero_point, low, high);
  mean.fixed = true;
  mean.twice = rounds_twice(op, rounding);
  mean.multiplier = int32_t(multiplier);
  mean.shift = int32_t(shift);
  return mean;
}

// numerics.mean_multiplier: the multiplier and shift of a mean over `count`.
void divide(const Mean& mean, int64_t count, int32_t& multiplier, int32_t& shift) {
  int extra = 0;
  while (int64_t(1) << extra < count) ++extra;
  const auto divided = [&] { return ((int64_t(mean.multiplier) << extra) + count / 2) / count; };
  if (divided() > INT32_MAX) --extra;
  const bool too_small = mean.shift + extra > 62;
  multiplier = too_small ? 0 : int32_t(divided());
  shift = too_small ? 62 : mean.shift + extra;
}

Tensor average(Image& image, const Windows (&windows)[3], int64_t divisor, const Mean& mean) {
  Tensor y = image.result();
  const ChannelsLast<uint8_t>& x = image.x;
  int64_t seen = 1;
  for (const Windows& own : windows)
    if (!own.empty()) seen *= own[0].end - own[0].begin;
  for_each_row(image, y, seen, [&](int64_t b, int64_t d, int64_t h, uint8_t* to) {
    const Window &plane = windows[0][d], &row = windows[1][h];
    const uint8_t* from = x.data + b * x.step[0];
    std::vector<int64_t> runs;
    for (int64_t i = plane.begin; i < plane.end; ++i)
      for (int64_t j = row.begin; j < row.end; ++j) runs.push_back(i * x.step[1] + j * x.step[2]);
    for (const Window& column : windows[2]) {
      const int64_t count = divisor ? divisor : plane.count * row.count * column.count;
      const int64_t pixels = std::max<int64_t>(0, column.end - column.begin);
      const uint8_t* begin = from + column.begin * x.step[3];
      if (mean.fixed) {
        int32_t multiplier, shift;
        divide(mean, count, multiplier, shift);
        active().mean_of_fixed(begin, runs.data(), int64_t(runs.size()), pixels, x.step[3], mean.z_x, multiplier, shift,
                               mean.twice, to, x.channels, mean.zero_point, mean.low, mean.high);
      } else {
        active().mean_of(begin, runs.data(), int64_t(runs.size()), pixels, x.step[3], mean.z_x,
                         float(mean.factor / double(count)), to, x.channels, mean.zero_point, mean.low, mean.high);
      }
      to += x.channels;
    }
  });
  return y;
}

Tensor avg_pool(const char* op, const Tensor& t, const Ints& kernel, const Ints& stride, const Ints& padding,
                bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor, const Mean& mean) {
  expect_dtype(op, "x", t, aoti_torch_dtype_uint8(), "uint8");
  if (mean.fixed && divisor && (*divisor < 1 || *divisor > 1 << 23))
    fail(op, ": divisor_override = ", *divisor, ", expected 1..2**23");
  const size_t rank = kernel.size();
  expect_entries(op, "kernel", kernel, rank, 1);
  expect_entries(op, "stride", stride, rank, 1);
  expect_entries(op, "padding", padding, rank, 0);
  Image image(op, t, int64_t(rank));
  Windows windows[3] = {{{0, 1, 1}}, {{0, 1, 1}}, {{0, 1, 1}}};
  for (size_t i = 0; i < rank; ++i) {
    const int64_t size = image.in(i), p = padding[i];
    const int64_t out = pooled_size(op, size, kernel[i], stride[i], p, 1, ceil_mode);
    image.set_out(i, out);
    Windows& own = windows[3 - rank + i];
    own.clear();
    for (int64_t o = 0; o < out; ++o) {
      const int64_t begin = o * stride[i] - p, end = std::min(begin + kernel[i], size + p);
      const int64_t inside = std::clamp<int64_t>(begin, 0, size), stop = std::clamp<int64_t>(end, 0, size);
      own.push_back({inside, stop, count_include_pad ? end - begin : stop - inside});
    }
  }
  return average(image, windows, divisor.value_or(0), mean);
}

Tensor qavg_pool(const Tensor& t, const Ints& kernel, const Ints& stride, const Ints& padding, bool ceil_mode,
                 bool count_include_pad, std::optional<int64_t> divisor, int64_t z_x, double m, int64_t zero_point,
                 int64_t low, int64_t high) {
  Mean mean = mean_to("qavg_pool", z_x, zero_point, low, high);
  mean.factor = m;
  return avg_pool("qavg_pool", t, kernel, stride, padding, ceil_mode, count_include_pad, divisor, mean);
}

Tensor qavg_pool_fixed(const Tensor& t, const Ints& kernel, const Ints& stride, const Ints& padding, bool ceil_mode,
                       bool count_include_pad, std::optional<int64_t> divisor, int64_t z_x, int64_t multiplier,
                       int64_t shift, int64_t zero_point, int64_t low, int64_t high, const std::string& rounding) {
  const char* op = "qavg_pool_fixed";
  const Mean mean = fixed_mean(op, z_x, multiplier, shift, zero_point, low, high, rounding);
  return avg_pool(op, t, kernel, stride, padding, ceil_mode, count_include_pad, divisor, mean);
}

Tensor adaptive_avg_pool(const char* op, const Tensor& t, const Ints& output_size, const Mean& mean) {
  expect_dtype(op, "x", t, aoti_torch_dtype_uint8(), "uint8");
  const size_t rank = output_size.size();
  expect_entries(op, "output_size", output_size, rank, 0);
  Image image(op, t, int64_t(rank));
  Windows windows[3] = {{{0, 1, 1}}, {{0, 1, 1}}, {{0, 1, 1}}};
  for (size_t i = 0; i < rank; ++i) {
    const int64_t size = image.in(i), out = output_size[i];
    image.set_out(i, out);
    Windows& own = windows[3 - rank + i];
    own.clear();
    for (int64_t o = 0; o < out; ++o) {
      const int64_t begin = o * size / out, end = ceil_div((o + 1) * size, out);
      own.push_back({begin, end, end - begin});
    }
  }
  return average(image, windows, 0, mean);
}

Tensor qadaptive_avg_pool(const Tensor& t, const Ints& output_size, int64_t z_x, double m, int64_t zero_point,
                          int64_t low, int64_t high) {
  Mean mean = mean_to("qadaptive_avg_pool", z_x, zero_point, low, high);
  mean.factor = m;
  return adaptive_avg_pool("qadaptive_avg_pool", t, output_size, mean);
}

Tensor qadaptive_avg_pool_fixed(const Tensor& t, const Ints& output_size, int64_t z_x, int64_t multiplier,
                                int64_t shift, int64_t zero_point, int64_t low, int64_t high,
                                const std::string& rounding) {
  const char* op = "qadaptive_avg_pool_fixed";
  return adaptive_avg_pool(op, t, output_size,
                           fixed_mean(op, z_x, multiplier, shift, zero_point, low, high, rounding));
}

Tensor qmax_pool(const Tensor& t, const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation,
                 bool ceil_mode) {
  const char* op = "qmax_pool";
  expect_dtype(op, "x", t, aoti_torch_dtype_uint8(), "uint8");
  const size_t rank = kernel.size();
  expect_entries(op, "kernel", kernel, rank, 1);
  expect_entries(op, "stride", stride, rank, 1);
  expect_entries(op, "padding", padding, rank, 0);
  expect_entries(op, "dilation", dilation, rank, 1);
  Image image(op, t, int64_t(rank));
  int64_t taps[3] = {1, 1, 1}, step[3] = {1, 1, 1}, before[3] = {}, apart[3] = {1, 1, 1}, seen = 1;
  for (size_t i = 0; i < rank; ++i) {
    const size_t at = 3 - rank + i;
    image.set_out(i, pooled_size(op, image.in(i), kernel[i], stride[i], padding[i], dilation[i], ceil_mode));
    taps[at] = kernel[i];
    step[at] = stride[i];
    before[at] = padding[i];
    apart[at] = dilation[i];
    seen *= kernel[i];
  }
  Tensor y = image.result();
  const ChannelsLast<uint8_t>& x = image.x;
  // Offsets of the taps of one window that lie inside the input: what is padded is never the largest.
  const auto inside = [&](int at, int64_t o, int64_t tap) {
    const int64_t i = o * step[at] - before[at] + tap * apart[at];
    return i >= 0 && i < x.size[at] ? i * x.step[at + 1] : int64_t(-1);
  };
  for_each_row(image, y, seen, [&](int64_t b, int64_t d, int64_t h, uint8_t* to) {
    std::vector<int64_t> rows, whole, cut;
    for (int64_t i = 0; i < taps[0]; ++i)
      for (int64_t j = 0; j < taps[1]; ++j) {
        const int64_t plane = inside(0, d, i), row = inside(1, h, j);
        if (plane >= 0 && row >= 0) rows.push_back(plane + row);
      }
    for (int64_t i = 0; i < taps[2]; ++i)
      for (const int64_t row : rows) whole.push_back(row + i * apart[2] * x.step[3]);
    const uint8_t* from = x.data + b * x.step[0];
    // The outputs [first, last) see whole windows, the others windows that are cut.
    const int64_t reach = x.size[2] - (taps[2] - 1) * apart[2] + before[2];
    const int64_t last = std::clamp<int64_t>(reach > 0 ? ceil_div(reach, step[2]) : 0, 0, image.out[2]);
    const int64_t first = std::min(ceil_div(before[2], step[2]), last);
    for (int64_t w = 0; w < image.out[2]; ++w, to += x.channels) {
      if (w == first && first < last && !whole.empty()) {
        active().max_of(from + (w * step[2] - before[2]) * x.step[3], whole.data(), int64_t(whole.size()), last - first,
                        step[2] * x.step[3], to, x.channels);
        to += (last - first) * x.channels;
        if ((w = last) == image.out[2]) break;
      }
      cut.clear();
      for (int64_t i = 0; i < taps[2]; ++i)
        if (const int64_t pixel = inside(2, w, i); pixel >= 0)
          for (const int64_t row : rows) cut.push_back(row + pixel);
      if (cut.empty())
        std::fill_n(to, x.channels, uint8_t(0));
      else
        active().max_of(from, cut.data(), int64_t(cut.size()), 1, 0, to, x.channels);
    }
  });
  return y;
}

float source_step(const char* op, int64_t size, int64_t out, double scale, bool align_corners) {
  if (align_corners) return out <= 1 ? 0.0f : float(size - 1) / float(out - 1);
  const float step = scale != 0 ? float(1.0 / scale) : float(size) / float(out);
  if (out && !(step >= 0 && step < float(int64_t(1) << 31)))
    fail(op, ": a scale is ", std::to_string(scale), ", expected 0 or above 2**-31");
  return step;
}

Image upsampled(const char* op, const Tensor& t, const Ints& size, size_t rank) {
  expect_dtype(op, "x", t, aoti_torch_dtype_uint8(), "uint8");
  expect_entries(op, "size", size, rank, 0);
  Image image(op, t, int64_t(size.size()));
  for (size_t i = 0; i < size.size(); ++i) {
    if (image.in(i) < 1) fail(op, ": x", t.shape(), " has no pixels");
    image.set_out(i, size[i]);
  }
  return image;
}

Tensor qupsample_nearest(const Tensor& t, const Ints& size, const std::vector<double>& scales) {
  const Image image = upsampled("qupsample_nearest", t, size, scales.size());
  Tensor y = image.result();
  const ChannelsLast<uint8_t>& x = image.x;
  std::vector<int64_t> source[3] = {{0}, {0}, {0}};
  for (size_t i = 0, at = 3 - size.size(); i < size.size(); ++i, ++at) {
    source[at].clear();
    const float step = source_step("qupsample_nearest", x.size[at], size[i], scales[i], false);
    for (int64_t o = 0; o < size[i]; ++o) {
      const float place = float(o) * step;
      source[at].push_back(std::min<int64_t>(int64_t(std::floor(place)), x.size[at] - 1) * x.step[at + 1]);
    }
  }
  for_each_row(image, y, 1, [&](int64_t b, int64_t d, int64_t h, uint8_t* to) {
    const uint8_t* from = x.data + b * x.step[0] + source[0][d] + source[1][h];
    for (const int64_t pixel : source[2]) to = std::copy_n(from + pixel, x.channels, to);
  });
  return y;
}

template <class Weight>
struct Neighbours {  // the two inputs that an output lies between, as offsets, and their weights
  int64_t first, second;
  Weight w0, w1;
};

// The means of four pixels each, by `mix`.
template <class Weight, class Mix>
Tensor mixed(const Image& image, const std::vector<Neighbours<Weight>> (&sources)[2], const Mix& mix) {
  Tensor y = image.result();
  const ChannelsLast<uint8_t>& x = image.x;
  for_each_row(image, y, 4, [&](int64_t b, int64_t, int64_t h, uint8_t* to) {
    const Neighbours<Weight>& v = sources[0][h];
    const uint8_t* from = x.data + b * x.step[0];
    for (const Neighbours<Weight>& u : sources[1]) {
      const uint8_t* const pixels[4] = {from + v.first + u.first, from + v.first + u.second, from + v.second + u.first,
                                        from + v.second + u.second};
      mix(pixels, u.w0, u.w1, v.w0, v.w1, to, x.channels);
      to += x.channels;
    }
  });
  return y;
}

Tensor qupsample_bilinear(const Tensor& t, const Ints& size, const std::vector<double>& scales, bool align_corners) {
  const Image image = upsampled("qupsample_bilinear", t, size, scales.size());
  if (size.size() != 2) fail("qupsample_bilinear: x", t.shape(), ", expected [B, C, H, W]");
  std::vector<Neighbours<float>> sources[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t last = image.x.size[i + 1] - 1, pixel = image.x.step[i + 2];
    const float step = source_step("qupsample_bilinear", last + 1, size[i], scales[i], align_corners);
    for (int64_t o = 0; o < size[i]; ++o) {
      const float place = align_corners ? float(o) * step : std::max((float(o) + 0.5f) * step - 0.5f, 0.0f);
      const int64_t first = std::min<int64_t>(int64_t(place), last);
      const float w1 = std::clamp(place - float(first), 0.0f, 1.0f);
      sources[i].push_back({first * pixel, std::min(first + 1, last) * pixel, 1.0f - w1, w1});
    }
  }
  return mixed(image, sources, active().mix_of);
}

// Places in steps of 2**-32, weights of 2**-11.
Tensor qupsample_bilinear_fixed(const Tensor& t, const Ints& size, const Ints& steps, bool align_corners) {
  constexpr const char* op = "qupsample_bilinear_fixed";
  const Image image = upsampled(op, t, size, steps.size());
  if (size.size() != 2) fail(op, ": x", t.shape(), ", expected [B, C, H, W]");
  std::vector<Neighbours<int32_t>> sources[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t last = image.x.size[i + 1] - 1, pixel = image.x.step[i + 2];
    int64_t step = steps[i];
    if (step < 0 || step > INT64_MAX / (2 * size[i] + 1)) fail(op, ": a step of ", step, " for ", size[i], " pixels");
    if (align_corners)
      step = size[i] <= 1 ? 0 : ((last << 33) / (size[i] - 1) + 1) >> 1;
    else if (!step)
      step = (((last + 1) << 33) / std::max<int64_t>(size[i], 1) + 1) >> 1;
    for (int64_t o = 0; o < size[i]; ++o) {
      const int64_t place =
          align_corners ? o * step : std::max<int64_t>(((2 * o + 1) * step >> 1) - (int64_t(1) << 31), 0);
      const int64_t first = std::min(place >> 32, last);
      const auto w1 = int32_t(((place & 0xFFFFFFFF) + (1 << 20)) >> 21);
      sources[i].push_back({first * pixel, std::min(first + 1, last) * pixel, 2048 - w1, w1});
    }
  }
  return mixed(image, sources, active().mix_of_fixed);
}

// Pixels in parts that stay in the first-level cache, channels in parts of 64: quantized as they lie, then transposed.
void transpose_quantized(const float* x, uint8_t* y, int64_t channels, int64_t pixels, int64_t begin, int64_t end,
                         float inverse, int32_t zero_point) {
  constexpr int64_t kChannels = 64;
  alignas(64) uint8_t part[kChannels * kPart];
  for (int64_t p = begin; p < end; p += kPart) {
    const int64_t count = std::min(kPart, end - p);
    for (int64_t c = 0; c < channels; c += kChannels) {
      const int64_t own = std::min(kChannels, channels - c);
      for (int64_t i = 0; i < own; ++i)
        active().quantize(x + (c + i) * pixels + p, part + i * kPart, count, inverse, zero_point);
      uint8_t* to = y + p * channels + c;
      int64_t i = 0;
      for (; i + 4 <= own; i += 4) active().interleave_four(part + i * kPart, kPart, to + i, channels, count);
      int64_t j = 0;
      if (channels == 3) {  // the fourth byte of a word is the next pixel's first, which is written after it
        active().interleave_four(part, kPart, to, channels, count - 1);
        j = count - 1;
      }
      for (; i < own; ++i)
        for (int64_t k = j; k < count; ++k) to[k * channels + i] = part[i * kPart + k];
    }
  }
}

Tensor quantize_channels_last(const Tensor& x, double scale, int64_t zero_point) {
  const char* op = "quantize_channels_last";
  expect_dtype(op, "x", x, aoti_torch_dtype_float32(), "float32");
  expect_range(op, zero_point, 0, 255);
  const Shape shape = x.shape();
  if (shape.dim < 2) fail(op, ": x", shape, ", expected [B, C, *spatial]");
  Tensor y = Tensor::empty_channels_last(shape, aoti_torch_dtype_uint8());
  const float inverse = 1.0f / float(scale);
  uint8_t* to = y.data<uint8_t>();
  int64_t pixels = 1, step = shape.sizes[1];
  bool dense = shape.sizes[1] == 1 || x.strides()[1] == 1;  // channels-last already
  for (int64_t i = shape.dim - 1; i >= 2; --i) {
    dense = dense && (shape.sizes[i] == 1 || x.strides()[i] == step);
    pixels *= shape.sizes[i];
    step *= shape.sizes[i];
  }
  dense = dense && (shape.sizes[0] == 1 || x.strides()[0] == step);
  if (dense) {
    const float* from = x.data<float>();
    parallel(x.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
      active().quantize(from + begin, to + begin, end - begin, inverse, int32_t(zero_point));
    });
    return y;
  }
  const Contiguous source(x);
  const float* from = source.data<float>();
  const int64_t channels = shape.sizes[1];
  const int64_t grain = std::max<int64_t>(256, kElementGrain / std::max<int64_t>(1, channels) / 256 * 256);
  parallel(shape.sizes[0] * pixels, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // image by image
      const int64_t image = begin / pixels, first = begin % pixels, last = std::min(pixels, first + end - begin);
      transpose_quantized(from + image * pixels * channels, to + image * pixels * channels, channels, pixels, first,
                          last, inverse, int32_t(zero_point));
      begin += last - first;
    }
  });
  return y;
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) {
  fxq::serve<fxq::qavg_pool_fixed>(m, "qavg_pool_fixed");
  fxq::serve<fxq::qadaptive_avg_pool_fixed>(m, "qadaptive_avg_pool_fixed");
  fxq::serve<fxq::qavg_pool>(m, "qavg_pool");
  fxq::serve<fxq::qadaptive_avg_pool>(m, "qadaptive_avg_pool");
  fxq::serve<fxq::qmax_pool>(m, "qmax_pool");
  fxq::serve<fxq::qupsample_nearest>(m, "qupsample_nearest");
  fxq::serve<fxq::qupsample_bilinear_fixed>(m, "qupsample_bilinear_fixed");
  fxq::serve<fxq::qupsample_bilinear>(m, "qupsample_bilinear");
  fxq::serve<fxq::quantize_channels_last>(m, "quantize_channels_last");
}

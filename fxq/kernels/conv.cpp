#include "conv.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace fxq {
namespace {

// The part of the input that some output rows see: where it lies, or a copy with what is padded around it.
struct Seen {
  const uint8_t* begin;                 // the first tap of the first window
  int64_t plane_tap, row_step, pixel_step;  // bytes from one plane of taps, row, pixel to the next
};

bool lies_inside(const Conv& c) {
  for (int i = 0; i < 3; ++i) {
    const int64_t last = (c.out[i] - 1) * c.stride[i] - c.before[i] + (c.kernel[i] - 1) * c.dilation[i];
    if (c.before[i] > 0 || last >= c.size[i]) return false;
  }
  return true;
}

// Whether windows can be read where they lie: none reaches outside, nor does the last group of four bytes of a run.
bool is_direct(const Conv& c) {
  if (!lies_inside(c)) return false;
  if (c.in_lanes()) return true;
  return c.run_bytes() % 4 == 0 && (!c.by_row() || c.kernel[2] == 1 || c.x_step[3] == c.channels);
}

void copy_row(const Conv& c, const uint8_t* row, uint8_t* to, int64_t width) {
  const int64_t left = std::clamp<int64_t>(c.before[2], 0, width), first = left - c.before[2];
  const int64_t count = std::clamp<int64_t>(c.size[2] - first, 0, width - left);
  memset(to, c.z_x, left * c.channels);
  to += left * c.channels;
  row += first * c.x_step[3];
  if (c.x_step[3] == c.channels) {
    if (count) memcpy(to, row, count * c.channels);
  } else {
    for (int64_t i = 0; i < count; ++i) memcpy(to + i * c.channels, row + i * c.x_step[3], c.channels);
  }
  memset(to + count * c.channels, c.z_x, (width - left - count) * c.channels);
}

Seen look(const Conv& c, int64_t image, int64_t plane, int64_t row, int64_t row_end) {
  const uint8_t* x = c.x + image * c.x_step[0];
  const int64_t top = row * c.stride[1] - c.before[1], front = plane * c.stride[0] - c.before[0];
  if (is_direct(c))
    return {x + front * c.x_step[1] + top * c.x_step[2] - c.before[2] * c.x_step[3], c.dilation[0] * c.x_step[1],
            c.x_step[2], c.x_step[3]};
  const int64_t height = (row_end - row - 1) * c.stride[1] + (c.kernel[1] - 1) * c.dilation[1] + 1;
  const int64_t width = (c.out[2] - 1) * c.stride[2] + (c.kernel[2] - 1) * c.dilation[2] + 1;
  const int64_t bytes = width * c.channels;
  // A run's last group may end behind it.
  auto* const begin = static_cast<uint8_t*>(scratch(c.kernel[0] * height * bytes + 3, Holder::kPart));
  uint8_t* to = begin;
  for (int64_t a = 0; a < c.kernel[0]; ++a) {
    const int64_t depth = front + a * c.dilation[0];
    for (int64_t r = 0; r < height; ++r, to += bytes) {
      const bool inside = depth >= 0 && depth < c.size[0] && top + r >= 0 && top + r < c.size[1];
      if (inside)
        copy_row(c, x + depth * c.x_step[1] + (top + r) * c.x_step[2], to, width);
      else
        memset(to, c.z_x, bytes);
    }
  }
  memset(to, 0, 3);
  return {begin, height * bytes, bytes, c.channels};
}

}  // namespace

void move_outputs(Gemm& g, int64_t elements, int64_t channel) {
  const bool is_float = g.output == Output::kFloat || g.output == Output::kActivation;
  g.y = static_cast<uint8_t*>(g.y) + (elements + channel) * (is_float ? sizeof(float) : 1);
  if (g.addend) g.addend += (g.addend_stride ? elements : 0) + channel;
  if (g.residual) g.residual += elements + channel;
  g.bias += channel;
  if (g.output == Output::kFixed) {
    g.fixed += channel;
    g.shift += channel;
  } else {
    g.multiplier += channel;
  }
}

void convolve(const Conv& c, int64_t image, int64_t plane, int64_t row, int64_t row_end, int64_t panel,
              int64_t panel_end) {
  const Kernels& kernels = active();
  const Seen seen = look(c, image, plane, row, row_end);
  const bool lanes = c.in_lanes(), by_row = !lanes && c.by_row();
  std::vector<int64_t> runs;
  for (int64_t a = 0; a < c.kernel[0]; ++a)
    for (int64_t b = 0; b < c.kernel[1]; ++b)
      for (int64_t d = 0; d < (by_row ? 1 : c.kernel[2]); ++d)
        runs.push_back(a * seen.plane_tap + b * c.dilation[1] * seen.row_step + d * c.dilation[2] * seen.pixel_step);

  Gemm g = c.product;
  g.k = c.k();
  g.y_stride = c.y_step[3];
  g.residual_stride = c.y_step[3];
  if (g.addend_stride) g.addend_stride = c.y_step[3];
  g.run_count = int64_t(runs.size());
  g.run_bytes = ceil_div(c.run_bytes(), 4) * 4;
  const int64_t start = image * c.y_step[0] + plane * c.y_step[1] + row * c.y_step[2];
  const bool depthwise = lanes && c.product.n == 1 && c.channels >= 16 && c.channels % 4 == 0 && !g.addend &&
                         g.output != Output::kFloat && g.output != Output::kFixed;
  if (lanes) {
    g.run_bytes = c.product.n;
    g.n = c.channels;
    runs.resize(ceil_div(g.run_count, 4) * 4, runs.back());
    g.runs = runs.data();
  }
  if (lanes && !depthwise) {
    g.x_stride = c.stride[2] * seen.pixel_step;
    for (int64_t r = 0; r < row_end - row; ++r) {
      Gemm own = g;
      own.x = seen.begin + r * c.stride[1] * seen.row_step;
      move_outputs(own, start + r * c.y_step[2], 0);
      kernels.lanes(own, c.out[2]);
    }
    return;
  }

  std::vector<const uint8_t*> pixels((row_end - row) * c.out[2]);
  const uint8_t** place = pixels.data();
  for (int64_t r = 0; r < row_end - row; ++r) {
    const uint8_t* window = seen.begin + r * c.stride[1] * seen.row_step;
    for (int64_t i = 0; i < c.out[2]; ++i, window += c.stride[2] * seen.pixel_step) *place++ = window;
  }
  const bool one = c.y_step[2] == c.out[2] * c.y_step[3];  // rows of the result follow one another as pixels do
  const int64_t count = one ? int64_t(pixels.size()) : c.out[2];
  if (depthwise) {
    const std::unique_ptr<int8_t[]> memory(new int8_t[256 * runs.size()]);
    for (int64_t r = 0; r < (one ? 1 : row_end - row); ++r) {
      Gemm own = g;
      own.rows = pixels.data() + r * count;
      move_outputs(own, start + r * c.y_step[2], 0);
      kernels.depthwise(own, count, memory.get());
    }
    return;
  }
  for (int64_t group = 0; group < c.groups; ++group) {
    std::vector<int64_t> own_runs = runs;
    for (int64_t& run : own_runs) run += group * (c.channels / c.groups);
    for (int64_t r = 0; r < (one ? 1 : row_end - row); ++r) {
      Gemm own = g;
      own.runs = own_runs.data();
      own.rows = pixels.data() + r * count;
      own.weight += group * packed_size(own.n, own.k);
      move_outputs(own, start + r * c.y_step[2], group * own.n);
      kernels.gemm(own, 0, count, panel, panel_end);
    }
  }
}

}  // namespace fxq

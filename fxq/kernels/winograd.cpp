// Which convolutions go by the tiles of winograd.h. Without torch.
#include "conv.h"

namespace fxq {
namespace {

constexpr int64_t kMostWeights = 8 << 20;  // bytes of transformed weights, all of which every block of tiles reads

}  // namespace

int64_t tile_weights_size(int64_t channels, int64_t n) {
  return 18 * channels * ceil_div(n, 16) * 16 + panel_count(n) * 36 * 16;
}

bool fits_tiles(const Conv& c) {
  for (int i = 0; i < 3; ++i)
    if (c.kernel[i] != (i ? 3 : 1) || c.stride[i] != 1 || c.dilation[i] != 1) return false;
  if (c.size[0] != 1 || c.out[0] != 1 || c.before[0] != 0 || c.groups != 1 || c.channels % 4 != 0) return false;
  // |y| < 2**25: whatever the weights, or with those that there are.
  constexpr int64_t most = (int64_t(1) << 25) / 255;
  return c.k() * 128 < most || active().largest_sum(c.product.weight, c.k(), c.product.n) < most;
}

// By times measured on a processor with AVX-512 VNNI, for each pair of an input and an output channel in units of some
// eight multiply-adds: of an output, and of a tile with its transforms, the inputs' being shared by all output channels
// and the outputs' by all input channels; then the transform of the weights. Others gain more: they widen bytes to int16
// anyway.
bool gains_by_tiles(const Conv& c) {
  const double n = double(c.product.n), channels = double(c.channels);
  const double outputs = double(c.batch * c.out[1] * c.out[2]), tiles = double(c.tiles());
  const double direct = .15 * outputs, by_tiles = (1.2 + 17.5 / channels + 8.5 / n) * tiles + 8;
  return 1.1 * by_tiles < direct && tile_weights_size(c.channels, c.product.n) * 4 <= kMostWeights;
}

}  // namespace fxq

// Which convolutions go by the tiles of winograd.h. Without torch.
#include "conv.h"

namespace fxq {

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
// anyway. Of more than 256 channels not even the weights of a narrow strip stay in the second-level cache.
bool gains_by_tiles(const Conv& c) {
  const double n = double(c.product.n), channels = double(c.channels);
  const double outputs = double(c.batch * c.out[1] * c.out[2]), tiles = double(c.tiles());
  const double direct = .15 * outputs, by_tiles = (1.2 + 25 / channels + 8.5 / n) * tiles + 8;
  return c.channels <= 256 && 1.1 * by_tiles < direct;
}

}  // namespace fxq

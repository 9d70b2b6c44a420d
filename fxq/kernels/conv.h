// A convolution over channels-last memory as products on the tile of gemm.h: every output pixel is a row, which lies in
// the input as runs of bytes, one for each kernel row or tap. Without torch.
#pragma once
#include "kernels.h"

namespace fxq {

// Three spatial dimensions; missing ones have size 1 and come first. Steps are elements between neighbours.
struct Conv {
  const uint8_t* x = nullptr;  // channels side by side
  int64_t batch = 0, channels = 0;
  int64_t size[3] = {1, 1, 1}, x_step[4] = {};  // x_step: image, plane, row, pixel
  int64_t kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, before[3] = {}, dilation[3] = {1, 1, 1}, out[3] = {1, 1, 1};
  int64_t groups = 1;
  uint8_t z_x = 0;  // what lies outside the input
  Gemm product;     // the epilogue; weight, bias and multiplier; n of one group; y, addend, residual of the first pixel
  int64_t y_step[4] = {};  // of y, addend and residual

  // Whether every output channel has inputs of its own: depthwise, or groups of 4 or 8 channels in and out.
  bool in_lanes() const {
    const int64_t own = channels / groups;
    return product.n == own && (own == 1 || (groups > 1 && (own == 4 || own == 8)));
  }
  bool by_row() const { return groups == 1 && dilation[2] == 1; }  // whether a run is a row of the kernel
  int64_t runs() const { return kernel[0] * kernel[1] * (by_row() ? 1 : kernel[2]); }
  int64_t run_bytes() const { return (by_row() ? kernel[2] : 1) * (channels / groups); }
  int64_t k() const {
    if (in_lanes()) return kernel[0] * kernel[1] * kernel[2] * product.n;
    return runs() * ceil_div(run_bytes(), 4) * 4;
  }
  int64_t weight_bytes() const {
    return in_lanes() ? packed_size(channels, k()) : groups * packed_size(product.n, k()) + lacking(run_bytes());
  }
  int64_t panels() const { return in_lanes() ? 1 : panel_count(product.n); }

  // The outputs as tiles of 4 x 4, those of the last row and column cut off.
  struct Tile {
    int64_t image, row, pixel;
  };
  int64_t tiles() const { return batch * ceil_div(out[1], 4) * ceil_div(out[2], 4); }
  Tile tile(int64_t i) const {
    const int64_t down = ceil_div(out[1], 4), across = ceil_div(out[2], 4);
    return {i / across / down, i / across % down * 4, i % across * 4};
  }
};

// Moves what `g` reads and writes beside its product by elements of the result and by channels.
void move_outputs(Gemm& g, int64_t elements, int64_t channel);

// The output rows [row, row_end) of one image and plane, channels of the panels [panel, panel_end) of every group.
void convolve(const Conv& c, int64_t image, int64_t plane, int64_t row, int64_t row_end, int64_t panel,
              int64_t panel_end);

// winograd.cpp: whether a convolution can go by tiles, by way of fewer products; and whether it is faster so.
bool fits_tiles(const Conv& c);
bool gains_by_tiles(const Conv& c);
constexpr int64_t kTileWeights = 600 * 1024;  // bytes of transformed weights that tiles use at a time

}  // namespace fxq

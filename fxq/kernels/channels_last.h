// A tensor [B, C, *spatial] as the kernels for images read it: the channels of a pixel side by side.
#pragma once
#include <algorithm>
#include <memory>

#include "checks.h"

namespace fxq {

// Its elements where they lie, or a copy where the channels are apart. Up to three spatial dimensions, missing ones in
// front with size 1; step: elements from one image, plane, row, pixel to the next.
template <class T>
class ChannelsLast {
 public:
  ChannelsLast(const char* op, const Tensor& t, int64_t rank) {
    const Shape shape = t.shape();
    if (rank < 1 || rank > 3 || shape.dim != rank + 2)
      fail(op, ": x", shape, ", expected [B, C] and one to three spatial dimensions, as many as the kernel has (", rank,
           ")");
    const int64_t* strides = t.strides();
    batch = shape.sizes[0];
    channels = shape.sizes[1];
    int64_t own[4] = {strides[0], 0, 0, 0};
    for (int64_t i = 0; i < rank; ++i) {
      size[3 - rank + i] = shape.sizes[2 + i];
      own[4 - rank + i] = strides[2 + i];
    }
    data = t.data<T>();
    if (channels <= 1 || strides[1] == 1)
      std::copy(own, own + 4, step);
    else
      copy(own, strides[1]);
  }

  bool is_dense() const {  // pixel after pixel without gaps
    const int64_t dense[4] = {size[0] * size[1] * size[2] * channels, size[1] * size[2] * channels, size[2] * channels,
                              channels};
    for (int i = 0; i < 4; ++i)
      if ((i ? size[i - 1] : batch) > 1 && step[i] != dense[i]) return false;
    return true;
  }

  const T* data;
  int64_t batch, channels, size[3] = {1, 1, 1}, step[4];

 private:
  void copy(const int64_t* from, int64_t channel_step) {
    step[3] = channels;
    step[2] = size[2] * step[3];
    step[1] = size[1] * step[2];
    step[0] = size[0] * step[1];
    copy_.reset(new T[batch * step[0]]);
    T* to = copy_.get();
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t d = 0; d < size[0]; ++d)
        for (int64_t h = 0; h < size[1]; ++h)
          for (int64_t w = 0; w < size[2]; ++w, to += channels) {
            const T* pixel = data + b * from[0] + d * from[1] + h * from[2] + w * from[3];
            for (int64_t c = 0; c < channels; ++c) to[c] = pixel[c * channel_step];
          }
    data = copy_.get();
  }

  std::unique_ptr<T[]> copy_;
};

}  // namespace fxq

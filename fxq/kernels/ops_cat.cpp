// Channels side by side as a torch operator.
#include <cstring>
#include <vector>

#include "channels_last.h"
#include "program.h"

namespace fxq {
namespace {

// memcpy without a call, which would take longer than the few bytes of a pixel; the last ones may be written twice.
inline void copy_pixel(uint8_t* to, const uint8_t* from, int64_t count) {
  if (count < 16) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + 16 < count; i += 16) std::memcpy(to + i, from + i, 16);
  std::memcpy(to + count - 16, from + count - 16, 16);
}

Tensor qcat(const std::vector<Tensor>& tensors) {
  const char* op = "qcat";
  if (tensors.empty()) fail(op, ": no tensors");
  const Shape first = tensors[0].shape();
  std::vector<ChannelsLast<uint8_t>> parts;
  parts.reserve(tensors.size());
  std::vector<int64_t> sizes(first.sizes, first.sizes + first.dim);
  for (const Tensor& t : tensors) {
    expect_dtype(op, "a tensor", t, aoti_torch_dtype_uint8(), "uint8");
    parts.emplace_back(op, t, first.dim - 2);
    if (parts.size() > 1) sizes[1] += parts.back().channels;
    for (int64_t i = 0; i < first.dim; ++i)
      if (i != 1 && t.shape().sizes[i] != first.sizes[i])
        fail(op, ": tensors ", first, " and ", t.shape(), " differ in more than their channels");
  }
  Tensor y = Tensor::empty_channels_last({sizes.data(), first.dim}, aoti_torch_dtype_uint8());
  uint8_t* const target = y.data<uint8_t>();
  const ChannelsLast<uint8_t>& shape = parts[0];
  const int64_t width = shape.size[2], channels = sizes[1], rows = shape.batch * shape.size[0] * shape.size[1];
  parallel(rows, std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, width * channels)),
           [&](int64_t begin, int64_t end) {
             for (int64_t row = begin; row < end; ++row) {
               uint8_t* to = target + row * width * channels;
               for (const ChannelsLast<uint8_t>& part : parts) {
                 const int64_t plane = row / part.size[1], count = part.channels;
                 const uint8_t* from = part.data + plane / part.size[0] * part.step[0] +
                                       plane % part.size[0] * part.step[1] + row % part.size[1] * part.step[2];
                 for (int64_t i = 0; i < width; ++i) copy_pixel(to + i * channels, from + i * part.step[3], count);
                 to += count;
               }
             }
           });
  return y;
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) { fxq::serve<fxq::qcat>(m, "qcat"); }

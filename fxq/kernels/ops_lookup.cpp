// Tables of 256 entries as torch operators: lookup, lookup_channels.
#include <algorithm>

#include "program.h"

namespace fxq {
namespace {

template <class T>
void map(const uint8_t* q, const T* table, T* y, int64_t count) {
  if constexpr (sizeof(T) == 1)
    active().lookup(q, table, y, count);
  else
    for (int64_t i = 0; i < count; ++i) y[i] = table[q[i]];
}

template <class T>
void map_innermost(const uint8_t* q, const T* table, T* __restrict y, int64_t count, int64_t channels) {
  for (int64_t i = 0; i < count; ++i, q += channels, y += channels)
    for (int64_t c = 0; c < channels; ++c) y[c] = table[256 * c + q[c]];
}

template <class T>
Tensor lookup_as(const Tensor& q, const Tensor& table) {
  const Contiguous from(q, true), entries(table);
  Tensor y = q.empty_like(table.dtype());
  const uint8_t* source = from.data<uint8_t>();
  const T* values = entries.data<T>();
  T* target = y.data<T>();
  parallel(q.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    map(source + begin, values, target + begin, end - begin);
  });
  return y;
}

bool is_float(const char* op, const Tensor& q, const Tensor& table) {
  expect_dtype(op, "q", q, aoti_torch_dtype_uint8(), "uint8");
  const bool to_float = table.dtype() == aoti_torch_dtype_float32();
  if (!to_float) expect_dtype(op, "table", table, aoti_torch_dtype_uint8(), "uint8 or float32");
  return to_float;
}

Tensor lookup(const Tensor& q, const Tensor& table) {
  const bool to_float = is_float("lookup", q, table);
  if (table.dim() != 1 || table.numel() != 256) fail("lookup: table has shape ", table.shape(), ", expected [256]");
  return to_float ? lookup_as<float>(q, table) : lookup_as<uint8_t>(q, table);
}

// Runs of `inner` values of one channel after the other; of single values where the channels lie innermost.
template <class T>
Tensor lookup_channels_as(const Tensor& q, const Tensor& table, int64_t dim) {
  const bool last = dim == 1 && q.is_channels_last();
  const Contiguous from(q, last), entries(table);
  Tensor y = last ? q.empty_like(table.dtype()) : Tensor::empty(q.shape(), table.dtype());
  const int64_t* sizes = q.shape().sizes;
  const int64_t channels = sizes[dim];
  int64_t inner = 1;
  for (int64_t i = dim + 1; i < q.dim() && !last; ++i) inner *= sizes[i];
  if (!q.numel()) return y;
  const uint8_t* source = from.data<uint8_t>();
  const T* values = entries.data<T>();
  T* target = y.data<T>();
  const int64_t grain = std::max<int64_t>(1, kElementGrain / (channels * inner));
  parallel(q.numel() / (channels * inner), grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * channels * inner, count = end - begin;
    if (inner == 1)
      map_innermost(source + first, values, target + first, count, channels);
    else
      for (int64_t run = 0; run < count * channels; ++run)
        map(source + first + run * inner, values + 256 * (run % channels), target + first + run * inner, inner);
  });
  return y;
}

Tensor lookup_channels(const Tensor& q, const Tensor& table, int64_t dim) {
  const bool to_float = is_float("lookup_channels", q, table);
  if (dim < 0 || dim >= q.dim()) fail("lookup_channels: dim = ", dim, ", q has shape ", q.shape());
  const Shape shape = table.shape();
  if (shape.dim != 2 || shape.sizes[0] != q.shape().sizes[dim] || shape.sizes[1] != 256)
    fail("lookup_channels: table has shape ", shape, ", expected [", q.shape().sizes[dim], ", 256]");
  return to_float ? lookup_channels_as<float>(q, table, dim) : lookup_channels_as<uint8_t>(q, table, dim);
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) {
  fxq::serve<fxq::lookup>(m, "lookup");
  fxq::serve<fxq::lookup_channels>(m, "lookup_channels");
}

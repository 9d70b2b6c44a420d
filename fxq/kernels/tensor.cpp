#include "tensor.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fxq {
namespace {

int64_t element_size(int32_t dtype) {
  if (dtype == aoti_torch_dtype_uint8()) return 1;
  if (dtype == aoti_torch_dtype_float32()) return 4;
  throw std::runtime_error("fxq: a value between the operations of one call is neither uint8 nor float32");
}

// So few that every step between them, in bytes, is a number of 64 bits.
void expect_possible(Shape shape) {
  constexpr int64_t kMost = int64_t(1) << 48;
  int64_t elements = 1;
  for (int64_t i = 0; i < shape.dim; ++i)
    if (__builtin_mul_overflow(elements, std::max<int64_t>(1, shape.sizes[i]), &elements) || elements > kMost)
      throw std::runtime_error("fxq: a result of more than 2**48 elements");
}

// Elements of any strides one after the other.
void gather(const uint8_t* from, const int64_t* sizes, const int64_t* strides, int64_t dim, int64_t size, uint8_t*& to) {
  if (dim == 0) {
    std::memcpy(to, from, size);
    to += size;
    return;
  }
  for (int64_t i = 0; i < *sizes; ++i) gather(from + i * *strides * size, sizes + 1, strides + 1, dim - 1, size, to);
}

}  // namespace

Tensor Tensor::empty(Shape shape, int32_t dtype) {
  expect_possible(shape);
  int64_t strides[kMaxDim], step = 1;
  for (int64_t i = shape.dim - 1; i >= 0; --i) {
    strides[i] = step;
    if (shape.sizes[i] > 1) step *= shape.sizes[i];
  }
  return empty(shape, strides, dtype);
}

Tensor Tensor::empty(Shape shape, const int64_t* strides, int32_t dtype) {
  if (Arena* const arena = Arena::current()) {
    if (shape.dim > kMaxPlanned) throw std::runtime_error("fxq: a value of more than eight dimensions within one call");
    int64_t numel = 1;
    for (int64_t i = 0; i < shape.dim; ++i) numel *= shape.sizes[i];
    void* const data = arena->take(numel * element_size(dtype));
    Tensor y(nullptr);
    y.planned_ = std::make_shared<Planned>();
    Planned& own = *y.planned_;
    own.arena = arena;
    own.data = data;
    own.dtype = dtype;
    own.dim = shape.dim;
    own.numel = numel;
    std::copy_n(shape.sizes, shape.dim, own.sizes);
    std::copy_n(strides, shape.dim, own.strides);
    return y;
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.dim, shape.sizes, strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor Tensor::empty_channels_last(Shape shape, int32_t dtype) {
  expect_possible(shape);
  int64_t strides[kMaxDim], step = shape.sizes[1];
  for (int64_t i = shape.dim - 1; i >= 2; --i) {
    strides[i] = step;
    step *= shape.sizes[i];
  }
  strides[1] = 1;
  strides[0] = step;
  return empty(shape, strides, dtype);
}

Tensor Tensor::empty_like(int32_t dtype) const {
  return is_channels_last() ? empty_channels_last(shape(), dtype) : empty(shape(), dtype);
}

bool Tensor::is_channels_last() const {
  const Shape own = shape();
  if (own.dim < 3 || is_contiguous()) return false;
  const int64_t* steps = strides();
  int64_t step = own.sizes[1];
  bool dense = step == 1 || steps[1] == 1;
  for (int64_t i = own.dim - 1; i >= 2; step *= own.sizes[i--]) dense = dense && (own.sizes[i] == 1 || steps[i] == step);
  return dense && (own.sizes[0] == 1 || steps[0] == step);
}

bool Tensor::is_contiguous() const {
  if (!planned_) return get<bool>(aoti_torch_is_contiguous);
  int64_t step = 1;
  for (int64_t i = planned_->dim - 1; i >= 0; step *= planned_->sizes[i--])
    if (planned_->sizes[i] != 1 && planned_->strides[i] != step) return planned_->numel == 0;
  return true;
}

Tensor Tensor::alias() const {
  Tensor other(nullptr);
  other.planned_ = planned_;
  if (!planned_) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &other.handle_));
  return other;
}

Tensor Tensor::contiguous() const {
  if (planned_) {
    Tensor y = empty(shape(), dtype());
    auto* to = y.data<uint8_t>();
    gather(data<uint8_t>(), planned_->sizes, planned_->strides, planned_->dim, element_size(dtype()), to);
    return y;
  }
  StableIValue stack[2] = {torch::stable::detail::from(alias().release()),
                           torch::stable::detail::from(torch::headeronly::MemoryFormat::Contiguous)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::contiguous", "", stack, TORCH_ABI_VERSION));
  return Tensor(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
}

Contiguous::Contiguous(const Tensor& tensor, bool or_channels_last) {
  if (!tensor.is_contiguous() && !(or_channels_last && tensor.is_channels_last())) copy_.emplace(tensor.contiguous());
  data_ = (copy_ ? *copy_ : tensor).data<void>();
}

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

}  // namespace fxq

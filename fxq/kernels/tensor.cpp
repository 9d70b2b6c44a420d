#include "tensor.h"

namespace fxq {

Tensor Tensor::empty(Shape shape, int32_t dtype) {
  int64_t strides[kMaxDim], step = 1;
  for (int64_t i = shape.dim - 1; i >= 0; --i) {
    strides[i] = step;
    if (shape.sizes[i] > 1) step *= shape.sizes[i];
  }
  return empty(shape, strides, dtype);
}

Tensor Tensor::empty(Shape shape, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.dim, shape.sizes, strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor Tensor::empty_channels_last(Shape shape, int32_t dtype) {
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

Tensor Tensor::contiguous() const {
  AtenTensorHandle self = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &self));
  StableIValue stack[2] = {torch::stable::detail::from(self),
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

// A tensor and an operator's calling convention over torch's stable C interface: what torch/csrc/stable/tensor.h and
// TORCH_BOX do, without a shared pointer for every argument, which is a tenth of the time of a small layer.
#pragma once
#include <torch/csrc/stable/library.h>

#include <optional>
#include <ostream>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace fxq {

struct Shape {
  const int64_t* sizes;
  int64_t dim;
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (int64_t i = 0; i < shape.dim; ++i) out << (i ? ", " : "") << shape.sizes[i];
  return out << ']';
}

class Tensor {  // owns its handle, a reference to the tensor
 public:
  static constexpr int64_t kMaxDim = 64;

  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&&) = delete;
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  static Tensor empty(Shape shape, int32_t dtype) {  // contiguous, on the CPU
    int64_t strides[kMaxDim], step = 1;
    for (int64_t i = shape.dim - 1; i >= 0; --i) {
      strides[i] = step;
      if (shape.sizes[i] > 1) step *= shape.sizes[i];
    }
    return empty(shape, strides, dtype);
  }

  static Tensor empty(Shape shape, const int64_t* strides, int32_t dtype) {
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.dim, shape.sizes, strides, dtype,
                                                           aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
  static Tensor empty_channels_last(Shape shape, int32_t dtype) {  // [B, C, *spatial], the channels innermost
    int64_t strides[kMaxDim], step = shape.sizes[1];
    for (int64_t i = shape.dim - 1; i >= 2; --i) {
      strides[i] = step;
      step *= shape.sizes[i];
    }
    strides[1] = 1;
    strides[0] = step;
    return empty(shape, strides, dtype);
  }

  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  Shape shape() const { return {get<int64_t*>(aoti_torch_get_sizes), dim()}; }
  const int64_t* strides() const { return get<int64_t*>(aoti_torch_get_strides); }
  bool is_contiguous() const { return get<bool>(aoti_torch_is_contiguous); }
  // [B, C, *spatial] with the channels of every pixel, and the pixels, side by side, and not contiguous as well.
  bool is_channels_last() const {
    const Shape own = shape();
    if (own.dim < 3 || is_contiguous()) return false;
    const int64_t* steps = strides();
    int64_t step = own.sizes[1];
    bool dense = step == 1 || steps[1] == 1;
    for (int64_t i = own.dim - 1; i >= 2; step *= own.sizes[i--]) dense = dense && (own.sizes[i] == 1 || steps[i] == step);
    return dense && (own.sizes[0] == 1 || steps[0] == step);
  }
  // Of the same shape, and channels-last where this one is.
  Tensor empty_like(int32_t dtype) const {
    return is_channels_last() ? empty_channels_last(shape(), dtype) : empty(shape(), dtype);
  }
  template <class T>
  T* data() const {
    return static_cast<T*>(get<void*>(aoti_torch_get_data_ptr));
  }

  Tensor contiguous() const {
    AtenTensorHandle self = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &self));
    StableIValue stack[2] = {torch::stable::detail::from(self),
                             torch::stable::detail::from(torch::headeronly::MemoryFormat::Contiguous)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::contiguous", "", stack, TORCH_ABI_VERSION));
    return Tensor(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
  }

 private:
  template <class T>
  T get(AOTITorchError (*getter)(AtenTensorHandle, T*)) const {
    T value{};
    STABLE_TORCH_ERROR_CODE_CHECK(getter(handle_, &value));
    return value;
  }

  AtenTensorHandle handle_;
};

// The elements of a tensor one after the other: its own, or those of a copy where its strides are others. In the order
// of `Tensor::empty_like` where elements may come channels-last.
class Contiguous {
 public:
  explicit Contiguous(const Tensor& tensor, bool or_channels_last = false) {
    if (!tensor.is_contiguous() && !(or_channels_last && tensor.is_channels_last())) copy_.emplace(tensor.contiguous());
    data_ = (copy_ ? *copy_ : tensor).data<void>();
  }
  template <class T>
  const T* data() const {
    return static_cast<const T*>(data_);
  }

 private:
  std::optional<Tensor> copy_;
  const void* data_;
};

// Whether x lies in rows of adjacent values, each at the same distance `stride` from the one before.
inline bool is_rows(const Tensor& x, int64_t* stride) {
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

// Arguments arrive on a stack of 64-bit values, tensors as handles that now belong to the kernel.
template <class T>
T argument(StableIValue value) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
  } else if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
    return handle ? T(Tensor(*handle)) : T();
  } else if constexpr (std::is_same_v<T, std::vector<Tensor>>) {
    std::vector<Tensor> tensors;
    for (AtenTensorHandle handle : torch::stable::detail::to<std::vector<AtenTensorHandle>>(value))
      tensors.emplace_back(handle);
    return tensors;
  } else {
    return torch::stable::detail::to<T>(value);
  }
}

template <class... Arguments, std::size_t... I>
void call_boxed(Tensor (*function)(Arguments...), StableIValue* stack, std::index_sequence<I...>) {
  const std::tuple<std::decay_t<Arguments>...> arguments{argument<std::decay_t<Arguments>>(stack[I])...};
  stack[0] = torch::stable::detail::from(std::apply(function, arguments).release());
}
template <class... Arguments>
void call_boxed(Tensor (*function)(Arguments...), StableIValue* stack) {
  call_boxed(function, stack, std::index_sequence_for<Arguments...>{});
}

template <class... Arguments, std::size_t... I>
void call_boxed(std::pair<Tensor, Tensor> (*function)(Arguments...), StableIValue* stack, std::index_sequence<I...>) {
  const std::tuple<std::decay_t<Arguments>...> arguments{argument<std::decay_t<Arguments>>(stack[I])...};
  std::pair<Tensor, Tensor> results = std::apply(function, arguments);
  stack[0] = torch::stable::detail::from(results.first.release());
  stack[1] = torch::stable::detail::from(results.second.release());
}
template <class... Arguments>
void call_boxed(std::pair<Tensor, Tensor> (*function)(Arguments...), StableIValue* stack) {
  call_boxed(function, stack, std::index_sequence_for<Arguments...>{});
}

template <class... Arguments, std::size_t... I>
void call_boxed(std::vector<Tensor> (*function)(Arguments...), StableIValue* stack, std::index_sequence<I...>) {
  const std::tuple<std::decay_t<Arguments>...> arguments{argument<std::decay_t<Arguments>>(stack[I])...};
  std::vector<AtenTensorHandle> handles;
  for (Tensor& result : std::apply(function, arguments)) handles.push_back(result.release());
  stack[0] = torch::stable::detail::from(handles);
}
template <class... Arguments>
void call_boxed(std::vector<Tensor> (*function)(Arguments...), StableIValue* stack) {
  call_boxed(function, stack, std::index_sequence_for<Arguments...>{});
}

// `function` in the dispatcher's calling convention.
template <auto function>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  call_boxed(function, stack);
}

}  // namespace fxq

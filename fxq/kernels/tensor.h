// A tensor and an operator's calling convention over torch's stable C interface: what torch/csrc/stable/tensor.h and
// TORCH_BOX do, without a shared pointer for every argument, which is a tenth of the time of a small layer.
#pragma once
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "arena.h"

namespace fxq {

struct Shape {
  const int64_t* sizes;
  int64_t dim;
};

// Owns its handle, a reference to a tensor of torch; or, between the operations of one call, memory of an arena.
class Tensor {
 public:
  static constexpr int64_t kMaxDim = 64;
  static constexpr int64_t kMaxPlanned = 8;  // dimensions of what lies in an arena

  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)), planned_(std::move(other.planned_)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    planned_.swap(other.planned_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  bool is_there() const { return handle_ || planned_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  // On the CPU, in Arena::current() where there is one.
  static Tensor empty(Shape shape, int32_t dtype);  // contiguous
  static Tensor empty(Shape shape, const int64_t* strides, int32_t dtype);
  static Tensor empty_channels_last(Shape shape, int32_t dtype);  // [B, C, *spatial], the channels innermost

  int32_t dtype() const { return planned_ ? planned_->dtype : get<int32_t>(aoti_torch_get_dtype); }
  int64_t dim() const { return planned_ ? planned_->dim : get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return planned_ ? planned_->numel : get<int64_t>(aoti_torch_get_numel); }
  Shape shape() const { return {planned_ ? planned_->sizes : get<int64_t*>(aoti_torch_get_sizes), dim()}; }
  const int64_t* strides() const { return planned_ ? planned_->strides : get<int64_t*>(aoti_torch_get_strides); }
  bool is_contiguous() const;
  // [B, C, *spatial] with the channels of every pixel, and the pixels, side by side, and not contiguous as well.
  bool is_channels_last() const;
  // Of the same shape, and channels-last where this one is.
  Tensor empty_like(int32_t dtype) const;
  Tensor contiguous() const;
  Tensor alias() const;  // the same tensor once more
  template <class T>
  T* data() const {
    return static_cast<T*>(planned_ ? planned_->data : get<void*>(aoti_torch_get_data_ptr));
  }

 private:
  struct Planned {
    Arena* arena;
    void* data;
    int32_t dtype;
    int64_t dim, numel, sizes[kMaxPlanned], strides[kMaxPlanned];
    Planned() = default;
    Planned(Planned&&) = delete;
    ~Planned() { arena->give(data); }
  };

  template <class T>
  T get(AOTITorchError (*getter)(AtenTensorHandle, T*)) const {
    T value{};
    STABLE_TORCH_ERROR_CODE_CHECK(getter(handle_, &value));
    return value;
  }

  AtenTensorHandle handle_;
  std::shared_ptr<Planned> planned_;
};

// The elements of a tensor one after the other: its own, or those of a copy where its strides are others. In the order
// of `Tensor::empty_like` where elements may come channels-last.
class Contiguous {
 public:
  explicit Contiguous(const Tensor& tensor, bool or_channels_last = false);
  template <class T>
  const T* data() const {
    return static_cast<const T*>(data_);
  }

 private:
  std::optional<Tensor> copy_;
  const void* data_;
};

// Whether x lies in rows of adjacent values, each at the same distance `stride` from the one before.
bool is_rows(const Tensor& x, int64_t* stride);

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

// What an operator returns, on the stack.
inline void give(StableIValue* stack, Tensor result) { stack[0] = torch::stable::detail::from(result.release()); }
inline void give(StableIValue* stack, std::pair<Tensor, Tensor> results) {
  give(stack, std::move(results.first));
  give(stack + 1, std::move(results.second));
}
inline void give(StableIValue* stack, std::vector<Tensor> results) {
  std::vector<AtenTensorHandle> handles;
  for (Tensor& result : results) handles.push_back(result.release());
  stack[0] = torch::stable::detail::from(handles);
}

template <class Result, class... Arguments, std::size_t... I>
void call_boxed(Result (*function)(Arguments...), StableIValue* stack, std::index_sequence<I...>) {
  give(stack, function(argument<std::decay_t<Arguments>>(stack[I])...));
}
template <class Result, class... Arguments>
void call_boxed(Result (*function)(Arguments...), StableIValue* stack) {
  call_boxed(function, stack, std::index_sequence_for<Arguments...>{});
}

// `function` in the dispatcher's calling convention.
template <auto function>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  call_boxed(function, stack);
}

}  // namespace fxq

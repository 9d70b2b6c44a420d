// The memory that the attention kernel works in, without torch.
#pragma once
#include "kernels.h"

namespace fxq {

// Memory of this thread, cut into parts that begin at cache lines.
class AttentionMemory {
 public:
  explicit AttentionMemory(const Attention& a) {
    const int64_t span = round_up(a.keys, kPanel), depth = round_up(a.depth, 4);
    for (int pass = 0; pass < 2; ++pass) {
      used_ = 0;
      at_.keys = take<int8_t>(span * depth);
      at_.values = take<int8_t>(round_up(a.width, kPanel) * round_up(a.keys, 4));
      at_.bias = take<int32_t>(span);
      at_.mask = take<float>(a.mask ? kMaxRows * span : 0);
      at_.scores = take<float>(kMaxRows * span);
      at_.queries = take<uint8_t>(kMaxRows * depth);
      at_.weights = take<uint8_t>(kMaxRows * span);
      if (pass == 0) base_ = static_cast<uint8_t*>(scratch(used_, Holder::kPart));
    }
  }
  const AttentionScratch& parts() const { return at_; }

 private:
  static int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }
  template <class T>
  T* take(int64_t count) {
    const int64_t begin = used_;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(base_ + begin);
  }
  uint8_t* base_ = nullptr;
  int64_t used_ = 0;
  AttentionScratch at_;
};

}  // namespace fxq

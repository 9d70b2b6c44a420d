// Memory for values that come and go within one call of many operations. It stays with its thread from call to call, as
// `scratch` does.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace fxq {

class Arena {
 public:
  // Room for `bytes`, aligned to 64, at the lowest place that is free; `give` it back.
  void* take(int64_t bytes);
  void give(const void* data);
  // Before a call: one piece of memory, as much as the last call would have had use for.
  void settle();

  // What results of operations lie in on this thread; null: in tensors of torch.
  static Arena*& current();

 private:
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  struct Held {
    int64_t begin, end;  // lines
    const void* data;
    std::unique_ptr<Line[]> own;  // of what lies beyond the memory that there is
  };
  std::vector<Held> held_;  // by place
  std::unique_ptr<Line[]> memory_;
  int64_t size_ = 0, most_ = 0;
};

}  // namespace fxq

// Memory for the parts of a result that no caller sees.
#include <vector>

#include "kernels.h"

namespace fxq {

void* scratch(int64_t bytes) {
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  static thread_local std::vector<Line> memory;
  if (int64_t(memory.size()) * 64 < bytes) memory.resize(ceil_div(bytes, 64));
  return memory.data();
}

}  // namespace fxq

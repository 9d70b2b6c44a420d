// Memory for the parts of a result that no caller sees.
#include <vector>

#include "kernels.h"

namespace fxq {

void* scratch(int64_t bytes, Holder holder) {
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  static thread_local std::vector<Line> memory[4];
  std::vector<Line>& own = memory[int(holder)];
  if (int64_t(own.size()) * 64 < bytes) own.resize(ceil_div(bytes, 64));
  return own.data();
}

}  // namespace fxq

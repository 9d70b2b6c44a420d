// Any processor: vectors of four lanes, which the compiler maps to SSE2, NEON or scalars.
#include <cstring>

#include "kernels.h"

namespace fxq::generic {

constexpr int W = 4;
constexpr int kRows = 4, kColumns = 1;

typedef int8_t Weights __attribute__((vector_size(16)));
typedef int32_t Input __attribute__((vector_size(16)));

// On Arm with the dot product extension this is the place for vusdotq_s32 (i8mm), or vdotq_s32 on x - 128 with
// 128 * sum(w) added to the accumulator: Input, input, Weights, weights and dot are all that changes.
static inline Input input(uint32_t group) { return int32_t(group) - Input{}; }
static inline Weights weights(const int8_t* p) {
  Weights w;
  memcpy(&w, p, sizeof w);
  return w;
}
static inline Input dot(Input acc, Input a, Weights b) {
  const Input w = (Input)b;
  acc += (a & 255) * (w << 24 >> 24);
  acc += (a >> 8 & 255) * (w << 16 >> 24);
  acc += (a >> 16 & 255) * (w << 8 >> 24);
  return acc + (a >> 24 & 255) * (w >> 24);
}

constexpr int64_t kChunk = INT64_MAX;
template <int R>
struct Rows {  // read in place
  const uint8_t* x;
  int64_t stride;
  Rows(const uint8_t* x, int64_t stride, int64_t) : x(x), stride(stride) {}
  Input input(int r, int64_t i) const {
    uint32_t group;
    memcpy(&group, x + r * stride + 4 * i, sizeof group);
    return generic::input(group);
  }
};
typedef uint8_t Bytes __attribute__((vector_size(4)));
static inline Bytes narrow(Input v) { return __builtin_convertvector(v, Bytes); }

#include "body.h"

extern const Kernels kernels;
const Kernels kernels = {"generic", quantize, dequantize, requantize, add, gemm};

}  // namespace fxq::generic

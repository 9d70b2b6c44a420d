// AVX-512 VNNI: vpdpbusd multiplies four uint8 by four int8 and adds them to an int32, in every lane, without saturation.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

FXQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
namespace fxq::avx512_vnni {

constexpr int W = 16;
constexpr int kRows = 6, kColumns = 4;  // 24 accumulators, 4 weights, 1 input: 29 of 32 registers

typedef int32_t Acc __attribute__((vector_size(64)));
using Input = __m512i;
using Weights = __m512i;

static inline Input input(uint32_t group) { return _mm512_set1_epi32(int32_t(group)); }
static inline Weights weights(const int8_t* p) {
  Weights w = _mm512_loadu_si512(p);
  asm("" : "+v"(w));  // keeps it in its register, where g++ would rather load it again for every row
  return w;
}
// Not the intrinsic: with it g++ 12 keeps the 24 accumulators on the stack, at 40 % of the speed.
static inline Acc dot(Acc acc, Input a, Weights b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
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
    return avx512_vnni::input(group);
  }
};

typedef uint8_t Bytes __attribute__((vector_size(16)));
static inline Bytes narrow(Acc v) { return __builtin_convertvector(v, Bytes); }

#include "body.h"

extern const Kernels kernels;
const Kernels kernels = {"avx512_vnni", quantize, dequantize, requantize, add, gemm};

}  // namespace fxq::avx512_vnni
FXQ_TARGET_END
#endif

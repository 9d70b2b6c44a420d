// AVX-512 without VNNI (Skylake-X): vectors of sixteen lanes; exact products by widening to int16, as in AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

FXQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq")
namespace fxq::avx512 {

constexpr int W = 16;
constexpr int kRows = 4, kColumns = 4;

struct Input {
  __m512i even, odd;
};
using Weights = Input;

static inline Input input(uint32_t group) {
  const __m512i x = _mm512_set1_epi32(int32_t(group));
  return {_mm512_and_si512(x, _mm512_set1_epi16(255)), _mm512_srli_epi16(x, 8)};
}
static inline Weights weights(const int8_t* p) {
  const __m512i w = _mm512_loadu_si512(p);
  return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
}
typedef int32_t Acc __attribute__((vector_size(64)));
static inline Acc dot(Acc acc, Input a, Weights b) {
  acc += (Acc)_mm512_madd_epi16(a.even, b.even);
  return acc + (Acc)_mm512_madd_epi16(a.odd, b.odd);
}
constexpr int64_t kChunk = 256;
template <int R>
struct Rows {  // widened once for all the channels of a tile, which would do it again otherwise
  struct Pairs {
    uint32_t even, odd;
  };
  Pairs pairs[R][kChunk];

  Rows(const uint8_t* x, int64_t stride, int64_t count) {
    for (int r = 0; r < R; ++r, x += stride) {
      for (int64_t i = 0; i < count; ++i) {
        uint32_t group;
        memcpy(&group, x + 4 * i, sizeof group);
        pairs[r][i] = {group & 0x00FF00FF, group >> 8 & 0x00FF00FF};
      }
    }
  }
  Input input(int r, int64_t i) const {
    return {_mm512_set1_epi32(int32_t(pairs[r][i].even)), _mm512_set1_epi32(int32_t(pairs[r][i].odd))};
  }
};

typedef uint8_t Bytes __attribute__((vector_size(16)));
static inline Bytes narrow(Acc v) { return __builtin_convertvector(v, Bytes); }

#include "body.h"

extern const Kernels kernels;
const Kernels kernels = {"avx512", quantize, dequantize, requantize, add, gemm};

}  // namespace fxq::avx512
FXQ_TARGET_END
#endif

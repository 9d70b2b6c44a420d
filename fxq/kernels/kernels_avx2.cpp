// AVX2: vectors of eight lanes; exact products by widening to int16 (vpmaddubsw would saturate).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

FXQ_TARGET("avx2")
namespace fxq::avx2 {

constexpr int W = 8;
constexpr int kRows = 4, kColumns = 2;

// Four bytes as two pairs of int16, (k0, k2) and (k1, k3): what vpmaddwd multiplies and adds, without saturation.
struct Input {
  __m256i even, odd;
};
using Weights = Input;

static inline Input input(uint32_t group) {
  const __m256i x = _mm256_set1_epi32(int32_t(group));
  return {_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16(x, 8)};
}
static inline Weights weights(const int8_t* p) {
  __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  asm("" : "+x"(w));  // loaded once
  return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
}
typedef int32_t Acc __attribute__((vector_size(32)));
static inline Acc dot(Acc acc, Input a, Weights b) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0\n\tvpmaddwd %5, %4, %1\n\tvpaddd %1, %0, %0"
      : "+x"(acc), "=&x"(product)
      : "x"(a.even), "x"(b.even), "x"(a.odd), "x"(b.odd));
  return acc;
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
    return {_mm256_set1_epi32(int32_t(pairs[r][i].even)), _mm256_set1_epi32(int32_t(pairs[r][i].odd))};
  }
};

typedef uint8_t Bytes __attribute__((vector_size(8)));
static inline Bytes narrow(Acc v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(words, words));
}

#include "body.h"

extern const Kernels kernels;
const Kernels kernels = {"avx2", quantize, dequantize, requantize, add, gemm};

}  // namespace fxq::avx2
FXQ_TARGET_END
#endif

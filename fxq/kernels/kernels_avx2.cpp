// AVX2: exact products by widening to int16 (vpmaddubsw would saturate).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "conv.h"

FXQ_TARGET("avx2,fma,f16c")
namespace fxq::avx2 {

constexpr const char* kIsa = "avx2";
// 8 accumulators, 4 halves of weights, 2 of input, 1 product: 15 of 16 registers
constexpr int kRows = 4, kTallRows = kRows;

#include "ymm.h"

// Four bytes as two pairs of int16, (k0, k2) and (k1, k3): what vpmaddwd multiplies and adds, without saturation.
struct Pairs {
  __m256i even, odd;
};
using Input = Pairs;
using Weights = Pairs;

#define WIDEN_ROWS
static inline Input input(uint32_t even, uint32_t odd) {
  return {_mm256_set1_epi32(int32_t(even)), _mm256_set1_epi32(int32_t(odd))};
}

static inline Input input(uint32_t group) { return input(group & 0x00FF00FF, group >> 8 & 0x00FF00FF); }

static inline Input input_lanes(I groups) {
  return {(__m256i)(groups & 0x00FF00FF), (__m256i)(groups >> 8 & 0x00FF00FF)};
}

static inline Weights weights(const int8_t* p) {
  __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  asm("" : "+x"(w));  // keeps it in its register, where g++ would rather load it twice
  return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
}

// Not the intrinsics: with them g++ 12 orders the products so that an accumulator ends up on the stack.
static inline I dot(I acc, Input a, Weights b) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0\n\tvpmaddwd %5, %4, %1\n\tvpaddd %1, %0, %0"
      : "+x"(acc), "=&x"(product)
      : "x"(a.even), "x"(b.even), "x"(a.odd), "x"(b.odd));
  return acc;
}

static inline I dot_pairs(I acc, I a, I b) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(a), "x"(b));
  return acc;
}

#include "products.h"

}  // namespace fxq::avx2
FXQ_TARGET_END
#endif

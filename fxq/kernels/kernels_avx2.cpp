// AVX2: vectors of eight lanes; exact products by widening to int16 (vpmaddubsw would saturate).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "conv.h"

FXQ_TARGET("avx2,fma")
namespace fxq::avx2 {

constexpr const char* kIsa = "avx2";
constexpr int W = 8;
constexpr int kRows = 4, kColumns = 2;  // 8 accumulators, 4 halves of weights, 2 of input, 1 product: 15 of 16
using I = Vectors<W>::I;
using B = Vectors<W>::B;
using Bytes = Vectors<4 * W>::B;
using L = Vectors<W>::L;
using F = Vectors<W>::F;

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

static inline I spread(const uint8_t* p, I index) {
  const __m256i groups = _mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return (I)_mm256_permutevar8x32_epi32(groups, (__m256i)index);
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

static inline I pair_weights(const int32_t* p) {
  I w = (I)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  asm("" : "+x"(w));
  return w;
}

static inline I dot_pairs(I acc, I a, I b) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(a), "x"(b));
  return acc;
}

static inline F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

static inline L multiply_even(I a, I b) { return (L)_mm256_mul_epi32((__m256i)a, (__m256i)b); }

static inline I widen(B v) {
  int64_t bytes;
  memcpy(&bytes, &v, sizeof bytes);
  return (I)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
}

static inline B narrow(I v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  return (B)_mm_cvtsi128_si64(_mm_packus_epi16(words, words));
}

#include "bytes_avx2.h"

#include "body.h"

}  // namespace fxq::avx2
FXQ_TARGET_END
#endif

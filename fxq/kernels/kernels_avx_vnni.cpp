// AVX-VNNI (Alder Lake and later without AVX-512): vpdpbusd on vectors of eight lanes, in the VEX encoding.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "conv.h"

FXQ_TARGET("avx2,fma")
namespace fxq::avx_vnni {

constexpr const char* kIsa = "avx_vnni";
constexpr int W = 8;
constexpr int kRows = 6, kColumns = 2;  // 12 accumulators, 2 weights, 1 input: 15 of 16 registers
using I = Vectors<W>::I;
using B = Vectors<W>::B;
using Bytes = Vectors<4 * W>::B;
using L = Vectors<W>::L;
using F = Vectors<W>::F;
using Input = __m256i;
using Weights = __m256i;

static inline Input input(uint32_t group) { return _mm256_set1_epi32(int32_t(group)); }

static inline Input input_lanes(I groups) { return (Input)groups; }

static inline I spread(const uint8_t* p, I index) {
  const __m256i groups = _mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return (I)_mm256_permutevar8x32_epi32(groups, (__m256i)index);
}

static inline Weights weights(const int8_t* p) {
  Weights w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  asm("" : "+x"(w));  // keeps it in its register, where g++ would rather load it again for every row
  return w;
}

static inline I dot(I acc, Input a, Weights b) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
  return acc;
}

static inline I pair_weights(const int32_t* p) {
  I w = (I)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  asm("" : "+x"(w));
  return w;
}

static inline I dot_pairs(I acc, I a, I b) {
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
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

}  // namespace fxq::avx_vnni
FXQ_TARGET_END
#endif

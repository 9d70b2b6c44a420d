// AVX2: vectors of eight lanes; exact products by widening to int16 (vpmaddubsw would saturate), or by AVX-VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "conv.h"

FXQ_TARGET("avx2,fma,f16c")
namespace fxq::ymm {

constexpr int W = 8, kColumns = 2;
using I = Vectors<W>::I;
using B = Vectors<W>::B;
using S = Vectors<W>::S;
using Bytes = Vectors<4 * W>::B;
using L = Vectors<W>::L;
using F = Vectors<W>::F;

static inline I spread(const uint8_t* p, I index) {
  const __m256i groups = _mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return (I)_mm256_permutevar8x32_epi32(groups, (__m256i)index);
}

static inline I pair_weights(const int32_t* p) {
  I w = (I)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  asm("" : "+x"(w));
  return w;
}

static inline F maximum(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }

static inline F minimum(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }

static inline F pick(const float* table, I index) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
  return (F)_mm256_blendv_ps(low, high, (__m256)(index << 28));
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

static inline __m128i load_half(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

template <int kPieces>
static inline Bytes pieces(const uint8_t* const* p, int64_t offset) {
  if constexpr (kPieces == 1) {
    return (Bytes)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p[0] + offset));
  } else {
    const __m256i v = _mm256_castsi128_si256(load_half(p[0] + offset));
    return (Bytes)_mm256_inserti128_si256(v, load_half(p[1] + offset), 1);
  }
}

template <int kPieces>
static inline void store_pieces(uint8_t* const* p, Bytes bytes) {
  const __m256i v = (__m256i)bytes;
  if constexpr (kPieces == 1) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p[0]), v);
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p[0]), _mm256_castsi256_si128(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p[1]), _mm256_extracti128_si256(v, 1));
  }
}

static inline void interleave(Bytes a, Bytes b, Bytes c, Bytes d, I (&lanes)[4]) {
  const __m256i low_ab = _mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
  const __m256i high_ab = _mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
  const __m256i low_cd = _mm256_unpacklo_epi8((__m256i)c, (__m256i)d);
  const __m256i high_cd = _mm256_unpackhi_epi8((__m256i)c, (__m256i)d);
  lanes[0] = (I)_mm256_unpacklo_epi16(low_ab, low_cd);
  lanes[1] = (I)_mm256_unpackhi_epi16(low_ab, low_cd);
  lanes[2] = (I)_mm256_unpacklo_epi16(high_ab, high_cd);
  lanes[3] = (I)_mm256_unpackhi_epi16(high_ab, high_cd);
}

static inline Bytes deinterleave(const I (&lanes)[4]) {
  const __m256i low = _mm256_packus_epi32((__m256i)lanes[0], (__m256i)lanes[1]);
  return (Bytes)_mm256_packus_epi16(low, _mm256_packus_epi32((__m256i)lanes[2], (__m256i)lanes[3]));
}

static inline Bytes narrow_four(I a, I b, I c, I d) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return (Bytes)_mm256_permutevar8x32_epi32((__m256i)deinterleave({a, b, c, d}), order);
}

#define CONVERTS_HALVES
static inline F of_half(S half) { return (F)_mm256_cvtph_ps((__m128i)half); }
static inline S to_half(F v) { return (S)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }

#include "body.h"

}  // namespace fxq::ymm

namespace fxq::avx2 {

using namespace ymm;
constexpr const char* kIsa = "avx2";
constexpr int kRows = 4;  // 8 accumulators, 4 halves of weights, 2 of input, 1 product: 15 of 16 registers

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

// AVX-VNNI (Alder Lake and later without AVX-512): vpdpbusd in the VEX encoding.
namespace fxq::avx_vnni {

using namespace ymm;
constexpr const char* kIsa = "avx_vnni";
constexpr int kRows = 6;  // 12 accumulators, 2 weights, 1 input: 15 of 16 registers
using Input = __m256i;
using Weights = __m256i;

static inline Input input(uint32_t group) { return _mm256_set1_epi32(int32_t(group)); }

static inline Input input_lanes(I groups) { return (Input)groups; }

static inline Weights weights(const int8_t* p) {
  Weights w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  asm("" : "+x"(w));  // keeps it in its register, where g++ would rather load it again for every row
  return w;
}

static inline I dot(I acc, Input a, Weights b) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
  return acc;
}

static inline I dot_pairs(I acc, I a, I b) {
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
  return acc;
}

#include "products.h"

}  // namespace fxq::avx_vnni
FXQ_TARGET_END
#endif

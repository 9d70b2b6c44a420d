// Vectors of eight lanes, for kernels_avx2.cpp and kernels_avx_vnni.cpp, each of which includes this in its namespace, and
// body.h with it.

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

// What packing within each 128 bits leaves, in the order of the vectors that were packed.
static inline Bytes in_order(__m256i packed) {
  return (Bytes)_mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

static inline Bytes narrow_four(I a, I b, I c, I d) { return in_order((__m256i)deinterleave({a, b, c, d})); }

// vcvtps2dq turns NaN, and what is too large for an int32, into the least one: hence the minimum before, which keeps NaN.
#define SATURATES
static inline __m256i saturated_pair(F a, F b, I z) {
  const F most = 65536.0f - F{};
  const __m256i low = _mm256_cvtps_epi32((__m256)minimum(most, a)), high = _mm256_cvtps_epi32((__m256)minimum(most, b));
  return _mm256_adds_epi16(_mm256_packs_epi32(low, high), (__m256i)z);
}
static inline Bytes saturated(F a, F b, F c, F d, I z) {
  return in_order(_mm256_packus_epi16(saturated_pair(a, b, z), saturated_pair(c, d, z)));
}

#define CONVERTS_HALVES
static inline F of_half(S half) { return (F)_mm256_cvtph_ps((__m128i)half); }
static inline S to_half(F v) { return (S)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }

#include "body.h"

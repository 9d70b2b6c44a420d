// Vectors of sixteen lanes, for the kernels_avx512*.cpp, each of which includes this in its namespace, and body.h with it.

constexpr int W = 16, kColumns = 4;
using I = Vectors<W>::I;
using B = Vectors<W>::B;
using S = Vectors<W>::S;
using Bytes = Vectors<4 * W>::B;
using L = Vectors<W>::L;
using F = Vectors<W>::F;

static inline I spread(const uint8_t* p, I index) {
  const __m512i groups = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (I)_mm512_permutexvar_epi32((__m512i)index, groups);
}

static inline I pair_weights(const int32_t* p) {
  I w = (I)_mm512_loadu_si512(p);
  asm("" : "+v"(w));
  return w;
}

static inline F maximum(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }

static inline F minimum(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }

static inline F pick(const float* table, I index) {
  return (F)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
}

static inline F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

static inline L multiply_even(I a, I b) { return (L)_mm512_mul_epi32((__m512i)a, (__m512i)b); }

static inline I widen(B v) { return (I)_mm512_cvtepu8_epi32((__m128i)v); }

static inline B narrow(I v) { return __builtin_convertvector(v, B); }

#define MASKED
static inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1); }

template <class V>
static inline V load_masked(const void* p, int64_t count) {
  if constexpr (sizeof(V) == 16) return (V)_mm_maskz_loadu_epi8(first_lanes(count), p);
  if constexpr (sizeof(V) == 32) return (V)_mm256_maskz_loadu_epi16(first_lanes(count), p);
  if constexpr (sizeof(V) == 64) return (V)_mm512_maskz_loadu_epi32(first_lanes(count), p);
}

template <class V>
static inline void store_masked(void* p, V v, int64_t count) {
  if constexpr (sizeof(V) == 16) _mm_mask_storeu_epi8(p, first_lanes(count), (__m128i)v);
  if constexpr (sizeof(V) == 32) _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)v);
  if constexpr (sizeof(V) == 64) _mm512_mask_storeu_epi32(p, first_lanes(count), (__m512i)v);
}

static inline __m256i load_half(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline __m128i load_quarter(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

template <int kPieces>
static inline Bytes pieces(const uint8_t* const* p, int64_t offset) {
  if constexpr (kPieces == 1) {
    return (Bytes)_mm512_loadu_si512(p[0] + offset);
  } else if constexpr (kPieces == 2) {
    const __m512i v = _mm512_castsi256_si512(load_half(p[0] + offset));
    return (Bytes)_mm512_inserti64x4(v, load_half(p[1] + offset), 1);
  } else {
    __m512i v = _mm512_castsi128_si512(load_quarter(p[0] + offset));
    v = _mm512_inserti32x4(v, load_quarter(p[1] + offset), 1);
    v = _mm512_inserti32x4(v, load_quarter(p[2] + offset), 2);
    return (Bytes)_mm512_inserti32x4(v, load_quarter(p[3] + offset), 3);
  }
}

template <int kPieces>
static inline void store_pieces(uint8_t* const* p, Bytes bytes) {
  const __m512i v = (__m512i)bytes;
  if constexpr (kPieces == 1) {
    _mm512_storeu_si512(p[0], v);
  } else if constexpr (kPieces == 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p[0]), _mm512_castsi512_si256(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p[1]), _mm512_extracti64x4_epi64(v, 1));
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p[0]), _mm512_castsi512_si128(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p[1]), _mm512_extracti32x4_epi32(v, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p[2]), _mm512_extracti32x4_epi32(v, 2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p[3]), _mm512_extracti32x4_epi32(v, 3));
  }
}

static inline void interleave(Bytes a, Bytes b, Bytes c, Bytes d, I (&lanes)[4]) {
  const __m512i low_ab = _mm512_unpacklo_epi8((__m512i)a, (__m512i)b);
  const __m512i high_ab = _mm512_unpackhi_epi8((__m512i)a, (__m512i)b);
  const __m512i low_cd = _mm512_unpacklo_epi8((__m512i)c, (__m512i)d);
  const __m512i high_cd = _mm512_unpackhi_epi8((__m512i)c, (__m512i)d);
  lanes[0] = (I)_mm512_unpacklo_epi16(low_ab, low_cd);
  lanes[1] = (I)_mm512_unpackhi_epi16(low_ab, low_cd);
  lanes[2] = (I)_mm512_unpacklo_epi16(high_ab, high_cd);
  lanes[3] = (I)_mm512_unpackhi_epi16(high_ab, high_cd);
}

static inline Bytes deinterleave(const I (&lanes)[4]) {
  const __m512i low = _mm512_packus_epi32((__m512i)lanes[0], (__m512i)lanes[1]);
  return (Bytes)_mm512_packus_epi16(low, _mm512_packus_epi32((__m512i)lanes[2], (__m512i)lanes[3]));
}

// What packing within each 128 bits leaves, in the order of the vectors that were packed.
static inline Bytes in_order(__m512i packed) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (Bytes)_mm512_permutexvar_epi32(order, packed);
}

static inline Bytes narrow_four(I a, I b, I c, I d) { return in_order((__m512i)deinterleave({a, b, c, d})); }

// vcvtps2dq turns NaN, and what is too large for an int32, into the least one: hence the minimum before, which keeps NaN.
#define SATURATES
static inline __m512i saturated_pair(F a, F b, I z) {
  const F most = 65536.0f - F{};
  const __m512i low = _mm512_cvtps_epi32((__m512)minimum(most, a)), high = _mm512_cvtps_epi32((__m512)minimum(most, b));
  return _mm512_adds_epi16(_mm512_packs_epi32(low, high), (__m512i)z);
}
static inline Bytes saturated(F a, F b, F c, F d, I z) {
  return in_order(_mm512_packus_epi16(saturated_pair(a, b, z), saturated_pair(c, d, z)));
}

// Byte by byte into the mantissa of 2**23 (its sign turned, so that it counts from -128), which is taken off again:
// exact, in two steps, one of which the unit for shuffles does.
#define WIDENS_BYTES
static inline Vectors<W>::F widened(I group, int j) {
  const __m512i magic = _mm512_set1_epi32(0x4B000000), turned = (__m512i)(group ^ int32_t(0x80808080));
  const __m512i from = _mm512_add_epi32(_mm512_set4_epi32(12, 8, 4, 0), _mm512_set1_epi32(j));
  const __m512i byte = _mm512_mask_shuffle_epi8(magic, 0x1111111111111111, turned, from);
  return (Vectors<W>::F)byte - 8388736.0f;  // 2**23 + 128
}

#define CONVERTS_HALVES
static inline F of_half(S half) { return (F)_mm512_cvtph_ps((__m256i)half); }
static inline S to_half(F v) { return (S)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }

#define PERMUTES_BYTES
#include "body.h"

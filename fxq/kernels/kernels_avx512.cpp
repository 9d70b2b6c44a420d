// AVX-512 without VNNI (Skylake-X): exact products by widening to int16.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "conv.h"

FXQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq")
namespace fxq::avx512 {

constexpr const char* kIsa = "avx512";
constexpr int kRows = 4, kTallRows = kRows;  // 16 accumulators, 8 halves of weights, 2 of input: 26 of 32 registers

#include "zmm.h"

struct Pairs {  // of int16: (k0, k2) and (k1, k3)
  __m512i even, odd;
};
using Input = Pairs;
using Weights = Pairs;

#define WIDEN_ROWS
static inline Input input(uint32_t even, uint32_t odd) {
  return {_mm512_set1_epi32(int32_t(even)), _mm512_set1_epi32(int32_t(odd))};
}

static inline Input input(uint32_t group) { return input(group & 0x00FF00FF, group >> 8 & 0x00FF00FF); }

static inline Input input_lanes(I groups) {
  return {(__m512i)(groups & 0x00FF00FF), (__m512i)(groups >> 8 & 0x00FF00FF)};
}

static inline Weights weights(const int8_t* p) {
  const __m512i w = _mm512_loadu_si512(p);
  return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
}

static inline I dot(I acc, Input a, Weights b) {
  acc += (I)_mm512_madd_epi16(a.even, b.even);
  return acc + (I)_mm512_madd_epi16(a.odd, b.odd);
}

static inline I dot_pairs(I acc, I a, I b) {
  return (I)_mm512_add_epi32((__m512i)acc, _mm512_madd_epi16((__m512i)a, (__m512i)b));
}

#include "products.h"

}  // namespace fxq::avx512
FXQ_TARGET_END
#endif

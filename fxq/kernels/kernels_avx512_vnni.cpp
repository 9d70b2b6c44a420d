// AVX-512 VNNI: in every lane, vpdpbusd adds four products of uint8 and int8 to an int32, without saturation.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "conv.h"

FXQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
namespace fxq::avx512_vnni {

constexpr const char* kIsa = "avx512_vnni";
constexpr int W = 16;
constexpr int kRows = 6, kColumns = 4;  // 24 accumulators, 4 weights, 1 input: 29 of 32 registers
using I = Vectors<W>::I;
using B = Vectors<W>::B;
using Bytes = Vectors<4 * W>::B;
using L = Vectors<W>::L;
using F = Vectors<W>::F;
using Input = __m512i;
using Weights = __m512i;

static inline Input input(uint32_t group) { return _mm512_set1_epi32(int32_t(group)); }

static inline Input input_lanes(I groups) { return (Input)groups; }

static inline I spread(const uint8_t* p, I index) {
  const __m512i groups = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (I)_mm512_permutexvar_epi32((__m512i)index, groups);
}

static inline Weights weights(const int8_t* p) {
  Weights w = _mm512_loadu_si512(p);
  asm("" : "+v"(w));  // keeps it in its register, where g++ would rather load it again for every row
  return w;
}

// Not the intrinsic: with it g++ 12 keeps the 24 accumulators on the stack, at 40 % of the speed.
static inline I dot(I acc, Input a, Weights b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

static inline I pair_weights(const int32_t* p) {
  I w = (I)_mm512_loadu_si512(p);
  asm("" : "+v"(w));
  return w;
}

static inline I dot_pairs(I acc, I a, I b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

static inline F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

static inline L multiply_even(I a, I b) { return (L)_mm512_mul_epi32((__m512i)a, (__m512i)b); }

static inline I widen(B v) { return (I)_mm512_cvtepu8_epi32((__m128i)v); }

static inline B narrow(I v) { return __builtin_convertvector(v, B); }

#include "bytes_avx512.h"

#define PERMUTES_BYTES
#include "body.h"
#include "weight_only_bf16.h"

}  // namespace fxq::avx512_vnni
FXQ_TARGET_END
#endif

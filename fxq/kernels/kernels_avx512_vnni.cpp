// AVX-512 VNNI: in every lane, vpdpbusd adds four products of uint8 and int8 to an int32, without saturation.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "conv.h"

FXQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
namespace fxq::avx512_vnni {

constexpr const char* kIsa = "avx512_vnni";
constexpr int kRows = 6;  // 24 accumulators, 4 weights, 1 input: 29 of 32 registers

#define MULTIPLIES_BRAINS
#include "zmm.h"
#include "weight_only_bf16.h"

using Input = __m512i;
using Weights = __m512i;

static inline Input input(uint32_t group) { return _mm512_set1_epi32(int32_t(group)); }

static inline Input input_lanes(I groups) { return (Input)groups; }

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

static inline I dot_pairs(I acc, I a, I b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

#include "products.h"

}  // namespace fxq::avx512_vnni
FXQ_TARGET_END
#endif

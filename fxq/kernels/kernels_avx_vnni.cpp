// AVX-VNNI (Alder Lake and later without AVX-512): vpdpbusd in the VEX encoding.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "conv.h"

FXQ_TARGET("avx2,fma,f16c")
namespace fxq::avx_vnni {

constexpr const char* kIsa = "avx_vnni";
constexpr int kRows = 6;  // 12 accumulators, 2 weights, 1 input: 15 of 16 registers

#include "ymm.h"

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

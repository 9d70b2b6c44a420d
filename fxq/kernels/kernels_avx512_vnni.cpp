// AVX-512 VNNI: in every lane, vpdpbusd adds four products of uint8 and int8 to an int32, without saturation.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "conv.h"

FXQ_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
namespace fxq::avx512_vnni {

constexpr const char* kIsa = "avx512_vnni";
constexpr int kRows = 6;  // 24 accumulators, 4 weights, 1 input: 29 of 32 registers
constexpr int kTallRows = 8;  // 24 accumulators, 3 weights, 1 input: 28

#define MULTIPLIES_BRAINS
#include "zmm.h"
#include "weight_only_bf16.h"

#define VEX ""
#include "vnni.h"
#include "products.h"

}  // namespace fxq::avx512_vnni
FXQ_TARGET_END
#endif

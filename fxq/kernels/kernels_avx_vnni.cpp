// AVX-VNNI (Alder Lake and later without AVX-512): vpdpbusd in the VEX encoding.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "conv.h"

FXQ_TARGET("avx2,fma,f16c")
namespace fxq::avx_vnni {

constexpr const char* kIsa = "avx_vnni";
constexpr int kRows = 6, kTallRows = kRows;  // 12 accumulators, 2 weights, 1 input: 15 of 16 registers

#include "ymm.h"

#define VEX "%{vex%} "
#include "vnni.h"
#include "products.h"

}  // namespace fxq::avx_vnni
FXQ_TARGET_END
#endif

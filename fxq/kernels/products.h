// The kernels that are products of uint8 and int8, written once as body.h. Each kernels_<isa>.cpp includes this behind
// body.h, in the same namespace, after defining
//   kRows                    the register tile in rows, at most kMaxRows
//   kTallRows                that of a tile of three vectors of channels; kRows where there is none
//   Weights, weights(p)      4 * W int8: four k of W channels
//   Input, input(uint32_t)   four uint8 of one row, for all lanes
//   input_lanes(I)           the same, other four in every lane
//   spread(p, I index)       int32 at p + 4 * index[lane] in each lane; reads W bytes
//   dot(acc, Input, Weights) acc[lane] += the four products, exact
//   pair_weights(p)          2 * W int16, in a register
//   dot_pairs(acc, I, I)     acc[lane] += both products of int16, modulo 2**32
//   WIDEN_ROWS               (optional) dot works on pairs of int16, and there is an input(even, odd) that takes them
//   MULTIPLIES_BRAINS        (optional) there is a brain_gemm, see weight_only_bf16.h
//   kIsa                     its name

#include "gemm.h"
#include "depthwise.h"
#include "lanes.h"
#include "winograd.h"
#include "attention.h"
#include "dynamic.h"

#ifndef MULTIPLIES_BRAINS
constexpr decltype(Kernels::brain_gemm) brain_gemm = nullptr;
#endif

extern const Kernels kernels;
const Kernels kernels = {kIsa, quantize, quantize_scaled, dequantize, requantize, add, requantize_fixed,
                         add_fixed, multiply_fixed, norm, gemm, attention, depthwise, lanes, largest_sum,
                         winograd, max_of, mean_of, mean_of_fixed, mix_of, mix_of_fixed,
                         interleave_four, multiply, gemm_dynamic, widen_reals, pair_brains, float_gemm,
                         brain_gemm, embed, lookup};

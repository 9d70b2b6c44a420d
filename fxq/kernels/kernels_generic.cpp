// Any processor: vectors of four lanes, which the compiler maps to SSE2, NEON or scalars.
#include <cstring>

#include "conv.h"

namespace fxq::generic {

constexpr const char* kIsa = "generic";
constexpr int W = 4, kColumns = 1, kRows = 4, kTallRows = kRows;
using I = Vectors<W>::I;
using B = Vectors<W>::B;
using S = Vectors<W>::S;
using Bytes = Vectors<4 * W>::B;
using L = Vectors<W>::L;
using F = Vectors<W>::F;
using H = Vectors<W>::H;

// Four bytes as two pairs of int16, (k0, k2) and (k1, k3): a product of uint8 and int8 fits int16.
struct Pairs {
  H even, odd;
};
using Input = Pairs;
using Weights = Pairs;

// On Arm with the dot product extension this is the place for vusdotq_s32 (i8mm), or for vdotq_s32 on x - 128 with
// 128 * sum(w) added to the accumulator: Input, Weights and dot are all that changes, and WIDEN_ROWS goes.
#define WIDEN_ROWS
static inline Input input(uint32_t even, uint32_t odd) { return {(H)(int32_t(even) - I{}), (H)(int32_t(odd) - I{})}; }

static inline Input input(uint32_t group) { return input(group & 0x00FF00FF, group >> 8 & 0x00FF00FF); }

static inline Input input_lanes(I groups) { return {(H)(groups & 0x00FF00FF), (H)(groups >> 8 & 0x00FF00FF)}; }

static inline I spread(const uint8_t* p, I index) {
  I groups;
  for (int lane = 0; lane < W; ++lane) {
    int32_t group;
    memcpy(&group, p + 4 * index[lane], sizeof group);
    groups[lane] = group;
  }
  return groups;
}

static inline Weights weights(const int8_t* p) {
  H w;
  memcpy(&w, p, sizeof w);
  return {w << 8 >> 8, w >> 8};
}

static inline I sum(H products) { return ((I)products << 16 >> 16) + ((I)products >> 16); }

static inline I dot(I acc, Input a, Weights b) { return acc + sum(a.even * b.even) + sum(a.odd * b.odd); }

static inline I pair_weights(const int32_t* p) {
  I w;
  memcpy(&w, p, sizeof w);
  return w;
}

static inline I dot_pairs(I acc, I a, I b) {
  using M = Vectors<W>::M;
  return (I)((M)acc + (M)((a << 16 >> 16) * (b << 16 >> 16)) + (M)((a >> 16) * (b >> 16)));
}

static inline F maximum(F a, F b) { return a > b ? a : b; }

static inline F minimum(F a, F b) { return a < b ? a : b; }

static inline F pick(const float* table, I index) {
  F picked;
  for (int lane = 0; lane < W; ++lane) picked[lane] = table[index[lane] & 15];
  return picked;
}

#ifdef __FP_FAST_FMAF
inline
#else  // calls of the math library; in line, they would make of every tile mostly calls
[[gnu::noinline]]
#endif
static F fused(F a, F b, F c) {
  for (int lane = 0; lane < W; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
}

static inline L multiply_even(I a, I b) { return ((L)a << 32 >> 32) * ((L)b << 32 >> 32); }

static inline I widen(B v) { return __builtin_convertvector(v, I); }

static inline B narrow(I v) { return __builtin_convertvector(v, B); }

template <int kPieces>
static inline Bytes pieces(const uint8_t* const* p, int64_t offset) {
  static_assert(kPieces == 1);
  Bytes bytes;
  memcpy(&bytes, p[0] + offset, sizeof bytes);
  return bytes;
}

template <int kPieces>
static inline void store_pieces(uint8_t* const* p, Bytes bytes) {
  memcpy(p[0], &bytes, sizeof bytes);
}

static inline void interleave(Bytes a, Bytes b, Bytes c, Bytes d, I (&lanes)[4]) {
  for (int i = 0; i < 4 * W; ++i) lanes[i / W][i % W] = a[i] | b[i] << 8 | c[i] << 16 | int32_t(uint32_t(d[i]) << 24);
}

static inline Bytes deinterleave(const I (&lanes)[4]) {
  Bytes bytes;
  for (int i = 0; i < 4 * W; ++i) bytes[i] = uint8_t(lanes[i / W][i % W]);
  return bytes;
}

static inline Bytes narrow_four(I a, I b, I c, I d) { return deinterleave({a, b, c, d}); }

#include "body.h"
#include "products.h"

}  // namespace fxq::generic

// The kernels, written once over vectors of W lanes: those that need no integer dot product; products.h has the others.
// Each kernels_<isa>.cpp includes this inside a namespace of its own, after defining
//   W, I, B, S, L, F         lanes in a vector; vectors of int32, uint8, uint16, int64 and float (`Vectors<W>`)
//   Bytes                    4 * W uint8
//   kColumns                 the register tile in vectors of channels; kColumns * W divides 64, or is 64
//   fused(F a, F b, F c)     a * b + c, rounded once
//   maximum(F a, F b), minimum(F a, F b)  a > b ? a : b and a < b ? a : b, each in one instruction
//   pick(const float* p, I)  p[index[lane] & 15] in each lane; p is aligned to 64 bytes
//   multiply_even(I, I)      int64 products of the lanes 0, 2, 4, ..., exact
//   widen(B), narrow(I)      uint8 to int32, and back (values 0..255)
//   narrow_four(I a, b, c, d)  the bytes of four vectors, one after the other
//   pieces<n>(p, offset)     Bytes, an n-th of them from each p[i] + offset; store_pieces<n>(p, Bytes)
//   interleave(Bytes a, b, c, d, I[4]), deinterleave(I[4])  see depthwise.h
//   SATURATES                (optional) there is a saturated(F a, b, c, d, I z), the bytes clamp(rne(v) + z, 0, 255)
//                          of four vectors, NaN being 0; z: an int16 from 0 to 255 in every half of a lane
//   WIDENS_BYTES             (optional) there is a widened(I group, int j), see weight_only.h
//   CONVERTS_HALVES          (optional) there are of_half(S) and to_half(F), see narrow.h
//   PERMUTES_BYTES           (optional) vectors of 64 bytes can be had, and the processor is asked for vpermi2b
//   MASKED                   (optional) there are load_masked<V>(p, count) and store_masked(p, v, count)
// Vectors are those of GCC and Clang: `a * b` is W products, `a > b ? a : b` is one max. The build forbids contraction
// to fused multiply-add (-ffp-contract=off), which would change bits; `fused` is one wherever it runs.

#define UNROLL _Pragma("GCC unroll 32")

template <class V, class T>
static inline V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
static inline void store(T* p, V v) {
  memcpy(p, &v, sizeof v);
}

// The first `count` lanes, the others 0: nothing beyond the array is touched.
template <class V, class T>
static inline V load_some(const T* p, int64_t count) {
  if (count >= W) return load<V>(p);
#ifdef MASKED
  return load_masked<V>(p, count);
#else
  T lanes[W] = {};
  memcpy(lanes, p, count * sizeof(T));
  return load<V>(lanes);
#endif
}
template <class V, class T>
static inline void store_some(T* p, V v, int64_t count) {
  if (count >= W) return store(p, v);
#ifdef MASKED
  store_masked(p, v, count);
#else
  memcpy(p, &v, count * sizeof(T));
#endif
}

static inline F splat(float v) { return v - F{}; }  // not v + F{}, which would turn -0 into 0

// clamp(rne(steps) + zero_point, low, high). Adding 1.5 * 2**23 to a float from -2**22 to 2**22 leaves its nearest integer,
// ties to even, in the low mantissa bits. Clamping to `low` before changes nothing, as it is an integer; to `high` after,
// as a larger sum has larger bits: fewer of the processor's units compare floats than integers. Four vectors at a time
// saturate on their way to bytes, and are clamped as bytes, where that can be had: a third fewer instructions.
struct Rounding {
  F low;
  I offset, high, zero_points;
  bool clamps;
  Bytes least, most;
  Rounding(int32_t zero_point, int32_t lo, int32_t hi)
      : low(splat(float(lo - zero_point))),
        offset((zero_point - 0x4B400000) - I{}),
        high(hi - I{}),
        zero_points(zero_point * 0x10001 - I{}),
        clamps(lo > 0 || hi < 255),
        least(uint8_t(lo) - Bytes{}),
        most(uint8_t(hi) - Bytes{}) {}
  I lanes(F steps) const {
    steps = steps > low ? steps : low;  // NaN compares false: it becomes `low`
    const I nearest = (I)(steps + 12582912.0f) + offset;
    return nearest < high ? nearest : high;
  }
  B operator()(F steps) const { return narrow(lanes(steps)); }
  Bytes operator()(F a, F b, F c, F d) const {
#ifdef SATURATES
    const Bytes q = saturated(a, b, c, d, zero_points);
    if (!clamps) return q;
    const Bytes raised = q > least ? q : least;
    return raised < most ? raised : most;
#else
    return narrow_four(lanes(a), lanes(b), lanes(c), lanes(d));
#endif
  }
};

struct Narrow {  // int32 of 0..255
  B operator()(I v) const { return narrow(v); }
  Bytes operator()(I a, I b, I c, I d) const { return narrow_four(a, b, c, d); }
};

struct Affine {  // f32((q - zero_point) * multiplier)
  const uint8_t* q;
  I zero_point;
  F multiplier;
  explicit Affine(const Term& t) : q(t.q), zero_point(t.zero_point - I{}), multiplier(splat(t.multiplier)) {}
  F operator()(int64_t i, int64_t count) const {
    const I steps = widen(load_some<B>(q + i, count)) - zero_point;
    return __builtin_convertvector(steps, F) * multiplier;
  }
};

// Tiles are kColumns, 2 or 1 vectors wide; what is between is made of two.
static inline int64_t columns_of(int64_t left) { return left >= kColumns ? kColumns : left >= 2 ? 2 : 1; }

#include "elementwise.h"
#include "activations.h"
#include "fixed_point.h"
#include "epilogue.h"
#include "winograd_tiles.h"
#include "images.h"
#include "norms.h"
#include "narrow.h"
#include "weight_only.h"
#include "embedding.h"
#include "lookup.h"
#include "attention_rows.h"

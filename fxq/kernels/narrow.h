// Numbers of 16 bits, bfloat16 and float16: widened exactly, rounded to nearest, ties to even; a part of body.h. float16
// NaNs become quiet and keep the upper bits of their payload, as in F16C.

#ifndef CONVERTS_HALVES
static inline F of_half(S half) {
  const I bits = __builtin_convertvector(half, I), magnitude = (bits & 0x7FFF) << 13;
  const I finite = (I)((F)magnitude * 0x1p112f);  // denormals become normal
  const I nonfinite = magnitude | (magnitude > 0x0F800000 ? 0x7FC00000 - I{} : 0x7F800000 - I{});
  return (F)((magnitude >= 0x0F800000 ? nonfinite : finite) | (bits & 0x8000) << 16);
}
static inline S to_half(F v) {
  const I bits = (I)v, magnitude = bits & 0x7FFFFFFF;
  const I denormal = (I)((F)magnitude + 0.5f) - 0x3F000000;  // in steps of 2**-24, the last bit of 0.5
  const I normal = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const I finite = magnitude < 0x38800000 ? denormal : normal;
  const I nonfinite = magnitude > 0x7F800000 ? 0x7E00 | (magnitude >> 13 & 0x3FF) : 0x7C00 - I{};
  return __builtin_convertvector((magnitude >= 0x47800000 ? nonfinite : finite) | (bits >> 16 & 0x8000), S);
}
#endif

static inline F of_brain(S brain) { return (F)(__builtin_convertvector(brain, I) << 16); }
static inline S to_brain(F v) {
  const I bits = (I)v;
  const I rounded = (I)(((Vectors<W>::M)bits + 0x7FFF + (Vectors<W>::M)(bits >> 16 & 1)) >> 16);
  return __builtin_convertvector((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 - I{} : rounded, S);
}

// y[i] = v, rounded to y's type.
static inline void store_real(void* y, Real type, int64_t i, F v, int64_t count) {
  if (type == Real::kFloat32)
    store_some(static_cast<float*>(y) + i, v, count);
  else
    store_some(static_cast<uint16_t*>(y) + i, type == Real::kFloat16 ? to_half(v) : to_brain(v), count);
}

struct WidenHalf {
  const uint16_t* x;
  float* y;
  inline void operator()(int64_t i, int64_t count) const { store_some(y + i, of_half(load_some<S>(x + i, count)), count); }
};
struct WidenBrain {
  const uint16_t* x;
  float* y;
  inline void operator()(int64_t i, int64_t count) const {
    store_some(y + i, of_brain(load_some<S>(x + i, count)), count);
  }
};
static void widen_reals(Real type, const uint16_t* x, float* y, int64_t count) {
  if (type == Real::kFloat16)
    for_each_vector(count, WidenHalf{x, y});
  else
    for_each_vector(count, WidenBrain{x, y});
}

// 0 or from 2**-100 up to 2**100, in the lower half of each lane: -1, else 0.
static inline I is_tame(I brain) {
  const I magnitude = brain & 0x7FFF;
  return (magnitude == 0) | ((magnitude >= (127 - 100) << 7) & (magnitude < (127 + 100) << 7));
}

static bool pair_brains(const uint16_t* x, uint32_t* pairs, int64_t count) {
  I tame = ~I{};
  const auto pair = [&](I two) {  // the lower half is the first in memory
    tame &= is_tame(two) & is_tame(two >> 16);
    return two << 16 | (two >> 16 & 0xFFFF);
  };
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) store(pairs + i / 2, pair(load<I>(x + i)));
  if (i < count) {
    uint16_t rest[2 * W] = {};
    memcpy(rest, x + i, (count - i) * sizeof *x);
    store_some(pairs + i / 2, pair(load<I>(rest)), (count - i + 1) / 2);
  }
  bool all = true;
  for (int lane = 0; lane < W; ++lane) all &= tame[lane] != 0;
  return all;
}

// Elementwise kernels; a part of body.h, compiled once per instruction set.

struct Larger {
  template <class V>
  static V of(V a, V b) {
    return a > b ? a : b;
  }
};
struct Sum {
  template <class V>
  static V of(V a, V b) {
    return a + b;
  }
};

struct Either {
  template <class V>
  static V of(V a, V b) {
    return a | b;
  }
};

template <int half, class V, size_t... lane>
static inline V turned(V v, std::index_sequence<lane...>) {  // lane i is that of i ^ half
#ifdef __clang__
  return __builtin_shufflevector(v, v, int(lane ^ half)...);
#else
  return __builtin_shuffle(v, I{int32_t(lane ^ half)...});
#endif
}

// All lanes of a vector as one, each half of them taken together with the other.
template <class Step, class T, int half = W / 2, class V>
static inline T fold(V v) {
  if constexpr (half == 0)
    return v[0];
  else
    return fold<Step, T, half / 2>(Step::of(v, turned<half>(v, std::make_index_sequence<W>())));
}

// step(i, count) for each vector; `count` is W, known to the compiler, in all but the last.
template <class Step>
static inline void for_each_vector(int64_t count, const Step& step) {
  int64_t i = 0;
  for (; i + W <= count; i += W) step(i, W);
  if (i < count) step(i, count - i);
}

// q[i] = round(steps(i)): four vectors at a time, as their bytes are stored together.
template <class Steps>
static inline void round_all(int64_t count, const Rounding& round, const Steps& steps, uint8_t* q) {
  int64_t i = 0;
  for (; i + 4 * W <= count; i += 4 * W)
    store(q + i, round(steps(i, W), steps(i + W, W), steps(i + 2 * W, W), steps(i + 3 * W, W)));
  for (; i < count; i += W) store_some(q + i, round(steps(i, count - i)), count - i);
}

struct Scaled {
  const float* x;
  float inverse;
  inline F operator()(int64_t i, int64_t count) const { return load_some<F>(x + i, count) * inverse; }
};
static void quantize(const float* x, uint8_t* q, int64_t count, float inverse, int32_t zero_point) {
  round_all(count, Rounding(zero_point, 0, 255), Scaled{x, inverse}, q);
}

struct ScaledTwice {
  const float *x, *factor;
  float inverse;
  inline F operator()(int64_t i, int64_t count) const {
    return load_some<F>(x + i, count) * load_some<F>(factor + i, count) * inverse;
  }
};
static void quantize_scaled(const float* x, const float* factor, uint8_t* q, int64_t count, float inverse,
                            int32_t zero_point) {
  round_all(count, Rounding(zero_point, 0, 255), ScaledTwice{x, factor, inverse}, q);
}

struct Dequantize {
  Affine value;
  float* y;
  inline void operator()(int64_t i, int64_t count) const { store_some(y + i, value(i, count), count); }
};
static void dequantize(Term x, float* y, int64_t count) { for_each_vector(count, Dequantize{Affine(x), y}); }

static void requantize(Term x, uint8_t* y, int64_t count, int32_t zero_point, int32_t low, int32_t high) {
  round_all(count, Rounding(zero_point, low, high), Affine(x), y);
}

struct AddTerms {
  Affine a, b;
  inline F operator()(int64_t i, int64_t count) const { return a(i, count) + b(i, count); }
};
static void add(Term a, Term b, uint8_t* y, int64_t count, int32_t zero_point, int32_t low, int32_t high) {
  round_all(count, Rounding(zero_point, low, high), AddTerms{Affine(a), Affine(b)}, y);
}

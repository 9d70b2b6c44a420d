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

struct Quantize {
  const float* x;
  float inverse;
  Rounding round;
  uint8_t* q;
  inline void operator()(int64_t i, int64_t count) const {
    store_some(q + i, round(load_some<F>(x + i, count) * inverse), count);
  }
};
static void quantize(const float* x, uint8_t* q, int64_t count, float inverse, int32_t zero_point) {
  for_each_vector(count, Quantize{x, inverse, Rounding(zero_point, 0, 255), q});
}

struct QuantizeScaled {
  const float *x, *factor;
  float inverse;
  Rounding round;
  uint8_t* q;
  inline void operator()(int64_t i, int64_t count) const {
    store_some(q + i, round(load_some<F>(x + i, count) * load_some<F>(factor + i, count) * inverse), count);
  }
};
static void quantize_scaled(const float* x, const float* factor, uint8_t* q, int64_t count, float inverse,
                            int32_t zero_point) {
  for_each_vector(count, QuantizeScaled{x, factor, inverse, Rounding(zero_point, 0, 255), q});
}

struct Dequantize {
  Affine value;
  float* y;
  inline void operator()(int64_t i, int64_t count) const { store_some(y + i, value(i, count), count); }
};
static void dequantize(Term x, float* y, int64_t count) { for_each_vector(count, Dequantize{Affine(x), y}); }

struct Requantize {
  Affine value;
  Rounding round;
  uint8_t* y;
  inline void operator()(int64_t i, int64_t count) const { store_some(y + i, round(value(i, count)), count); }
};
static void requantize(Term x, uint8_t* y, int64_t count, int32_t zero_point, int32_t low, int32_t high) {
  for_each_vector(count, Requantize{Affine(x), Rounding(zero_point, low, high), y});
}

struct Add {
  Affine a, b;
  Rounding round;
  uint8_t* y;
  inline void operator()(int64_t i, int64_t count) const { store_some(y + i, round(a(i, count) + b(i, count)), count); }
};
static void add(Term a, Term b, uint8_t* y, int64_t count, int32_t zero_point, int32_t low, int32_t high) {
  for_each_vector(count, Add{Affine(a), Affine(b), Rounding(zero_point, low, high), y});
}

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

// Lane i of the result is lane from(i) of a and b, those of b from W on; `from` is known to the compiler.
template <class V, class From, size_t... lane>
static inline V shuffled(V a, V b, From from, std::index_sequence<lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, from(int(lane))...);
#else
  return __builtin_shuffle(a, b, I{int32_t(from(int(lane)))...});
#endif
}
template <class V, class From>
static inline V shuffled(V a, V b, From from) {
  return shuffled(a, b, from, std::make_index_sequence<W>());
}
template <class V, class From>
static inline V shuffled(V v, From from) {
  return shuffled(v, v, from);
}

// Within each 128 bits, a lane of a and one of b in turns, from lane `first` on.
template <int first>
static inline I unpacked(I a, I b) {
  return shuffled(a, b, [](int lane) { return lane / 4 * 4 + lane % 4 / 2 + first + lane % 2 * W; });
}

// All lanes of a vector as one, each half of them taken together with the other.
template <class Step, class T, int half = W / 2, class V>
static inline T fold(V v) {
  if constexpr (half == 0)
    return v[0];
  else
    return fold<Step, T, half / 2>(Step::of(v, shuffled(v, [](int lane) { return lane ^ half; })));
}

// The same of N vectors at once, N a power of two: lane r is that of vector r.
template <class Step, int half = W / 2, class V, int N>
static inline V fold_rows(const V (&v)[N]) {
  if constexpr (half == 0) {
    return v[0];
  } else {
    V folded[N > 1 ? N / 2 : 1];
    UNROLL for (int i = 0; 2 * i < N; ++i) {
      const V a = v[2 * i], b = v[(2 * i + 1) % N];
      folded[i] = Step::of(shuffled(a, b, [](int lane) { return lane + lane / half * half; }),
                           shuffled(a, b, [](int lane) { return lane + lane / half * half + half; }));
    }
    return fold_rows<Step, half / 2>(folded);
  }
}

// step(i, count) for each vector; `count` is W, known to the compiler, in all but the last.
template <class Step>
static inline void for_each_vector(int64_t count, const Step& step) {
  int64_t i = 0;
  for (; i + W <= count; i += W) step(i, W);
  if (i < count) step(i, count - i);
}

// q[i] = bytes(value(i)), four vectors at a time, as their bytes are stored together.
template <class Value, class InBytes>
static inline void bytes_of(int64_t count, const InBytes& bytes, const Value& value, uint8_t* q) {
  int64_t i = 0;
  for (; i + 4 * W <= count; i += 4 * W)
    store(q + i, bytes(value(i, W), value(i + W, W), value(i + 2 * W, W), value(i + 3 * W, W)));
  for (; i < count; i += W) store_some(q + i, bytes(value(i, count - i)), count - i);
}

struct Scaled {
  const float* x;
  float inverse;
  inline F operator()(int64_t i, int64_t count) const { return load_some<F>(x + i, count) * inverse; }
};
static void quantize(const float* x, uint8_t* q, int64_t count, float inverse, int32_t zero_point) {
  bytes_of(count, Rounding(zero_point, 0, 255), Scaled{x, inverse}, q);
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
  bytes_of(count, Rounding(zero_point, 0, 255), ScaledTwice{x, factor, inverse}, q);
}

struct Dequantize {
  Affine value;
  float* y;
  inline void operator()(int64_t i, int64_t count) const { store_some(y + i, value(i, count), count); }
};
static void dequantize(Term x, float* y, int64_t count) { for_each_vector(count, Dequantize{Affine(x), y}); }

static void requantize(Term x, uint8_t* y, int64_t count, int32_t zero_point, int32_t low, int32_t high) {
  bytes_of(count, Rounding(zero_point, low, high), Affine(x), y);
}

struct AddTerms {
  Affine a, b;
  inline F operator()(int64_t i, int64_t count) const { return a(i, count) + b(i, count); }
};
static void add(Term a, Term b, uint8_t* y, int64_t count, int32_t zero_point, int32_t low, int32_t high) {
  bytes_of(count, Rounding(zero_point, low, high), AddTerms{Affine(a), Affine(b)}, y);
}

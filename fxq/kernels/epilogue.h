// What becomes of the sums of a tile of the integer product; a part of body.h, compiled once per instruction set.

static inline F residual(const Gemm& g, const uint8_t* q, int64_t count) {
  return __builtin_convertvector(widen(load_some<B>(q, count)) - g.residual_zero_point, F) * g.residual_multiplier;
}

// What a tile applies to its results as they stand in their registers: the activations that are short enough.
enum class Inside { kNothing, kGelu, kHardswish };
static inline Inside inside_of(const Gemm& g) {
  if (g.output != Output::kActivation && g.output != Output::kActivationUint8) return Inside::kNothing;
  return g.activation == Activation::kGelu        ? Inside::kGelu
         : g.activation == Activation::kHardswish ? Inside::kHardswish
                                                  : Inside::kNothing;
}
template <int C>
static inline void apply(Inside inside, F (&values)[C]) {
  if (inside == Inside::kGelu) {
    UNROLL for (F& value : values) value = gelu(value);
  } else if (inside == Inside::kHardswish) {
    UNROLL for (F& value : values) value = hardswish(value);
  }
}

// memcpy without a call: rows of a tile are short and many.
static inline void copy(void* to, const void* from, int64_t bytes) {
  uint8_t* const y = static_cast<uint8_t*>(to);
  const uint8_t* const x = static_cast<const uint8_t*>(from);
  if (bytes < 8) {
    for (int64_t i = 0; i < bytes; ++i) y[i] = x[i];
    return;
  }
  if (bytes < 16) {
    memcpy(y, x, 8);
    return void(memcpy(y + bytes - 8, x + bytes - 8, 8));
  }
  for (int64_t i = 0; i + 16 < bytes; i += 16) memcpy(y + i, x + i, 16);
  memcpy(y + bytes - 16, x + bytes - 16, 16);
}

// The float that each sum of a row stands for; the pointers stand at the row's first channel of those at hand.
template <bool kDynamic>
struct Scaling {
  const Gemm& g;
  const float* multiplier;
  const float* addend = nullptr;  // or none, as of `bias`
  const int32_t* column_sums = nullptr;
  const float* bias = nullptr;
  int32_t zero_point = 0;
  float scale = 1;

  Scaling(const Gemm& g, int64_t row, int64_t channel, const float* multiplier) : g(g), multiplier(multiplier) {
    if (g.addend) addend = g.addend + row * g.addend_stride + channel;
    if constexpr (kDynamic) {
      column_sums = g.bias + channel;
      if (g.float_bias) bias = g.float_bias + channel;
      zero_point = g.row_zero_point[row];
      scale = g.row_scale[row];
    }
  }
  inline F operator()(I sum, int64_t i, int64_t count) const {
    F factor = load_some<F>(multiplier + i, count);
    if constexpr (kDynamic) {
      sum += load_some<I>(column_sums + i, count) * zero_point;
      factor *= scale;
    }
    F value = __builtin_convertvector(sum, F) * factor;
    if (kDynamic && bias) value += load_some<F>(bias + i, count);
    if (addend) value += load_some<F>(addend + i, count);
    if (kDynamic) value = clip(value, g.clamp_low, g.clamp_high);
    return value;
  }
};

// Those of a tile of sums; `y` may be where they lie.
template <bool kDynamic>
static void scale_sums(const Gemm& g, int64_t row, int64_t rows, int64_t channel, int64_t valid, const int32_t* sums,
                       int64_t width, float* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; ++r, sums += width, y += y_stride) {
    const Scaling<kDynamic> scaled(g, row + r, channel, g.multiplier + channel);
    for_each_vector(valid, [&](int64_t i, int64_t count) { store_some(y + i, scaled(load<I>(sums + i), i, count), count); });
  }
}

struct WithResidual {
  const Gemm& g;
  const float* x;
  const uint8_t* added;

  inline F operator()(int64_t i, int64_t count) const {
    const F value = load<F>(x + i);
    return added ? value + residual(g, added + i, count) : value;
  }
};

// Floats [rows, width], of which `valid` channels exist, to y at [row, channel]; they are overwritten on the way.
static void finish_values(const Gemm& g, int64_t row, int64_t rows, int64_t channel, int64_t valid, float* values,
                          int64_t width) {
  if (g.output == Output::kActivation || g.output == Output::kActivationUint8)
    activate(g.activation, values, rows, width, width);
  const bool one = valid == width && g.y_stride == width;  // rows of the result follow one another
  if (one && g.output == Output::kActivationUint8 && !g.factor)
    return quantize(values, static_cast<uint8_t*>(g.y) + row * width, rows * width, g.inverse, g.zero_point);
  for (int64_t r = 0; r < rows; ++r) {
    const float* const x = values + r * width;
    const int64_t i = (row + r) * g.y_stride + channel;
    uint8_t* const q = static_cast<uint8_t*>(g.y) + i;
    if (g.output == Output::kFloat || g.output == Output::kActivation)
      copy(static_cast<float*>(g.y) + i, x, valid * sizeof(float));
    else if (g.output == Output::kUint8)
      bytes_of(valid, Rounding(g.zero_point, g.low, g.high),
                WithResidual{g, x, g.residual ? g.residual + (row + r) * g.residual_stride + channel : nullptr}, q);
    else if (g.factor)
      quantize_scaled(x, g.factor + channel, q, valid, g.inverse, g.zero_point);
    else
      quantize(x, q, valid, g.inverse, g.zero_point);
  }
}

// The same of the sums that a tile has left; floats take their places.
static void finish_sums(const Gemm& g, int64_t row, int64_t rows, int64_t channel, int64_t valid, int32_t* sums,
                        int64_t width) {
  const int64_t i = row * g.y_stride + channel;
  if (g.output == Output::kFixed)
    return (g.twice ? fixed_tile<true> : fixed_tile<false>)(g, row, channel, sums, rows, width,
                                                            static_cast<uint8_t*>(g.y) + i, valid);
  const bool direct = g.output == Output::kFloat;
  float* const values = direct ? static_cast<float*>(g.y) + i : reinterpret_cast<float*>(sums);
  (g.dynamic ? scale_sums<true> : scale_sums<false>)(g, row, rows, channel, valid, sums, width, values,
                                                     direct ? g.y_stride : width);
  if (!direct) finish_values(g, row, rows, channel, valid, values, width);
}

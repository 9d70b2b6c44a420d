// The kernels, written once over vectors of W lanes. Each kernels_<isa>.cpp includes this inside a namespace of its
// own, after defining
//   W, I, B                  lanes in a vector; vectors of int32 and uint8 (`Vectors<W>`)
//   kRows, kColumns          the register tile: rows x vectors of channels; kColumns * W divides 64, or is 64
//   Weights, weights(p)      4 * W int8: four k of W channels
//   Input, input(uint32_t)   four uint8 of one row, for all lanes
//   dot(acc, Input, Weights) acc[lane] += the four products, exact
//   widen(B), narrow(I)      uint8 to int32, and back (values 0..255)
//   WIDEN_ROWS               (optional) dot works on pairs of int16, and there is an input(even, odd) that takes them
// Vectors are those of GCC and Clang: `a * b` is W products, `a > b ? a : b` is one max. The build forbids contraction
// to fused multiply-add (-ffp-contract=off), which would change bits.

using F = Vectors<W>::F;

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
  T lanes[W] = {};
  memcpy(lanes, p, count * sizeof(T));
  return load<V>(lanes);
}
template <class V, class T>
static inline void store_some(T* p, V v, int64_t count) {
  if (count >= W) return store(p, v);
  memcpy(p, &v, count * sizeof(T));
}

static inline F splat(float v) { return v - F{}; }  // not v + F{}, which would turn -0 into 0

// clamp(rne(steps) + zero_point, low, high). Clamping first changes nothing, as the bounds are integers. Adding
// 1.5 * 2**23 to a float below 2**22 leaves its nearest integer, ties to even, in the low mantissa bits.
struct Rounding {
  F low, high;
  I offset;
  Rounding(int32_t zero_point, int32_t lo, int32_t hi)
      : low(splat(float(lo - zero_point))),
        high(splat(float(hi - zero_point))),
        offset((zero_point - 0x4B400000) - I{}) {}
  B operator()(F steps) const {
    steps = steps > low ? steps : low;  // NaN compares false: it becomes `low`
    steps = steps < high ? steps : high;
    return narrow((I)(steps + 12582912.0f) + offset);
  }
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

static void quantize(const float* x, uint8_t* q, int64_t count, float inverse, int32_t zero_point) {
  const Rounding round(zero_point, 0, 255);
  int64_t i = 0;
  for (; i + W <= count; i += W) store(q + i, round(load<F>(x + i) * inverse));
  if (i < count) store_some(q + i, round(load_some<F>(x + i, count - i) * inverse), count - i);
}

// step(i, count) for each vector; `count` is W, known to the compiler, in all but the last.
template <class Step>
static inline void for_each_vector(int64_t count, const Step& step) {
  int64_t i = 0;
  for (; i + W <= count; i += W) step(i, W);
  if (i < count) step(i, count - i);
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

// Activations, step by step those of numerics.py. `low > x ? low : x` is one max instruction, and keeps NaN.
static inline F at_least(F x, float low) {
  const F bound = splat(low);
  return bound > x ? bound : x;
}
static inline F at_most(F x, float high) {
  const F bound = splat(high);
  return bound < x ? bound : x;
}
static inline F clip(F x, float low, float high) { return at_most(at_least(x, low), high); }

template <int N>
static inline F polynomial(F x, const float (&coefficients)[N]) {
  F y = splat(coefficients[0]);
  UNROLL for (int i = 1; i < N; ++i) y = y * x + coefficients[i];
  return y;
}

static inline F sigmoid(F x) {
  const F v = -clip(x, -87.0f, 87.0f);
  const F shifted = v * 1.44269504088896341f + 12582912.0f;
  const F n = shifted - 12582912.0f;
  F r = v - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  const F p = polynomial(r, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                             5.0000001201e-1f});
  const F power = (F)(((I)shifted - (0x4B400000 - 127)) << 23);
  return 1.0f / (1.0f + ((p * (r * r) + r) + 1.0f) * power);
}

static inline F gate(F x, F logit) { return at_least(x, -87.0f) * sigmoid(logit); }

static inline F gelu_tanh_logit(F x) {
  const F c = clip(x, -87.0f, 87.0f);
  return c * polynomial(c * c, {0.07135481627f, 1.59576912161f});
}

static inline F gelu_logit(F x) {
  const F c = clip(x, -87.0f, 87.0f);
  return c * polynomial(at_most(c * c, 30.0f),
                        {3.611615229104359e-09f, -2.669106606845162e-07f, 7.938518137962092e-06f,
                         -0.00011048255692003295f, -6.625254172831774e-05f, 0.07266855984926224f, 1.5957684516906738f});
}

static inline F tanh(F x) {
  const F c = clip(x, -7.90531110763549805f, 7.90531110763549805f);
  const F t = c * c;
  const F p = polynomial(t, {-2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f,
                             5.12229709037114e-08f, 1.48572235717979e-05f, 6.37261928875436e-04f,
                             4.89352455891786e-03f});
  const F q = polynomial(t, {1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f,
                             4.89352518554385e-03f});
  return c * (p / q);
}

static inline F relu(F x) { return x < 0.0f ? F{} : x; }

static inline F silu(F x) { return gate(x, x); }

template <F (*function)(F)>
static void map(float* y, int64_t count) {  // count: a multiple of W, at most a tile
  for (int64_t i = 0; i < count; i += W) store(y + i, function(load<F>(y + i)));
}

// y = gate(y, logit(y)) in two loops: each step waits for the one before, and a processor looks only so far ahead.
template <F (*logit)(F)>
static void map_gate(float* y, int64_t count) {
  alignas(64) float logits[kRows * kColumns * W];
  for (int64_t i = 0; i < count; i += W) store(logits + i, logit(load<F>(y + i)));
  for (int64_t i = 0; i < count; i += W) store(y + i, gate(load<F>(y + i), load<F>(logits + i)));
}

static void activate(Activation activation, float* y, int64_t count) {
  switch (activation) {
    case Activation::kGelu: return map_gate<gelu_logit>(y, count);
    case Activation::kGeluTanh: return map_gate<gelu_tanh_logit>(y, count);
    case Activation::kSilu: return map<silu>(y, count);
    case Activation::kTanh: return map<tanh>(y, count);
    case Activation::kSigmoid: return map<sigmoid>(y, count);
    case Activation::kRelu: return map<relu>(y, count);
  }
}

// Where one tile finds its operands and leaves its result; each pointer stands at the tile's first row and channel.
struct Place {
  const uint8_t* x;
  const int8_t* weight;
  int64_t step;  // bytes from one group of four k to the next
  const int32_t* bias;
  const float* multiplier;
  const float* addend;
  int64_t addend_stride;
  void* y;
  int64_t y_stride;
};

static inline uint32_t load_group(const uint8_t* x, int64_t count) {  // up to four bytes, the others 0
  uint32_t group = 0;
  for (int64_t i = 0; i < count; ++i) group |= uint32_t(x[i]) << (8 * i);
  return group;
}

// R rows of 4 * count bytes, read four at a time.
template <int R>
struct Rows {
#ifdef WIDEN_ROWS
  static constexpr int64_t kMost = 256;
  uint32_t pairs[R][kMost][2];  // widened here once, and not again for every vector of channels

  Rows(const uint8_t* x, int64_t stride, int64_t count) {
    for (int r = 0; r < R; ++r, x += stride) {
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t group = load<uint32_t>(x + 4 * i);
        pairs[r][i][0] = group & 0x00FF00FF;
        pairs[r][i][1] = group >> 8 & 0x00FF00FF;
      }
    }
  }
  Input operator()(int r, int64_t i) const { return input(pairs[r][i][0], pairs[r][i][1]); }
#else
  static constexpr int64_t kMost = INT64_MAX;
  const uint8_t* x;
  int64_t stride;

  Rows(const uint8_t* x, int64_t stride, int64_t) : x(x), stride(stride) {}
  Input operator()(int r, int64_t i) const { return input(load<uint32_t>(x + r * stride + 4 * i)); }
#endif
};

// R rows x C vectors of channels: summed up in registers from the bias on, and the epilogue in registers as well.
template <int R, int C, bool kFloatOutput>
static void tile(const Gemm& g, const Place& at) {
  I acc[R][C];
  UNROLL for (int c = 0; c < C; ++c) {
    UNROLL for (int r = 0; r < R; ++r) acc[r][c] = load<I>(at.bias + c * W);
  }
  const uint8_t* x = at.x;
  const int8_t* w = at.weight;
  const int64_t stride = g.x_stride, step = at.step;
  for (int64_t groups = g.k / 4, count; groups > 0; groups -= count, x += 4 * count) {
    count = groups < Rows<R>::kMost ? groups : Rows<R>::kMost;
    const Rows<R> rows(x, stride, count);
    for (int64_t i = 0; i < count; ++i, w += step) {
      Weights b[C];
      UNROLL for (int c = 0; c < C; ++c) b[c] = weights(w + 4 * W * c);
      UNROLL for (int r = 0; r < R; ++r) {
        const Input a = rows(r, i);
        UNROLL for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], a, b[c]);
      }
    }
  }
  if (g.k % 4) {  // the packed weights end in zeros, but x ends
    UNROLL for (int r = 0; r < R; ++r) {
      const Input a = input(load_group(x + r * stride, g.k % 4));
      UNROLL for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], a, weights(w + 4 * W * c));
    }
  }
  const Rounding round(g.zero_point, g.low, g.high);
  UNROLL for (int c = 0; c < C; ++c) {
    const F multiplier = load<F>(at.multiplier + c * W);
    UNROLL for (int r = 0; r < R; ++r) {
      F value = __builtin_convertvector(acc[r][c], F) * multiplier;
      const int64_t i = r * at.y_stride + c * W;
      if (kFloatOutput) {
        if (at.addend) value += load<F>(at.addend + r * at.addend_stride + c * W);
        store(static_cast<float*>(at.y) + i, value);
      } else {
        store(static_cast<uint8_t*>(at.y) + i, round(value));
      }
    }
  }
}

using Tile = void (*)(const Gemm&, const Place&);

template <int R, bool kFloatOutput>
static Tile tile_of(int64_t columns) {
  if constexpr (kColumns == 4) {
    if (columns == 4) return tile<R, 4, kFloatOutput>;
    if (columns == 3) return tile<R, 3, kFloatOutput>;
  }
  if constexpr (kColumns >= 2)
    if (columns == 2) return tile<R, 2, kFloatOutput>;
  return tile<R, 1, kFloatOutput>;
}

template <bool kFloatOutput>
static Tile tile_of(int64_t rows, int64_t columns) {
  if constexpr (kRows == 6) {
    if (rows == 6) return tile_of<6, kFloatOutput>(columns);
    if (rows == 5) return tile_of<5, kFloatOutput>(columns);
  }
  if (rows == 4) return tile_of<4, kFloatOutput>(columns);
  if (rows == 3) return tile_of<3, kFloatOutput>(columns);
  if (rows == 2) return tile_of<2, kFloatOutput>(columns);
  return tile_of<1, kFloatOutput>(columns);
}

// memcpy without a call: rows of a strip are short and many.
static inline void copy(uint8_t* to, const uint8_t* from, int64_t bytes) {
  if (bytes < 16) return void(memcpy(to, from, bytes));
  for (int64_t i = 0; i + 16 < bytes; i += 16) memcpy(to + i, from + i, 16);
  memcpy(to + bytes - 16, from + bytes - 16, 16);
}

// A strip of the output: the rows [row, row_end) of `columns` vectors of channels, kRows at a time.
static void strip(const Gemm& g, int64_t row, int64_t row_end, int64_t channel, int64_t columns, const int8_t* weight,
                  int64_t step) {
  constexpr int64_t kWidth = kColumns * W;
  const int64_t size = g.output == Output::kFloat || g.output == Output::kActivation ? sizeof(float) : 1;
  const int64_t width = columns * W, valid = g.n - channel < width ? g.n - channel : width;
  const bool ragged = valid < width;  // the arrays end within the last vector: work on padded copies
  const bool staged = ragged || g.output == Output::kActivation || g.output == Output::kActivationUint8;

  Place at = {nullptr, weight, step, g.bias + channel, g.multiplier + channel, nullptr, g.addend_stride, nullptr, 0};
  alignas(64) int32_t bias[kWidth];
  alignas(64) float multiplier[kWidth];
  if (ragged) {
    memset(bias, 0, sizeof bias);
    memset(multiplier, 0, sizeof multiplier);
    at.bias = static_cast<int32_t*>(memcpy(bias, at.bias, valid * sizeof(int32_t)));
    at.multiplier = static_cast<float*>(memcpy(multiplier, at.multiplier, valid * sizeof(float)));
  }
  alignas(64) float stage[kRows * kWidth];
  alignas(64) float addend[kRows * kWidth];

  for (; row < row_end; row += kRows) {
    const int64_t rows = row_end - row < kRows ? row_end - row : kRows;
    uint8_t* y = static_cast<uint8_t*>(g.y) + (row * g.y_stride + channel) * size;
    at.x = g.x + row * g.x_stride;
    at.y = staged ? static_cast<void*>(stage) : y;
    at.y_stride = staged ? width : g.y_stride;
    if (g.addend) {
      at.addend = g.addend + row * g.addend_stride + channel;
      if (ragged) {
        for (int64_t r = 0; r < rows; ++r)
          memcpy(addend + r * width, at.addend + r * g.addend_stride, valid * sizeof(float));
        at.addend = addend;
        at.addend_stride = width;
      }
    }
    (g.output == Output::kUint8 ? tile_of<false>(rows, columns) : tile_of<true>(rows, columns))(g, at);
    if (!staged) continue;

    if (g.output == Output::kActivation || g.output == Output::kActivationUint8)
      activate(g.activation, stage, rows * width);
    for (int64_t r = 0; r < rows; ++r, y += g.y_stride * size) {
      if (g.output == Output::kActivationUint8)
        quantize(stage + r * width, y, valid, g.inverse, g.zero_point);
      else
        copy(y, reinterpret_cast<uint8_t*>(stage) + r * width * size, valid * size);
    }
  }
}

static void gemm(const Gemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
  // A block of rows that stays in the second-level cache shares one read of each panel; blocks are of equal height.
  const int64_t fit = 384 * 1024 / (g.k + 1), most = fit < 96 ? 96 : fit > 960 ? 960 : fit;
  const int64_t blocks = (row_end - row + most - 1) / most;
  const int64_t tiles = blocks ? (row_end - row + blocks * kRows - 1) / (blocks * kRows) : 0;
  const int64_t height = tiles * kRows;
  const int64_t padded_k = (g.k + 3) / 4 * 4, padded_n = (g.n + 15) / 16 * 16;
  for (int64_t block = row; block < row_end; block += height) {
    const int64_t block_end = block + height < row_end ? block + height : row_end;
    for (int64_t first = panel * kPanel; first < padded_n && first < panel_end * kPanel; first += kPanel) {
      const int64_t width = padded_n - first < kPanel ? padded_n - first : kPanel;
      const int8_t* weight = g.weight + first * padded_k;
      for (int64_t c = 0; c < width && first + c < g.n; c += kColumns * W) {
        const int64_t columns = (width - c) / W < kColumns ? (width - c) / W : kColumns;
        strip(g, block, block_end, first + c, columns, weight + 4 * c, 4 * width);
      }
    }
  }
}

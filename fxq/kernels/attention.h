// softmax(q k^T) v as one pass over each head; a part of products.h, compiled once per instruction set.
//
// Keys and values of a head are packed once into vectors of W lanes, then kRows queries at a time go through both
// products and the softmax between them in a few kilobytes of scratch memory.

static constexpr float kMinusInfinity = -__builtin_inff();

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Keys as vectors: [vector of W keys][group of four d][W][4] int8, k - 128, zeros where there is no key or no d.
static void pack_keys(const Attention& a, const uint8_t* k, int8_t* packed) {
  const int64_t groups = ceil_div(a.depth, 4), whole = a.depth / 4;
  memset(packed, 0, round_up(a.keys, W) * groups * 4);
  for (int64_t s = 0; s < a.keys; ++s, k += a.k_stride[2]) {
    int8_t* to = packed + s / W * groups * 4 * W + s % W * 4;
    int64_t g = 0;
    for (; g + 2 <= whole; g += 2) {
      const uint64_t two = load<uint64_t>(k + 4 * g) ^ 0x8080808080808080u;
      store(to + g * 4 * W, uint32_t(two));
      store(to + (g + 1) * 4 * W, uint32_t(two >> 32));
    }
    if (g < whole) store(to + g * 4 * W, load<uint32_t>(k + 4 * g) ^ 0x80808080u);
    for (int64_t d = 4 * whole; d < a.depth; ++d) to[whole * 4 * W + d % 4] = int8_t(k[d] ^ 0x80);
  }
}

// Values as vectors: [vector of W e][group of four keys][W][4] int8, v - 128.
static void pack_values(const Attention& a, const uint8_t* v, int8_t* packed) {
  const int64_t groups = ceil_div(a.keys, 4), row = a.v_stride[2];
  for (int64_t e = 0; e < a.width; e += W) {
    const int64_t lanes = a.width - e < W ? a.width - e : W;
    for (int64_t g = 0; g < groups; ++g, packed += 4 * W) {
      I word = I{};
      for (int64_t i = 0; i < 4 && 4 * g + i < a.keys; ++i)
        word |= widen(load_some<B>(v + (4 * g + i) * row + e, lanes)) << int32_t(8 * i);
      store(packed, word ^ int32_t(0x80808080));
    }
  }
}

// acc[r][c] = done.start(c) + sum over groups of four, then done(r, c, acc): R rows of x against C vectors.
// Done::kUnrolled: straight from the registers; code that branches would make a tile of that ten times as long.
template <int R, int C, class Done>
static inline void products(const uint8_t* x, int64_t x_stride, const int8_t* w, int64_t w_stride, int64_t groups,
                            const Done& done) {
  I acc[R][C];
  UNROLL for (int c = 0; c < C; ++c) {
    const I start = done.start(c);
    UNROLL for (int r = 0; r < R; ++r) acc[r][c] = start;
  }
  for (int64_t i = 0; i < groups; ++i, w += 4 * W) {
    Weights b[C];
    UNROLL for (int c = 0; c < C; ++c) b[c] = weights(w + c * w_stride);
    UNROLL for (int r = 0; r < R; ++r) {
      const Input row = input(load<uint32_t>(x + r * x_stride + 4 * i));
      UNROLL for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], row, b[c]);
    }
  }
  if constexpr (Done::kUnrolled) {
    UNROLL for (int c = 0; c < C; ++c) {
      UNROLL for (int r = 0; r < R; ++r) done(r, c, acc[r][c]);
    }
  } else {
    I sums[C][R];
    UNROLL for (int c = 0; c < C; ++c) {
      UNROLL for (int r = 0; r < R; ++r) store(&sums[c][r], acc[r][c]);
    }
    for (int c = 0; c < C; ++c) {
      for (int r = 0; r < R; ++r) done(r, c, load<I>(&sums[c][r]));
    }
  }
}

struct StoreScores {  // f32(acc * m) [+ mask]
  static constexpr bool kUnrolled = true;
  const int32_t* bias;
  const float* mask;
  int64_t mask_stride;
  F multiplier;
  float* scores;
  int64_t stride;
  inline I start(int c) const { return load<I>(bias + c * W); }
  inline void operator()(int r, int c, I acc) const {
    F x = __builtin_convertvector(acc, F) * multiplier;
    if (mask) x += load<F>(mask + r * mask_stride + c * W);
    store(scores + r * stride + c * W, x);
  }
};

struct StoreOutput {  // f32(acc + offset) * m, of the rows that there are
  static constexpr bool kUnrolled = false;
  const Attention& a;
  const int32_t* offset;
  const float* multiplier;
  Rounding round;
  int64_t rows, lanes;  // lanes: those left from the first vector on
  uint8_t* y;           // the block's first row and lane
  inline I start(int) const { return I{}; }
  inline void operator()(int r, int c, I acc) const {
    if (r >= rows) return;
    const F value = __builtin_convertvector(acc + offset[r], F) * multiplier[r];
    const int64_t i = r * a.heads * a.width + c * W, count = lanes - c * W;
    if (a.is_float)
      store_some(reinterpret_cast<float*>(y) + i, value, count);
    else
      store_some(y + i, round(value), count);
  }
};

template <int R, int C, class Done>
static void product_of(int64_t columns, const uint8_t* x, int64_t x_stride, const int8_t* w, int64_t w_stride,
                       int64_t groups, const Done& done) {
  if constexpr (C > 1)
    if (columns < C) return product_of<R, C / 2>(columns, x, x_stride, w, w_stride, groups, done);
  products<R, C>(x, x_stride, w, w_stride, groups, done);
}

template <class Done>
static void product_of(int64_t rows, int64_t columns, const uint8_t* x, int64_t x_stride, const int8_t* w,
                       int64_t w_stride, int64_t groups, const Done& done) {
  if (rows == 1)
    product_of<1, kColumns>(columns, x, x_stride, w, w_stride, groups, done);
  else  // the rows that are too many are scratch memory
    product_of<kRows, kColumns>(columns, x, x_stride, w, w_stride, groups, done);
}

// The largest of a row of scores, a multiple of W; NaN compares false.
static inline float largest(const float* x, int64_t count) {
  F tops = splat(kMinusInfinity);
  for (int64_t i = 0; i < count; i += W) {
    const F v = load<F>(x + i);
    tops = v > tops ? v : tops;
  }
  return fold<Larger, float>(tops);
}

// rne(255 * 2**(-9 i / 255)).
struct Exponentials {
  uint8_t p[256] = {};
  constexpr Exponentials() {
    double value = 255;
    for (uint8_t& entry : p) {
      entry = uint8_t(value + 0.5);
      value *= 0.9758328005684533;  // 2**(-9 / 255)
    }
  }
};
alignas(64) constexpr Exponentials kExponentials;

// i = min(rne((top - x) * 255 / (9 ln 2)), 255) of a row of scores; NaN compares false.
static inline void softmax_steps(const float* x, float top, uint8_t* steps, int64_t count) {
  const F last = splat(255.0f);
  for (int64_t i = 0; i < count; i += W) {
    const F d = (top - load<F>(x + i)) * 40.876358f;
    store(steps + i, narrow((I)(minimum(d, last) + 12582912.0f) - 0x4B400000));
  }
}

// The sum of `count` bytes, a multiple of four; ones: 4 * W of them.
static inline int32_t sum_of_bytes(const uint8_t* p, int64_t count, const int8_t* ones) {
  const Weights one = weights(ones);
  const int32_t* groups = reinterpret_cast<const int32_t*>(p);
  I totals = I{};
  for (int64_t i = 0; i < count / 4; i += W)
    totals = dot(totals, input_lanes(load_some<I>(groups + i, count / 4 - i)), one);
  return fold<Sum, int32_t>(totals);
}

struct FillMasked {
  const uint8_t* from;
  float* to;
  inline void operator()(int64_t i, int64_t count) const {
    const I hidden = widen(load_some<B>(from + i, count)) == 0;
    store_some(to + i, (F)(hidden & int32_t(0xFF800000)), count);
  }
};

// A row of the mask as what is added to the scores.
static void read_mask(const Attention& a, int64_t offset, float* to) {
  const int64_t step = a.mask_stride[3];
  if (a.mask_is_float) {
    const float* from = static_cast<const float*>(a.mask) + offset;
    if (step == 1) return void(memcpy(to, from, a.keys * sizeof(float)));
    for (int64_t s = 0; s < a.keys; ++s) to[s] = from[s * step];
  } else {
    const uint8_t* from = static_cast<const uint8_t*>(a.mask) + offset;
    if (step == 1)
      for_each_vector(a.keys, FillMasked{from, to});
    else
      for (int64_t s = 0; s < a.keys; ++s) to[s] = from[s * step] ? 0.0f : kMinusInfinity;
  }
}

// The queries [row, row_end) of head `head` of all batch x heads.
static void attention(const Attention& a, int64_t head, int64_t row, int64_t row_end, const AttentionScratch& at,
                      bool packed) {
  const int64_t b = head / a.heads, h = head % a.heads, kv = h / (a.heads / a.kv_heads);
  const int64_t groups = ceil_div(a.depth, 4), depth = 4 * groups, span = round_up(a.keys, kPanel);
  const int64_t key_vector = 4 * W * groups, value_vector = 4 * W * ceil_div(a.keys, 4);
  if (!packed) {
    pack_keys(a, a.k + b * a.k_stride[0] + kv * a.k_stride[1], at.keys);
    pack_values(a, a.v + b * a.v_stride[0] + kv * a.v_stride[1], at.values);
    for (int64_t s = 0; s < a.keys; s += W) {  // -z_q * sum of each key
      I sum = I{};
      for (int64_t g = 0; g < groups; ++g)
        sum = dot(sum, input(0x01010101u), weights(at.keys + s / W * key_vector + g * 4 * W));
      store(at.bias + s, sum * -a.q_zero_point);
    }
  }
  const int64_t mask_offset = b * a.mask_stride[0] + h * a.mask_stride[1];
  const bool one_mask = a.mask && a.mask_stride[2] == 0;
  int8_t ones[4 * W];
  memset(ones, 1, sizeof ones);
  bool masks = a.mask;
  if (one_mask) {
    read_mask(a, mask_offset, at.mask);
    I bits = I{};  // where it hides nothing there is none
    const int32_t* const added = reinterpret_cast<const int32_t*>(at.mask);
    for (int64_t s = 0; s < a.keys; s += W) bits |= load_some<I>(added + s, a.keys - s);
    masks = fold<Either, int32_t>(bits) != 0;
  }
  const int64_t item = a.is_float ? sizeof(float) : 1;
  const Rounding round(a.zero_point, 0, 255);

  for (; row < row_end; row += kRows) {
    const int64_t rows = row_end - row < kRows ? row_end - row : kRows;
    const int64_t seen = a.is_causal && row + rows < a.keys ? row + rows : a.keys;  // keys that any of them sees
    const int64_t vectors = ceil_div(seen, W);
    const uint8_t* q = a.q + b * a.q_stride[0] + h * a.q_stride[1] + row * a.q_stride[2];
    const bool in_place = depth == a.depth && (rows == kRows || rows == 1);
    const uint8_t* const queries = in_place ? q : at.queries;
    const int64_t query_stride = in_place ? a.q_stride[2] : depth;
    for (int64_t r = 0; r < rows && !in_place; ++r) {
      copy(at.queries + r * depth, q + r * a.q_stride[2], a.depth);
      for (int64_t d = a.depth; d < depth; ++d) at.queries[r * depth + d] = 0;
    }
    for (int64_t r = 0; r < rows && a.mask && !one_mask; ++r)
      read_mask(a, mask_offset + (row + r) * a.mask_stride[2], at.mask + r * span);
    for (int64_t c = 0, columns; c < vectors; c += columns) {
      columns = columns_of(vectors - c);
      product_of(rows, columns, queries, query_stride, at.keys + c * key_vector, key_vector, groups,
                 StoreScores{at.bias + c * W, masks ? at.mask + c * W : nullptr, one_mask ? 0 : span,
                             splat(a.multiplier), at.scores + c * W, span});
    }
    int32_t offset[kRows] = {};
    float multiplier[kRows] = {};
    float tops[kRows];  // all before the first exp, so that no row waits for its own
    bool empty[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t last = a.is_causal && row + r + 1 < seen ? row + r + 1 : seen;
      for (int64_t s = last; s < vectors * W; ++s) at.scores[r * span + s] = kMinusInfinity;
      tops[r] = largest(at.scores + r * span, vectors * W);
    }
    for (int64_t r = 0; r < rows; ++r) softmax_steps(at.scores + r * span, tops[r], at.weights + r * span, vectors * W);
    lookup(at.weights, kExponentials.p, at.weights, rows * span);
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t total = sum_of_bytes(at.weights + r * span, vectors * W, ones);
      empty[r] = total == 0;
      offset[r] = (128 - a.v_zero_point) * total;
      multiplier[r] = a.v_multiplier / float(total);
    }
    uint8_t* y = static_cast<uint8_t*>(a.y) + ((b * a.queries + row) * a.heads + h) * a.width * item;
    for (int64_t e = 0, columns; e < a.width; e += columns * W) {
      columns = columns_of(ceil_div(a.width - e, W));
      product_of(rows, columns, at.weights, span, at.values + e / W * value_vector, value_vector, ceil_div(seen, 4),
                 StoreOutput{a, offset, multiplier, round, rows, a.width - e, y + e * item});
    }
    for (int64_t r = 0; r < rows; ++r, y += a.heads * a.width * item) {
      for (int64_t e = 0; e < a.width && empty[r]; ++e) {
        if (a.is_float)
          reinterpret_cast<float*>(y)[e] = a.masked;
        else
          y[e] = uint8_t(a.masked);
      }
    }
  }
}

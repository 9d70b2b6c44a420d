// softmax(q k^T) v as one pass over each head; a part of products.h, compiled once per instruction set.
//
// Keys and values of a head are packed once into vectors of W lanes, then kRows queries at a time go through both
// products and the softmax between them in a few kilobytes of scratch memory.

// acc[r][c] = done.start(c) + sum over groups of four, then done(r, acc[r]): R rows of x against C vectors.
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
    UNROLL for (int r = 0; r < R; ++r) done(r, acc[r]);
  } else {
    I sums[R][C];
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int c = 0; c < C; ++c) store(&sums[r][c], acc[r][c]);
    }
    for (int r = 0; r < done.rows && r < R; ++r) done(r, sums[r]);
  }
}

// f32(acc * m); the largest of each row goes to `tops`. kAll: no mask is added, and each row sees all of the keys.
template <bool kAll>
struct StoreScores {
  static constexpr bool kUnrolled = kAll;
  const int32_t* bias;
  F multiplier;
  float* scores;
  int64_t stride;
  F* tops;
  int64_t rows;
  const float* mask;  // or null
  int64_t mask_stride;
  const int32_t* seen;  // how many keys each row sees; the others get -inf
  I key;                // those of the first vector
  inline I start(int c) const { return load<I>(bias + c * W); }
  template <int C>
  inline void operator()(int r, const I (&acc)[C]) const {
    F top = tops[r];
    UNROLL for (int c = 0; c < C; ++c) {
      F x = __builtin_convertvector(acc[c], F) * multiplier;
      if (!kAll && mask) x += load<F>(mask + r * mask_stride + c * W);
      if (!kAll) x = key + c * W < seen[r] ? x : splat(kMinusInfinity);
      store(scores + r * stride + c * W, x);
      top = maximum(x, top);  // NaN compares false
    }
    tops[r] = top;
  }
};

struct StoreOutput {  // f32(acc + offset) * m, of the rows that there are
  static constexpr bool kUnrolled = false;
  const Attention& a;
  const int32_t* offset;  // of each row, as
  const float* multiplier;
  Rounding round;
  int64_t rows, lanes;  // lanes: those left from the first vector on
  uint8_t* y;           // the block's first row and lane
  inline I start(int) const { return I{}; }
  template <int C>
  inline void operator()(int r, const I (&acc)[C]) const {
    UNROLL for (int c = 0; c < C; ++c) {
      const F value = __builtin_convertvector(acc[c] + offset[r], F) * multiplier[r];
      const int64_t i = r * a.heads * a.width + c * W, count = lanes - c * W;
      if (a.is_float)
        store_some(reinterpret_cast<float*>(y) + i, value, count);
      else
        store_some(y + i, round(value), count);
    }
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

// Bytes, a multiple of four, added up in lanes; ones: 4 * W of them.
static inline I sums_of_bytes(const uint8_t* p, int64_t count, const int8_t* ones) {
  const Weights one = weights(ones);
  const int32_t* groups = reinterpret_cast<const int32_t*>(p);
  I totals = I{};
  int64_t i = 0;
  for (; i + W <= count / 4; i += W) totals = dot(totals, input_lanes(load<I>(groups + i)), one);
  if (i < count / 4) totals = dot(totals, input_lanes(load_some<I>(groups + i, count / 4 - i)), one);
  return totals;
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
  constexpr int kTogether = kRows > 4 ? 8 : 4;  // what rows are folded as
  I lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
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
  const F multiplier = splat(a.multiplier);

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
    F tops[kTogether];
    UNROLL for (F& top : tops) top = splat(kMinusInfinity);
    int32_t sees[kRows];
    for (int64_t r = 0; r < kRows; ++r) sees[r] = int32_t(a.is_causal && row + r + 1 < seen ? row + r + 1 : seen);
    const bool all = !masks && !a.is_causal && seen % W == 0;
    for (int64_t c = 0, columns; c < vectors; c += columns) {
      columns = columns_of(vectors - c);
      const auto product = [&](const auto& scores) {
        product_of(rows, columns, queries, query_stride, at.keys + c * key_vector, key_vector, groups, scores);
      };
      const int32_t* const bias = at.bias + c * W;
      float* const scores = at.scores + c * W;
      if (all)
        product(StoreScores<true>{bias, multiplier, scores, span, tops});
      else
        product(StoreScores<false>{bias, multiplier, scores, span, tops, rows, masks ? at.mask + c * W : nullptr,
                                   one_mask ? 0 : span, sees, lane + int32_t(c * W)});
    }
    const F top = fold_rows<Larger>(tops);
    for (int64_t r = 0; r < rows; ++r)
      softmax_steps(at.scores + r * span, top[r], at.weights + r * span, vectors * W);
    lookup(at.weights, kExponentials.p, at.weights, rows * span);
    I sums[kTogether];
    UNROLL for (I& sum : sums) sum = I{};
    for (int64_t r = 0; r < rows; ++r) sums[r] = sums_of_bytes(at.weights + r * span, vectors * W, ones);
    const I totals = fold_rows<Sum>(sums);
    int32_t offset[W];
    float normalised[W];
    store(offset, (128 - a.v_zero_point) * totals);
    store(normalised, a.v_multiplier / __builtin_convertvector(totals, F));
    uint8_t* y = static_cast<uint8_t*>(a.y) + ((b * a.queries + row) * a.heads + h) * a.width * item;
    for (int64_t e = 0, columns; e < a.width; e += columns * W) {
      columns = columns_of(ceil_div(a.width - e, W));
      product_of(rows, columns, at.weights, span, at.values + e / W * value_vector, value_vector, ceil_div(seen, 4),
                 StoreOutput{a, offset, normalised, round, rows, a.width - e, y + e * item});
    }
    for (int64_t r = 0; r < rows; ++r, y += a.heads * a.width * item) {
      for (int64_t e = 0; e < a.width && totals[r] == 0; ++e) {
        if (a.is_float)
          reinterpret_cast<float*>(y)[e] = a.masked;
        else
          y[e] = uint8_t(a.masked);
      }
    }
  }
}

// Depthwise convolutions to uint8: four taps of 4 * W channels become lanes of four bytes, as `dot` wants them; a part
// of products.h. `interleave` leaves channels in an order that `deinterleave` takes back: in lane l of vector j is channel
// l / 4 * 16 + 4 * j + l % 4. Fewer channels than 4 * W are those of several pixels side by side.

// The operands of the channels of one tile, in the order of `interleave`.
struct Channels {
  const int8_t* weight;  // [taps / 4][4 * W][4]
  alignas(64) int32_t bias[4 * W];
  alignas(64) float multiplier[4 * W];
};

// kUnits times 4 * W results: kPieces pixels of 4 * W / kPieces channels each; x and y point to the first channel.
template <int kUnits, int kPieces>
static inline void depthwise_tile(const Gemm& g, const uint8_t* const (&x)[kUnits * kPieces], const Channels& own,
                                  const uint8_t* const (&residual)[kUnits * kPieces],
                                  uint8_t* const (&y)[kUnits * kPieces], const Rounding& round) {
  I acc[kUnits][4];
  UNROLL for (int u = 0; u < kUnits; ++u) {
    UNROLL for (int j = 0; j < 4; ++j) acc[u][j] = load<I>(own.bias + j * W);
  }
  const int8_t* w = own.weight;
  for (int64_t t = 0; t < g.run_count; t += 4, w += 16 * W) {
    Weights b[4];
    UNROLL for (int j = 0; j < 4; ++j) b[j] = weights(w + 4 * W * j);
    UNROLL for (int u = 0; u < kUnits; ++u) {
      I four[4];
      interleave(pieces<kPieces>(x + u * kPieces, g.runs[t]), pieces<kPieces>(x + u * kPieces, g.runs[t + 1]),
                 pieces<kPieces>(x + u * kPieces, g.runs[t + 2]), pieces<kPieces>(x + u * kPieces, g.runs[t + 3]), four);
      UNROLL for (int j = 0; j < 4; ++j) acc[u][j] = dot(acc[u][j], input_lanes(four[j]), b[j]);
    }
  }
  F value[kUnits][4];
  UNROLL for (int u = 0; u < kUnits; ++u) {
    UNROLL for (int j = 0; j < 4; ++j)
      value[u][j] = __builtin_convertvector(acc[u][j], F) * load<F>(own.multiplier + j * W);
    if (g.residual) {
      I q[4];
      interleave(pieces<kPieces>(residual + u * kPieces, 0), Bytes{}, Bytes{}, Bytes{}, q);
      UNROLL for (int j = 0; j < 4; ++j)
        value[u][j] += __builtin_convertvector(q[j] - g.residual_zero_point, F) * g.residual_multiplier;
    }
  }
  if (const Inside inside = inside_of(g); inside != Inside::kNothing) {
    UNROLL for (int u = 0; u < kUnits; ++u) {
      apply(inside, value[u]);
      UNROLL for (int j = 0; j < 4; ++j) value[u][j] *= g.inverse;
    }
  } else if (g.output == Output::kActivationUint8) {
    alignas(64) float stage[kUnits * 4 * W];
    UNROLL for (int u = 0; u < kUnits; ++u) {
      UNROLL for (int j = 0; j < 4; ++j) store(stage + (4 * u + j) * W, value[u][j]);
    }
    activate(g.activation, stage, 1, kUnits * 4 * W, 0);
    UNROLL for (int u = 0; u < kUnits; ++u) {
      UNROLL for (int j = 0; j < 4; ++j) value[u][j] = load<F>(stage + (4 * u + j) * W) * g.inverse;
    }
  }
  UNROLL for (int u = 0; u < kUnits; ++u) {
    I q[4];
    UNROLL for (int j = 0; j < 4; ++j) q[j] = round.lanes(value[u][j]);
    store_pieces<kPieces>(y + u * kPieces, deinterleave(q));
  }
}

template <int kPieces>
static void depthwise_channels(const Gemm& g, int64_t pixels, int64_t channel, int8_t* memory) {
  constexpr int kUnits = W == 16 ? 2 : 1, kMany = kUnits * kPieces;
  constexpr int64_t kOwn = 4 * W / kPieces;
  const int64_t padded_k = (g.k + 3) / 4 * 4, padded_n = (g.n + 15) / 16 * 16;
  Channels own;
  own.weight = memory;
  for (int64_t i = 0; i < W; ++i) {  // four channels at a time
    const int64_t from = channel + (16 * (i % (W / 4)) + 4 * (i / (W / 4))) % kOwn;
    memcpy(own.bias + 4 * i, g.bias + from, 16);
    memcpy(own.multiplier + 4 * i, g.multiplier + from, 16);
    const int64_t panel = from / kPanel * kPanel, width = padded_n - panel < kPanel ? padded_n - panel : kPanel;
    const int8_t* weight = g.weight + panel * padded_k + 4 * (from - panel);
    for (int64_t t = 0; t < g.run_count; t += 4) memcpy(memory + 4 * t * W + 16 * i, weight + t * width, 16);
  }
  const Rounding round(g.zero_point, g.low, g.high);
  for (int64_t pixel = 0; pixel < pixels; pixel += kMany) {
    const uint8_t *x[kMany], *residual[kMany] = {};
    uint8_t* y[kMany];
    for (int i = 0; i < kMany; ++i) {
      const int64_t p = pixel + i < pixels ? pixel + i : pixels - 1;  // the last one fills the tile
      x[i] = g.rows[p] + channel;
      y[i] = static_cast<uint8_t*>(g.y) + p * g.y_stride + channel;
      if (g.residual) residual[i] = g.residual + p * g.residual_stride + channel;
    }
    depthwise_tile<kUnits, kPieces>(g, x, own, residual, y, round);
  }
}

static void depthwise(const Gemm& g, int64_t pixels, int8_t* memory) {
  int64_t channel = 0;
  for (; channel + 4 * W <= g.n; channel += 4 * W) depthwise_channels<1>(g, pixels, channel, memory);
  if constexpr (W >= 8)
    for (; channel + 2 * W <= g.n; channel += 2 * W) depthwise_channels<2>(g, pixels, channel, memory);
  if constexpr (W >= 16)
    for (; channel + W <= g.n; channel += W) depthwise_channels<4>(g, pixels, channel, memory);
  if (channel < g.n) depthwise_channels<W / 4>(g, pixels, g.n - 16, memory);  // the last 16, some of them again
}

// Convolutions whose output channels have inputs of their own, which lie in the lanes beside their weights: depthwise
// ones, and groups of 4 or 8 channels; a part of products.h.

// Four taps of W channels: the bytes that `dot` multiplies in each lane.
static inline I gather(const uint8_t* x, const int64_t* taps, int64_t count, int64_t valid) {
  I bytes = widen(load_some<B>(x + taps[0], valid));
  for (int64_t t = 1; t < count; ++t) bytes |= widen(load_some<B>(x + taps[t], valid)) << int(8 * t);
  return bytes;
}

// Four channels of the group of each lane.
static inline I group_lanes(const uint8_t* x, I index, int64_t valid) {
  if (valid >= W) return spread(x, index);
  I groups{};
  for (int64_t lane = 0; lane < valid; ++lane) {
    int32_t own;
    memcpy(&own, x + 4 * index[lane], sizeof own);
    groups[lane] = own;
  }
  return groups;
}

// clamp(scale(sum) + zero point) of P pixels.
template <bool twice, int P>
static void fixed_lanes(const Gemm& g, int64_t pixel, int64_t channel, int64_t valid, const I (&sums)[P]) {
  const FixedScale<twice> scale(load_some<I>(g.fixed + channel, valid), load_some<I>(g.shift + channel, valid));
  for (int p = 0; p < P; ++p)
    store_some(static_cast<uint8_t*>(g.y) + (pixel + p) * g.y_stride + channel,
               scale(sums[p], g.zero_point, g.low, g.high), valid);
}

// P pixels of W channels from `channel` on, of which `valid` exist.
template <int P>
static inline void lanes_tile(const Gemm& g, int64_t pixel, int64_t channel, int64_t valid, const int8_t* w,
                                  int64_t step, const Rounding& round) {
  const uint8_t* x = g.x + pixel * g.x_stride + channel;
  const I bias = load_some<I>(g.bias + channel, valid);
  I acc[P];
  UNROLL for (int p = 0; p < P; ++p) acc[p] = bias;
  if (g.run_bytes == 1) {
    int64_t t = 0;
    for (; t + 4 <= g.run_count; t += 4, w += step) {
      const Weights b = weights(w);
      UNROLL for (int p = 0; p < P; ++p)
        acc[p] = dot(acc[p], input_lanes(gather(x + p * g.x_stride, g.runs + t, 4, valid)), b);
    }
    if (t < g.run_count) {
      const Weights b = weights(w);
      UNROLL for (int p = 0; p < P; ++p)
        acc[p] = dot(acc[p], input_lanes(gather(x + p * g.x_stride, g.runs + t, g.run_count - t, valid)), b);
    }
  } else {
    const int64_t own = g.run_bytes, first = channel / own;
    I index;
    for (int64_t lane = 0; lane < W; ++lane) index[lane] = int32_t(((channel + lane) / own - first) * (own / 4));
    x += first * own - channel;
    for (int64_t t = 0; t < g.run_count; ++t) {
      for (int64_t four = 0; four < own / 4; ++four, w += step) {
        const Weights b = weights(w);
        UNROLL for (int p = 0; p < P; ++p)
          acc[p] = dot(acc[p], input_lanes(group_lanes(x + p * g.x_stride + g.runs[t], index + int32_t(four), valid)), b);
      }
    }
  }

  if (g.output == Output::kFixed) {
    (g.twice ? fixed_lanes<true, P> : fixed_lanes<false, P>)(g, pixel, channel, valid, acc);
    return;
  }
  const F multiplier = load_some<F>(g.multiplier + channel, valid);
  alignas(64) float stage[P * W];
  UNROLL for (int p = 0; p < P; ++p) {
    F value = __builtin_convertvector(acc[p], F) * multiplier;
    const int64_t at = (pixel + p) * g.y_stride + channel;
    if (g.addend) value += load_some<F>(g.addend + (pixel + p) * g.addend_stride + channel, valid);
    if (g.residual) value += residual(g, g.residual + (pixel + p) * g.residual_stride + channel, valid);
    if (g.output == Output::kUint8)
      store_some(static_cast<uint8_t*>(g.y) + at, round(value), valid);
    else if (g.output == Output::kFloat)
      store_some(static_cast<float*>(g.y) + at, value, valid);
    else
      store(stage + p * W, value);
  }
  if (g.output != Output::kActivationUint8) return;
  activate(g.activation, stage, 1, P * W, 0);
  for (int p = 0; p < P; ++p)
    quantize(stage + p * W, static_cast<uint8_t*>(g.y) + (pixel + p) * g.y_stride + channel, valid, g.inverse,
             g.zero_point);
}

// A row of `pixels` outputs: the windows begin at g.x, g.x_stride apart, g.runs are the taps.
static void lanes(const Gemm& g, int64_t pixels) {
  constexpr int kPixels = 4;
  const Rounding round(g.zero_point, g.low, g.high);
  const int64_t padded_k = (g.k + 3) / 4 * 4, padded_n = (g.n + 15) / 16 * 16;
  for (int64_t channel = 0; channel < g.n; channel += W) {
    const int64_t first = channel / kPanel * kPanel, width = padded_n - first < kPanel ? padded_n - first : kPanel;
    const int8_t* w = g.weight + first * padded_k + 4 * (channel - first);
    const int64_t rest = g.n - channel;
    int64_t pixel = 0;
    for (; pixel + kPixels <= pixels; pixel += kPixels) {
      if (rest >= W)
        lanes_tile<kPixels>(g, pixel, channel, W, w, 4 * width, round);
      else
        lanes_tile<kPixels>(g, pixel, channel, rest, w, 4 * width, round);
    }
    for (; pixel < pixels; ++pixel) lanes_tile<1>(g, pixel, channel, rest < W ? rest : W, w, 4 * width, round);
  }
}

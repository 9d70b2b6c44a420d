// Kernels for channels-last images beside the products: pooling, means of pixels, gates; a part of body.h.

// y[c] = the largest x[taps[t] + c] over `count` taps.
static void max_of(const uint8_t* x, const int64_t* taps, int64_t count, uint8_t* y, int64_t channels) {
  using Bytes = typename Vectors<4 * W>::B;
  int64_t c = 0;
  for (; c + 4 * W <= channels; c += 4 * W) {
    Bytes best = load<Bytes>(x + taps[0] + c);
    for (int64_t t = 1; t < count; ++t) {
      const Bytes other = load<Bytes>(x + taps[t] + c);
      best = other > best ? other : best;
    }
    store(y + c, best);
  }
  for (; c < channels; ++c) {
    uint8_t best = x[taps[0] + c];
    for (int64_t t = 1; t < count; ++t) best = x[taps[t] + c] > best ? x[taps[t] + c] : best;
    y[c] = best;
  }
}

// y[c] = round(f32(sum - count * zero_point) * multiplier), the sum of `count` pixels of `channels` from each run on.
static void mean_of(const uint8_t* x, const int64_t* runs, int64_t run_count, int64_t pixels, int64_t pixel_step,
                    int32_t z_x, float multiplier, uint8_t* y, int64_t channels, int32_t zero_point, int32_t low,
                    int32_t high) {
  const Rounding round(zero_point, low, high);
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t valid = channels - c < W ? channels - c : W;
    I sum = I{} - int32_t(run_count * pixels) * z_x;
    for (int64_t r = 0; r < run_count; ++r) {
      const uint8_t* p = x + runs[r] + c;
      if (valid == W)
        for (int64_t i = 0; i < pixels; ++i, p += pixel_step) sum += widen(load<B>(p));
      else
        for (int64_t i = 0; i < pixels; ++i, p += pixel_step) sum += widen(load_some<B>(p, valid));
    }
    store_some(y + c, round(__builtin_convertvector(sum, F) * multiplier), valid);
  }
}

// y[c] = rne of the bilinear mean of four pixels.
static void mix_of(const uint8_t* const (&q)[4], float v0, float v1, float u0, float u1, uint8_t* y, int64_t channels) {
  const Rounding round(0, 0, 255);
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t valid = channels - c < W ? channels - c : W;
    F x[4];
    UNROLL for (int i = 0; i < 4; ++i) x[i] = __builtin_convertvector(widen(load_some<B>(q[i] + c, valid)), F);
    const F top = x[0] * v0 + x[1] * v1, bottom = x[2] * v0 + x[3] * v1;
    store_some(y + c, round(top * u0 + bottom * u1), valid);
  }
}

struct Multiply {
  const uint8_t *a, *b;
  int32_t z_a, z_b;
  float multiplier;
  Rounding round;
  uint8_t* y;
  inline void operator()(int64_t i, int64_t count) const {
    const I product = (widen(load_some<B>(a + i, count)) - z_a) * (widen(load_some<B>(b + i, count)) - z_b);
    store_some(y + i, round(__builtin_convertvector(product, F) * multiplier), count);
  }
};
static void multiply(Term a, Term b, uint8_t* y, int64_t count, int32_t zero_point, int32_t low, int32_t high) {
  for_each_vector(count, Multiply{a.q, b.q, a.zero_point, b.zero_point, a.multiplier,
                                  Rounding(zero_point, low, high), y});
}

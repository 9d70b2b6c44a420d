// Kernels for channels-last images beside the products: pooling, means of pixels, gates; a part of body.h.

template <class V>
static inline void max_part(const uint8_t* x, const int64_t* taps, int64_t count, uint8_t* y) {
  V best = load<V>(x + taps[0]);
  for (int64_t t = 1; t < count; ++t) {
    const V other = load<V>(x + taps[t]);
    best = other > best ? other : best;
  }
  store(y, best);
}

// y[p][c] = the largest x[p * pixel_step + taps[t] + c] over `count` taps.
static void max_of(const uint8_t* x, const int64_t* taps, int64_t count, int64_t pixels, int64_t pixel_step, uint8_t* y,
                   int64_t channels) {
  for (int64_t p = 0; p < pixels; ++p, x += pixel_step, y += channels) {
    int64_t c = 0;
    for (; c + 4 * W <= channels; c += 4 * W) max_part<typename Vectors<4 * W>::B>(x + c, taps, count, y + c);
    for (; c + W <= channels; c += W) max_part<B>(x + c, taps, count, y + c);
    if (c < channels && channels >= W) {  // the last ones, some of them again
      max_part<B>(x + channels - W, taps, count, y + channels - W);
      continue;
    }
    for (; c < channels; ++c) {
      uint8_t best = x[taps[0] + c];
      for (int64_t t = 1; t < count; ++t) best = x[taps[t] + c] > best ? x[taps[t] + c] : best;
      y[c] = best;
    }
  }
}

// sum - count * zero_point over `count` pixels of `valid` channels from each run on.
static inline I sum_of(const uint8_t* x, const int64_t* runs, int64_t run_count, int64_t pixels, int64_t pixel_step,
                       int32_t z_x, int64_t valid) {
  I sum = I{} - int32_t(run_count * pixels) * z_x;
  for (int64_t r = 0; r < run_count; ++r) {
    const uint8_t* p = x + runs[r];
    if (valid == W)
      for (int64_t i = 0; i < pixels; ++i, p += pixel_step) sum += widen(load<B>(p));
    else
      for (int64_t i = 0; i < pixels; ++i, p += pixel_step) sum += widen(load_some<B>(p, valid));
  }
  return sum;
}

// y[c] = round(f32(sum) * multiplier).
static void mean_of(const uint8_t* x, const int64_t* runs, int64_t run_count, int64_t pixels, int64_t pixel_step,
                    int32_t z_x, float multiplier, uint8_t* y, int64_t channels, int32_t zero_point, int32_t low,
                    int32_t high) {
  const Rounding round(zero_point, low, high);
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t valid = channels - c < W ? channels - c : W;
    const I sum = sum_of(x + c, runs, run_count, pixels, pixel_step, z_x, valid);
    store_some(y + c, round(__builtin_convertvector(sum, F) * multiplier), valid);
  }
}

// y[c] = scale(sum), without floats.
template <bool twice>
static void mean_of_fixed(const uint8_t* x, const int64_t* runs, int64_t run_count, int64_t pixels, int64_t pixel_step,
                          int32_t z_x, int32_t multiplier, int32_t shift, uint8_t* y, int64_t channels,
                          int32_t zero_point, int32_t low, int32_t high) {
  const FixedScale<twice> scale(multiplier - I{}, shift - I{});
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t valid = channels - c < W ? channels - c : W;
    const I sum = sum_of(x + c, runs, run_count, pixels, pixel_step, z_x, valid);
    store_some(y + c, scale(sum, zero_point, low, high), valid);
  }
}
static void mean_of_fixed(const uint8_t* x, const int64_t* runs, int64_t run_count, int64_t pixels, int64_t pixel_step,
                          int32_t z_x, int32_t multiplier, int32_t shift, bool twice, uint8_t* y, int64_t channels,
                          int32_t zero_point, int32_t low, int32_t high) {
  (twice ? mean_of_fixed<true> : mean_of_fixed<false>)(x, runs, run_count, pixels, pixel_step, z_x, multiplier, shift,
                                                       y, channels, zero_point, low, high);
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

static void mix_of_fixed(const uint8_t* const (&q)[4], int32_t v0, int32_t v1, int32_t u0, int32_t u1, uint8_t* y,
                         int64_t channels) {
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t valid = channels - c < W ? channels - c : W;
    I x[4];
    UNROLL for (int i = 0; i < 4; ++i) x[i] = widen(load_some<B>(q[i] + c, valid));
    const I top = x[0] * v0 + x[1] * v1, bottom = x[2] * v0 + x[3] * v1;
    store_some(y + c, narrow((top * u0 + bottom * u1 + (1 << 21)) >> 22), valid);
  }
}

static inline F steps(const Term& t, int64_t i, int64_t count) {
  return __builtin_convertvector(widen(load_some<B>(t.q + i, count)) - t.zero_point, F);
}

// Rows of `row` values from `begin` to `end`, by the same b.
struct MultiplyRows {
  Term a, b;
  Rounding round;
  uint8_t* y;
  int64_t begin, end, row;
  inline void operator()(int64_t i, int64_t count) const {
    const F factor = steps(b, i, count);
    for (int64_t at = begin + i; at < end; at += row)
      store_some(y + at, round(steps(a, at, count) * factor * a.multiplier), count);
  }
};

// The products are exact in float32.
static void multiply(Term a, Term b, uint8_t* y, int64_t rows, int64_t count, int32_t zero_point, int32_t low,
                     int32_t high) {
  const Rounding round(zero_point, low, high);
  const int64_t fit = 8192 / (count + 1) + 1;  // rows that stay in the first-level cache
  for (int64_t row = 0; row < rows; row += fit)
    for_each_vector(count, MultiplyRows{a, b, round, y, row * count, (row + fit < rows ? row + fit : rows) * count, count});
}

// to[j * step + i] = from[i * stride + j] for four i: bytes side by side, moved as words.
static void interleave_four(const uint8_t* from, int64_t stride, uint8_t* to, int64_t step, int64_t count) {
  alignas(64) uint32_t words[W];
  for (int64_t j = 0; j < count; j += W) {
    const int64_t valid = count - j < W ? count - j : W;
    I word{};
    UNROLL for (int i = 0; i < 4; ++i) word |= widen(load_some<B>(from + i * stride + j, valid)) << (8 * i);
    store(words, word);
    for (int64_t k = 0; k < valid; ++k, to += step) memcpy(to, words + k, 4);
  }
}

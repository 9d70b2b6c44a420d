// Normalisation of rows, step by step that of fxq/numerics/norms.py; a part of body.h.

constexpr int kLanes = 64 / W;  // vectors of partial sums

static inline F first_of(F v, int64_t count) {  // the first `count` lanes, the others 0
  F some = {};
  memcpy(&some, &v, count * sizeof(float));
  return some;
}

// Adds each half of the 64 partial sums to the other, down to one.
static inline float total(F (&sums)[kLanes]) {
  UNROLL for (int half = kLanes / 2; half > 0; half /= 2) {
    UNROLL for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return fold<Sum, float>(sums[0]);
}

template <bool kSquared>
static inline F term(F v) {
  return kSquared ? v * v : v;
}

// The sum of x - mean, or of its squares, over a row.
template <bool kSquared>
static float sum_of(const float* x, int64_t k, F mean) {
  F sums[kLanes] = {};
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    UNROLL for (int c = 0; c < kLanes; ++c) sums[c] += term<kSquared>(load<F>(x + i + c * W) - mean);
  }
  for (int c = 0; i < k; ++c, i += W) {
    const int64_t count = k - i < W ? k - i : W;
    sums[c] += term<kSquared>(first_of(load_some<F>(x + i, count) - mean, count));
  }
  return total(sums);
}

// The normalised values, stored where kFloat, and in steps of uint8 where kUint8.
template <bool kFloat, bool kUint8>
struct Normalise {
  const Norm n;
  const float* x;
  F mean, inverse_deviation;
  float* y;
  inline F operator()(int64_t i, int64_t count) const {
    F value = (load_some<F>(x + i, count) - mean) * inverse_deviation;
    if (n.weight) value *= load_some<F>(n.weight + i, count);
    if (n.bias) value += load_some<F>(n.bias + i, count);
    if (kFloat) store_some(y + i, value, count);
    if (kUint8 && n.factor) value *= load_some<F>(n.factor + i, count);
    return value * n.inverse;
  }
};

// A few rows at a time, step by step, so that no row waits for its own sums.
static void norm(const Norm& n, const float* x, float* y, uint8_t* q, int64_t rows) {
  constexpr int64_t kTogether = 4;
  const Rounding round(n.zero_point, 0, 255);
  for (int64_t count; rows > 0; rows -= count) {
    count = rows < kTogether ? rows : kTogether;
    float means[kTogether] = {}, inverse_deviations[kTogether];
    for (int64_t r = 0; r < count && n.centred; ++r) means[r] = sum_of<false>(x + r * n.k, n.k, F{}) / float(n.k);
    for (int64_t r = 0; r < count; ++r) {
      const float variance = sum_of<true>(x + r * n.k, n.k, splat(means[r])) / float(n.k);
      inverse_deviations[r] = 1.0f / __builtin_sqrtf(variance + n.eps);
    }
    for (int64_t r = 0; r < count; ++r, x += n.k) {
      const F mean = splat(means[r]), inverse_deviation = splat(inverse_deviations[r]);
      if (!q)
        for_each_vector(n.k, Normalise<true, false>{n, x, mean, inverse_deviation, y});
      else if (!y)
        bytes_of(n.k, round, Normalise<false, true>{n, x, mean, inverse_deviation, y}, q);
      else
        bytes_of(n.k, round, Normalise<true, true>{n, x, mean, inverse_deviation, y}, q);
      if (y) y += n.k;
      if (q) q += n.k;
    }
  }
}

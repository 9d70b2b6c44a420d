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

template <bool kFloat, bool kUint8>
struct Normalise {
  const Norm& n;
  const float* x;
  F mean, inverse_deviation;
  Rounding round;
  float* y;
  uint8_t* q;
  inline void operator()(int64_t i, int64_t count) const {
    F value = (load_some<F>(x + i, count) - mean) * inverse_deviation;
    if (n.weight) value *= load_some<F>(n.weight + i, count);
    if (n.bias) value += load_some<F>(n.bias + i, count);
    if (kFloat) store_some(y + i, value, count);
    if (kUint8) {
      if (n.factor) value *= load_some<F>(n.factor + i, count);
      store_some(q + i, round(value * n.inverse), count);
    }
  }
};

static void norm(const Norm& n, const float* x, float* y, uint8_t* q, int64_t rows) {
  const Rounding round(n.zero_point, 0, 255);
  for (int64_t row = 0; row < rows; ++row, x += n.k) {
    const F mean = n.centred ? splat(sum_of<false>(x, n.k, F{}) / float(n.k)) : F{};
    const float variance = sum_of<true>(x, n.k, mean) / float(n.k);
    const F inverse_deviation = splat(1.0f / __builtin_sqrtf(variance + n.eps));
    if (!q)
      for_each_vector(n.k, Normalise<true, false>{n, x, mean, inverse_deviation, round, y, q});
    else if (!y)
      for_each_vector(n.k, Normalise<false, true>{n, x, mean, inverse_deviation, round, y, q});
    else
      for_each_vector(n.k, Normalise<true, true>{n, x, mean, inverse_deviation, round, y, q});
    if (y) y += n.k;
    if (q) q += n.k;
  }
}

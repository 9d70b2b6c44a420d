// Activations, step by step those of fxq/numerics/activations.py; a part of body.h.
// `low > x ? low : x` is one max instruction, and keeps NaN.

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
  const F t = clip(x, -87.0f, 87.0f) * -1.44269504088896341f;
  const F shifted = t + 12582912.0f;
  const F f = t - (shifted - 12582912.0f);
  const F p = polynomial(f, {1.326472731307149e-3f, 9.671512991189957e-3f, 5.550733581185341e-2f, 0.24022242426872253f,
                             0.6931470036506653f, 1.0f});
  const F power = (F)(((I)shifted - (0x4B400000 - 127)) << 23);
  return 1.0f / (1.0f + p * power);
}

static inline F gate(F x, F logit) { return at_least(x, -87.0f) * sigmoid(logit); }

static inline F gelu_tanh_logit(F x) {
  const F c = clip(x, -87.0f, 87.0f);
  return c * polynomial(c * c, {0.07135481627f, 1.59576912161f});
}

static inline F gelu(F x) {
  const F c = clip(x, -5.306929f, 5.306929f);
  const F t = c * c;
  const F p = polynomial(t, {6.264670446398668e-06f, 0.00034161523217335343f, 0.005699352826923132f,
                             0.05206981301307678f, 0.3989418148994446f});
  const F q = polynomial(t, {5.29815679328749e-07f, 0.00012253080785740167f, 0.0028634381014853716f,
                             0.038829389959573746f, 0.2971790134906769f, 1.0f});
  return at_least(x, -5.306929f) * (0.5f + c * (p / q));
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

static inline F hardsigmoid(F x) { return clip(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f); }

static inline F hardswish(F x) { return at_least(x, -3.0f) * hardsigmoid(x); }

template <F (*function)(F)>
static void map(float* y, int64_t count) {  // count: a multiple of W, at most a tile
  for (int64_t i = 0; i < count; i += W) store(y + i, function(load<F>(y + i)));
}

// y = gate(y, logit(y)) in two loops: each step waits for the one before, and a processor looks only so far ahead.
template <F (*logit)(F)>
static void map_gate(float* y, int64_t count) {
  alignas(64) float logits[kMaxRows * kPanel];
  for (int64_t i = 0; i < count; i += W) store(logits + i, logit(load<F>(y + i)));
  for (int64_t i = 0; i < count; i += W) store(y + i, gate(load<F>(y + i), load<F>(logits + i)));
}

static void activate(Activation activation, float* y, int64_t count) {
  switch (activation) {
    case Activation::kGelu: return map<gelu>(y, count);
    case Activation::kGeluTanh: return map_gate<gelu_tanh_logit>(y, count);
    case Activation::kSilu: return map<silu>(y, count);
    case Activation::kTanh: return map<tanh>(y, count);
    case Activation::kSigmoid: return map<sigmoid>(y, count);
    case Activation::kRelu: return map<relu>(y, count);
    case Activation::kHardsigmoid: return map<hardsigmoid>(y, count);
    case Activation::kHardswish: return map<hardswish>(y, count);
  }
}

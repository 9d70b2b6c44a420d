// Activations, step by step those of fxq/numerics/activations.py; a part of body.h.
// `maximum(bound, x)` keeps NaN.

static inline F at_least(F x, float low) { return maximum(splat(low), x); }
static inline F at_most(F x, float high) { return minimum(splat(high), x); }
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

// Sixteen parabolas, those of numerics.activations: coefficients of a**2, of a, and of 1.
alignas(64) constexpr float kGelu[3][16] = {
    {-0.3979057f, -0.37346542f, -0.30739462f, -0.21634752f, -0.12137586f, -0.0406195f, 0.015487165f, 0.045270264f,
     0.05369695f, 0.04845078f, 0.037237033f, 0.025351914f, 0.015590439f, 0.008755444f, 0.004520987f, -0.024190523f},
    {0.4999751f, 0.49209967f, 0.44118497f, 0.32680815f, 0.16085137f, -0.020027068f, -0.17326652f, -0.2690948f,
     -0.300019f, -0.27736518f, -0.22398812f, -0.16163678f, -0.105618104f, -0.06301239f, -0.03451801f, 0.18015599f},
    {0.0f, 0.0006366027f, 0.010522881f, 0.046559576f, 0.11918096f, 0.2205661f, 0.32526663f, 0.402381f, 0.43075106f,
     0.40629512f, 0.34276304f, 0.26097146f, 0.18058981f, 0.11418601f, 0.06624499f, -0.33486864f}};

static inline F gelu(F x) {
  const F a = at_most((F)((I)x & 0x7FFFFFFF), 3.8749998f);
  const I i = (I)(a + 3145728.0f);  // 1.5 * 2**21 leaves rne(4 a) in the low mantissa bits
  return at_least(x, 0.0f) - ((pick(kGelu[0], i) * a + pick(kGelu[1], i)) * a + pick(kGelu[2], i));
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

// Rows of `width` floats, a multiple of W, `stride` apart; at most a tile.
template <F (*function)(F)>
static void map(float* y, int64_t rows, int64_t width, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, y += stride)
    for (int64_t i = 0; i < width; i += W) store(y + i, function(load<F>(y + i)));
}

// y = gate(y, logit(y)) in two loops: each step waits for the one before, and a processor looks only so far ahead.
template <F (*logit)(F)>
static void map_gate(float* y, int64_t rows, int64_t width, int64_t stride) {
  alignas(64) float logits[kMaxRows * kPanel];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; i += W) store(logits + r * width + i, logit(load<F>(y + r * stride + i)));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; i += W)
      store(y + r * stride + i, gate(load<F>(y + r * stride + i), load<F>(logits + r * width + i)));
}

static void activate(Activation activation, float* y, int64_t rows, int64_t width, int64_t stride) {
  switch (activation) {
    case Activation::kGelu: return map<gelu>(y, rows, width, stride);
    case Activation::kGeluTanh: return map_gate<gelu_tanh_logit>(y, rows, width, stride);
    case Activation::kSilu: return map<silu>(y, rows, width, stride);
    case Activation::kTanh: return map<tanh>(y, rows, width, stride);
    case Activation::kSigmoid: return map<sigmoid>(y, rows, width, stride);
    case Activation::kRelu: return map<relu>(y, rows, width, stride);
    case Activation::kHardsigmoid: return map<hardsigmoid>(y, rows, width, stride);
    case Activation::kHardswish: return map<hardswish>(y, rows, width, stride);
  }
}

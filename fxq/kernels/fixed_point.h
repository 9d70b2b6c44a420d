// Requantization without a float multiply, step by step that of fxq/numerics/fixed_point.py; a part of body.h.

typedef uint64_t U __attribute__((vector_size(4 * W)));

static inline U splat64(uint64_t v) { return v - U{}; }

// Arithmetic right shift of each int64 by a count of its own, which before AVX-512 is there for unsigned numbers only.
struct ShiftRight {
  static constexpr uint64_t kTop = uint64_t(1) << 63;
  U count, top;
  explicit ShiftRight(U count) : count(count), top(splat64(kTop) >> count) {}
  L operator()(L v) const { return (L)((((U)v + kTop) >> count) - top); }
};

// Every other lane of a vector of int32, scaled by multiplier * 2**-shift and rounded, as int64.
template <bool twice>
struct HalfScale {
  I multiplier;  // of the even lanes
  U left;
  L half, negative;
  ShiftRight right;

  static U right_of(U shift) { return twice ? (U)(shift > 31 ? shift - 31 : U{}) : shift; }
  HalfScale(I multiplier, U shift)
      : multiplier(multiplier),
        left(shift < 31 ? 31 - shift : U{}),
        half((L)(((U{} + 1) << right_of(shift)) >> 1)),
        negative((L)(right_of(shift) > 0)),
        right(right_of(shift)) {}

  L operator()(I v) const {  // v: of its even lanes
    if (!twice) return right(multiply_even(v, multiplier) + half);
    L wide = (L)((U)((L)((U)v << 32) >> 32) << left);  // gemmlowp saturates what the left shift carries out of int32
    const L least = L{} + INT32_MIN, most = L{} + INT32_MAX;
    wide = wide < least ? least : wide;
    wide = wide > most ? most : wide;
    const L high = (multiply_even((I)wide, multiplier) + (int64_t(1) << 30)) >> 31;
    return right(high + half + ((high < 0) & negative));
  }
};

// clamp(steps + zero_point, low, high) as uint8, from the even and the odd lanes.
static inline B joined(L even, L odd, int32_t zero_point, int32_t low, int32_t high) {
  const L least = L{} + (low - zero_point), most = L{} + (high - zero_point);
  even = even < least ? least : even;
  odd = odd < least ? least : odd;
  even = even > most ? most : even;
  odd = odd > most ? most : odd;
  return narrow((I)(((U)even & 0xFFFFFFFF) | (U)odd << 32) + zero_point);
}

// clamp(scale(v, multiplier, shift) + zero_point, low, high) of a vector of int32.
template <bool twice>
struct FixedScale {
  HalfScale<twice> even, odd;

  FixedScale(I multiplier, I shift)
      : even(multiplier, (U)shift & 0xFFFFFFFF), odd((I)((U)multiplier >> 32), (U)shift >> 32) {}

  B operator()(I v, int32_t zero_point, int32_t low, int32_t high) const {
    return joined(even(v), odd((I)((U)v >> 32)), zero_point, low, high);
  }
};

// The staged accumulators of a tile, [rows, width], to uint8; channels outside, as their constants serve all rows.
template <bool twice>
static void fixed_tile(const Gemm& g, int64_t row, int64_t channel, const int32_t* acc, int64_t rows, int64_t width,
                       uint8_t* y, int64_t valid) {
  for (int64_t i = 0; i < valid; i += W) {
    const int64_t count = valid - i, n = channel + i;
    const FixedScale<twice> scale(load_some<I>(g.fixed + n, count), load_some<I>(g.shift + n, count));
    const I zero_w = g.zero_w ? load_some<I>(g.zero_w + n, count) : I{};
    for (int64_t r = 0; r < rows; ++r) {
      I v = load<I>(acc + r * width + i);
      if (g.zero_w) v -= zero_w * g.row_sums[row + r];
      store_some(y + r * g.y_stride + i, scale(v, g.zero_point, g.low, g.high), count);
    }
  }
}

template <bool twice>
static void requantize_fixed(FixedTerm x, uint8_t* y, int64_t count, int32_t shift, int32_t zero_point, int32_t low,
                             int32_t high) {
  const FixedScale<twice> scale(x.multiplier - I{}, shift - I{});
  for (int64_t i = 0; i < count; i += W) {
    const I steps = widen(load_some<B>(x.q + i, count - i)) - x.zero_point;
    store_some(y + i, scale(steps, zero_point, low, high), count - i);
  }
}
static void requantize_fixed(FixedTerm x, uint8_t* y, int64_t count, int32_t shift, bool twice, int32_t zero_point,
                             int32_t low, int32_t high) {
  (twice ? requantize_fixed<true> : requantize_fixed<false>)(x, y, count, shift, zero_point, low, high);
}

static void add_fixed(FixedTerm a, FixedTerm b, uint8_t* y, int64_t count, int32_t shift, int32_t zero_point,
                      int32_t low, int32_t high) {
  const I m_a = a.multiplier - I{}, m_b = b.multiplier - I{};
  const ShiftRight right(splat64(shift));
  const int64_t half = int64_t(1) << shift >> 1;
  for (int64_t i = 0; i < count; i += W) {
    const I steps_a = widen(load_some<B>(a.q + i, count - i)) - a.zero_point;
    const I steps_b = widen(load_some<B>(b.q + i, count - i)) - b.zero_point;
    const L even = multiply_even(steps_a, m_a) + multiply_even(steps_b, m_b);
    const L odd = multiply_even((I)((U)steps_a >> 32), m_a) + multiply_even((I)((U)steps_b >> 32), m_b);
    store_some(y + i, joined(right(even + half), right(odd + half), zero_point, low, high), count - i);
  }
}

template <bool twice>
static void multiply_fixed(FixedTerm a, FixedTerm b, uint8_t* y, int64_t count, int32_t shift, int32_t zero_point,
                           int32_t low, int32_t high) {
  const FixedScale<twice> scale(a.multiplier - I{}, shift - I{});
  for (int64_t i = 0; i < count; i += W) {
    const I steps_a = widen(load_some<B>(a.q + i, count - i)) - a.zero_point;
    const I steps_b = widen(load_some<B>(b.q + i, count - i)) - b.zero_point;
    store_some(y + i, scale(steps_a * steps_b, zero_point, low, high), count - i);
  }
}
static void multiply_fixed(FixedTerm a, FixedTerm b, uint8_t* y, int64_t count, int32_t shift, bool twice,
                           int32_t zero_point, int32_t low, int32_t high) {
  (twice ? multiply_fixed<true> : multiply_fixed<false>)(a, b, y, count, shift, zero_point, low, high);
}

// 3 x 3 convolutions by Winograd's F(4 x 4, 3 x 3), in exact integers; a part of body.h.
//
// A tile of 4 x 4 outputs y, of 6 x 6 inputs d and 3 x 3 weights g, takes 36 products for each channel in place of 144
// (Lavin and Gray, 2015, "Fast Algorithms for Convolutional Neural Networks"):
//
//   576 y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A
//
//   B^T =  4  0 -5  0  1  0     G =  6  0  0     A^T =  1  1  1  1  1  0
//          0 -4 -4  1  1  0         -4 -4 -4            0  1 -1  2 -2  0
//          0  4 -4 -1  1  0         -4  4 -4            0  1  1  4  4  0
//          0 -2 -1  2  1  0          1  2  4            0  1 -1  8 -8  2
//          0  2 -1 -2  1  0          1 -2  4
//          0  4  0 -5  0  1          0  0 12
//
// |B^T d B| <= 10 * 10 * 255 and |G g G^T| <= 12 * 12 * 128, so both fit int16. From there on it is arithmetic modulo
// 2**32, where 9 has an inverse: it leaves 64 y, and hence y if |y| < 2**25, which winograd.cpp makes sure of.
//
// Only the steps along one side of a tile are unrolled: a whole tile is more than the registers hold in any case, and
// unrolled it is a tenth to a fifth of the time that a file takes to compile.

using Halves = typename Vectors<W>::H;
using Modular = typename Vectors<W>::M;

// B^T d
static inline void to_tile(const Halves (&d)[6], Halves (&v)[6]) {
  const Halves p = d[4] - (d[2] << 2), q = d[3] - (d[1] << 2), r = d[4] - d[2], e = (d[3] - d[1]) << 1;
  v[0] = ((d[0] - d[2]) << 2) + r;
  v[1] = p + q;
  v[2] = p - q;
  v[3] = r + e;
  v[4] = r - e;
  v[5] = d[5] - d[3] - (e << 1);
}

// G g
static inline void to_factors(const Halves (&g)[3], Halves (&u)[6]) {
  const Halves s = g[0] + g[2], t = g[0] + (g[2] << 2), h = g[1] << 1;
  u[0] = g[0] * 6;
  u[1] = (s + g[1]) * -4;
  u[2] = (s - g[1]) * -4;
  u[3] = t + h;
  u[4] = t - h;
  u[5] = g[2] * 12;
}

// A^T m
static inline void from_tile(const Modular (&m)[6], Modular (&y)[4]) {
  const Modular s = m[1] + m[2], d = m[1] - m[2], t = m[3] + m[4], e = (m[3] - m[4]) << 1;
  y[0] = m[0] + s + t;
  y[1] = d + e;
  y[2] = s + (t << 2);
  y[3] = d + (e << 2) + (m[5] << 1);
}

// Of each four channels the first and the third, or the second and the fourth, in int16.
static inline Halves half_of_inputs(I group, int half) { return (Halves)(group >> 8 * half & 0x00FF00FF); }
static inline Halves half_of_weights(I group, int half) { return ((Halves)group << 8 * (1 - half)) >> 8; }

// G g G^T of packed weights, for `width` channels of a panel of `panel_width` from `packed` on: [36][channels / 2][width]
// pairs of int16, each position of the 36 followed by a cache line, as 36 streams at a power of two from one another
// would share one set of the cache. Pairs come as `tile_inputs` leaves them: of W groups all first halves, then all
// second.
static int64_t position_size(int64_t pairs, int64_t width) { return pairs * width + 16; }

static void tile_weights(const int8_t* packed, int64_t panel_width, int64_t channels, int64_t width, int32_t* to) {
  const int64_t groups = channels / 4, position = position_size(2 * groups, width);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t run = g / W * W, count = groups - run < W ? groups - run : W;
    for (int64_t c = 0; c < width; c += W)
      for (int half = 0; half < 2; ++half) {
        Halves rows[3][6], u[6];
        UNROLL for (int i = 0; i < 3; ++i) {
          Halves taps[3];
          UNROLL for (int j = 0; j < 3; ++j)
            taps[j] = half_of_weights(load<I>(packed + 4 * (((i * 3 + j) * groups + g) * panel_width + c)), half);
          to_factors(taps, rows[i]);
        }
        int32_t* const at = to + (2 * run + half * count + g - run) * width + c;
        for (int j = 0; j < 6; ++j) {
          to_factors({rows[0][j], rows[1][j], rows[2][j]}, u);
          UNROLL for (int i = 0; i < 6; ++i) store(at + (6 * i + j) * position, u[i]);
        }
      }
  }
}

// B^T d B of 6 x 6 pixels: [36][channels / 2] pairs of int16.
static void tile_inputs(const uint8_t* x, int64_t row, int64_t pixel, int64_t channels, int32_t* v) {
  const int64_t groups = channels / 4;
  for (int64_t g = 0; g < groups; g += W) {
    const int64_t count = groups - g < W ? groups - g : W;
    for (int half = 0; half < 2; ++half) {
      Halves columns[6][6];
      for (int j = 0; j < 6; ++j) {
        Halves d[6];
        for (int i = 0; i < 6; ++i) {
          const uint8_t* const at = x + i * row + j * pixel + 4 * g;
          d[i] = half_of_inputs(load_some<I>(reinterpret_cast<const int32_t*>(at), count), half);
        }
        to_tile(d, columns[j]);
      }
      for (int i = 0; i < 6; ++i) {
        Halves t[6];
        to_tile({columns[0][i], columns[1][i], columns[2][i], columns[3][i], columns[4][i], columns[5][i]}, t);
        UNROLL for (int j = 0; j < 6; ++j)
          store_some(v + (6 * i + j) * 2 * groups + 2 * g + half * count, (I)t[j], count);
      }
    }
  }
}

// The outputs that the sums [36][columns * W] of a tile stand for: `rows` x `pixels` of them, the first at g.
static void tile_outputs(const Gemm& g, int64_t row_step, const int32_t* m, int64_t columns, int64_t channel,
                         int64_t rows, int64_t pixels) {
  const int64_t width = columns * W, left = g.n - channel < width ? g.n - channel : width;
  const bool to_uint8 = g.output == Output::kUint8;
  alignas(64) int32_t stage[16 * kColumns * W];
  const Rounding round(g.zero_point, g.low, g.high);
  for (int64_t c = 0; c < left; c += W) {
    const int64_t valid = left - c < W ? left - c : W;
    const I bias = load_some<I>(g.bias + channel + c, valid);
    const F multiplier = to_uint8 ? load_some<F>(g.multiplier + channel + c, valid) : F{};
    Modular across[6][4];
    for (int j = 0; j < 6; ++j) {
      Modular sums[6];
      UNROLL for (int i = 0; i < 6; ++i) sums[i] = load<Modular>(m + (6 * i + j) * width + c);
      from_tile(sums, across[j]);
    }
    for (int i = 0; i < 4; ++i) {
      if (i >= rows) break;
      Modular y[4];
      from_tile({across[0][i], across[1][i], across[2][i], across[3][i], across[4][i], across[5][i]}, y);
      UNROLL for (int j = 0; j < 4; ++j) {
        if (j >= pixels) break;
        const I sum = ((I)(y[j] * 0x38E38E39u) >> 6) + bias;  // 9 * 0x38E38E39 = 2**33 + 1
        if (!to_uint8) {
          store(stage + (4 * i + j) * width + c, sum);
          continue;
        }
        F value = __builtin_convertvector(sum, F) * multiplier;
        const int64_t at = i * row_step + j * g.y_stride + channel + c;
        if (g.residual) value += residual(g, g.residual + at, valid);
        store_some(static_cast<uint8_t*>(g.y) + at, round(value), valid);
      }
    }
  }
  if (to_uint8) return;
  for (int64_t i = 0; i < rows; ++i) {
    Gemm own = g;
    move_outputs(own, i * row_step, 0);
    finish_sums(own, 0, pixels, channel, left, stage + 4 * i * width, width);
  }
}

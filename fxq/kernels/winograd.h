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

// The largest sum of the positive weights of one output channel, or of the negative ones; k: a multiple of four.
static int64_t largest_sum(const int8_t* packed, int64_t k, int64_t n) {
  const int64_t padded_n = (n + 15) / 16 * 16;
  I most = {};
  for (int64_t first = 0; first < padded_n; first += kPanel, packed += k * kPanel) {
    const int64_t width = padded_n - first < kPanel ? padded_n - first : kPanel;
    for (int64_t c = 0; c < width; c += W) {
      I above = {}, below = {};
      for (int64_t i = 0; i < k / 4; ++i)
        UNROLL for (int half = 0; half < 2; ++half) {
          const Halves w = half_of_weights(load<I>(packed + 4 * (i * width + c)), half), none = {};
          above = dot_pairs(above, 0x00010001 - I{}, (I)(w > none ? w : none));
          below = dot_pairs(below, I{} - 1, (I)(w < none ? w : none));
        }
      most = above > most ? above : most;
      most = below > most ? below : most;
    }
  }
  int32_t largest = 0;
  for (int lane = 0; lane < W; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  return largest;
}

// G g G^T of packed weights, for the groups of four channels [group, group_end): [n / 64][36][channels / 2][width] pairs
// of int16, each position of the 36 followed by a cache line, as 36 streams at a power of two from one another would
// share one set of the cache. Pairs come as `tile_inputs` leaves them: of W groups all first halves, then all second.
static int64_t position_size(int64_t pairs, int64_t width) { return pairs * width + 16; }

static void winograd_weights(const int8_t* packed, int64_t channels, int64_t n, int64_t group, int64_t group_end,
                             int32_t* to) {
  const int64_t groups = channels / 4, padded_n = (n + 15) / 16 * 16;
  for (int64_t first = 0; first < padded_n; first += kPanel) {
    const int64_t width = padded_n - first < kPanel ? padded_n - first : kPanel;
    const int64_t position = position_size(2 * groups, width);
    for (int64_t g = group; g < group_end; ++g) {
      const int64_t run = g / W * W, count = groups - run < W ? groups - run : W;
      for (int64_t c = 0; c < width; c += W)
        for (int half = 0; half < 2; ++half) {
          Halves rows[3][6], u[6];
          UNROLL for (int i = 0; i < 3; ++i) {
            Halves taps[3];
            UNROLL for (int j = 0; j < 3; ++j)
              taps[j] = half_of_weights(load<I>(packed + 4 * (((i * 3 + j) * groups + g) * width + c)), half);
            to_factors(taps, rows[i]);
          }
          int32_t* const at = to + (2 * run + half * count + g - run) * width + c;
          UNROLL for (int j = 0; j < 6; ++j) {
            to_factors({rows[0][j], rows[1][j], rows[2][j]}, u);
            UNROLL for (int i = 0; i < 6; ++i) store(at + (6 * i + j) * position, u[i]);
          }
        }
    }
    packed += 9 * channels * width;
    to += 36 * position;
  }
}

// B^T d B of 6 x 6 pixels: [36][channels / 2] pairs of int16.
static void tile_inputs(const uint8_t* x, int64_t row, int64_t pixel, int64_t channels, int32_t* v) {
  const int64_t groups = channels / 4;
  for (int64_t g = 0; g < groups; g += W) {
    const int64_t count = groups - g < W ? groups - g : W;
    for (int half = 0; half < 2; ++half) {
      Halves columns[6][6];
      UNROLL for (int j = 0; j < 6; ++j) {
        Halves d[6];
        UNROLL for (int i = 0; i < 6; ++i) {
          const uint8_t* const at = x + i * row + j * pixel + 4 * g;
          d[i] = half_of_inputs(load_some<I>(reinterpret_cast<const int32_t*>(at), count), half);
        }
        to_tile(d, columns[j]);
      }
      UNROLL for (int i = 0; i < 6; ++i) {
        Halves t[6];
        to_tile({columns[0][i], columns[1][i], columns[2][i], columns[3][i], columns[4][i], columns[5][i]}, t);
        UNROLL for (int j = 0; j < 6; ++j)
          store_some(v + (6 * i + j) * 2 * groups + 2 * g + half * count, (I)t[j], count);
      }
    }
  }
}

// Sums of products of pairs: R tiles x C vectors of channels, at one of the 36 positions.
template <int R, int C>
static void pair_sums(const int32_t* v, int64_t v_step, const int32_t* u, int64_t u_step, int64_t pairs, int32_t* m,
                      int64_t m_step) {
  I acc[R][C] = {};
  for (int64_t k = 0; k < pairs; ++k, u += u_step) {
    I b[C];
    UNROLL for (int c = 0; c < C; ++c) b[c] = pair_weights(u + c * W);
    UNROLL for (int r = 0; r < R; ++r) {
      const I a = v[r * v_step + k] - I{};
      UNROLL for (int c = 0; c < C; ++c) acc[r][c] = dot_pairs(acc[r][c], a, b[c]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < C; ++c) store(m + r * m_step + c * W, acc[r][c]);
  }
}

using PairSums = void (*)(const int32_t*, int64_t, const int32_t*, int64_t, int64_t, int32_t*, int64_t);

template <int R>
static PairSums pair_sums_of(int64_t columns) {
  if constexpr (kColumns >= 4)
    if (columns == 4) return pair_sums<R, 4>;
  if constexpr (kColumns >= 2)
    if (columns == 2) return pair_sums<R, 2>;
  return pair_sums<R, 1>;
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
    UNROLL for (int j = 0; j < 6; ++j) {
      Modular sums[6];
      UNROLL for (int i = 0; i < 6; ++i) sums[i] = load<Modular>(m + (6 * i + j) * width + c);
      from_tile(sums, across[j]);
    }
    UNROLL for (int i = 0; i < 4; ++i) {
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

// The tiles [tile, tile_end) of all images, which follow one another row by row.
static void winograd(const Conv& c, const int32_t* weight, int64_t tile, int64_t tile_end) {
  constexpr int64_t kStrip = kColumns * W;
  const int64_t pairs = c.channels / 2, n = c.product.n, padded_n = (n + 15) / 16 * 16;
  // Inputs and sums of a block of tiles stay in the second-level cache.
  const int64_t tile_bytes = 36 * (pairs + kStrip) * 4, fit = 600 * 1024 / tile_bytes + 1;
  const int64_t blocks = (tile_end - tile + fit - 1) / fit, height = (tile_end - tile + blocks - 1) / blocks;
  const int64_t rows = height + kRows - 1;  // the last products of a block may compute tiles that do not exist
  int32_t* const v = static_cast<int32_t*>(scratch(rows * tile_bytes + 36 * c.channels));
  int32_t* const m = v + rows * 36 * pairs;
  uint8_t* const patch = reinterpret_cast<uint8_t*>(m + rows * 36 * kStrip);
  for (; tile < tile_end; tile += height) {
    const int64_t count = tile_end - tile < height ? tile_end - tile : height;
    for (int64_t t = 0; t < count; ++t) {
      const Conv::Tile at = c.tile(tile + t);
      const int64_t top = at.row - c.before[1], left = at.pixel - c.before[2];
      const uint8_t* const image = c.x + at.image * c.x_step[0];
      int32_t* const own = v + t * 36 * pairs;
      if (top >= 0 && left >= 0 && top + 6 <= c.size[1] && left + 6 <= c.size[2]) {
        tile_inputs(image + top * c.x_step[2] + left * c.x_step[3], c.x_step[2], c.x_step[3], c.channels, own);
        continue;
      }
      for (int64_t i = 0; i < 36; ++i) {
        const int64_t h = top + i / 6, w = left + i % 6;
        uint8_t* const to = patch + i * c.channels;
        if (h >= 0 && w >= 0 && h < c.size[1] && w < c.size[2])
          memcpy(to, image + h * c.x_step[2] + w * c.x_step[3], c.channels);
        else
          memset(to, c.z_x, c.channels);
      }
      tile_inputs(patch, 6 * c.channels, c.channels, c.channels, own);
    }
    const int32_t* panel = weight;
    for (int64_t first = 0; first < padded_n; first += kPanel) {
      const int64_t width = padded_n - first < kPanel ? padded_n - first : kPanel;
      const int64_t position = position_size(pairs, width);
      for (int64_t channel = 0, columns; channel < width && first + channel < n; channel += columns * W) {
        const int64_t left = (width - channel) / W;
        columns = left >= kColumns ? kColumns : left >= 2 ? 2 : 1;
        const int64_t strip = columns * W;
        for (int64_t p = 0; p < 36; ++p)
          for (int64_t t = 0; t < count;) {
            const bool tall = (count - t) % kRows == 0;  // as many low ones as make the numbers meet come first
            (tall ? pair_sums_of<kRows>(columns) : pair_sums_of<kRows - 1>(columns))(
                v + (t * 36 + p) * pairs, 36 * pairs, panel + p * position + channel, width, pairs,
                m + (t * 36 + p) * strip, 36 * strip);
            t += tall ? kRows : kRows - 1;
          }
        for (int64_t t = 0; t < count; ++t) {
          const Conv::Tile at = c.tile(tile + t);
          const int64_t tall = c.out[1] - at.row, wide = c.out[2] - at.pixel;
          Gemm own = c.product;
          own.y_stride = own.residual_stride = c.y_step[3];
          if (own.addend_stride) own.addend_stride = c.y_step[3];
          move_outputs(own, at.image * c.y_step[0] + at.row * c.y_step[2] + at.pixel * c.y_step[3], 0);
          tile_outputs(own, c.y_step[2], m + t * 36 * strip, columns, first + channel, tall < 4 ? tall : 4,
                       wide < 4 ? wide : 4);
        }
      }
      panel += 36 * position;
    }
  }
}

// 3 x 3 convolutions by tiles: the products between the transforms of winograd_tiles.h; a part of products.h.

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

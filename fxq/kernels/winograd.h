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

// The tiles [tile, tile_end) of all images, which follow one another row by row, in the channels [channel, channel_end);
// the first begins a panel. Weights are transformed where they are used, strip by strip: eight times as large as they
// were, they would leave the second-level cache before they come to use.
static void winograd(const Conv& c, int64_t tile, int64_t tile_end, int64_t channel, int64_t channel_end) {
  const int64_t pairs = c.channels / 2, n = c.product.n, padded_n = (n + 15) / 16 * 16;
  int64_t widest = kColumns;
  while (widest > 1 && 36 * position_size(pairs, widest * W) * 4 > kTileWeights) widest /= 2;
  const auto panel_width = [&](int64_t at) {
    const int64_t left = padded_n - at / kPanel * kPanel;
    return left < kPanel ? left : kPanel;
  };
  const auto columns_at = [&](int64_t at) {  // of the strip that begins there
    const int64_t columns = columns_of((panel_width(at) - at % kPanel) / W);
    return columns < widest ? columns : widest;
  };
  const int64_t strip_size = 36 * position_size(pairs, widest * W);
  // Inputs and sums of a block of tiles stay in the second-level cache beside the weights of a group of strips.
  const int64_t tile_bytes = 36 * (pairs + widest * W) * 4, fit = 400 * 1024 / tile_bytes + 1;
  const int64_t blocks = (tile_end - tile + fit - 1) / fit, height = (tile_end - tile + blocks - 1) / blocks;
  const int64_t rows = height + kRows - 1;  // the last products of a block may compute tiles that do not exist
  // Several blocks transform their inputs again for each group; for many tiles that is more than to read weights from
  // further away.
  const int64_t end = channel_end < n ? channel_end : n, all = (end - channel + widest * W - 1) / (widest * W) + 3;
  const int64_t room = kTileWeights / (strip_size * 4) > 1 ? kTileWeights / (strip_size * 4) : 1;
  const int64_t kept = (tile_end - tile > n / 2 || room > all ? all : room) * strip_size;
  int32_t* const u = static_cast<int32_t*>(scratch(kept * 4 + rows * tile_bytes + 36 * c.channels));
  int32_t* const v = u + kept;
  int32_t* const m = v + rows * 36 * pairs;
  uint8_t* const patch = reinterpret_cast<uint8_t*>(m + rows * 36 * widest * W);

  for (bool is_first = true; channel < end; is_first = false) {
    const int64_t group = channel;
    for (int32_t* to = u; channel < end && to + strip_size <= u + kept;) {
      const int64_t panel = channel / kPanel * kPanel, columns = columns_at(channel);
      tile_weights(c.product.weight + panel * c.k() + 4 * (channel - panel), panel_width(channel), c.channels,
                   columns * W, to);
      to += 36 * position_size(pairs, columns * W);
      channel += columns * W;
    }
    for (int64_t block = tile; block < tile_end; block += height) {
      const int64_t tiles = tile_end - block < height ? tile_end - block : height;
      for (int64_t t = 0; t < tiles && (is_first || blocks > 1); ++t) {
        const Conv::Tile at = c.tile(block + t);
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
      const int32_t* weight = u;
      for (int64_t first = group, columns; first < channel; first += columns * W) {
        columns = columns_at(first);
        const int64_t width = columns * W, position = position_size(pairs, width);
        for (int64_t p = 0; p < 36; ++p)
          for (int64_t t = 0; t < tiles;) {
            const bool tall = (tiles - t) % kRows == 0;  // as many low ones as make the numbers meet come first
            (tall ? pair_sums_of<kRows>(columns) : pair_sums_of<kRows - 1>(columns))(
                v + (t * 36 + p) * pairs, 36 * pairs, weight + p * position, width, pairs,
                m + (t * 36 + p) * width, 36 * width);
            t += tall ? kRows : kRows - 1;
          }
        for (int64_t t = 0; t < tiles; ++t) {
          const Conv::Tile at = c.tile(block + t);
          const int64_t tall = c.out[1] - at.row, wide = c.out[2] - at.pixel;
          Gemm own = c.product;
          own.y_stride = own.residual_stride = c.y_step[3];
          if (own.addend_stride) own.addend_stride = c.y_step[3];
          move_outputs(own, at.image * c.y_step[0] + at.row * c.y_step[2] + at.pixel * c.y_step[3], 0);
          tile_outputs(own, c.y_step[2], m + t * 36 * width, columns, first, tall < 4 ? tall : 4,
                       wide < 4 ? wide : 4);
        }
        weight += 36 * position;
      }
    }
  }
}

// The product of float rows with int8 weights, widened in registers, step by step as `numerics.linear_weight_only`: in
// every output, blocks of kBlock products are summed by fused multiply-adds in the order of k, and then the blocks. A
// part of body.h, compiled once per instruction set.

constexpr int64_t kBlock = 512;

#ifndef WIDENS_BYTES
static inline F widened(I group, int j) {  // the j-th byte of each lane
  return __builtin_convertvector(group << (24 - 8 * j) >> 24, F);
}
#endif

// Where a tile of the float product finds its operands: its first row and k, and its first channel.
struct FloatPlace {
  const float* x;
  int64_t x_stride;
  const void* weight;  // packed int8 or widened, see below
  int64_t step;        // elements from one group of four k to the next (int8), from one k to the next (float)
  int64_t count;       // how many k
  float* y;            // the sum of the blocks before
  int64_t y_stride;
  bool first;
};

// Adds one block's products of R rows x C vectors of channels to y. kWide: the weights lie widened in float.
template <int R, int C, bool kWide>
static void float_tile(const FloatPlace& at) {
  F acc[R][C] = {};
  const float* x = at.x;
  if (kWide) {
    const float* w = static_cast<const float*>(at.weight);
    for (int64_t k = 0; k < at.count; ++k, w += at.step) {
      F b[C];
      UNROLL for (int c = 0; c < C; ++c) b[c] = load<F>(w + c * W);
      UNROLL for (int r = 0; r < R; ++r) {
        const F a = splat(x[r * at.x_stride + k]);
        UNROLL for (int c = 0; c < C; ++c) acc[r][c] = fused(a, b[c], acc[r][c]);
      }
    }
  } else {
    const int8_t* w = static_cast<const int8_t*>(at.weight);
    int64_t k = 0;
    for (; k + 4 <= at.count; k += 4, w += at.step) {
      I group[C];
      UNROLL for (int c = 0; c < C; ++c) group[c] = load<I>(w + 4 * W * c);
      UNROLL for (int j = 0; j < 4; ++j) {
        UNROLL for (int c = 0; c < C; ++c) {
          const F b = widened(group[c], j);
          UNROLL for (int r = 0; r < R; ++r) acc[r][c] = fused(splat(x[r * at.x_stride + k + j]), b, acc[r][c]);
        }
      }
    }
    for (int j = 0; k + j < at.count; ++j) {  // x ends within the last group
      UNROLL for (int c = 0; c < C; ++c) {
        const F b = widened(load<I>(w + 4 * W * c), j);
        UNROLL for (int r = 0; r < R; ++r) acc[r][c] = fused(splat(x[r * at.x_stride + k + j]), b, acc[r][c]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < C; ++c) {
      float* y = at.y + r * at.y_stride + c * W;
      store(y, at.first ? acc[r][c] : load<F>(y) + acc[r][c]);
    }
  }
}

using FloatTile = void (*)(const FloatPlace&);

// Tiles of widened weights, which are for many rows, are kMaxRows to kMaxRows / 2 high, those of packed ones 1 to kMaxRows. They
// are as wide as the integer product's, or of any width where there are few rows, whose sums wait for each other.
constexpr int64_t kFewRows = 2;

static inline int64_t float_columns(int64_t rows, int64_t left) {
  return rows <= kFewRows && left < kColumns ? left : columns_of(left);
}

template <int R, int C, bool kWide>
static FloatTile float_tile_of(int64_t columns) {
  if constexpr (C == 3 && (kWide || R > kFewRows)) {
    return float_tile_of<R, 2, kWide>(columns);
  } else {
    if constexpr (C > 1)
      if (columns < C) return float_tile_of<R, C - 1, kWide>(columns);
    return float_tile<R, C, kWide>;
  }
}

template <int R>
static FloatTile packed_tile_of(int64_t rows, int64_t columns) {
  if constexpr (R > 1)
    if (rows < R) return packed_tile_of<R - 1>(rows, columns);
  return float_tile_of<R, kColumns, false>(columns);
}

template <int R>
static FloatTile wide_tile_of(int64_t rows, int64_t columns) {
  if constexpr (R > kMaxRows / 2)
    if (rows < R) return wide_tile_of<R - 1>(rows, columns);
  return float_tile_of<R, kColumns, true>(columns);
}

// `count` k of `columns` vectors of channels, widened to [count][columns * W].
static void widen_weights(const int8_t* weight, int64_t step, int64_t count, int64_t columns, float* wide) {
  const int64_t width = columns * W;
  for (int64_t k = 0; k < count; k += 4, weight += step) {
    for (int64_t c = 0; c < columns; ++c) {
      const I group = load<I>(weight + 4 * W * c);
      UNROLL for (int j = 0; j < 4; ++j)
        if (k + j < count) store(wide + (k + j) * width + c * W, widened(group, j));
    }
  }
}

// The sums of `rows` rows of channels, scaled, with the bias.
static void finish_floats(const FloatGemm& g, int64_t row, int64_t rows, int64_t channel, int64_t width,
                          const float* sums) {
  const int64_t valid = g.n - channel < width ? g.n - channel : width;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < valid; c += W) {
      const F sum = g.k ? load<F>(sums + r * width + c) : F{};
      F value = sum * load_some<F>(g.scale + channel + c, valid - c);
      if (g.bias) value += load_some<F>(g.bias + channel + c, valid - c);
      store_real(g.y, g.type, (row + r) * g.y_stride + channel + c, value, valid - c);
    }
  }
}

// A strip of the output: `rows` rows of `columns` vectors of channels, in the memory of `sums` until all k are summed.
static void float_strip(const FloatGemm& g, int64_t row, int64_t rows, int64_t channel, int64_t columns,
                        const int8_t* weight, int64_t step, float* wide, float* sums) {
  const int64_t width = columns * W;
  const bool widen = rows > kMaxRows;  // each weight is then widened once for all rows
  FloatPlace at = {};
  at.x_stride = g.x_stride;
  at.y_stride = width;
  at.step = widen ? width : step;
  for (int64_t k = 0; k < g.k; k += kBlock) {
    at.count = g.k - k < kBlock ? g.k - k : kBlock;
    at.first = k == 0;
    const int8_t* packed = weight + k / 4 * step;
    at.weight = widen ? static_cast<const void*>(wide) : packed;
    if (widen) widen_weights(packed, step, at.count, columns, wide);
    for (int64_t r = 0, height; r < rows; r += height) {
      const int64_t left = rows - r;  // the last two tiles share what they have to do
      height = left <= kMaxRows ? left : left < 2 * kMaxRows ? (left + 1) / 2 : kMaxRows;
      at.x = g.x + (row + r) * g.x_stride + k;
      at.y = sums + r * width;
      (widen ? wide_tile_of<kMaxRows> : packed_tile_of<kMaxRows>)(height, columns)(at);
    }
  }
  finish_floats(g, row, rows, channel, width, sums);
}

static void float_gemm(const FloatGemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
  constexpr int64_t kHeight = 192 / kMaxRows * kMaxRows, kWidth = kColumns * W;
  float* wide = static_cast<float*>(scratch((kBlock + kHeight) * kWidth * sizeof(float)));
  float* sums = wide + kBlock * kWidth;
  const int64_t padded_k = (g.k + 3) / 4 * 4, padded_n = (g.n + 15) / 16 * 16;
  for (; row < row_end; row += kHeight) {
    const int64_t rows = row_end - row < kHeight ? row_end - row : kHeight;
    for (int64_t first = panel * kPanel; first < padded_n && first < panel_end * kPanel; first += kPanel) {
      const int64_t width = padded_n - first < kPanel ? padded_n - first : kPanel;
      const int8_t* weight = g.weight + first * padded_k;
      for (int64_t c = 0, columns; c < width && first + c < g.n; c += columns * W) {
        columns = float_columns(rows, (width - c) / W);
        float_strip(g, row, rows, first + c, columns, weight + 4 * c, 4 * width, wide, sums);
      }
    }
  }
}

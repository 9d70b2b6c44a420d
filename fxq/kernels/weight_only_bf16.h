// The product of bfloat16 rows with int8 weights by vdpbf16ps, for processors that have it; included behind body.h by
// kernels_avx512_vnni.cpp. In every lane it adds two products to a float, first that of the upper halves, each sum
// rounded once. A product of a bfloat16 with an int8 is exact in float, so these are the steps of weight_only.h, and the
// bits are the same, as long as nothing overflows or becomes denormal: see `pair_brains`.

static inline F dot_brain(F acc, I a, I b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

struct BrainPlace {
  const uint32_t* x;
  int64_t x_stride;
  const int32_t* weight;  // widened to pairs, [count][C * W]
  int64_t count;          // how many pairs
  float* y;               // the sum of the blocks before
  int64_t y_stride;
  bool first;
};

template <int R, int C>
static void brain_tile(const BrainPlace& at) {
  F acc[R][C] = {};
  const int32_t* w = at.weight;
  for (int64_t k = 0; k < at.count; ++k, w += C * W) {
    I b[C];
    UNROLL for (int c = 0; c < C; ++c) b[c] = load<I>(w + c * W);
    UNROLL for (int r = 0; r < R; ++r) {
      const I a = int32_t(at.x[r * at.x_stride + k]) - I{};
      UNROLL for (int c = 0; c < C; ++c) acc[r][c] = dot_brain(acc[r][c], a, b[c]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < C; ++c) {
      float* y = at.y + r * at.y_stride + c * W;
      store(y, at.first ? acc[r][c] : load<F>(y) + acc[r][c]);
    }
  }
}

using BrainTile = void (*)(const BrainPlace&);

template <int R>
static BrainTile brain_tile_of(int64_t columns) {
  return columns == 4 ? brain_tile<R, 4> : columns == 2 ? brain_tile<R, 2> : brain_tile<R, 1>;
}

static BrainTile brain_tile_of(int64_t rows, int64_t columns) {
  constexpr BrainTile (*kTiles[])(int64_t) = {brain_tile_of<1>, brain_tile_of<2>, brain_tile_of<3>,
                                              brain_tile_of<4>, brain_tile_of<5>, brain_tile_of<6>};
  return kTiles[rows - 1](columns);
}

// `count` k of `columns` vectors of channels, as pairs of bfloat16, [ceil(count / 2)][columns * W].
static void widen_pairs(const int8_t* weight, int64_t step, int64_t count, int64_t columns, int32_t* wide) {
  const int64_t width = columns * W;
  for (int64_t k = 0; k < count; k += 4, weight += step, wide += 2 * width) {
    for (int64_t c = 0; c < columns; ++c) {
      const I group = load<I>(weight + 4 * W * c);
      UNROLL for (int j = 0; j < 4; j += 2) {  // the lower half of such a float is zero
        if (k + j < count)
          store(wide + j / 2 * width + c * W,
                (I)widened(group, j) | (I)((U)(I)widened(group, j + 1) >> 16 & 0x0000FFFF0000FFFF));
      }
    }
  }
}

static void brain_gemm(const FloatGemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
  constexpr int64_t kHeight = 192 / kMaxRows * kMaxRows, kWidth = kColumns * W;
  int32_t* wide = static_cast<int32_t*>(scratch((kBlock / 2 + kHeight) * kWidth * sizeof(float)));
  float* sums = reinterpret_cast<float*>(wide + kBlock / 2 * kWidth);
  const int64_t padded_k = (g.k + 3) / 4 * 4, padded_n = (g.n + 15) / 16 * 16;
  for (; row < row_end; row += kHeight) {
    const int64_t rows = row_end - row < kHeight ? row_end - row : kHeight;
    for (int64_t first = panel * kPanel; first < padded_n && first < panel_end * kPanel; first += kPanel) {
      const int64_t width = padded_n - first < kPanel ? padded_n - first : kPanel;
      for (int64_t c = 0, columns; c < width && first + c < g.n; c += columns * W) {
        columns = columns_of((width - c) / W);
        const int8_t* weight = g.weight + first * padded_k + 4 * c;
        BrainPlace at = {};
        at.x_stride = g.x_stride;
        at.weight = wide;
        at.y_stride = columns * W;
        for (int64_t k = 0; k < g.k; k += kBlock, weight += kBlock * width) {
          const int64_t count = g.k - k < kBlock ? g.k - k : kBlock;
          widen_pairs(weight, 4 * width, count, columns, wide);
          at.count = (count + 1) / 2;
          at.first = k == 0;
          for (int64_t r = 0; r < rows; r += kMaxRows) {
            at.x = g.pairs + (row + r) * g.x_stride + k / 2;
            at.y = sums + r * columns * W;
            brain_tile_of(rows - r < kMaxRows ? rows - r : kMaxRows, columns)(at);
          }
        }
        finish_floats(g, row, rows, first + c, columns * W, sums);
      }
    }
  }
}

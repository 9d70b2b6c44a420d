// The integer product with its epilogues; a part of body.h, compiled once per instruction set.

// What a tile writes. kRows: float, each row with a scale and zero point of its own; kSums: its int32 accumulators.
enum class Leaves { kUint8, kFloat, kRows, kSums };

// Where one tile finds its operands and leaves its result; each pointer stands at the tile's first row and channel.
struct Place {
  const uint8_t* x;
  const uint8_t* const* rows;  // instead of x, where the product has them
  const int8_t* weight;
  int64_t step;  // bytes from one group of four k to the next
  const int32_t* bias;
  const float* multiplier;
  const float* float_bias;
  const float* row_scale;
  const int32_t* row_zero_point;
  const float* addend;
  int64_t addend_stride;
  const uint8_t* residual;
  int64_t residual_stride;
  void* y;
  int64_t y_stride;
};

static inline uint32_t load_group(const uint8_t* x, int64_t count) {  // up to four bytes, the others 0
  uint32_t group = 0;
  for (int64_t i = 0; i < count; ++i) group |= uint32_t(x[i]) << (8 * i);
  return group;
}

// R rows of bytes from `begin` to `end`, read four at a time.
template <int R>
struct Rows {
#ifdef WIDEN_ROWS
  static constexpr int64_t kMost = 1024;
  int64_t begin;
  uint32_t pairs[R][kMost / 4][2];  // widened here once, and not again for every vector of channels

  Rows(const uint8_t* const (&x)[R], int64_t begin, int64_t end) : begin(begin) {
    const int64_t count = (end - begin) / 4;
    for (int r = 0; r < R; ++r) {
      const uint8_t* groups = x[r] + begin;
      for (int64_t n = 0; n < count; ++n) {  // counted like this, it becomes vectors
        const uint32_t group = load<uint32_t>(groups + 4 * n);
        pairs[r][n][0] = group & 0x00FF00FF;
        pairs[r][n][1] = group >> 8 & 0x00FF00FF;
      }
    }
  }
  Input operator()(int r, int64_t i) const {
    const char* pair = reinterpret_cast<const char*>(pairs[r]) + 2 * (i - begin);
    return input(load<uint32_t>(pair), load<uint32_t>(pair + 4));
  }
#else
  static constexpr int64_t kMost = INT64_MAX / 2;
  const uint8_t* const (&x)[R];

  Rows(const uint8_t* const (&x)[R], int64_t, int64_t) : x(x) {}
  Input operator()(int r, int64_t i) const { return input(load<uint32_t>(x[r] + i)); }
#endif
};

static inline F residual(const Gemm& g, const uint8_t* q, int64_t count) {
  return __builtin_convertvector(widen(load_some<B>(q, count)) - g.residual_zero_point, F) * g.residual_multiplier;
}

// R rows x C vectors of channels: summed up in registers from the bias on, and the epilogue in registers as well.
template <int R, int C, Leaves kLeaves>
static void tile(const Gemm& g, const Place& at) {
  I acc[R][C];
  UNROLL for (int c = 0; c < C; ++c) {
    UNROLL for (int r = 0; r < R; ++r) {
      acc[r][c] = load<I>(at.bias + c * W);
      if (kLeaves == Leaves::kRows) acc[r][c] *= at.row_zero_point[r];
    }
  }
  const uint8_t* x[R];
  UNROLL for (int r = 0; r < R; ++r) x[r] = at.rows ? at.rows[r] : at.x + r * g.x_stride;
  const int8_t* w = at.weight;
  const int64_t step = at.step, whole = at.rows ? g.run_bytes : g.k / 4 * 4;
  for (int64_t run = 0; run < g.run_count; ++run) {
    int64_t i = at.rows ? g.runs[run] : 0;
    for (const int64_t run_end = i + whole; i < run_end;) {
      const int64_t end = run_end - i < Rows<R>::kMost ? run_end : i + Rows<R>::kMost;
      const Rows<R> rows(x, i, end);
      for (; i < end; i += 4, w += step) {
        Weights b[C];
        UNROLL for (int c = 0; c < C; ++c) b[c] = weights(w + 4 * W * c);
        UNROLL for (int r = 0; r < R; ++r) {
          const Input a = rows(r, i);
          UNROLL for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], a, b[c]);
        }
      }
    }
  }
  if (!at.rows && g.k % 4) {  // the packed weights end in zeros, but x ends
    UNROLL for (int r = 0; r < R; ++r) {
      const Input a = input(load_group(x[r] + whole, g.k % 4));
      UNROLL for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], a, weights(w + 4 * W * c));
    }
  }
  if constexpr (kLeaves == Leaves::kSums) {
    UNROLL for (int c = 0; c < C; ++c) {
      UNROLL for (int r = 0; r < R; ++r) store(static_cast<int32_t*>(at.y) + r * at.y_stride + c * W, acc[r][c]);
    }
    return;
  }
  const Rounding round(g.zero_point, g.low, g.high);
  UNROLL for (int c = 0; c < C; ++c) {
    const F multiplier = load<F>(at.multiplier + c * W);
    UNROLL for (int r = 0; r < R; ++r) {
      const F scale = kLeaves == Leaves::kRows ? multiplier * at.row_scale[r] : multiplier;
      F value = __builtin_convertvector(acc[r][c], F) * scale;
      const int64_t i = r * at.y_stride + c * W;
      if (kLeaves == Leaves::kFloat || kLeaves == Leaves::kRows) {
        if (kLeaves == Leaves::kRows && at.float_bias) value += load<F>(at.float_bias + c * W);
        if (at.addend) value += load<F>(at.addend + r * at.addend_stride + c * W);
        if (kLeaves == Leaves::kRows) value = clip(value, g.clamp_low, g.clamp_high);
        store(static_cast<float*>(at.y) + i, value);
      } else {
        if (at.residual) value += residual(g, at.residual + r * at.residual_stride + c * W, W);
        store(static_cast<uint8_t*>(at.y) + i, round(value));
      }
    }
  }
}

using Tile = void (*)(const Gemm&, const Place&);

template <int R, Leaves kLeaves>
static Tile tile_of(int64_t columns) {
  if constexpr (kColumns == 4) {
    if (columns == 4) return tile<R, 4, kLeaves>;
    if (columns == 3) return tile<R, 3, kLeaves>;
  }
  if constexpr (kColumns >= 2)
    if (columns == 2) return tile<R, 2, kLeaves>;
  return tile<R, 1, kLeaves>;
}

template <Leaves kLeaves>
static Tile tile_of(int64_t rows, int64_t columns) {
  if constexpr (kRows == 6) {
    if (rows == 6) return tile_of<6, kLeaves>(columns);
    if (rows == 5) return tile_of<5, kLeaves>(columns);
  }
  if (rows == 4) return tile_of<4, kLeaves>(columns);
  if (rows == 3) return tile_of<3, kLeaves>(columns);
  if (rows == 2) return tile_of<2, kLeaves>(columns);
  return tile_of<1, kLeaves>(columns);
}

// memcpy without a call: rows of a strip are short and many.
static inline void copy(uint8_t* to, const uint8_t* from, int64_t bytes) {
  if (bytes < 16) return void(memcpy(to, from, bytes));
  for (int64_t i = 0; i + 16 < bytes; i += 16) memcpy(to + i, from + i, 16);
  memcpy(to + bytes - 16, from + bytes - 16, 16);
}

// A strip of the output: the rows [row, row_end) of `columns` vectors of channels, kRows at a time.
static void strip(const Gemm& g, int64_t row, int64_t row_end, int64_t channel, int64_t columns, const int8_t* weight,
                  int64_t step) {
  constexpr int64_t kWidth = kColumns * W;
  const int64_t size = g.output == Output::kFloat || g.output == Output::kActivation ? sizeof(float) : 1;
  const int64_t width = columns * W, valid = g.n - channel < width ? g.n - channel : width;
  const bool ragged = valid < width;  // the arrays end within the last vector: work on padded copies
  const bool staged = ragged || g.output == Output::kActivation || g.output == Output::kActivationUint8 ||
                      g.output == Output::kFixed;
  const Leaves leaves = g.output == Output::kUint8   ? Leaves::kUint8
                        : g.output == Output::kFixed ? Leaves::kSums
                        : g.dynamic                  ? Leaves::kRows
                                                     : Leaves::kFloat;

  Place at = {};
  at.weight = weight;
  at.step = step;
  at.bias = g.bias + channel;
  at.multiplier = g.multiplier ? g.multiplier + channel : nullptr;  // kFixed has none
  at.float_bias = g.float_bias ? g.float_bias + channel : nullptr;
  at.addend_stride = g.addend_stride;
  at.residual_stride = g.residual_stride;
  alignas(64) int32_t bias[kWidth];
  alignas(64) float multiplier[kWidth], float_bias[kWidth];
  if (ragged) {
    memset(bias, 0, sizeof bias);
    memset(multiplier, 0, sizeof multiplier);
    at.bias = static_cast<int32_t*>(memcpy(bias, at.bias, valid * sizeof(int32_t)));
    if (at.multiplier) at.multiplier = static_cast<float*>(memcpy(multiplier, at.multiplier, valid * sizeof(float)));
    if (at.float_bias) {
      memset(float_bias, 0, sizeof float_bias);
      at.float_bias = static_cast<float*>(memcpy(float_bias, at.float_bias, valid * sizeof(float)));
    }
  }
  alignas(64) float stage[kRows * kWidth];
  alignas(64) float addend[kRows * kWidth];
  alignas(64) uint8_t added[kRows * kWidth];

  for (; row < row_end; row += kRows) {
    const int64_t rows = row_end - row < kRows ? row_end - row : kRows;
    uint8_t* y = static_cast<uint8_t*>(g.y) + (row * g.y_stride + channel) * size;
    if (g.rows)
      at.rows = g.rows + row;
    else
      at.x = g.x + row * g.x_stride;
    if (g.dynamic) {
      at.row_scale = g.row_scale + row;
      at.row_zero_point = g.row_zero_point + row;
    }
    at.y = staged ? static_cast<void*>(stage) : y;
    at.y_stride = staged ? width : g.y_stride;
    if (g.addend) {
      at.addend = g.addend + row * g.addend_stride + channel;
      if (ragged) {
        for (int64_t r = 0; r < rows; ++r)
          memcpy(addend + r * width, at.addend + r * g.addend_stride, valid * sizeof(float));
        at.addend = addend;
        at.addend_stride = width;
      }
    }
    if (g.residual) {
      at.residual = g.residual + row * g.residual_stride + channel;
      if (ragged) {
        for (int64_t r = 0; r < rows; ++r)
          memcpy(added + r * width, at.residual + r * g.residual_stride, valid);
        at.residual = added;
        at.residual_stride = width;
      }
    }
    (leaves == Leaves::kUint8   ? tile_of<Leaves::kUint8>(rows, columns)
     : leaves == Leaves::kFloat ? tile_of<Leaves::kFloat>(rows, columns)
     : leaves == Leaves::kRows  ? tile_of<Leaves::kRows>(rows, columns)
                                : tile_of<Leaves::kSums>(rows, columns))(g, at);
    if (!staged) continue;

    if (g.output == Output::kFixed) {
      (g.twice ? fixed_tile<true> : fixed_tile<false>)(g, row, channel, reinterpret_cast<int32_t*>(stage), rows, width,
                                                       y, valid);
      continue;
    }

    if (g.output == Output::kActivation || g.output == Output::kActivationUint8)
      activate(g.activation, stage, rows * width);
    for (int64_t r = 0; r < rows; ++r, y += g.y_stride * size) {
      if (g.output != Output::kActivationUint8)
        copy(y, reinterpret_cast<uint8_t*>(stage) + r * width * size, valid * size);
      else if (g.factor)
        quantize_scaled(stage + r * width, g.factor + channel, y, valid, g.inverse, g.zero_point);
      else
        quantize(stage + r * width, y, valid, g.inverse, g.zero_point);
    }
  }
}

static void gemm(const Gemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
  // A block of rows that stays in the second-level cache shares one read of each panel; blocks are of equal height.
  const int64_t fit = 384 * 1024 / (g.k + 1), most = fit < 96 ? 96 : fit > 960 ? 960 : fit;
  const int64_t blocks = (row_end - row + most - 1) / most;
  const int64_t tiles = blocks ? (row_end - row + blocks * kRows - 1) / (blocks * kRows) : 0;
  const int64_t height = tiles * kRows;
  const int64_t padded_k = (g.k + 3) / 4 * 4, padded_n = (g.n + 15) / 16 * 16;
  for (int64_t block = row; block < row_end; block += height) {
    const int64_t block_end = block + height < row_end ? block + height : row_end;
    for (int64_t first = panel * kPanel; first < padded_n && first < panel_end * kPanel; first += kPanel) {
      const int64_t width = padded_n - first < kPanel ? padded_n - first : kPanel;
      const int8_t* weight = g.weight + first * padded_k;
      for (int64_t c = 0; c < width && first + c < g.n; c += kColumns * W) {
        const int64_t columns = (width - c) / W < kColumns ? (width - c) / W : kColumns;
        strip(g, block, block_end, first + c, columns, weight + 4 * c, 4 * width);
      }
    }
  }
}

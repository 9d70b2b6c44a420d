// The integer product with its epilogues; a part of products.h, compiled once per instruction set.

// What a tile leaves: results made in registers, or its sums, for `finish_sums`.
enum class Leaves { kUint8, kFloat, kSums };

// Where one tile finds its operands and leaves its result; each pointer stands at the tile's first row and channel.
struct Place {
  const uint8_t* x;
  const uint8_t* const* rows;  // instead of x, where the product has them
  const int8_t* weight;
  int64_t step;  // bytes from one group of four k to the next
  int64_t second, third;  // of a tall tile: bytes from its first vector of weights to the others, across panels
  const int32_t* bias;
  const float* multiplier;
  const float* factor;  // or null
  int64_t row, channel;
  const uint8_t* residual;
  void* y;
  int64_t y_stride;
  int64_t last;  // the last row that there is: narrow tiles take it for those beyond
  Inside inside;
  const int8_t* ahead;  // what this tile brings into the cache, `ahead_step` bytes for four k
  int64_t ahead_step;
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
  int32_t even[R][kMost / 4], odd[R][kMost / 4];  // widened here once, and not again for every vector of channels

  Rows(const uint8_t* const (&x)[R], int64_t begin, int64_t end) : begin(begin) {
    const int64_t count = (end - begin) / 4;
    for (int r = 0; r < R; ++r) {
      const int32_t* groups = reinterpret_cast<const int32_t*>(x[r] + begin);
      for (int64_t n = 0; n < count; n += W) {
        const I group = load_some<I>(groups + n, count - n);
        store(even[r] + n, group & 0x00FF00FF);
        store(odd[r] + n, group >> 8 & 0x00FF00FF);
      }
    }
  }
  Input operator()(int r, int64_t i) const {
    const int64_t n = (i - begin) / 4;
    return input(uint32_t(even[r][n]), uint32_t(odd[r][n]));
  }
#else
  static constexpr int64_t kMost = INT64_MAX / 2;
  const uint8_t* const (&x)[R];

  Rows(const uint8_t* const (&x)[R], int64_t, int64_t) : x(x) {}
  Input operator()(int r, int64_t i) const { return input(load<uint32_t>(x[r] + i)); }
#endif
};

// A tall tile has three vectors of channels, and so more rows, but no more sums; three panels are four strips of them.
constexpr int64_t kTallColumns = 3, kTallPanels = 3;
static_assert(kTallRows == kRows || (kTallRows <= 8 && kTallRows * kTallColumns <= kRows * kColumns));

constexpr bool is_tall(int64_t columns) { return kTallRows > kRows && columns == kTallColumns; }

// Whether tall tiles read the weights once instead of twice, or twice instead of three times. Two of them gain nothing
// where a panel stays in the first-level cache; more of them gain one or two hundredths, or lose three from memory.
static bool gains_by_tall(int64_t rows, int64_t k) {
  if (rows > 2 * kTallRows || ceil_div(rows, kTallRows) == ceil_div(rows, kRows)) return false;
  return rows <= kTallRows || k * kPanel > 32 * 1024;
}

// acc += the products of R rows and C vectors of channels.
template <int R, int C>
[[gnu::always_inline]] static inline void multiply(const Gemm& g, const Place& at, I (&acc)[R][C]) {
  const uint8_t* x[R];
  UNROLL for (int r = 0; r < R; ++r) {
    const int64_t row = C < kColumns && r > at.last ? at.last : r;
    x[r] = at.rows ? at.rows[row] : at.x + row * g.x_stride;
  }
  const int8_t *w = at.weight, *ahead = at.ahead;
  const int64_t step = at.step, ahead_step = at.ahead_step, whole = at.rows ? g.run_bytes : g.k / 4 * 4;
  const bool rest = !at.rows && g.k % 4;  // the packed weights end in zeros, but x ends: a run of four bytes more
  uint32_t last[R];
  for (int64_t run = 0; run < g.run_count + rest; ++run) {
    int64_t i = at.rows ? g.runs[run] : 0, run_end = i + whole;
    if (run == g.run_count) {
      UNROLL for (int r = 0; r < R; ++r) {
        last[r] = load_group(x[r] + whole, g.k % 4);
        x[r] = reinterpret_cast<const uint8_t*>(last + r);
      }
      run_end = 4;
    }
    while (i < run_end) {
      const int64_t end = run_end - i < Rows<R>::kMost ? run_end : i + Rows<R>::kMost;
      const Rows<R> rows(x, i, end);
      for (; i < end; i += 4, w += step, ahead += ahead_step) {
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + 64);
        Weights b[C];
        UNROLL for (int c = 0; c < C; ++c) b[c] = weights(w + 4 * W * c);
        UNROLL for (int r = 0; r < R; ++r) {
          const Input a = rows(r, i);
          UNROLL for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], a, b[c]);
        }
      }
    }
  }
}

// The same of a tall tile, whose k are whole groups. There are too few registers for a pointer to every row.
template <int R>
[[gnu::always_inline]] static inline void multiply(const Gemm& g, const Place& at, I (&acc)[R][kTallColumns]) {
  const uint8_t *low = at.x, *high = low + 4 * g.x_stride, *const end = low + g.k;
  const int8_t *w = at.weight, *ahead = at.ahead;
  int64_t one = g.x_stride, three = 3 * one, second = at.second, third = at.third;
  const int64_t ahead_step = at.ahead_step;
  for (; low < end; low += 4, high += 4, w += 4 * kPanel, ahead += ahead_step) {
    // From sums that do not change g++ would make a pointer to every row.
    asm("" : "+r"(low), "+r"(high), "+r"(one), "+r"(three), "+r"(w), "+r"(second), "+r"(third));
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + 64);
    const Weights b[] = {weights(w), weights(w + second), weights(w + third)};
    UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* const group = (r < 4 ? low : high) + (r % 4 == 3 ? three : r % 4 * one);
      const Input a = input(load<uint32_t>(group));
      UNROLL for (int c = 0; c < kTallColumns; ++c) acc[r][c] = dot(acc[r][c], a, b[c]);
    }
  }
}

// R rows x C vectors of channels, summed up in registers from the bias on.
template <int R, int C, Leaves kLeaves>
static void tile(const Gemm& g, const Place& at) {
  I acc[R][C];
  UNROLL for (int c = 0; c < C; ++c) {
    const I bias = load<I>(at.bias + c * W);
    UNROLL for (int r = 0; r < R; ++r) acc[r][c] = bias;
  }
  if (kLeaves == Leaves::kFloat && g.addend) {  // comes from the second-level cache or beyond while the products run
    UNROLL for (int r = 0; r < R; ++r) {
      const float* const addend = g.addend + (at.row + r) * g.addend_stride + at.channel;
      UNROLL for (int c = 0; c < C; ++c) __builtin_prefetch(addend + c * W);
    }
  }
  multiply(g, at, acc);
  if constexpr (kLeaves == Leaves::kSums) {
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int c = 0; c < C; ++c) store(static_cast<int32_t*>(at.y) + r * at.y_stride + c * W, acc[r][c]);
    }
    return;
  }
  const Rounding round(g.zero_point, g.low, g.high);
  UNROLL for (int r = 0; r < R; ++r) {
    F value[C];
    if constexpr (kLeaves == Leaves::kFloat) {
      if (g.dynamic) {
        const Scaling<true> scaled(g, at.row + r, at.channel, at.multiplier);
        UNROLL for (int c = 0; c < C; ++c) value[c] = scaled(acc[r][c], c * W, W);
      } else {
        const Scaling<false> scaled(g, at.row + r, at.channel, at.multiplier);
        UNROLL for (int c = 0; c < C; ++c) value[c] = scaled(acc[r][c], c * W, W);
      }
      apply(at.inside, value);
      UNROLL for (int c = 0; c < C; ++c) store(static_cast<float*>(at.y) + r * at.y_stride + c * W, value[c]);
    } else {
      UNROLL for (int c = 0; c < C; ++c)
        value[c] = __builtin_convertvector(acc[r][c], F) * load<F>(at.multiplier + c * W);
      if (at.inside != Inside::kNothing) {
        apply(at.inside, value);
        if (at.factor) {
          UNROLL for (int c = 0; c < C; ++c) value[c] *= load<F>(at.factor + c * W);
        }
        UNROLL for (int c = 0; c < C; ++c) value[c] *= g.inverse;
      } else if (at.residual) {
        UNROLL for (int c = 0; c < C; ++c) value[c] += residual(g, at.residual + r * g.residual_stride + c * W, W);
      }
      uint8_t* const y = static_cast<uint8_t*>(at.y) + r * at.y_stride;
      if constexpr (C == 4) {  // by lanes: not as few instructions as `round` has, but done sooner
        const auto q = [&](int c) { return round.lanes(value[c]); };
        store(y, narrow_four(q(0), q(1), q(2), q(3)));
      } else {
        UNROLL for (int c = 0; c < C; ++c) store(y + c * W, round(value[c]));
      }
    }
  }
}

using Tile = void (*)(const Gemm&, const Place&);

template <int R, Leaves kLeaves>
static Tile tile_of(int64_t columns) {
  if constexpr (kColumns > 1)
    if (columns == 1) return tile<R, 1, kLeaves>;
  if constexpr (kColumns > 2)
    if (columns == 2) return tile<R, 2, kLeaves>;
  return tile<R, kColumns, kLeaves>;
}

template <int R, Leaves kLeaves>
static Tile wide_tile_of(int64_t rows) {
  if constexpr (R > 1)
    if (rows < R) return wide_tile_of<R - 1, kLeaves>(rows);
  return tile<R, kColumns, kLeaves>;
}

// Of kRows or more rows each, as they are fewer than tiles of kRows would be.
template <int R, Leaves kLeaves>
static Tile tall_tile_of(int64_t rows) {
  if constexpr (kTallRows == kRows) {
    return nullptr;
  } else {
    if constexpr (R > kRows)
      if (rows < R) return tall_tile_of<R - 1, kLeaves>(rows);
    return tile<R, kTallColumns, kLeaves>;
  }
}

// As high as there are rows; narrow ones of one row, half of kRows or kRows, as others would save little.
static Tile sums_of(int64_t rows, int64_t columns) {
  if (is_tall(columns)) return tall_tile_of<kTallRows, Leaves::kSums>(rows);
  if (columns == kColumns) return wide_tile_of<kRows, Leaves::kSums>(rows);
  if (rows == 1) return tile_of<1, Leaves::kSums>(columns);
  return rows <= kRows / 2 ? tile_of<kRows / 2, Leaves::kSums>(columns) : tile_of<kRows, Leaves::kSums>(columns);
}

// The tile that leaves results, where there is one: of any height, but of narrow ones those that there are most of.
static Tile results_of(int64_t rows, int64_t columns, bool to_uint8) {
  if (is_tall(columns))
    return to_uint8 ? tall_tile_of<kTallRows, Leaves::kUint8>(rows) : tall_tile_of<kTallRows, Leaves::kFloat>(rows);
  if (columns == kColumns)
    return to_uint8 ? wide_tile_of<kRows, Leaves::kUint8>(rows) : wide_tile_of<kRows, Leaves::kFloat>(rows);
  if (to_uint8 && rows == 1) return tile_of<1, Leaves::kUint8>(columns);
  if (rows != kRows) return nullptr;
  return to_uint8 ? tile_of<kRows, Leaves::kUint8>(columns) : tile_of<kRows, Leaves::kFloat>(columns);
}

// A strip of the output: the rows [row, row_end) of `columns` vectors of channels, by tiles, with weights of `at`.
static void strip(const Gemm& g, int64_t row, int64_t row_end, int64_t channel, int64_t columns, Place at) {
  constexpr int64_t kWidth = kColumns * W;
  const int64_t width = columns * W, valid = g.n - channel < width ? g.n - channel : width;
  const bool ragged = valid < width;  // the arrays end within the last vector
  const Inside inside = inside_of(g);
  const bool to_uint8 =
      g.output == Output::kUint8 || (g.output == Output::kActivationUint8 && inside != Inside::kNothing);
  const bool staged = ragged || !(to_uint8 || g.output == Output::kFloat || g.output == Output::kActivation);
  const bool only_sums = g.output == Output::kFixed || (ragged && (g.addend || g.residual || g.factor || g.dynamic));
  alignas(64) int32_t bias[kWidth];
  alignas(64) float multiplier[kWidth];
  alignas(64) int32_t stage[kRows * kWidth];  // a tall tile has no more

  at.inside = staged && !to_uint8 ? Inside::kNothing : inside;
  at.bias = g.bias + channel;
  if (!only_sums) at.multiplier = g.multiplier + channel;
  if (g.factor) at.factor = g.factor + channel;
  at.channel = channel;
  if (ragged || g.dynamic) {
    memset(bias, 0, sizeof bias);
    if (!g.dynamic) memcpy(bias, at.bias, valid * sizeof(int32_t));
    at.bias = bias;
  }
  if (ragged && !only_sums) {
    memset(multiplier, 0, sizeof multiplier);
    at.multiplier = static_cast<float*>(memcpy(multiplier, at.multiplier, valid * sizeof(float)));
  }

  const int64_t first = row;
  for (int64_t rows; row < row_end; row += rows, at.ahead += at.ahead_step * ceil_div(g.k, 4)) {
    const int64_t left = row_end - row;
    rows = left < kRows ? left : kRows;
    if (columns == kColumns || is_tall(columns)) {  // of equal height, as the weights come equally fast for each
      rows = ceil_div(left, is_tall(columns) ? ceil_div(left, kTallRows) : ceil_div(left, kRows));
    } else if (rows > 1 && rows < kRows && row_end - first >= kRows && (kRows - rows) * g.k <= 256) {
      row = row_end - kRows;  // the last ones, some of them again, where those cost less than leaving sums does
      rows = kRows;
    }
    if (g.rows)
      at.rows = g.rows + row;
    else
      at.x = g.x + row * g.x_stride;
    at.y = stage;
    at.y_stride = width;
    at.last = rows - 1;
    const Tile direct = only_sums ? nullptr : results_of(rows, columns, to_uint8);
    if (!direct) {
      sums_of(rows, columns)(g, at);
      finish_sums(g, row, rows, channel, valid, stage, width);
      continue;
    }

    const int64_t i = row * g.y_stride + channel;
    uint8_t* const q = static_cast<uint8_t*>(g.y) + i;
    if (!staged) {
      at.y = to_uint8 ? static_cast<void*>(q) : static_cast<float*>(g.y) + i;
      at.y_stride = g.y_stride;
    }
    at.row = row;
    if (g.residual) at.residual = g.residual + row * g.residual_stride + channel;
    direct(g, at);
    if (!staged) {
      if (g.output == Output::kActivation && at.inside == Inside::kNothing)
        activate(g.activation, static_cast<float*>(at.y), rows, width, g.y_stride);
      continue;
    }
    if (!to_uint8) {
      finish_values(g, row, rows, channel, valid, reinterpret_cast<float*>(stage), width);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) copy(q + r * g.y_stride, reinterpret_cast<uint8_t*>(stage) + r * width, valid);
  }
}

// From so many rows on, each tile brings its share of what is read next into the cache: the next panel, or the rows of
// the next block (where there is but one panel, of the next tile). From memory, as in a large model at each call, both
// come in two thirds of the time; from the third-level cache weights take one or two hundredths more. With fewer rows
// those would take up to a third more: the few buffers for misses that a core has are then waited for, which what the
// processor prefetches by itself does without. Tall tiles, of any number of rows, bring what is two panels on: from
// memory they take two thirds of the time so.
constexpr int64_t kAheadRows = 12;

static void gemm(const Gemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
  // A block of rows that stays in the second-level cache shares one read of each panel; blocks are of equal height.
  const int64_t fit = 384 * 1024 / (g.k + 1), most = fit < 96 ? 96 : fit > 960 ? 960 : fit;
  const int64_t blocks = ceil_div(row_end - row, most);
  const int64_t height = blocks ? ceil_div(row_end - row, blocks * kRows) * kRows : 0;
  const int64_t groups = ceil_div(g.k, 4), padded_k = 4 * groups, padded_n = (g.n + 15) / 16 * 16;
  const int64_t begin = panel * kPanel, end = panel_end * kPanel < padded_n ? panel_end * kPanel : padded_n;
  const auto offset = [=](int64_t c) { return c / kPanel * kPanel * padded_k + c % kPanel * 4; };  // from a panel on
  for (int64_t block = row; block < row_end; block += height) {
    const int64_t block_end = block + height < row_end ? block + height : row_end, rows = block_end - block;
    const bool gains = gains_by_tall(rows, g.k) && !g.rows && g.k % 4 == 0;
    for (int64_t first = begin, panels; first < end; first += panels * kPanel) {
      const bool tall = gains && end - first >= kTallPanels * kPanel;
      panels = tall ? kTallPanels : 1;
      const int64_t width = padded_n - first < kPanel ? padded_n - first : kPanel;
      const int8_t* const weight = g.weight + first * padded_k;
      Place at = {};
      at.step = 4 * width;
      at.ahead = weight;
      int64_t strip_ahead = 0;
      if (tall || rows >= kAheadRows) {
        const int64_t tiles = tall ? ceil_div(rows, kTallRows) : ceil_div(rows, kRows);  // divisors that are constants
        const int64_t strips = tall ? kTallPanels * kPanel / (kTallColumns * W) : ceil_div(width, kColumns * W);
        const bool only = end - begin <= kColumns * W, last = first + panels * kPanel >= end;
        if (last && !g.rows && (only || block_end < row_end)) {
          at.ahead = reinterpret_cast<const int8_t*>(g.x + (only ? block + kRows : block_end) * g.x_stride);
          at.ahead_step = 4 * kRows / strips;
        } else {  // behind the last panel are, within a chain, the weights of the next layer
          at.ahead += (tall ? 2 : 1) * width * padded_k;
          at.ahead_step = ceil_div(panels * at.step, tiles * strips);
        }
        strip_ahead = tiles * at.ahead_step * groups;
      }
      for (int64_t c = 0, columns; c < panels * width && first + c < g.n; c += columns * W) {
        columns = tall ? kTallColumns : columns_of((width - c) / W);
        at.weight = weight + offset(c);
        if (tall) {
          at.second = offset(c + W) - offset(c);
          at.third = offset(c + 2 * W) - offset(c);
        }
        strip(g, block, block_end, first + c, columns, at);
        at.ahead += strip_ahead;
      }
    }
  }
}

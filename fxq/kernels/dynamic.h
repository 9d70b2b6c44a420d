// Rows that find their own scale and zero point, before gemm; a part of products.h, compiled once per instruction set.

// Scale and negated zero point of a row, step by step as `numerics.row_qparams`; NaN and 0 where it is not finite.
static inline void row_qparams(const float* x, int64_t count, float* scale, int32_t* negative) {
  F low = {}, high = {};
  I largest = {};  // the bits of the greatest magnitude; those of infinity and NaN are beyond every number's
  for (int64_t i = 0; i < count; i += W) {
    const F v = load_some<F>(x + i, count - i);
    const I bits = (I)v & 0x7FFFFFFF;
    low = low < v ? low : v;
    high = high > v ? high : v;
    largest = largest > bits ? largest : bits;
  }
  const float least = -fold<Larger, float>(-low), greatest = fold<Larger, float>(high);
  if (fold<Larger, int32_t>(largest) >= 0x7F800000) {
    *scale = NAN;
    *negative = 0;
    return;
  }
  const float floor = 0x1p-60f, step = greatest / 255.0f - least / 255.0f;
  *scale = step < floor ? floor : step;
  const float steps = -least * (1.0f / *scale);  // at most 256, so that the magic number rounds it
  *negative = -int32_t((steps < 255.0f ? steps : 255.0f) + 12582912.0f - 12582912.0f);
}

// Rows as uint8, as `numerics.quantize_rows`: a few at a time, so that none waits for its own scale.
static void quantize_rows(const float* x, int64_t x_stride, int64_t count, int64_t rows, uint8_t* q, int64_t q_stride,
                          float* scale, int32_t* negative) {
  constexpr int64_t kTogether = 4;
  for (int64_t first = 0; first < rows; first += kTogether) {
    const int64_t end = rows - first < kTogether ? rows : first + kTogether;
    for (int64_t r = first; r < end; ++r) row_qparams(x + r * x_stride, count, scale + r, negative + r);
    for (int64_t r = first; r < end; ++r) {
      if (std::isnan(scale[r]))
        memset(q + r * q_stride, 0, count);
      else
        quantize(x + r * x_stride, q + r * q_stride, count, 1.0f / scale[r], -negative[r]);
    }
  }
}

// As gemm, of float rows: a block of them is quantized into memory of this thread, and then multiplied.
static void gemm_dynamic(const Gemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
  const int64_t stride = (g.k + 63) / 64 * 64, fit = 384 * 1024 / (stride + 1);
  const int64_t most = (fit < 96 ? 96 : fit > 960 ? 960 : fit) / kRows * kRows;
  const int64_t height = row_end - row < most ? row_end - row : most;
  uint8_t* q = static_cast<uint8_t*>(scratch(height * (stride + 8)));
  float* scale = reinterpret_cast<float*>(q + height * stride);
  int32_t* zero_point = reinterpret_cast<int32_t*>(scale + height);

  Gemm block = g;
  block.x = q;
  block.x_stride = stride;
  block.row_scale = scale;
  block.row_zero_point = zero_point;
  for (; row < row_end; row += height) {
    const int64_t rows = row_end - row < height ? row_end - row : height;
    quantize_rows(g.float_x + row * g.x_stride, g.x_stride, g.k, rows, q, stride, scale, zero_point);
    block.y = static_cast<float*>(g.y) + row * g.y_stride;
    block.addend = g.addend ? g.addend + row * g.addend_stride : nullptr;
    gemm(block, 0, rows, panel, panel_end);
  }
}

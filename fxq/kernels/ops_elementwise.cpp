// The elementwise kernels as torch operators: quantize, dequantize, requantize, add, multiply.
#include <algorithm>
#include <string>

#include "program.h"

namespace fxq {
namespace {

Tensor quantize(const Tensor& x, double scale, int64_t zero_point) {
  expect_dtype("quantize", "x", x, aoti_torch_dtype_float32(), "float32");
  expect_range("quantize", zero_point, 0, 255);
  const Contiguous from(x, true);
  Tensor y = x.empty_like(aoti_torch_dtype_uint8());
  const float* source = from.data<float>();
  uint8_t* target = y.data<uint8_t>();
  parallel(x.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    active().quantize(source + begin, target + begin, end - begin, 1.0f / float(scale), int32_t(zero_point));
  });
  return y;
}

Tensor quantize_scaled(const Tensor& x, const Tensor& factor, double scale, int64_t zero_point) {
  expect_dtype("quantize_scaled", "x", x, aoti_torch_dtype_float32(), "float32");
  expect_dtype("quantize_scaled", "factor", factor, aoti_torch_dtype_float32(), "float32");
  expect_range("quantize_scaled", zero_point, 0, 255);
  const int64_t k = factor.numel();
  if (factor.dim() != 1 || x.dim() < 1 || x.shape().sizes[x.dim() - 1] != k)
    fail("quantize_scaled: factor has shape ", factor.shape(), ", x ", x.shape());
  const Contiguous from(x), by(factor);
  Tensor y = Tensor::empty(x.shape(), aoti_torch_dtype_uint8());
  if (!x.numel()) return y;
  const float *source = from.data<float>(), *factors = by.data<float>();
  uint8_t* target = y.data<uint8_t>();
  parallel(x.numel() / k, std::max<int64_t>(1, kElementGrain / k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      active().quantize_scaled(source + row * k, factors, target + row * k, k, 1.0f / float(scale),
                               int32_t(zero_point));
  });
  return y;
}

Tensor dequantize(const Tensor& q, double scale, int64_t zero_point) {
  expect_dtype("dequantize", "q", q, aoti_torch_dtype_uint8(), "uint8");
  expect_range("dequantize", zero_point, 0, 255);
  const Contiguous from(q, true);
  Tensor y = q.empty_like(aoti_torch_dtype_float32());
  const uint8_t* source = from.data<uint8_t>();
  float* target = y.data<float>();
  parallel(q.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    active().dequantize({source + begin, int32_t(zero_point), float(scale)}, target + begin, end - begin);
  });
  return y;
}

Tensor requantize(const Tensor& q, int64_t z_x, double multiplier, int64_t zero_point, int64_t low, int64_t high) {
  expect_dtype("requantize", "q", q, aoti_torch_dtype_uint8(), "uint8");
  expect_range("requantize", zero_point, low, high);
  expect_range("requantize (z_x)", z_x, 0, 255);
  const Contiguous from(q, true);
  Tensor y = q.empty_like(aoti_torch_dtype_uint8());
  const uint8_t* source = from.data<uint8_t>();
  uint8_t* target = y.data<uint8_t>();
  parallel(q.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    active().requantize({source + begin, int32_t(z_x), float(multiplier)}, target + begin, end - begin,
                        int32_t(zero_point), int32_t(low), int32_t(high));
  });
  return y;
}

// An operand of a broadcast: strides over the dimensions of the result, 0 where the operand repeats.
struct Broadcast {
  const uint8_t* q;
  int64_t strides[Tensor::kMaxDim];

  Broadcast(const Tensor& t, Shape result) : q(t.data<uint8_t>()) {
    const Shape own = t.shape();
    const int64_t* own_strides = t.strides();
    for (int64_t i = 0, missing = result.dim - own.dim; i < result.dim; ++i)
      strides[i] = i < missing || own.sizes[i - missing] == 1 ? 0 : own_strides[i - missing];
  }
  // `count` elements from `index` on in the innermost dimension: where they lie, or gathered into `buffer`.
  const uint8_t* row(int64_t offset, int64_t index, int64_t count, int64_t stride, uint8_t* buffer) const {
    const uint8_t* p = q + offset + index * stride;
    if (stride == 1) return p;
    for (int64_t i = 0; i < count; ++i) buffer[i] = p[i * stride];
    return buffer;
  }
};

// run(a, b, y, rows, count) over rows of adjacent values that share their b; what is not adjacent is gathered first.
template <class Run>
void broadcast(const Broadcast& a, const Broadcast& b, uint8_t* y, Shape shape, const Run& run) {
  constexpr int64_t kChunk = 1024;
  uint8_t buffer_a[kChunk], buffer_b[kChunk];
  const int64_t* sizes = shape.sizes;
  const int64_t inner = sizes[shape.dim - 1];
  int64_t outer = shape.dim - 1, shared = 1;
  if (a.strides[outer] == 1 && b.strides[outer] == 1)
    for (; outer > 0 && b.strides[outer - 1] == 0 && a.strides[outer - 1] == shared * inner; --outer)
      shared *= sizes[outer - 1];
  int64_t rows = 1, index[Tensor::kMaxDim] = {}, offset_a = 0, offset_b = 0;
  for (int64_t d = 0; d < outer; ++d) rows *= sizes[d];
  for (int64_t row = 0; row < rows; ++row) {
    if (shared > 1) {
      parallel(shared, std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, inner)), [&](int64_t begin, int64_t end) {
        run(a.q + offset_a + begin * inner, b.q + offset_b, y + begin * inner, end - begin, inner);
      });
      y += shared * inner;
    } else {
      for (int64_t i = 0, count; i < inner; i += count, y += count) {
        count = std::min(inner - i, kChunk);
        const uint8_t* values_a = a.row(offset_a, i, count, a.strides[shape.dim - 1], buffer_a);
        run(values_a, b.row(offset_b, i, count, b.strides[shape.dim - 1], buffer_b), y, 1, count);
      }
    }
    for (int64_t d = outer - 1; d >= 0; --d) {  // an odometer over the outer dimensions
      offset_a += a.strides[d];
      offset_b += b.strides[d];
      if (++index[d] < sizes[d]) break;
      offset_a -= sizes[d] * a.strides[d];
      offset_b -= sizes[d] * b.strides[d];
      index[d] = 0;
    }
  }
}

// The same for a run(a, b, y, count) over one row.
template <class Run>
auto each_row(const Run& run) {
  return [&run](const uint8_t* a, const uint8_t* b, uint8_t* y, int64_t rows, int64_t count) {
    for (int64_t row = 0; row < rows; ++row) run(a + row * count, b, y + row * count, count);
  };
}

// What adds and products share: checks and the way through broadcast operands; `run` as in `broadcast`.
template <class Run>
Tensor combine(const char* op, const Tensor& a, const Tensor& b, int64_t z_a, int64_t z_b, const Run& run) {
  expect_dtype(op, "a", a, aoti_torch_dtype_uint8(), "uint8");
  expect_dtype(op, "b", b, aoti_torch_dtype_uint8(), "uint8");
  expect_range(op, z_a, 0, 255);
  expect_range(op, z_b, 0, 255);
  const Shape shape_a = a.shape(), shape_b = b.shape();
  const int64_t dim = std::max(shape_a.dim, shape_b.dim);
  int64_t sizes[Tensor::kMaxDim];
  bool same = shape_a.dim == shape_b.dim;
  for (int64_t i = 1; i <= dim; ++i) {
    const int64_t size_a = i <= shape_a.dim ? shape_a.sizes[shape_a.dim - i] : 1;
    const int64_t size_b = i <= shape_b.dim ? shape_b.sizes[shape_b.dim - i] : 1;
    if (size_a != size_b && size_a != 1 && size_b != 1) fail(op, ": a", shape_a, " and b", shape_b, " do not broadcast");
    same = same && size_a == size_b;
    sizes[dim - i] = size_a == 1 ? size_b : size_a;
  }
  const Shape shape = {sizes, dim};
  const auto full = [&](Shape own) { return own.dim == dim && std::equal(sizes, sizes + dim, own.sizes); };
  const bool last = (full(shape_a) && a.is_channels_last()) || (full(shape_b) && b.is_channels_last());
  Tensor y = last ? Tensor::empty_channels_last(shape, aoti_torch_dtype_uint8())
                  : Tensor::empty(shape, aoti_torch_dtype_uint8());
  uint8_t* target = y.data<uint8_t>();
  const bool alike = last ? a.is_channels_last() && b.is_channels_last() : a.is_contiguous() && b.is_contiguous();
  if (dim == 0 || (same && alike)) {
    const uint8_t *values_a = a.data<uint8_t>(), *values_b = b.data<uint8_t>();
    parallel(y.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
      run(values_a + begin, values_b + begin, target + begin, 1, end - begin);
    });
  } else if (y.numel() > 0) {
    Broadcast from_a(a, shape), from_b(b, shape);
    if (last) {  // the channels innermost
      std::rotate(sizes + 1, sizes + 2, sizes + dim);
      std::rotate(from_a.strides + 1, from_a.strides + 2, from_a.strides + dim);
      std::rotate(from_b.strides + 1, from_b.strides + 2, from_b.strides + dim);
    }
    broadcast(from_a, from_b, target, shape, run);
  }
  return y;
}

Tensor qadd(const Tensor& a, const Tensor& b, double m_a, int64_t z_a, double m_b, int64_t z_b, int64_t zero_point,
            int64_t low, int64_t high) {
  expect_range("qadd", zero_point, low, high);
  const auto run = [&](const uint8_t* q_a, const uint8_t* q_b, uint8_t* y, int64_t count) {
    active().add({q_a, int32_t(z_a), float(m_a)}, {q_b, int32_t(z_b), float(m_b)}, y, count, int32_t(zero_point),
                 int32_t(low), int32_t(high));
  };
  return combine("qadd", a, b, z_a, z_b, each_row(run));
}

Tensor qmul(const Tensor& a, const Tensor& b, double m, int64_t z_a, int64_t z_b, int64_t zero_point, int64_t low,
            int64_t high) {
  expect_range("qmul", zero_point, low, high);
  if (a.numel() < b.numel()) return qmul(b, a, m, z_b, z_a, zero_point, low, high);  // b is what may repeat
  return combine("qmul", a, b, z_a, z_b,
                 [&](const uint8_t* q_a, const uint8_t* q_b, uint8_t* y, int64_t rows, int64_t count) {
                   active().multiply({q_a, int32_t(z_a), float(m)}, {q_b, int32_t(z_b), 1}, y, rows, count,
                                     int32_t(zero_point), int32_t(low), int32_t(high));
                 });
}

// A multiplier in 0..2**31 - 1 and a shift in 0..62, whose products cannot leave int64.
void expect_fixed(const char* op, int64_t multiplier, int64_t shift) {
  if (multiplier < 0 || multiplier > INT32_MAX || shift < 0 || shift > 62)
    fail(op, ": multiplier = ", multiplier, ", shift = ", shift, ", expected 0..2**31 - 1 and 0..62");
}

Tensor qadd_fixed(const Tensor& a, const Tensor& b, int64_t m_a, int64_t z_a, int64_t m_b, int64_t z_b, int64_t shift,
                  int64_t zero_point, int64_t low, int64_t high) {
  expect_range("qadd_fixed", zero_point, low, high);
  expect_fixed("qadd_fixed", m_a, shift);
  expect_fixed("qadd_fixed", m_b, shift);
  const auto run = [&](const uint8_t* q_a, const uint8_t* q_b, uint8_t* y, int64_t count) {
    active().add_fixed({q_a, int32_t(z_a), int32_t(m_a)}, {q_b, int32_t(z_b), int32_t(m_b)}, y, count, int32_t(shift),
                       int32_t(zero_point), int32_t(low), int32_t(high));
  };
  return combine("qadd_fixed", a, b, z_a, z_b, each_row(run));
}

Tensor qmul_fixed(const Tensor& a, const Tensor& b, int64_t z_a, int64_t z_b, int64_t multiplier, int64_t shift,
                  int64_t zero_point, int64_t low, int64_t high, const std::string& rounding) {
  expect_range("qmul_fixed", zero_point, low, high);
  expect_fixed("qmul_fixed", multiplier, shift);
  const bool twice = rounds_twice("qmul_fixed", rounding);
  const auto run = [&](const uint8_t* q_a, const uint8_t* q_b, uint8_t* y, int64_t count) {
    active().multiply_fixed({q_a, int32_t(z_a), int32_t(multiplier)}, {q_b, int32_t(z_b), 1}, y, count, int32_t(shift),
                            twice, int32_t(zero_point), int32_t(low), int32_t(high));
  };
  return combine("qmul_fixed", a, b, z_a, z_b, each_row(run));
}

Tensor requantize_fixed(const Tensor& q, int64_t z_x, int64_t multiplier, int64_t shift, int64_t zero_point,
                        int64_t low, int64_t high, const std::string& rounding) {
  expect_dtype("requantize_fixed", "q", q, aoti_torch_dtype_uint8(), "uint8");
  expect_range("requantize_fixed", zero_point, low, high);
  expect_range("requantize_fixed (z_x)", z_x, 0, 255);
  expect_fixed("requantize_fixed", multiplier, shift);
  const bool twice = rounds_twice("requantize_fixed", rounding);
  const Contiguous from(q, true);
  Tensor y = q.empty_like(aoti_torch_dtype_uint8());
  const uint8_t* source = from.data<uint8_t>();
  uint8_t* target = y.data<uint8_t>();
  parallel(q.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    active().requantize_fixed({source + begin, int32_t(z_x), int32_t(multiplier)}, target + begin, end - begin,
                              int32_t(shift), twice, int32_t(zero_point), int32_t(low), int32_t(high));
  });
  return y;
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) {
  fxq::serve<fxq::quantize>(m, "quantize");
  fxq::serve<fxq::quantize_scaled>(m, "quantize_scaled");
  fxq::serve<fxq::dequantize>(m, "dequantize");
  fxq::serve<fxq::requantize>(m, "requantize");
  fxq::serve<fxq::qadd>(m, "qadd");
  fxq::serve<fxq::qmul>(m, "qmul");
  fxq::serve<fxq::qadd_fixed>(m, "qadd_fixed");
  fxq::serve<fxq::qmul_fixed>(m, "qmul_fixed");
  fxq::serve<fxq::requantize_fixed>(m, "requantize_fixed");
}

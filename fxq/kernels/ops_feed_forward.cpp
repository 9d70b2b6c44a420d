// Two linears with an activation between them as one torch operator.
#include <algorithm>
#include <optional>
#include <string>

#include "broadcast.h"
#include "steps.h"

namespace fxq {
namespace {

constexpr const char* kOp = "qfeed_forward";
constexpr int64_t kBlockBytes = 384 * 1024;  // of float rows between the two: they stay in the second-level cache

// The constants of one of the linears, checked; they hold what `g` points to.
struct Constants {
  Contiguous weight, bias, multiplier;

  Constants(const Tensor& weight_, const Tensor& bias_, const Tensor& multiplier_, int64_t k, Gemm& g)
      : weight(weight_), bias(bias_), multiplier(multiplier_) {
    expect_dtype(kOp, "weight", weight_, aoti_torch_dtype_int8(), "int8 (packed)");
    expect_dtype(kOp, "bias or column_sums", bias_, aoti_torch_dtype_int32(), "int32");
    expect_dtype(kOp, "multiplier or scale", multiplier_, aoti_torch_dtype_float32(), "float32");
    g.k = k;
    g.n = bias_.numel();
    if (weight_.numel() != packed_size(g.n, k) || weight_.dim() != 1)
      fail(kOp, ": weight", weight_.shape(), ", expected [", packed_size(g.n, k), "], the packed size of N = ", g.n,
           " and K = ", k);
    if (bias_.dim() != 1 || multiplier_.dim() != 1 || multiplier_.numel() != g.n)
      fail(kOp, ": ", multiplier_.shape(), " and ", bias_.shape(), " beside a weight, expected both of one size [N]");
    g.weight = weight.data<int8_t>();
    g.bias = bias.data<int32_t>();
    g.multiplier = multiplier.data<float>();
  }
};

}  // namespace

void feed_forward(const Gemm& wide, const Gemm& narrow, int64_t row, int64_t row_end) {
  const int64_t fit = kBlockBytes / (wide.n * int64_t(sizeof(float)) + 1), most = std::max<int64_t>(fit / kMaxRows, 4) * kMaxRows;
  const int64_t blocks = ceil_div(row_end - row, most), height = ceil_div(ceil_div(row_end - row, blocks), kMaxRows) * kMaxRows;
  auto* const between = static_cast<float*>(scratch(std::min(height, row_end - row) * wide.n * 4, Holder::kPart));
  for (; row < row_end; row += height) {
    const int64_t rows = std::min(height, row_end - row);
    Gemm first = wide, second = narrow;
    first.x += row * wide.x_stride;
    first.y = between;
    second.float_x = between;
    second.y = static_cast<float*>(narrow.y) + row * narrow.y_stride;
    if (narrow.addend) second.addend = narrow.addend + row * narrow.addend_stride;
    active().gemm(first, 0, rows, 0, panel_count(first.n));
    active().gemm_dynamic(second, 0, rows, 0, panel_count(second.n));
  }
}

// All rows, shared among threads.
static void run_feed_forward(Gemm wide, Gemm narrow, int64_t rows) {
  const int64_t work = rows * wide.n * (wide.k + narrow.n), threads = torch::stable::get_num_threads();
  const int64_t tiles = ceil_div(rows, kMaxRows), share = ceil_div(tiles, threads);
  if (rows == 0 || narrow.n == 0) return;
  if (threads == 1 || work < 2 * kProductGrain) return feed_forward(wide, narrow, 0, rows);
  if (tiles < 4 * threads) {  // all threads share the channels of one, then those of the other
    auto* const between = static_cast<float*>(scratch(rows * wide.n * 4, Holder::kPart));
    wide.y = between;
    narrow.float_x = between;
    run_gemm(wide, rows);
    return run_gemm(narrow, rows);
  }
  torch::stable::parallel_for(0, tiles, share, [&](int64_t begin, int64_t end) {
    feed_forward(wide, narrow, begin * kMaxRows, std::min(end * kMaxRows, rows));
  });
}

namespace {

Tensor qfeed_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& multiplier,
                     const std::string& activation, const Tensor& weight_2, const Tensor& column_sums,
                     const Tensor& scale, const std::optional<Tensor>& bias_2, const std::optional<Tensor>& addend) {
  expect_dtype(kOp, "x", x, aoti_torch_dtype_uint8(), "uint8");
  const Shape shape = x.shape();
  if (shape.dim == 0) fail(kOp, ": x is a scalar, expected [..., K]");
  Gemm wide, narrow;
  const Constants first(weight, bias, multiplier, shape.sizes[shape.dim - 1], wide);
  const Constants second(weight_2, column_sums, scale, wide.n, narrow);
  if (addend) {
    expect_dtype(kOp, "addend", *addend, aoti_torch_dtype_float32(), "float32");
    const Shape own = addend->shape();
    const bool same = own.dim == shape.dim && own.sizes[own.dim - 1] == narrow.n &&
                      std::equal(own.sizes, own.sizes + own.dim - 1, shape.sizes);
    if (!same) {  // both written out in the shape that they share
      int64_t sizes[Tensor::kMaxDim], dim;
      if (!broadcast_rows(shape, own, narrow.n, sizes, &dim))
        fail(kOp, ": addend", own, " and x", shape, " with N = ", narrow.n, " have no common shape");
      sizes[dim - 1] = wide.k;
      const Tensor rows = repeated<uint8_t>(x, {sizes, dim});
      sizes[dim - 1] = narrow.n;
      const std::optional<Tensor> added(repeated<float>(*addend, {sizes, dim}));
      return qfeed_forward(rows, weight, bias, multiplier, activation, weight_2, column_sums, scale, bias_2,
                           added);
    }
  }

  std::optional<Tensor> copy;
  if (!is_rows(x, &wide.x_stride)) {
    copy.emplace(x.contiguous());
    wide.x_stride = wide.k;
  }
  wide.x = (copy ? *copy : x).data<uint8_t>();
  wide.output = Output::kActivation;
  wide.activation = activation_named(kOp, activation);
  wide.y_stride = wide.n;

  narrow.output = Output::kFloat;
  narrow.dynamic = true;
  narrow.x_stride = wide.n;
  std::optional<Contiguous> own_bias, added;
  if (bias_2) {
    expect_dtype(kOp, "bias_2", *bias_2, aoti_torch_dtype_float32(), "float32");
    if (bias_2->dim() != 1 || bias_2->numel() != narrow.n) fail(kOp, ": bias_2", bias_2->shape(), ", expected [", narrow.n, "]");
    narrow.float_bias = own_bias.emplace(*bias_2).data<float>();
  }
  if (addend) {
    narrow.addend = added.emplace(*addend).data<float>();
    narrow.addend_stride = narrow.n;
  }
  int64_t sizes[Tensor::kMaxDim], rows = 1;
  for (int64_t i = 0; i < shape.dim - 1; ++i) rows *= sizes[i] = shape.sizes[i];
  sizes[shape.dim - 1] = narrow.n;
  Tensor y = Tensor::empty({sizes, shape.dim}, aoti_torch_dtype_float32());
  narrow.y = y.data<void>();
  narrow.y_stride = narrow.n;
  run_feed_forward(wide, narrow, rows);
  return y;
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) { m.impl("qfeed_forward", fxq::boxed<fxq::qfeed_forward>); }

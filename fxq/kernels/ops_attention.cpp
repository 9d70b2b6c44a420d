// Attention as torch operators.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "attention_memory.h"
#include "steps.h"

namespace fxq {
namespace {

// [B, H, T, D], [B, T, D] or, with `heads` of them in a row, [B, T, H * D], as sizes and strides of [B, H, T, D].
struct Heads {
  int64_t size[4], stride[4];
};

Heads heads_of(const char* name, const Tensor& t, int64_t dim, int64_t heads) {
  expect_dtype("qattention", name, t, aoti_torch_dtype_uint8(), "uint8");
  if (t.dim() != dim || dim < 3 || dim > 4)
    fail("qattention: ", name, t.shape(), ", expected [B, H, T, D] or [B, T, D], the same for q, k and v");
  const int64_t *sizes = t.shape().sizes, *strides = t.strides();
  if (heads) {
    if (dim != 3 || heads < 0 || sizes[2] % heads || !sizes[2])
      fail("qattention: ", name, t.shape(), ", expected [B, T, H * D] with H = ", heads);
    const int64_t depth = sizes[2] / heads;
    return {{sizes[0], heads, sizes[1], depth}, {strides[0], depth * strides[2], strides[1], strides[2]}};
  }
  if (dim == 3) return {{sizes[0], 1, sizes[1], sizes[2]}, {strides[0], 0, strides[1], strides[2]}};
  return {{sizes[0], sizes[1], sizes[2], sizes[3]}, {strides[0], strides[1], strides[2], strides[3]}};
}

// An operand whose rows are adjacent values: itself, or a copy where it lies in memory otherwise.
struct Operand {
  std::optional<Tensor> copy;
  Heads heads;
  const uint8_t* data;

  Operand(const char* name, const Tensor& t, int64_t dim, int64_t count)
      : heads(heads_of(name, t, dim, count)), data(t.data<uint8_t>()) {
    if (heads.stride[3] == 1 || heads.size[3] <= 1) return;
    copy.emplace(t.contiguous());
    heads = heads_of(name, *copy, dim, count);
    data = copy->data<uint8_t>();
  }
  void into(const uint8_t** to, int64_t* stride, int64_t batch) const {
    *to = data;
    for (int i = 0; i < 3; ++i) stride[i] = heads.stride[i];
    if (heads.size[0] == 1 && batch != 1) stride[0] = 0;
  }
};

}  // namespace

float attention_multiplier(double s_qk, const std::optional<double>& scale, int64_t depth) {
  return float(s_qk * (scale ? *scale : 1 / std::sqrt(double(depth))));
}

void set_mask(Attention& a, const Tensor& mask, int64_t batch, bool has_heads) {
  a.mask_is_float = mask.dtype() == aoti_torch_dtype_float32();
  if (!a.mask_is_float && mask.dtype() != aoti_torch_dtype_bool()) fail("qattention: mask is neither bool nor float32");
  const int64_t want[4] = {batch, a.heads, a.queries, a.keys};
  const int64_t *sizes = mask.shape().sizes, *strides = mask.strides();
  int64_t target = 3;
  for (int64_t i = mask.dim() - 1; i >= 0; --i, --target) {
    if (!has_heads && target == 1) target = 0;
    if (target < 0 || (sizes[i] != 1 && sizes[i] != want[target]))
      fail("qattention: mask", mask.shape(), " does not fit scores", Shape{want, 4});
    a.mask_stride[target] = sizes[i] == 1 ? 0 : strides[i];
  }
  a.mask = mask.data<void>();
}

// Shares heads, and blocks of the queries of a head where there are fewer heads than threads could use.
AttentionPieces::AttentionPieces(const Attention& attention, int64_t batch, int64_t threads) : a(attention) {
  const int64_t heads = batch * a.heads, most = ceil_div(a.queries, 4 * kMaxRows);
  blocks = threads == 1 ? 1 : std::max<int64_t>(1, std::min(most, ceil_div(4 * threads, heads)));
  height = ceil_div(ceil_div(a.queries, blocks), kMaxRows) * kMaxRows;
  count = heads * blocks;
}

void AttentionPieces::run(int64_t begin, int64_t end) const {
  const Kernels& kernels = active();
  const int64_t sharing = a.heads / a.kv_heads;
  const AttentionMemory memory(a);
  int64_t packed = -1;  // whose keys and values the memory holds
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / blocks, row = i % blocks * height;
    if (row >= a.queries) continue;
    kernels.attention(a, head, row, std::min(row + height, a.queries), memory.parts(), head / sharing == packed);
    packed = head / sharing;
  }
}

void run_attention(const Attention& a, int64_t batch) {
  const int64_t heads = batch * a.heads, work = a.queries * a.keys * (a.depth + a.width);
  if (heads == 0 || a.queries == 0 || a.width == 0) return;
  const int64_t threads = heads * work < 2 * kProductGrain ? 1 : torch::stable::get_num_threads();
  const AttentionPieces pieces(a, batch, threads);
  parallel(pieces.count, threads == 1 ? pieces.count : std::max<int64_t>(1, pieces.count / (4 * threads)),
           [&](int64_t begin, int64_t end) { pieces.run(begin, end); });
}

namespace {

// What both operators share; the caller has set the epilogue.
Tensor attend(Attention& a, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
              bool is_causal, std::optional<double> scale, int64_t z_q, int64_t z_v, double s_qk, double v_multiplier,
              int64_t count) {
  const int64_t dim = q.dim();
  const Operand queries("q", q, dim, count);
  const int64_t depth = queries.heads.size[3];
  const int64_t shared = count && k.dim() == 3 ? k.shape().sizes[2] / depth : 0;  // heads of k and v
  if (count && shared * depth != k.shape().sizes[k.dim() - 1])
    fail("qattention: k", k.shape(), " does not hold heads of ", depth, ", those of q", q.shape());
  const Operand keys("k", k, dim, shared), values("v", v, dim, shared);
  const int64_t *of_q = queries.heads.size, *of_k = keys.heads.size, *of_v = values.heads.size;
  const int64_t batch = of_q[0];
  const bool fit = of_k[3] == of_q[3] && of_v[2] == of_k[2] && of_v[1] == of_k[1] &&
                   (of_k[0] == batch || of_k[0] == 1) && (of_v[0] == batch || of_v[0] == 1) && of_k[1] > 0 &&
                   of_q[1] % of_k[1] == 0;
  if (!fit) fail("qattention: q", q.shape(), ", k", k.shape(), " and v", v.shape(), " do not belong together");
  if (of_k[2] > kMaxKeys) fail("qattention: ", of_k[2], " keys, expected at most ", kMaxKeys);
  expect_range("qattention", z_q, 0, 255);
  expect_range("qattention", z_v, 0, 255);
  queries.into(&a.q, a.q_stride, batch);
  keys.into(&a.k, a.k_stride, batch);
  values.into(&a.v, a.v_stride, batch);
  a.heads = of_q[1];
  a.kv_heads = of_k[1];
  a.queries = of_q[2];
  a.keys = of_k[2];
  a.depth = of_q[3];
  a.width = of_v[3];
  a.is_causal = is_causal;
  a.q_zero_point = int32_t(z_q);
  a.v_zero_point = int32_t(z_v);
  a.multiplier = attention_multiplier(s_qk, scale, a.depth);
  a.v_multiplier = float(v_multiplier);
  if (mask) set_mask(a, *mask, batch, dim == 4 || count);

  // [B, H, T, E] in the memory order [B, T, H, E]: the transpose and reshape behind an attention copy nothing.
  const int64_t row = a.heads * a.width;
  const int64_t sizes[4] = {batch, a.heads, a.queries, a.width}, strides[4] = {a.queries * row, a.width, row, 1};
  const int64_t flat[3] = {batch, a.queries, count ? row : a.width};
  const int32_t dtype = a.is_float ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8();
  Tensor y = dim == 3 ? Tensor::empty({flat, 3}, dtype) : Tensor::empty({sizes, 4}, strides, dtype);
  a.y = y.data<void>();
  run_attention(a, batch);
  return y;
}

Tensor qattention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, bool is_causal,
                  const std::optional<double>& scale, int64_t z_q, int64_t z_v, double s_qk, double m_v,
                  int64_t zero_point, int64_t masked, int64_t heads) {
  expect_range("qattention", zero_point, 0, 255);
  expect_range("qattention", masked, 0, 255);
  Attention a;
  a.zero_point = int32_t(zero_point);
  a.masked = float(masked);
  return attend(a, q, k, v, mask, is_causal, scale, z_q, z_v, s_qk, m_v, heads);
}

Tensor qattention_float(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                        bool is_causal, const std::optional<double>& scale, int64_t z_q, int64_t z_v, double s_qk,
                        double s_v, bool nan_if_masked, int64_t heads) {
  Attention a;
  a.is_float = true;
  a.masked = nan_if_masked ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
  return attend(a, q, k, v, mask, is_causal, scale, z_q, z_v, s_qk, s_v, heads);
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) {
  m.impl("qattention", fxq::boxed<fxq::qattention>);
  m.impl("qattention_float", fxq::boxed<fxq::qattention_float>);
}

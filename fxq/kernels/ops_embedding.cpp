// Embeddings from int8 tables as torch operators.
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "norm_rows.h"

namespace fxq {
namespace {

constexpr int64_t kTogether = 8;  // rows

// Ids of one table, to be read in the order of a shape that they broadcast to.
struct Ids {
  const void* data;
  bool wide;
  int64_t strides[Tensor::kMaxDim] = {};  // of the dimensions of the common shape
  Contiguous table, scales;
  int64_t rows;

  Ids(const char* op, const Tensor& ids, const Tensor& table, const Tensor& scales, Shape common, int64_t k)
      : data(ids.data<void>()), wide(ids.dtype() == aoti_torch_dtype_int64()), table(table), scales(scales) {
    if (!wide && ids.dtype() != aoti_torch_dtype_int32()) fail(op, ": ids has the wrong dtype, expected int32 or int64");
    expect_dtype(op, "table", table, aoti_torch_dtype_int8(), "int8");
    expect_dtype(op, "scales", scales, aoti_torch_dtype_float32(), "float32");
    if (table.dim() != 2 || table.shape().sizes[1] != k) fail(op, ": table", table.shape(), ", expected [V, ", k, "]");
    rows = table.shape().sizes[0];
    if (scales.dim() != 1 || scales.numel() != rows)
      fail(op, ": scales", scales.shape(), ", expected one for each row of the table", table.shape());
    const Shape own = ids.shape();
    for (int64_t i = 0; i < own.dim; ++i)
      strides[common.dim - own.dim + i] = own.sizes[i] == 1 ? 0 : ids.strides()[i];
  }
  TableRow row(int64_t place, Shape common, int64_t k) const {
    int64_t offset = 0;
    for (int64_t d = common.dim - 1; d >= 0; place /= common.sizes[d--]) offset += place % common.sizes[d] * strides[d];
    const int64_t id = wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
    if (id < 0 || id >= rows) throw std::out_of_range("index out of range in self");  // IndexError, as torch's
    return {table.data<int8_t>() + id * k, scales.data<float>()[id]};
  }
};

// The rows to be added up for each place of the common shape of all ids.
struct Lookup {
  int64_t sizes[Tensor::kMaxDim], dim = 0, count = 1, k = 0, tables;
  std::vector<TableRow> rows;  // [count][tables]

  Lookup(const char* op, const std::vector<const Tensor*>& ids, const std::vector<const Tensor*>& tables_,
         const std::vector<const Tensor*>& scales)
      : tables(int64_t(ids.size())) {
    if (ids.empty() || ids.size() != tables_.size() || ids.size() != scales.size())
      fail(op, ": ", ids.size(), " ids, ", tables_.size(), " tables, ", scales.size(), " scales, expected as many of each");
    for (const Tensor* t : ids) dim = std::max(dim, t->dim());
    std::fill(sizes, sizes + dim, 1);
    for (const Tensor* t : ids) {
      const Shape own = t->shape();
      for (int64_t i = 0; i < own.dim; ++i) {
        int64_t& size = sizes[dim - own.dim + i];
        if (own.sizes[i] != 1 && size != 1 && own.sizes[i] != size) fail(op, ": ids", own, " do not broadcast together");
        if (own.sizes[i] != 1) size = own.sizes[i];
      }
    }
    for (int64_t i = 0; i < dim; ++i) count *= sizes[i];
    if (tables_[0]->dim() != 2) fail(op, ": table", tables_[0]->shape(), ", expected [V, K]");
    k = tables_[0]->shape().sizes[1];
    rows.resize(count * tables);
    for (int64_t t = 0; t < tables; ++t) {
      const Ids own(op, *ids[t], *tables_[t], *scales[t], {sizes, dim}, k);
      for (int64_t place = 0; place < count; ++place) rows[place * tables + t] = own.row(place, {sizes, dim}, k);
    }
    sizes[dim] = k;
  }
  Tensor empty(int32_t dtype) const { return Tensor::empty({sizes, dim + 1}, dtype); }
};

std::vector<const Tensor*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<const Tensor*> found;
  for (const Tensor& t : tensors) found.push_back(&t);
  return found;
}

Tensor qembedding(const Tensor& ids, const Tensor& table, const Tensor& scales) {
  const Lookup lookup("qembedding", {&ids}, {&table}, {&scales});
  Tensor y = lookup.empty(aoti_torch_dtype_float32());
  float* to = y.data<float>();
  const int64_t k = lookup.k;
  parallel(lookup.count, std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, k)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) active().embed(lookup.rows.data() + i, 1, k, to + i * k);
  });
  return y;
}

std::pair<Tensor, Tensor> qembedding_norm(const std::vector<Tensor>& ids, const std::vector<Tensor>& tables,
                                          const std::vector<Tensor>& scales, const std::string& kind,
                                          const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                          double eps, double scale, int64_t zero_point,
                                          const std::optional<Tensor>& factor) {
  constexpr const char* op = "qembedding_norm";
  const Lookup lookup(op, pointers(ids), pointers(tables), pointers(scales));
  const int64_t k = lookup.k;
  NormRows norm(op, k, kind, weight, bias, eps);
  norm.quantized(scale, zero_point, factor);
  Tensor y = lookup.empty(aoti_torch_dtype_float32()), q = lookup.empty(aoti_torch_dtype_uint8());
  float* to = y.data<float>();
  uint8_t* to_q = q.data<uint8_t>();
  if (k == 0) return {std::move(y), std::move(q)};
  parallel(lookup.count, std::max<int64_t>(1, kElementGrain / 4 / k), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin, last; first < end; first = last) {  // sums are normalised where they lie, still in cache
      last = std::min(first + kTogether, end);
      for (int64_t i = first; i < last; ++i)
        active().embed(lookup.rows.data() + i * lookup.tables, lookup.tables, k, to + i * k);
      active().norm(norm.norm, to + first * k, to + first * k, to_q + first * k, last - first);
    }
  });
  return {std::move(y), std::move(q)};
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) {
  m.impl("qembedding", fxq::boxed<fxq::qembedding>);
  m.impl("qembedding_norm", fxq::boxed<fxq::qembedding_norm>);
}

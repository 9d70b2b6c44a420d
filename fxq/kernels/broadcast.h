// Operands written out in a shape that they share.
#pragma once
#include <algorithm>

#include "tensor.h"

namespace fxq {

// A copy of `t` with the shape `to`, repeated along dimensions that it lacks or where its size is 1.
template <class T>
Tensor repeated(const Tensor& t, Shape to) {
  Tensor copy = Tensor::empty(to, t.dtype());
  const Shape own = t.shape();
  const int64_t *strides = t.strides(), missing = to.dim - own.dim;
  const T* from = t.data<T>();
  T* target = copy.data<T>();
  for (int64_t i = 0, count = copy.numel(); i < count; ++i) {
    int64_t offset = 0;
    for (int64_t d = to.dim - 1, rest = i; d >= missing; rest /= to.sizes[d--])
      if (own.sizes[d - missing] != 1) offset += rest % to.sizes[d] * strides[d - missing];
    target[i] = from[offset];
  }
  return copy;
}

// The common shape of x [..., K] and addend [..., N or 1], up to the last dimension; false where they have none.
inline bool broadcast_rows(Shape x, Shape addend, int64_t n, int64_t* sizes, int64_t* dim) {
  *dim = std::max(x.dim, addend.dim);
  for (int64_t i = 2; i <= *dim; ++i) {
    const int64_t a = i <= x.dim ? x.sizes[x.dim - i] : 1, b = i <= addend.dim ? addend.sizes[addend.dim - i] : 1;
    if (a != b && a != 1 && b != 1) return false;
    sizes[*dim - i] = a == 1 ? b : a;
  }
  return addend.dim == 0 || addend.sizes[addend.dim - 1] == n || addend.sizes[addend.dim - 1] == 1;
}

}  // namespace fxq

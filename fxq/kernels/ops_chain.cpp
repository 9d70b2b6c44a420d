// Chains of layers as torch operators.
#include <algorithm>
#include <stdexcept>

#include "chain.h"
#include "checks.h"

namespace fxq {
namespace {

void gemm_here(const Gemm& g, int64_t rows) { active().gemm(g, 0, rows, 0, panel_count(g.n)); }

// Each thread takes its rows through all layers; or, with few rows and many weights, all threads share each layer.
void run_chain(const Chain& chain, const void* x, int64_t rows, void* y) {
  const int64_t work = rows * chain.weight_bytes();
  const int64_t threads = work < 2 * kProductGrain ? 1 : torch::stable::get_num_threads();
  if (threads == 1) return chain.run(x, rows, y, chain.block_rows(), gemm_here);
  const int64_t tiles = ceil_div(rows, kMaxRows);
  if (tiles < threads || (tiles < 4 * threads && chain.weight_bytes() > (1 << 20)))
    return chain.run(x, rows, y, rows, run_gemm);
  const ChainHeader& header = chain.header();
  const int64_t x_row = chain.in_features() * (header.from_float ? sizeof(float) : 1);
  const int64_t y_row = chain.out_features() * (header.to_float ? sizeof(float) : 1);
  torch::stable::parallel_for(0, tiles, ceil_div(tiles, threads), [&](int64_t begin, int64_t end) {
    begin *= kMaxRows;
    end = std::min(end * kMaxRows, rows);
    chain.run(static_cast<const uint8_t*>(x) + begin * x_row, end - begin, static_cast<uint8_t*>(y) + begin * y_row,
              chain.block_rows(), gemm_here);
  });
}

Chain read_program(const char* op, const Tensor& program, const Contiguous& bytes) {
  try {
    return Chain(bytes.data<uint8_t>(), program.numel());
  } catch (const std::invalid_argument& error) {
    fail(op, ": program", program.shape(), " cannot be run: ", error.what());
  }
}

Tensor run_program(const char* op, const Tensor& x, const Tensor& program, bool to_float) {
  expect_dtype(op, "program", program, aoti_torch_dtype_uint8(), "uint8");
  const Contiguous bytes(program), source(x);
  const Chain chain = read_program(op, program, bytes);
  if (chain.header().from_float)
    expect_dtype(op, "x", x, aoti_torch_dtype_float32(), "float32 (the program begins with quantize)");
  else
    expect_dtype(op, "x", x, aoti_torch_dtype_uint8(), "uint8");
  const Shape shape = x.shape();
  if (shape.dim == 0 || shape.sizes[shape.dim - 1] != chain.in_features())
    fail(op, ": x", shape, ", expected [..., ", chain.in_features(), "]");
  const bool shaped = program.dim() == 2 && program.shape().sizes[0] == chain.out_features();
  if (!shaped || bool(chain.header().to_float) != to_float)
    fail(op, ": program", program.shape(), " gives [..., ", chain.out_features(), "] of ",
         chain.header().to_float ? "float32" : "uint8", ", which is not what its shape and the operator say");

  int64_t sizes[Tensor::kMaxDim], rows = 1;
  for (int64_t i = 0; i < shape.dim - 1; ++i) rows *= sizes[i] = shape.sizes[i];
  sizes[shape.dim - 1] = chain.out_features();
  Tensor y = Tensor::empty({sizes, shape.dim}, to_float ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8());
  if (rows > 0) run_chain(chain, source.data<void>(), rows, y.data<void>());
  return y;
}

Tensor qchain(const Tensor& x, const Tensor& program) { return run_program("qchain", x, program, false); }
Tensor qchain_float(const Tensor& x, const Tensor& program) { return run_program("qchain_float", x, program, true); }

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) {
  m.impl("qchain", fxq::boxed<fxq::qchain>);
  m.impl("qchain_float", fxq::boxed<fxq::qchain_float>);
}

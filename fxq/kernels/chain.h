// A run of linear layers as one flat program, as fxq/ops/chain.py writes it: its bytes read, checked and executed.
//
//   ChainHeader | ChainLayer per layer | for each layer: packed weight, bias, multipliers
//
// little endian, every section at a multiple of 64 bytes, offsets from the start of the program.
#pragma once
#include "kernels.h"

namespace fxq {

struct ChainHeader {
  char magic[8];      // "fxqchain"
  uint32_t version;   // 1
  uint32_t layers;
  uint64_t size;      // bytes, without what pads the tensor
  uint32_t from_float, to_float;  // the input is float32, quantized with scale and zero_point; the result is float32
  float scale;
  int32_t zero_point;
  char reserved[24];
};

struct ChainLayer {
  uint64_t weight, bias, multiplier;
  uint32_t k, n;
  int32_t zero_point, low, high;
  char reserved[20];
};

static_assert(sizeof(ChainHeader) == 64 && sizeof(ChainLayer) == 64);

using RunGemm = void (*)(const Gemm& g, int64_t rows);

class Chain {
 public:
  // Reads the header and checks every size and offset; throws std::invalid_argument, which says what is wrong.
  Chain(const uint8_t* program, uint64_t size);

  const ChainHeader& header() const { return header_; }
  int64_t in_features() const { return layer(0).k; }
  int64_t out_features() const { return layer(header_.layers - 1).n; }
  int64_t weight_bytes() const { return weight_bytes_; }

  // x: uint8 or float [rows, in_features]; y: uint8 or float [rows, out_features]; both contiguous. Takes `block` rows
  // at a time through all layers, with `gemm` for each.
  void run(const void* x, int64_t rows, void* y, int64_t block, RunGemm gemm) const;

  // Rows that go through all layers together: few enough to stay in the caches between layers, and many where the
  // weights do not stay there themselves.
  int64_t block_rows() const;

 private:
  ChainLayer layer(int64_t i) const;

  const uint8_t* program_;
  ChainHeader header_;
  int64_t widest_ = 0;  // of all the intermediate rows
  int64_t weight_bytes_ = 0;
};

}  // namespace fxq

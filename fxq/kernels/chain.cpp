#include "chain.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fxq {

constexpr int64_t kMostRows = 96;
constexpr int64_t kCachedRows = 256 << 10;     // bytes of rows between layers that stay in a second-level cache
constexpr int64_t kCachedWeights = 512 << 10;  // weights that do, from block to block

ChainLayer Chain::layer(int64_t i) const {
  ChainLayer layer;
  memcpy(&layer, program_ + sizeof(ChainHeader) + i * sizeof layer, sizeof layer);
  return layer;
}

[[noreturn]] static void damaged(const std::string& how) { throw std::invalid_argument(how); }

Chain::Chain(const uint8_t* program, uint64_t size) : program_(program) {
  if (size < sizeof header_) damaged("it is shorter than a header");
  memcpy(&header_, program, sizeof header_);
  if (memcmp(header_.magic, "fxqchain", 8)) damaged("it does not begin with 'fxqchain'");
  if (header_.version != 1) damaged("its version is " + std::to_string(header_.version) + ", expected 1");
  if (header_.size < sizeof header_ || header_.size > size)
    damaged("it is cut off: " + std::to_string(size) + " of " + std::to_string(header_.size) + " bytes");
  size = header_.size;
  if (header_.layers == 0 || header_.layers > (size - sizeof header_) / sizeof(ChainLayer))
    damaged("it holds no table of " + std::to_string(header_.layers) + " layers");
  if (header_.zero_point < 0 || header_.zero_point > 255)
    damaged("it quantizes with zero point " + std::to_string(header_.zero_point));
  for (uint32_t i = 0, k = 0; i < header_.layers; ++i) {
    const ChainLayer own = layer(i);
    const auto within = [&](uint64_t offset, uint64_t bytes) {
      return offset % 64 == 0 && offset <= size && bytes <= size - offset;
    };
    constexpr uint32_t kMost = 1u << 30;  // so that no size below overflows
    const bool in_range = own.zero_point >= 0 && own.zero_point <= 255 && own.low >= 0 && own.low <= own.high &&
                          own.high <= 255;
    const bool sized = own.k > 0 && own.k <= kMost && own.n > 0 && own.n <= kMost && (i == 0 || own.k == k);
    const bool whole = sized && within(own.weight, packed_size(own.n, own.k)) && within(own.bias, 4ull * own.n) &&
                       within(own.multiplier, 4ull * own.n);
    if (!in_range || !whole) damaged("layer " + std::to_string(i) + " is damaged");
    k = own.n;
    widest_ = std::max<int64_t>({widest_, own.k, own.n});
    weight_bytes_ += packed_size(own.n, own.k);
  }
}

int64_t Chain::block_rows() const {
  if (weight_bytes_ > kCachedWeights) return kMostRows;
  return std::clamp<int64_t>(kCachedRows / (2 * widest_) / kMaxRows * kMaxRows, kMaxRows, kMostRows);
}

void Chain::run(const void* x, int64_t rows, void* y, int64_t block, RunGemm gemm) const {
  block = std::min(block, rows);
  uint8_t* const memory = static_cast<uint8_t*>(scratch(2 * block * widest_, Holder::kPart));
  uint8_t* const between[2] = {memory, memory + block * widest_};
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t count = std::min(block, rows - row);
    Gemm g;
    if (header_.from_float) {
      const float* source = static_cast<const float*>(x) + row * in_features();
      active().quantize(source, between[0], count * in_features(), 1.0f / header_.scale, header_.zero_point);
      g.x = between[0];
    } else {
      g.x = static_cast<const uint8_t*>(x) + row * in_features();
    }
    for (uint32_t i = 0; i < header_.layers; ++i) {
      const ChainLayer own = layer(i);
      const bool last = i + 1 == header_.layers;
      g.k = g.x_stride = own.k;
      g.n = g.y_stride = own.n;
      g.weight = reinterpret_cast<const int8_t*>(program_ + own.weight);
      g.bias = reinterpret_cast<const int32_t*>(program_ + own.bias);
      g.multiplier = reinterpret_cast<const float*>(program_ + own.multiplier);
      g.zero_point = own.zero_point;
      g.low = own.low;
      g.high = own.high;
      g.output = last && header_.to_float ? Output::kFloat : Output::kUint8;
      uint8_t* next = between[(i + 1) % 2];
      if (last) next = static_cast<uint8_t*>(y) + row * own.n * (header_.to_float ? sizeof(float) : 1);
      g.y = next;
      gemm(g, count);
      g.x = next;
    }
  }
}

}  // namespace fxq

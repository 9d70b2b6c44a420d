// Every kernel on every instruction set over awkward sizes, in arrays of exactly the right size, under
// AddressSanitizer and UndefinedBehaviorSanitizer. All instruction sets must give the bits of the generic one.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "chain.h"
#include "kernels.h"

using namespace fxq;

static std::mt19937 random_bits(0);

template <class T>
static std::vector<T> draw(size_t size, int low, int high, double scale = 1) {
  std::vector<T> values(size);
  for (T& value : values) value = T((low + int64_t(random_bits() % (high - low + 1))) * scale);
  return values;
}

static std::vector<std::string> instruction_sets() {
  std::vector<std::string> names(1);
  for (const char* c = available_isas(); *c; ++c)
    if (*c == ',')
      names.emplace_back();
    else
      names.back() += *c;
  return names;
}

// run(target) on each instruction set; the targets must come out equal.
template <class Run>
static void compare(const char* what, size_t bytes, const Run& run) {
  std::vector<uint8_t> expected(bytes), found(bytes);
  use_isa("generic");
  run(expected.data());
  for (const std::string& isa : instruction_sets()) {
    use_isa(isa.c_str());
    run(found.data());
    if (found != expected) {
      std::printf("%s differs on %s\n", what, isa.c_str());
      std::exit(1);
    }
  }
}

static void check_elementwise(size_t count) {
  const auto q = draw<uint8_t>(count, 0, 255), p = draw<uint8_t>(count, 0, 255);
  const auto x = draw<float>(count, -1000, 1000, 0.25);
  compare("quantize", count, [&](uint8_t* y) { active().quantize(x.data(), y, count, 1.5f, 100); });
  compare("requantize", count, [&](uint8_t* y) { active().requantize({q.data(), 9, .7f}, y, count, 3, 3, 200); });
  compare("add", count,
          [&](uint8_t* y) { active().add({q.data(), 9, .7f}, {p.data(), 1, .3f}, y, count, 3, 3, 200); });
  std::vector<float> wide(count);
  compare("dequantize", count * 4, [&](uint8_t* y) {
    active().dequantize({q.data(), 9, .7f}, wide.data(), count);
    if (count) memcpy(y, wide.data(), count * 4);
  });
}

static void check_gemm(int64_t rows, int64_t n, int64_t k) {
  const auto x = draw<uint8_t>(rows * k, 0, 255);
  const auto weight = draw<int8_t>(packed_size(n, k), -128, 127);
  const auto bias = draw<int32_t>(n, -3000, 3000);
  const auto multiplier = draw<float>(n, 1, 100, 1e-4);
  const auto addend = draw<float>(rows * n, -1000, 1000, 0.01);
  for (const Output output : {Output::kUint8, Output::kFloat, Output::kActivation, Output::kActivationUint8}) {
    for (int activation = 0; activation < (output == Output::kActivation ? 6 : 1); ++activation) {
      Gemm g;
      g.x = x.data();
      g.x_stride = g.k = k;
      g.n = g.y_stride = n;
      g.weight = weight.data();
      g.bias = bias.data();
      g.multiplier = multiplier.data();
      g.output = output;
      g.activation = Activation(activation);
      g.zero_point = g.low = 7;
      g.addend = output == Output::kFloat || output == Output::kActivation ? addend.data() : nullptr;
      g.addend_stride = activation % 2 ? 0 : n;
      const bool is_float = g.addend != nullptr;
      std::vector<float> wide(is_float ? rows * n : 0);
      compare("gemm", rows * n * (is_float ? 4 : 1), [&](uint8_t* y) {
        g.y = is_float ? static_cast<void*>(wide.data()) : y;
        active().gemm(g, 0, rows, 0, panel_count(n));
        if (!wide.empty()) memcpy(y, wide.data(), wide.size() * 4);
      });
    }
  }
}

static std::vector<uint8_t> program_of(const std::vector<uint32_t>& sizes) {
  const uint32_t layers = sizes.size() - 1;
  std::vector<uint8_t> program(sizeof(ChainHeader) + layers * sizeof(ChainLayer));
  const auto append = [&](const void* data, size_t bytes) {
    const uint64_t offset = program.size();
    program.resize(offset + ceil_div(bytes, 64) * 64);
    memcpy(program.data() + offset, data, bytes);
    return offset;
  };
  for (uint32_t i = 0; i < layers; ++i) {
    const uint32_t k = sizes[i], n = sizes[i + 1];
    const auto weight = draw<int8_t>(packed_size(n, k), -128, 127);
    const auto bias = draw<int32_t>(n, -3000, 3000);
    const auto multiplier = draw<float>(n, 1, 100, 1e-4);
    ChainLayer layer = {};
    layer.weight = append(weight.data(), weight.size());
    layer.bias = append(bias.data(), 4 * n);
    layer.multiplier = append(multiplier.data(), 4 * n);
    layer.k = k;
    layer.n = n;
    layer.high = 255;
    memcpy(program.data() + sizeof(ChainHeader) + i * sizeof layer, &layer, sizeof layer);
  }
  const ChainHeader header = {{'f', 'x', 'q', 'c', 'h', 'a', 'i', 'n'}, 1, layers, program.size(), 1, 1, .5f, 100, {}};
  memcpy(program.data(), &header, sizeof header);
  return program;
}

static void run_here(const Gemm& g, int64_t rows) { active().gemm(g, 0, rows, 0, panel_count(g.n)); }

static void check_chain(const std::vector<uint32_t>& sizes, int64_t rows) {
  const auto program = program_of(sizes);
  const auto x = draw<float>(rows * sizes.front(), -1000, 1000, 0.25);
  std::vector<float> y(rows * sizes.back());
  compare("chain", y.size() * 4, [&](uint8_t* bytes) {
    const Chain chain(program.data(), program.size());
    chain.run(x.data(), rows, y.data(), chain.block_rows(), run_here);
    memcpy(bytes, y.data(), y.size() * 4);
  });
}

// Whatever a byte of the header or the table is changed to, the program is refused or runs within its bounds.
static void check_damaged_chains() {
  const auto whole = program_of({20, 70, 9});
  const size_t front = sizeof(ChainHeader) + 2 * sizeof(ChainLayer);
  for (int i = 0; i < 20000; ++i) {
    auto program = whole;
    for (int changes = 1 + random_bits() % 3; changes > 0; --changes)
      program[random_bits() % front] = random_bits() % 4 ? random_bits() : 0;
    program.resize(random_bits() % 8 ? program.size() : random_bits() % program.size());
    program.shrink_to_fit();
    try {
      const Chain chain(program.data(), program.size());
      std::vector<float> x(chain.in_features()), y(chain.out_features());
      chain.run(x.data(), 1, y.data(), chain.block_rows(), run_here);
    } catch (const std::invalid_argument&) {
    }
  }
}

int main() {
  for (size_t count = 0; count < 70; ++count) check_elementwise(count);
  for (const int64_t k : {0, 1, 3, 4, 5, 66, 1029})
    for (const int64_t n : {0, 1, 15, 16, 17, 63, 64, 65, 130})
      for (const int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 97})
        if (k < 1000 || rows < 8) check_gemm(rows, n, k);
  check_chain({1, 1}, 3);
  check_chain({33, 17, 65, 7}, 20);
  check_chain({64, 5000, 30}, 13);
  check_chain({700, 900, 10}, 100);
  check_damaged_chains();
  std::printf("clean on %s\n", available_isas());
}

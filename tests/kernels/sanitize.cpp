// Every kernel on every instruction set over awkward sizes, in arrays of exactly the right size, under
// AddressSanitizer and UndefinedBehaviorSanitizer. All instruction sets must give the bits of the generic one.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_memory.h"
#include "chain.h"
#include "conv.h"
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
  for (int32_t shift : {0, 31, 40, 62}) {
    for (bool twice : {false, true})
      compare("requantize_fixed", count, [&](uint8_t* y) {
        active().requantize_fixed({q.data(), 9, INT32_MAX}, y, count, shift, twice, 3, 3, 200);
      });
    compare("add_fixed", count, [&](uint8_t* y) {
      active().add_fixed({q.data(), 9, INT32_MAX}, {p.data(), 1, 1 << 30}, y, count, shift, 3, 3, 200);
    });
  }
  std::vector<float> wide(count);
  compare("dequantize", count * 4, [&](uint8_t* y) {
    active().dequantize({q.data(), 9, .7f}, wide.data(), count);
    if (count) memcpy(y, wide.data(), count * 4);
  });
}

// Numbers of 16 bits, among them denormals, infinities and NaNs, signalling ones too, and tame ones.
static void check_reals(size_t count) {
  const auto x = draw<uint16_t>(count, 0, 0xFFFF);
  for (const Real type : {Real::kBfloat16, Real::kFloat16}) {
    std::vector<float> wide(count);
    compare("widen_reals", count * 4, [&](uint8_t* y) {
      active().widen_reals(type, x.data(), wide.data(), count);
      if (count) memcpy(y, wide.data(), count * 4);
    });
  }
  std::vector<uint32_t> pairs(ceil_div(count, 2));
  for (const bool wild : {false, true}) {
    auto brains = wild ? x : draw<uint16_t>(count, 0x3F80, 0x42FF);
    for (size_t i = 0; i < count; i += 3) brains[i] = 0;
    compare("pair_brains", pairs.size() * 4 + 1, [&](uint8_t* y) {
      y[0] = active().pair_brains(brains.data(), pairs.data(), count);
      if (count) memcpy(y + 1, pairs.data(), pairs.size() * 4);
    });
  }
}

static void check_gemm(int64_t rows, int64_t n, int64_t k) {
  const auto x = draw<uint8_t>(rows * k, 0, 255);
  const auto weight = draw<int8_t>(packed_size(n, k), -128, 127);
  const auto bias = draw<int32_t>(n, -3000, 3000);
  const auto multiplier = draw<float>(n, 1, 100, 1e-4);
  const auto addend = draw<float>(rows * n, -1000, 1000, 0.01);
  const auto residual = draw<uint8_t>(rows * n, 0, 255);
  const auto factor = draw<float>(n, 1, 100, 0.01);
  for (const Output output : {Output::kUint8, Output::kFloat, Output::kActivation, Output::kActivationUint8}) {
    const bool to_uint8 = output == Output::kActivationUint8;  // gelu in the registers and tanh's behind them, twice
    for (int activation = 0; activation < (output == Output::kActivation ? 8 : to_uint8 ? 4 : 2); ++activation) {
      Gemm g;
      g.x = x.data();
      g.x_stride = g.k = k;
      g.n = g.y_stride = n;
      g.weight = weight.data();
      g.bias = bias.data();
      g.multiplier = multiplier.data();
      g.output = output;
      g.activation = Activation(to_uint8 ? activation % 2 : activation);
      if (to_uint8 && activation >= 2) g.factor = factor.data();
      g.zero_point = g.low = 7;
      g.addend = output == Output::kFloat || output == Output::kActivation ? addend.data() : nullptr;
      g.addend_stride = activation % 2 ? 0 : n;
      if (output == Output::kUint8 && activation) {
        g.residual = residual.data();
        g.residual_stride = n;
        g.residual_zero_point = 3;
        g.residual_multiplier = 0.7f;
      }
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

// A float product on all instruction sets, to each type; where the processor multiplies pairs of bfloat16, that way too.
static void check_float_gemm(int64_t rows, int64_t n, int64_t k, const std::vector<float>& x,
                             const std::vector<int8_t>& weight, const std::vector<float>& scale,
                             const std::vector<float>& bias) {
  FloatGemm g;
  g.x = x.data();
  g.x_stride = g.k = k;
  g.n = g.y_stride = n;
  g.weight = weight.data();
  g.scale = scale.data();
  for (const Real type : {Real::kFloat32, Real::kBfloat16, Real::kFloat16}) {
    const int64_t bytes = rows * n * (type == Real::kFloat32 ? 4 : 2);
    g.type = type;
    g.bias = type == Real::kFloat16 ? nullptr : bias.data();
    compare("float_gemm", bytes, [&](uint8_t* y) {
      g.y = y;
      active().float_gemm(g, 0, rows, 0, panel_count(n));
    });
  }
  const auto brains = draw<uint16_t>(rows * k, 0x3F80, 0x42FF);
  std::vector<float> wide(rows * k);
  std::vector<uint32_t> pairs(rows * ceil_div(k, 2));
  g.type = Real::kBfloat16;
  compare("brain_gemm", rows * n * 2, [&](uint8_t* y) {
    g.y = y;
    g.x = nullptr;
    g.pairs = nullptr;
    if (brain_gemm()) {
      g.pairs = pairs.data();
      g.x_stride = ceil_div(k, 2);
      for (int64_t row = 0; row < rows; ++row)
        active().pair_brains(brains.data() + row * k, pairs.data() + row * g.x_stride, k);
      brain_gemm()(g, 0, rows, 0, panel_count(n));
    } else {
      g.x = wide.data();
      g.x_stride = k;
      active().widen_reals(Real::kBfloat16, brains.data(), wide.data(), rows * k);
      active().float_gemm(g, 0, rows, 0, panel_count(n));
    }
  });
}

// Float rows that find their own scales, and int8 weights beside floats.
static void check_float_rows(int64_t rows, int64_t n, int64_t k) {
  const auto x = draw<float>(rows * k, -1000, 1000, 0.01);
  const auto weight = draw<int8_t>(packed_size(n, k), -128, 127);
  const auto column_sums = draw<int32_t>(n, -3000, 3000);
  const auto scale = draw<float>(n, 1, 100, 1e-4), bias = draw<float>(n, -9, 9), addend = draw<float>(rows * n, -9, 9);
  std::vector<float> y(rows * n);
  for (int way = 0; way < 4; ++way) {
    Gemm g;
    g.dynamic = true;
    g.output = Output::kFloat;
    g.float_x = x.data();
    g.x_stride = g.k = k;
    g.n = g.y_stride = g.addend_stride = n;
    g.weight = weight.data();
    g.bias = column_sums.data();
    g.multiplier = scale.data();
    g.float_bias = way % 2 ? bias.data() : nullptr;
    g.addend = way / 2 ? addend.data() : nullptr;
    g.y = y.data();
    compare("gemm_dynamic", rows * n * 4, [&](uint8_t* found) {
      active().gemm_dynamic(g, 0, rows, 0, panel_count(n));
      if (!y.empty()) memcpy(found, y.data(), y.size() * 4);
    });
  }
  check_float_gemm(rows, n, k, x, weight, scale, bias);
}

static void check_images(int64_t channels) {
  const auto x = draw<uint8_t>(20 * channels, 0, 255), p = draw<uint8_t>(channels, 0, 255);
  const int64_t taps[5] = {0, 3 * channels, 19 * channels, 7 * channels, channels};
  compare("max_of", channels, [&](uint8_t* y) { active().max_of(x.data(), taps, 5, 1, 0, y, channels); });
  compare("max_of", 7 * channels, [&](uint8_t* y) {
    active().max_of(x.data(), taps + 4, 1, 7, 3 * channels, y, channels);
  });
  const int64_t runs[2] = {0, 10 * channels};
  compare("mean_of", channels, [&](uint8_t* y) {
    active().mean_of(x.data(), runs, 2, 5, 2 * channels, 30, 0.13f, y, channels, 40, 3, 250);
  });
  const uint8_t* const four[4] = {x.data(), x.data() + channels, x.data() + 5 * channels, x.data() + 19 * channels};
  compare("mix_of", channels, [&](uint8_t* y) { active().mix_of(four, .3f, .7f, .25f, .75f, y, channels); });
  compare("multiply", channels, [&](uint8_t* y) {
    active().multiply({x.data(), 9, .01f}, {p.data(), 200, 1}, y, 1, channels, 3, 0, 255);
  });
  compare("multiply", 20 * channels, [&](uint8_t* y) {
    active().multiply({x.data(), 9, .01f}, {p.data(), 200, 1}, y, 20, channels, 3, 0, 255);
  });
}

static void check_gemm_fixed(int64_t rows, int64_t n, int64_t k) {
  const auto x = draw<uint8_t>(rows * k, 0, 255);
  const auto weight = draw<int8_t>(packed_size(n, k), -128, 127);
  const auto bias = draw<int32_t>(n, -3000, 3000), multiplier = draw<int32_t>(n, 1 << 30, INT32_MAX);
  const auto shift = draw<int32_t>(n, 0, 62), zero_w = draw<int32_t>(n, -128, 127);
  const auto row_sums = draw<int32_t>(rows, 0, int(255 * k));
  for (int way = 0; way < 4; ++way) {
    Gemm g;
    g.x = x.data();
    g.x_stride = g.k = k;
    g.n = g.y_stride = n;
    g.weight = weight.data();
    g.bias = bias.data();
    g.output = Output::kFixed;
    g.fixed = multiplier.data();
    g.shift = shift.data();
    g.twice = way % 2;
    g.zero_w = way / 2 ? zero_w.data() : nullptr;
    g.row_sums = row_sums.data();
    g.zero_point = g.low = 7;
    compare("gemm, fixed", rows * n, [&](uint8_t* y) {
      g.y = y;
      active().gemm(g, 0, rows, 0, panel_count(n));
    });
  }
}

// A convolution of [batch, height, width, channels], each array of exactly its size.
static void check_conv(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t n, int64_t kernel,
                       int64_t stride, int64_t padding, int64_t dilation, int64_t groups) {
  Conv c;
  const auto x = draw<uint8_t>(batch * height * width * channels, 0, 255);
  c.x = x.data();
  c.batch = batch;
  c.channels = channels;
  c.groups = groups;
  c.z_x = 9;
  c.size[1] = height;
  c.size[2] = width;
  c.x_step[3] = channels;
  c.x_step[2] = width * channels;
  c.x_step[1] = c.x_step[0] = height * c.x_step[2];
  c.product.n = n / groups;
  for (int i = 1; i < 3; ++i) {
    c.kernel[i] = kernel;
    c.stride[i] = stride;
    c.before[i] = padding;
    c.dilation[i] = dilation;
    c.out[i] = (c.size[i] + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  }
  c.y_step[3] = n;
  c.y_step[2] = c.out[2] * n;
  c.y_step[1] = c.y_step[0] = c.out[1] * c.y_step[2];
  const auto weight = draw<int8_t>(c.weight_bytes(), -128, 127);
  const auto bias = draw<int32_t>(n, -3000, 3000);
  const auto multiplier = draw<float>(n, 1, 100, 1e-4);
  const int64_t outputs = batch * c.y_step[0];
  const auto addend = draw<float>(outputs, -1000, 1000, 0.01);
  const auto residual = draw<uint8_t>(outputs, 0, 255);
  c.product.weight = weight.data();
  c.product.bias = bias.data();
  c.product.multiplier = multiplier.data();
  c.product.zero_point = c.product.low = 7;
  c.product.residual_multiplier = 0.3f;
  for (const Output output : {Output::kUint8, Output::kFloat, Output::kActivationUint8}) {
    c.product.output = output;
    c.product.residual = output == Output::kUint8 && stride == 1 ? residual.data() : nullptr;
    c.product.addend = output == Output::kFloat ? addend.data() : nullptr;
    c.product.addend_stride = stride == 1 ? n : 0;
    std::vector<float> wide(output == Output::kFloat ? outputs : 0);
    compare("conv", outputs * (wide.empty() ? 1 : 4), [&](uint8_t* y) {
      c.product.y = wide.empty() ? static_cast<void*>(y) : wide.data();
      if (fits_tiles(c) && active().isa != std::string("generic")) {
        const int64_t half = c.tiles() / 2;
        active().winograd(c, 0, half, 0, n);
        active().winograd(c, half, c.tiles(), 0, kPanel);
        active().winograd(c, half, c.tiles(), kPanel, n);
      } else {
        for (int64_t image = 0; image < batch; ++image)
          for (int64_t row = 0; row < c.out[1]; row += 2)
            convolve(c, image, 0, row, row + 2 < c.out[1] ? row + 2 : c.out[1], 0, c.panels());
      }
      if (!wide.empty()) memcpy(y, wide.data(), wide.size() * 4);
    });
  }
}

static void check_attention(int64_t queries, int64_t keys, int64_t depth, int64_t width) {
  const int64_t batch = 2, heads = 4, kv_heads = 2;
  const auto q = draw<uint8_t>(batch * queries * heads * depth, 0, 255);
  const auto k = draw<uint8_t>(batch * keys * kv_heads * depth, 0, 255);
  const auto v = draw<uint8_t>(batch * keys * kv_heads * width, 0, 255);
  const auto seen = draw<uint8_t>(batch * queries * keys, 0, 1);
  const auto added = draw<float>(keys, -100, 100, 0.1);
  for (int kind = 0; kind < 6; ++kind) {
    Attention a;
    a.q = q.data();
    a.k = k.data();
    a.v = v.data();
    const int64_t strides[3][3] = {{queries * heads * depth, depth, heads * depth},
                                   {keys * kv_heads * depth, depth, kv_heads * depth},
                                   {keys * kv_heads * width, width, kv_heads * width}};
    memcpy(a.q_stride, strides[0], sizeof strides[0]);
    memcpy(a.k_stride, strides[1], sizeof strides[1]);
    memcpy(a.v_stride, strides[2], sizeof strides[2]);
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.queries = queries;
    a.keys = keys;
    a.depth = depth;
    a.width = width;
    a.is_causal = kind % 2;
    a.is_float = kind == 5;
    a.mask_is_float = kind == 3;
    if (kind == 2 || kind == 3) a.mask = kind == 2 ? static_cast<const void*>(seen.data()) : added.data();
    const int64_t of_seen[4] = {queries * keys, 0, keys, 1}, of_added[4] = {0, 0, 0, 1};
    memcpy(a.mask_stride, kind == 2 ? of_seen : of_added, sizeof of_seen);
    a.q_zero_point = 120;
    a.v_zero_point = 9;
    a.zero_point = 100;
    a.multiplier = 1e-3f;
    const int64_t count = batch * queries * heads * width;
    std::vector<float> wide(a.is_float ? count : 0);
    compare("attention", count * (a.is_float ? 4 : 1), [&](uint8_t* y) {
      const AttentionMemory memory(a);
      a.y = a.is_float ? static_cast<void*>(wide.data()) : y;
      for (int64_t head = 0; head < batch * heads; ++head)
        active().attention(a, head, 0, queries, memory.parts(), head % 2);
      if (!wide.empty()) memcpy(y, wide.data(), wide.size() * 4);
    });
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
  for (size_t count = 0; count < 70; ++count) {
    check_elementwise(count);
    check_reals(count);
  }
  for (const int64_t k : {0, 1, 3, 4, 5, 66, 1029})
    for (const int64_t n : {0, 1, 15, 16, 17, 63, 64, 65, 130})
      for (const int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 97})
        if (k < 1000 || rows < 8) {
          check_gemm(rows, n, k);
          check_gemm_fixed(rows, n, k);
          check_float_rows(rows, n, k);
        }
  for (const int64_t k : {4, 70, 516})
    for (const int64_t n : {177, 192, 260})
      for (const int64_t rows : {5, 7, 8, 13, 16}) {
        check_gemm(rows, n, k);
        check_gemm_fixed(rows, n, k);
      }
  for (int64_t channels = 0; channels < 70; ++channels) check_images(channels);
  for (const int64_t kernel : {1, 2, 3})
    for (const int64_t stride : {1, 2})
      for (const int64_t padding : {0, 2})
        for (const int64_t dilation : {1, 2}) {
          for (const int64_t channels : {1, 3, 4, 18}) check_conv(2, 7, 6, channels, 17, kernel, stride, padding, dilation, 1);
          for (const int64_t channels : {4, 19, 66, 68, 112})
            check_conv(1, 5, 9, channels, channels, kernel, stride, padding, dilation, channels);
          for (const int64_t groups : {2, 3, 7}) {
            check_conv(1, 5, 9, 4 * groups, 4 * groups, kernel, stride, padding, dilation, groups);
            check_conv(1, 5, 9, 8 * groups, 8 * groups, kernel, stride, padding, dilation, groups);
          }
          check_conv(1, 6, 5, 6, 66, kernel, stride, padding, dilation, 2);
        }
  check_conv(1, 3, 5, 8, 200, 2, 1, 0, 1, 1);
  for (const int64_t channels : {4, 60, 68}) check_conv(1, 13, 10, channels, channels + 46, 3, 1, 1, 1, 1);
  for (const int64_t queries : {1, 6, 13})
    for (const int64_t keys : {0, 1, 4, 15, 64, 67})
      for (const int64_t depth : {1, 4, 7, 32})
        for (const int64_t width : {1, 16, 33, 64}) check_attention(queries, keys, depth, width);
  check_chain({1, 1}, 3);
  check_chain({33, 17, 65, 7}, 20);
  check_chain({64, 5000, 30}, 13);
  check_chain({700, 900, 10}, 100);
  check_damaged_chains();
  std::printf("clean on %s\n", available_isas());
}

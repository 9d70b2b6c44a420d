// The kernels as plain C++, without torch: what one instruction set offers, and what a call asks of it.
//
// Every function returns the bits of the function of the same name in fxq/numerics/. Each `kernels_<isa>.cpp` compiles
// body.h and products.h for one instruction set; dispatch.cpp chooses among those that the binary holds; ops_*.cpp make
// them torch operators.
//
// In which order to read them, after this file:
//   kernels_generic.cpp  one instruction set in full, without intrinsics: what body.h and products.h ask of each
//   body.h               the kernels without a dot product of integers: elementwise.h first, on which the others draw
//   products.h           those with one: gemm.h first, with epilogue.h, which says what becomes of its sums; attention.h;
//                        convolutions by conv.cpp (on gemm.h), depthwise.h, lanes.h, winograd_tiles.h and winograd.h
//   tensor.h, checks.h   the side of torch; ops_linear.cpp is a whole operator, threads.cpp shares out its work
//   chain.h, block.h, program.h  many operations in one call: linears, the blocks of a transformer, images
#pragma once
#include <cmath>
#include <cstdint>
#include <utility>

namespace fxq {

constexpr int64_t kPanel = 64;   // output channels in a full panel of the packed weights
constexpr int64_t kMaxRows = 6;  // the tallest tile of any instruction set, but for tall ones, see gemm.h

constexpr int64_t kMaxKeys = 33025;  // 255 * 255 * keys stays in int32

enum class Output { kUint8, kFloat, kActivation, kActivationUint8, kFixed };
enum class Activation { kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kRelu, kHardsigmoid, kHardswish };

// y = epilogue(bias + x * weight^T): x uint8 [rows, k], weight packed int8 [n, k], y uint8 or float [rows, n].
struct Gemm {
  const uint8_t* x = nullptr;
  int64_t x_stride = 0;  // elements from one row of x to the next
  const uint8_t* const* rows = nullptr;  // instead of x: where each row begins, and of what runs it consists
  const int64_t* runs = nullptr;         // offsets from there
  int64_t run_count = 1, run_bytes = 0;  // bytes of each: a multiple of four
  int64_t k = 0, n = 0;
  const int8_t* weight = nullptr;  // panels of 64 channels, [panel][k / 4][width][4], as numerics.pack wrote them
  const int32_t* bias = nullptr;
  const float* multiplier = nullptr;  // all but kFixed
  void* y = nullptr;
  int64_t y_stride = 0;

  Output output = Output::kUint8;
  int32_t zero_point = 0, low = 0, high = 255;  // kUint8, kFixed
  const float* addend = nullptr;                // kFloat, kActivation: added before the activation
  int64_t addend_stride = 0;                    // 0 adds one row to all
  const uint8_t* residual = nullptr;            // kUint8: (q - zero point) * multiplier is added before the rounding
  int64_t residual_stride = 0;
  int32_t residual_zero_point = 0;
  float residual_multiplier = 0;
  Activation activation = Activation::kRelu;    // kActivation, kActivationUint8
  float inverse = 1;                            // kActivationUint8: f32(1 / scale) of the output
  const float* factor = nullptr;                // kActivationUint8: per channel, before the scale; or none

  const int32_t *fixed = nullptr, *shift = nullptr;        // kFixed: multiplier and right shift of each channel
  bool twice = false;                                      // kFixed: TFLite's double rounding
  const int32_t *row_sums = nullptr, *zero_w = nullptr;    // kFixed: sums of x's rows, zero points of affine weights

  // Float32 rows [rows, k] in the place of x, quantized on the way, each with a scale of its own. `bias` then holds the
  // column sums of the weight, `multiplier` its scales, and the result is
  //   y = clamp(f32(acc - zero_point[row] * bias) * (scale[row] * multiplier) + float_bias + addend, clamp_low, clamp_high)
  bool dynamic = false;
  const float* float_x = nullptr;
  const float* row_scale = nullptr;         // set by gemm_dynamic, as is
  const int32_t* row_zero_point = nullptr;  // which is negated
  const float* float_bias = nullptr;        // [n], or null
  float clamp_low = -INFINITY, clamp_high = INFINITY;
};

enum class Real { kFloat32, kBfloat16, kFloat16 };

// y = epilogue(x * weight^T): x float [rows, k], y [rows, n], weight and epilogue as for gemm's.
struct FloatGemm {
  const float* x = nullptr;
  const uint32_t* pairs = nullptr;  // instead of x: two bfloat16 each, the first k in the upper half, the last with a 0
  int64_t x_stride = 0, k = 0, n = 0;
  const int8_t* weight = nullptr;
  const float* scale = nullptr;  // [n]
  const float* bias = nullptr;   // [n], or null
  void* y = nullptr;
  Real type = Real::kFloat32;  // of y
  int64_t y_stride = 0;
};

// y = softmax(q k^T * multiplier + mask) v for each head; sizes and strides in elements, all of y contiguous.
struct Attention {
  const uint8_t *q = nullptr, *k = nullptr, *v = nullptr;
  int64_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {};  // batch, head, row; within a row 1
  int64_t heads = 1, kv_heads = 1, queries = 0, keys = 0, depth = 0, width = 0;
  const void* mask = nullptr;   // bool, or float to add
  int64_t mask_stride[4] = {};  // batch, head, query, key
  bool mask_is_float = false, is_causal = false, is_float = false;
  int32_t q_zero_point = 0, v_zero_point = 0, zero_point = 0;
  float multiplier = 1, v_multiplier = 1;
  float masked = 0;    // in the row of a query without a key
  void* y = nullptr;   // uint8 or float [batch, queries, heads, width]
};

// Memory for one head and a tile of its queries; `AttentionMemory` holds it.
struct AttentionScratch {
  int8_t *keys, *values;
  int32_t* bias;
  float *mask, *scores;
  uint8_t *queries, *weights;
};

// One term of qadd: f32((q - zero_point) * multiplier).
struct Term {
  const uint8_t* q;
  int32_t zero_point;
  float multiplier;
};

// The same without floats: (q - zero_point) * multiplier, an int64.
struct FixedTerm {
  const uint8_t* q;
  int32_t zero_point, multiplier;
};

// Layer norm (centred) or RMS norm of rows of k values; weight, bias and factor may be null.
struct Norm {
  int64_t k;
  bool centred;
  const float *weight, *bias;
  float eps;
  const float* factor = nullptr;  // uint8 only: per value, before the scale
  float inverse = 1;              // uint8 only: f32(1 / scale)
  int32_t zero_point = 0;
};

// A row of an int8 table and its scale.
struct TableRow {
  const int8_t* q;
  float scale;
};

struct Conv;  // conv.h

struct Kernels {
  const char* isa;
  void (*quantize)(const float* x, uint8_t* q, int64_t count, float inverse, int32_t zero_point);
  void (*quantize_scaled)(const float* x, const float* factor, uint8_t* q, int64_t count, float inverse,
                          int32_t zero_point);
  void (*dequantize)(Term x, float* y, int64_t count);
  void (*requantize)(Term x, uint8_t* y, int64_t count, int32_t zero_point, int32_t low, int32_t high);
  void (*add)(Term a, Term b, uint8_t* y, int64_t count, int32_t zero_point, int32_t low, int32_t high);
  void (*requantize_fixed)(FixedTerm x, uint8_t* y, int64_t count, int32_t shift, bool twice, int32_t zero_point,
                           int32_t low, int32_t high);
  void (*add_fixed)(FixedTerm a, FixedTerm b, uint8_t* y, int64_t count, int32_t shift, int32_t zero_point,
                    int32_t low, int32_t high);
  // (q_a - z_a) * (q_b - z_b) * multiplier of a * 2**-shift.
  void (*multiply_fixed)(FixedTerm a, FixedTerm b, uint8_t* y, int64_t count, int32_t shift, bool twice,
                         int32_t zero_point, int32_t low, int32_t high);
  // float32 to y and uint8 to q; either may be null.
  void (*norm)(const Norm& n, const float* x, float* y, uint8_t* q, int64_t rows);
  // The output rows [row, row_end) of the panels [panel, panel_end).
  void (*gemm)(const Gemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end);
  // The queries [row, row_end) of one of batch * heads heads; packed: its keys and values are in the scratch memory.
  void (*attention)(const Attention& a, int64_t head, int64_t row, int64_t row_end, const AttentionScratch& at,
                    bool packed);
  // `pixels` outputs of a depthwise convolution to uint8: their windows at g.rows, the taps g.runs, padded to a multiple
  // of four, as which of them is no matter. n: a multiple of 4, and 16 or more. memory: 256 bytes a tap.
  void (*depthwise)(const Gemm& g, int64_t pixels, int8_t* memory);
  // A row of `pixels` outputs of a convolution in groups of run_bytes = 1, 4 or 8 channels in and out: x at the first
  // window, x_stride to the next, runs the taps.
  void (*lanes)(const Gemm& g, int64_t pixels);
  // A 3 x 3 convolution by tiles of outputs, those [tile, tile_end), in the channels [channel, channel_end), the first
  // of a panel; winograd.cpp says which. largest_sum: of one output channel's positive weights, or of its negative ones.
  int64_t (*largest_sum)(const int8_t* packed, int64_t k, int64_t n);
  void (*winograd)(const Conv& c, int64_t tile, int64_t tile_end, int64_t channel, int64_t channel_end);
  // Channels-last images: pixels y of `channels`, from pixels of x at offsets.
  void (*max_of)(const uint8_t* x, const int64_t* taps, int64_t count, int64_t pixels, int64_t pixel_step, uint8_t* y,
                 int64_t channels);
  // Runs of `pixels`, pixel_step apart; multiplier: of the sum of (q - z_x).
  void (*mean_of)(const uint8_t* x, const int64_t* runs, int64_t run_count, int64_t pixels, int64_t pixel_step,
                  int32_t z_x, float multiplier, uint8_t* y, int64_t channels, int32_t zero_point, int32_t low,
                  int32_t high);
  void (*mean_of_fixed)(const uint8_t* x, const int64_t* runs, int64_t run_count, int64_t pixels, int64_t pixel_step,
                        int32_t z_x, int32_t multiplier, int32_t shift, bool twice, uint8_t* y, int64_t channels,
                        int32_t zero_point, int32_t low, int32_t high);
  // The mean of the rows q[0], q[1] and q[2], q[3], v along a row, u across.
  void (*mix_of)(const uint8_t* const (&q)[4], float v0, float v1, float u0, float u1, uint8_t* y, int64_t channels);
  // The same by integer weights, of which each pair adds up to 2**11.
  void (*mix_of_fixed)(const uint8_t* const (&q)[4], int32_t v0, int32_t v1, int32_t u0, int32_t u1, uint8_t* y,
                       int64_t channels);
  // to[j * step + i] = from[i * stride + j] for i of 0..3 and j below count.
  void (*interleave_four)(const uint8_t* from, int64_t stride, uint8_t* to, int64_t step, int64_t count);
  // f32((q_a - z_a) * (q_b - z_b) * multiplier of a), `rows` rows of a by the same `count` values b.
  void (*multiply)(Term a, Term b, uint8_t* y, int64_t rows, int64_t count, int32_t zero_point, int32_t low,
                   int32_t high);
  void (*gemm_dynamic)(const Gemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end);
  // From numbers of 16 bits to float32, and bfloat16 to FloatGemm::pairs. The latter returns whether none is infinite or
  // so large or small that vdpbf16ps, which takes denormals for zeros, may differ: 0, or 2**-100 up to 2**100.
  void (*widen_reals)(Real type, const uint16_t* x, float* y, int64_t count);
  bool (*pair_brains)(const uint16_t* x, uint32_t* pairs, int64_t count);
  void (*float_gemm)(const FloatGemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end);
  // The product of FloatGemm::pairs, with the bits of float_gemm; null where the instruction set has none.
  void (*brain_gemm)(const FloatGemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end);
  // y = the sum of `count` rows of k values.
  void (*embed)(const TableRow* rows, int64_t count, int64_t k, float* y);
  // y = table[q], of 256 bytes.
  void (*lookup)(const uint8_t* q, const uint8_t* table, uint8_t* y, int64_t count);
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t panel_count(int64_t n) { return ceil_div(n, kPanel); }
// What k lacks of a multiple of four; a packed weight ends in so many zeros, by which its length tells k.
inline int64_t lacking(int64_t k) { return ceil_div(k, 4) * 4 - k; }
inline int64_t packed_size(int64_t n, int64_t k) { return ceil_div(n, 16) * 16 * (k + lacking(k)) + lacking(k); }

// scratch.cpp: memory of this thread, aligned to 64 bytes, that holds until the same holder asks again. It stays with the
// thread: what goes back to the system after each call comes again page by page, which can take half of a call's time.
// A kernel; what one thread does of an operator; the rows that it takes through several; an operator.
enum class Holder { kKernel, kPart, kRows, kOperator };
void* scratch(int64_t bytes, Holder holder = Holder::kKernel);

// dispatch.cpp
const Kernels& active();               // those in use
// Kernels::brain_gemm of those in use; null where the processor lacks what it takes.
void (*brain_gemm())(const FloatGemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end);
bool use_isa(const char* isa);         // false where this processor or binary lacks it
const char* available_isas();          // names with commas between, best first

template <int lanes>
struct Vectors {
  typedef float F __attribute__((vector_size(4 * lanes)));
  typedef int32_t I __attribute__((vector_size(4 * lanes)));
  typedef uint8_t B __attribute__((vector_size(lanes)));
  typedef int64_t L __attribute__((vector_size(4 * lanes)));  // half as many, in the same registers
  typedef uint16_t S __attribute__((vector_size(2 * lanes)));
  typedef int16_t H __attribute__((vector_size(4 * lanes)));  // twice as many
  typedef uint32_t M __attribute__((vector_size(4 * lanes)));  // for sums modulo 2**32
};

}  // namespace fxq

// Functions and templates between FXQ_TARGET and FXQ_TARGET_END are compiled for the named extensions. Include the
// standard library before it: the linker may keep the copy of an inline function that was compiled here for everyone.
#define FXQ_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FXQ_TARGET(isa) FXQ_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FXQ_TARGET_END _Pragma("clang attribute pop")
#else
#define FXQ_TARGET(isa) _Pragma("GCC push_options") FXQ_PRAGMA(GCC target(isa))
#define FXQ_TARGET_END _Pragma("GCC pop_options")
#endif

// What operators of one product and the operator of many (ops_block.cpp) have in common: the work, on operands checked.
#pragma once
#include <optional>

#include "checks.h"

namespace fxq {

// ops_attention.cpp: the mask of scores [batch, a.heads, a.queries, a.keys]; has_heads: whether it may have them.
void set_mask(Attention& a, const Tensor& mask, int64_t batch, bool has_heads);
float attention_multiplier(double s_qk, const std::optional<double>& scale, int64_t depth);
// All heads of all `batch`, shared among threads.
void run_attention(const Attention& a, int64_t batch);

// ops_norm.cpp: rows of float32 to y and q, of which either may be null.
void run_norm(const Norm& norm, const float* x, float* y, uint8_t* q, int64_t rows);

// ops_feed_forward.cpp: rows through `wide`, which gives float32, and `narrow`, which is dynamic; their y and x between
// them are set here.
void run_feed_forward(Gemm wide, Gemm narrow, int64_t rows);
// The same of rows [row, row_end), a few at a time, on this thread.
void feed_forward(const Gemm& wide, const Gemm& narrow, int64_t row, int64_t row_end);

}  // namespace fxq

// What operators of one product and the operator of many (block.cpp) have in common: the work, on operands checked.
#pragma once
#include <optional>

#include "checks.h"

namespace fxq {

// ops_attention.cpp: the mask of scores [batch, a.heads, a.queries, a.keys]; has_heads: whether it may have them.
void set_mask(Attention& a, const Tensor& mask, int64_t batch, bool has_heads);
float attention_multiplier(double s_qk, const std::optional<double>& scale, int64_t depth);
// The work of all heads of all `batch`: `count` pieces, some queries of a head each, for `threads` threads.
struct AttentionPieces {
  AttentionPieces(const Attention& a, int64_t batch, int64_t threads);
  void run(int64_t begin, int64_t end) const;  // on this thread
  const Attention& a;
  int64_t blocks, height, count;
};
// All heads of all `batch`, shared among threads.
void run_attention(const Attention& a, int64_t batch);

// ops_feed_forward.cpp: rows [row, row_end), a few at a time on this thread, through `wide`, which gives float32, and
// `narrow`, which is dynamic; their y and x between them are set here.
void feed_forward(const Gemm& wide, const Gemm& narrow, int64_t row, int64_t row_end);

}  // namespace fxq

// How the windows of a convolution lie on its input, from a text like `3x3 stride 2 pad 1 groups 16`: the inverse of
// `str` of fxq/numerics/window.py.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "checks.h"

namespace fxq {

struct Window {
  int64_t rank = 0;
  int64_t kernel[3], stride[3], padding[6], dilation[3], output_padding[3], groups;

  Window(const char* op, const std::string& text) : at_(text.c_str()) {
    rank = numbers(kernel, 3);
    bool good = rank > 0 && least(kernel, rank) >= 1 && *std::max_element(kernel, kernel + rank) <= kMost;
    good = good && entries(" stride ", stride, rank, 1, 1) && entries(" pad ", padding, 2 * rank, 0, -kMost) &&
           entries(" output pad ", output_padding, rank, 0, 0) && entries(" dilation ", dilation, rank, 1, 1) &&
           entries(" groups ", &groups, 1, 1, 1);
    if (!good || *at_) fail(op, ": window '", text, "', expected one like '3x3 stride 2 pad 1 dilation 1 groups 16'");
  }

 private:
  static constexpr int64_t kMost = 1 << 20;  // a kernel, stride or padding; what is computed of them fits 64 bits
  static int64_t least(const int64_t* values, int64_t count) { return *std::min_element(values, values + count); }

  int64_t numbers(int64_t* values, int64_t most) {  // how many, 0 where they are none or too many
    for (int64_t count = 0; count < most;) {
      char* end = nullptr;
      values[count] = std::strtoll(at_, &end, 10);
      if (end == at_) return 0;
      at_ = end;
      ++count;
      if (*at_ != 'x' && *at_ != ',') return count;
      ++at_;
    }
    return 0;
  }

  bool entries(const char* word, int64_t* values, int64_t count, int64_t usual, int64_t lowest) {
    std::fill_n(values, count, usual);
    const size_t length = std::strlen(word);
    if (std::strncmp(at_, word, length) != 0) return true;
    at_ += length;
    const int64_t found = numbers(values, count);
    if (found == 1) std::fill_n(values, count, values[0]);
    return (found == 1 || found == count) && least(values, count) >= lowest &&
           *std::max_element(values, values + count) <= kMost;
  }

  const char* at_;
};

}  // namespace fxq

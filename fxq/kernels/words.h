// The text of a block's program, as fxq/ops/block.py writes it: words of 64 bits; a part of block.cpp.
#pragma once
#include <cstring>
#include <iterator>
#include <string>
#include <utility>

#include "checks.h"

namespace fxq::block {

constexpr const char* kOp = "qblock";
constexpr const char* kNames[] = {"gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "relu", "hardsigmoid", "hardswish",
                                  "layer_norm", "rms_norm"};

enum class Tag { kNone, kInteger, kReal, kName, kValue, kConstant, kList };

// Words of a program, each argument after its tag; what is not there is refused, never read.
class Words {
 public:
  Words(const int64_t* words, int64_t count) : at_(words), end_(words + count) {}
  // The next 3 * `count` words.
  const int64_t* triples(int64_t count) {
    if (count < 0 || count > (end_ - at_) / 3) fail(kOp, ": the program is cut off");
    return std::exchange(at_, at_ + 3 * count);
  }
  int64_t word() {
    if (at_ == end_) fail(kOp, ": the program is cut off");
    return *at_++;
  }
  int64_t of(Tag tag) {
    const int64_t found = word();
    if (found != int64_t(tag)) fail(kOp, ": the program has an argument of kind ", found, ", expected ", int64_t(tag));
    return word();
  }
  bool none() {
    if (at_ == end_ || *at_ != int64_t(Tag::kNone)) return false;
    if (end_ - at_ < 2) fail(kOp, ": the program is cut off");
    at_ += 2;
    return true;
  }
  double real() {
    const int64_t bits = of(Tag::kReal);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  std::string name() {
    const int64_t i = of(Tag::kName);
    if (i < 0 || i >= int64_t(std::size(kNames))) fail(kOp, ": the program has name ", i);
    return kNames[i];
  }
  int64_t byte() {
    const int64_t value = of(Tag::kInteger);
    if (value < 0 || value > 255) fail(kOp, ": ", value, " in the program, expected 0..255");
    return value;
  }

 private:
  const int64_t *at_, *end_;
};

}  // namespace fxq::block

// A run of operations on the rows of a transformer: what block.cpp reads from a program and ops_block.cpp runs.
#pragma once
#include <functional>
#include <vector>

#include "checks.h"

namespace fxq::block {

// Where the rows of a value lie: in a tensor of the whole batch, in the memory of a slice, or in that of a thread.
enum class Home { kTensor, kSlice, kThread };

// Rows of `width` values, or several such from `first` on among `parts`.
struct Value {
  Home home = Home::kTensor;
  const uint8_t* data = nullptr;  // kTensor
  int64_t place = 0;        // the others: bytes of a row before those of this value
  int64_t width = -1;       // -1: no rows
  bool is_float = false;
  int64_t first = -1, count = 0;
  int64_t bytes() const { return width * (is_float ? int64_t(sizeof(float)) : 1); }
};

// Some sequences of the batch that go through all steps together: the first one, and the memory for `capacity` rows.
struct Slice {
  int64_t first, count, tokens, capacity;
  uint8_t* memory;
};

// The rows of a slice that a step works on, and where the values of the thread, or threads, that work on them lie.
struct Rows {
  const Slice& slice;
  int64_t begin, count;
  uint8_t* own = nullptr;
  float* between = nullptr;  // of the two products of a feed-forward, where threads share each
};

// What of a step's work on its rows a thread does: all of it, or of one phase the share `index` of `count`.
struct Share {
  int64_t phase, index = 0, count = 1;
  bool is_all() const { return count == 1; }
  int64_t begin(int64_t pieces) const { return pieces * index / count; }
  int64_t end(int64_t pieces) const { return pieces * (index + 1) / count; }
};

inline const uint8_t* at(const Value& value, const Rows& rows) {
  const Slice& slice = rows.slice;
  switch (value.home) {
    case Home::kTensor: return value.data + (slice.first * slice.tokens + rows.begin) * value.bytes();
    case Home::kSlice: return slice.memory + slice.capacity * value.place + rows.begin * value.bytes();
    default: return rows.own + rows.count * value.place;
  }
}
// Of what a step writes: a result of the block, or its memory.
inline uint8_t* to(const Value& value, const Rows& rows) { return const_cast<uint8_t*>(at(value, rows)); }

// A step, read and checked: its work on some rows. An attention works on those of whole sequences.
struct Step {
  std::function<void(const Rows&, const Share&)> run;
  bool is_attention;
  int64_t work = 0;     // products for each row
  int64_t phases = 1;   // each begins when all threads are done with the one before
  int64_t between = 0;  // values for each row between its phases
};

struct Block {
  int64_t batch = 0, tokens = 0;
  int64_t slice_bytes = 0, own_bytes = 0;  // for each row: the memory of a slice, and that of a thread
  std::vector<Contiguous> inputs;          // those of rows
  std::vector<Tensor> results;
  std::vector<Step> steps;
};

// Masks among the inputs, and the constants, are to live as long as the block.
Block read(const std::vector<Tensor>& inputs, const Tensor& program, const Tensor& constants,
           const std::vector<int64_t>& widths);

}  // namespace fxq::block

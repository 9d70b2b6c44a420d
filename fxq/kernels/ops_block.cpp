// A run of operations on the rows of a transformer as one torch operator: the program that fxq/ops/block.py writes.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "block.h"

namespace fxq::block {
namespace {

// What the values of a slice may take: more come back from further away, fewer have threads wait for one another more
// often.
constexpr int64_t kSliceBytes = 8 << 20;
constexpr int64_t kLooks = 10'000;  // at what another thread does, before the processor is offered to others

// A phase of a step that threads share: how many shares are taken, how many done.
struct alignas(64) Turn {
  std::atomic<int64_t> taken{0}, done{0};
};
// Counts a share as done however it ends: the others would wait for ever for one that threw.
struct Done {
  std::atomic<int64_t>& count;
  ~Done() { count.fetch_add(1, std::memory_order_release); }
};

void through(const Block& block, std::size_t i, std::size_t end, Rows rows) {
  rows.own = static_cast<uint8_t*>(scratch(rows.count * block.own_bytes + 64, Holder::kRows));
  for (; i < end; ++i) block.steps[i].run(rows, {0});
}

// The steps [i, end), none of them an attention. Rows know nothing of one another there: each thread takes its share of
// them through all steps.
void row_by_row(const Block& block, const Slice& slice, std::size_t i, std::size_t end) {
  const int64_t rows = slice.count * slice.tokens, tiles = ceil_div(rows, kMaxRows);
  int64_t work = 0;
  for (std::size_t step = i; step < end; ++step) work += rows * block.steps[step].work;
  const int64_t threads = work < 2 * kProductGrain ? 1 : torch::stable::get_num_threads();
  if (threads == 1) return through(block, i, end, {slice, 0, rows});
  torch::stable::parallel_for(0, tiles, ceil_div(tiles, threads), [&](int64_t begin, int64_t tiles_end) {
    begin *= kMaxRows;
    through(block, i, end, {slice, begin, std::min(tiles_end * kMaxRows, rows) - begin});
  });
}

// Rows so few that threads have little to share go through step by step, attentions among them, and the threads share
// the work of each. Returns whether they are so few. One call of all threads for all steps: to begin and end one for
// each takes as long as many a step. Whoever is there takes the next share of a phase, and goes on when all shares are
// done: nobody waits for a thread that has not begun, as where the caller is itself one of several threads.
bool together(const Block& block, const Slice& slice) {
  Rows rows{slice, 0, slice.count * slice.tokens};
  int64_t work = 0, phases = 0, between = 0;
  for (const Step& step : block.steps) {
    work += rows.count * step.work;
    phases += step.phases;
    between = std::max(between, step.between);
  }
  // A phase begins and ends within the time of half a grain.
  const int64_t pay = 2 * work / std::max<int64_t>(1, phases * kProductGrain);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), pay);
  if (threads < 2 || ceil_div(rows.count, kMaxRows) >= 4 * threads) return false;
  const int64_t own = rows.count * block.own_bytes;
  rows.own = static_cast<uint8_t*>(scratch(own + rows.count * between * int64_t(sizeof(float)) + 64, Holder::kRows));
  rows.between = reinterpret_cast<float*>(rows.own + own);
  std::vector<Turn> turns(phases);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Turn* turn = turns.data();
    for (const Step& step : block.steps)
      for (int64_t phase = 0; phase < step.phases; ++phase, ++turn) {
        for (int64_t share; (share = turn->taken.fetch_add(1, std::memory_order_relaxed)) < threads;) {
          const Done counted{turn->done};
          step.run(rows, {phase, share, threads});
        }
        for (int64_t looks = 0; turn->done.load(std::memory_order_acquire) < threads; ++looks)
          if (looks > kLooks) std::this_thread::yield();
      }
  });
  return true;
}

void run(const Block& block) {
  if (block.tokens == 0) return;
  const int64_t row_bytes = block.slice_bytes + block.own_bytes;
  const int64_t most = std::max<int64_t>(1, kSliceBytes / std::max<int64_t>(1, row_bytes * block.tokens));
  const int64_t slices = std::max<int64_t>(1, ceil_div(block.batch, most)), count = ceil_div(block.batch, slices);
  const int64_t capacity = count * block.tokens;
  auto* const memory = static_cast<uint8_t*>(scratch(capacity * block.slice_bytes + 64, Holder::kOperator));
  for (int64_t first = 0; first < block.batch; first += count) {
    const Slice slice{first, std::min(count, block.batch - first), block.tokens, capacity, memory};
    if (together(block, slice)) continue;
    const std::vector<Step>& steps = block.steps;
    for (std::size_t i = 0, end; i < steps.size(); i = end) {
      for (end = i + 1; !steps[i].is_attention && end < steps.size() && !steps[end].is_attention;) ++end;
      if (steps[i].is_attention)
        steps[i].run({slice, 0, slice.count * slice.tokens}, {0});
      else
        row_by_row(block, slice, i, end);
    }
  }
}

std::vector<Tensor> qblock(const std::vector<Tensor>& inputs, const Tensor& program, const Tensor& constants,
                           const std::vector<int64_t>& widths) {
  Block block = read(inputs, program, constants, widths);
  run(block);
  return std::move(block.results);
}

}  // namespace
}  // namespace fxq::block

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) { m.impl("qblock", fxq::boxed<fxq::block::qblock>); }

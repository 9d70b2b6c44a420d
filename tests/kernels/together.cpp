// A step of a transformer's block that throws in the share of one thread: the others are not to wait for it.
#include "ops_block.cpp"

namespace fxq::block {

// Never called: a program is not read here.
Block read(const std::vector<Tensor>&, const Tensor&, const Tensor&, const std::vector<int64_t>&) { return {}; }

}  // namespace fxq::block

// How many shares of the last step were done; -1 where nothing came out of the call.
extern "C" __attribute__((visibility("default"))) int64_t shares_behind_one_that_throws() {
  using namespace fxq::block;
  std::atomic<int64_t> count{0};
  Block block;
  const auto fail = [](const Rows&, const Share& share) {
    if (share.index == 1) throw std::runtime_error("a share fails");
  };
  const auto last = [&](const Rows&, const Share&) { ++count; };
  block.steps = {{fail, false, 2 * fxq::kProductGrain}, {last, false, 2 * fxq::kProductGrain}};
  try {
    together(block, {0, 1, 8, 8, nullptr});
  } catch (const std::exception&) {
    return count;
  }
  return -1;
}

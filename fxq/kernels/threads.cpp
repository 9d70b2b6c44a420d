#include <algorithm>

#include "checks.h"

namespace fxq {

// Splits the output over threads: by panels of channels or by tiles of rows, whichever shares the work more evenly.
void run_gemm(const Gemm& g, int64_t rows) {
  if (rows == 0 || g.n == 0) return;
  const int64_t panels = panel_count(g.n), work = rows * g.n * g.k;
  const Kernels& kernels = active();
  int64_t threads = 1;
  if (work >= 2 * kProductGrain)
    threads = std::min<int64_t>(torch::stable::get_num_threads(), work / kProductGrain);
  if (threads == 1) return kernels.gemm(g, 0, rows, 0, panels);
  const int64_t tiles = ceil_div(rows, kMaxRows), share = ceil_div(panels, threads);
  // What the slowest thread does: `share` panels of all rows, or its share of the tiles over all channels.
  if (std::min(share * kPanel, g.n) * tiles <= ceil_div(tiles, threads) * g.n)
    torch::stable::parallel_for(0, panels, share,
                                [&](int64_t begin, int64_t end) { kernels.gemm(g, 0, rows, begin, end); });
  else
    torch::stable::parallel_for(0, tiles, ceil_div(tiles, threads), [&](int64_t begin, int64_t end) {
      kernels.gemm(g, begin * kMaxRows, std::min(end * kMaxRows, rows), 0, panels);
    });
}

}  // namespace fxq

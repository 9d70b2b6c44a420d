#include <algorithm>

#include "checks.h"

namespace fxq {

// Splits the output over threads: by panels of channels or by tiles of rows, whichever shares the work more evenly.
template <class Product>
static void share_out(const Product& g, int64_t rows,
                      void (*gemm)(const Product&, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end)) {
  if (rows == 0 || g.n == 0) return;
  const int64_t panels = panel_count(g.n), work = rows * g.n * g.k;
  int64_t threads = 1;
  if (work >= 2 * kProductGrain)
    threads = std::min<int64_t>(torch::stable::get_num_threads(), work / kProductGrain);
  if (threads == 1) return gemm(g, 0, rows, 0, panels);
  const int64_t tiles = ceil_div(rows, kMaxRows), share = ceil_div(panels, threads);
  // What the slowest thread does: `share` panels of all rows, or its share of the tiles over all channels.
  if (std::min(share * kPanel, g.n) * tiles <= ceil_div(tiles, threads) * g.n)
    torch::stable::parallel_for(0, panels, share,
                                [&](int64_t begin, int64_t end) { gemm(g, 0, rows, begin, end); });
  else
    torch::stable::parallel_for(0, tiles, ceil_div(tiles, threads), [&](int64_t begin, int64_t end) {
      gemm(g, begin * kMaxRows, std::min(end * kMaxRows, rows), 0, panels);
    });
}

void run_gemm(const Gemm& g, int64_t rows) { share_out(g, rows, g.dynamic ? active().gemm_dynamic : active().gemm); }

// By panels of all parts together, where each thread gets some; else one after the other.
void run_gemms(const Gemm* parts, int64_t count, int64_t rows) {
  int64_t panels = 0, work = 0;
  for (int64_t i = 0; i < count; ++i) {
    panels += panel_count(parts[i].n);
    work += rows * parts[i].n * parts[i].k;
  }
  const int64_t threads =
      work < 2 * kProductGrain ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), work / kProductGrain);
  if (threads == 1 || panels < 4 * threads) {
    for (int64_t i = 0; i < count; ++i) run_gemm(parts[i], rows);
    return;
  }
  torch::stable::parallel_for(0, panels, ceil_div(panels, threads), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0, first = 0; i < count; ++i) {
      const int64_t own = panel_count(parts[i].n);
      if (begin < first + own && end > first)
        active().gemm(parts[i], 0, rows, std::max<int64_t>(begin - first, 0), std::min(end - first, own));
      first += own;
    }
  });
}

void run_float_gemm(const FloatGemm& g, int64_t rows) {
  share_out(g, rows, g.pairs ? brain_gemm() : active().float_gemm);
}

}  // namespace fxq

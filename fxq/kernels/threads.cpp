#include <algorithm>

#include "checks.h"

namespace fxq {

// Of what `count` threads share the part `index`: panels of channels or tiles of rows, whichever shares more evenly.
template <class Product>
static void run_share(const Product& g, int64_t rows,
                      void (*gemm)(const Product&, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end),
                      int64_t index, int64_t count) {
  const int64_t panels = panel_count(g.n), tiles = ceil_div(rows, kMaxRows);
  // What the slowest thread does: its panels for all rows, or its tiles for all channels.
  const int64_t by_panels = std::min(ceil_div(panels, count) * kPanel, g.n) * tiles;
  if (by_panels <= ceil_div(tiles, count) * g.n)
    gemm(g, 0, rows, panels * index / count, panels * (index + 1) / count);
  else
    gemm(g, tiles * index / count * kMaxRows, std::min(tiles * (index + 1) / count * kMaxRows, rows), 0, panels);
}

template <class Product>
static void share_out(const Product& g, int64_t rows,
                      void (*gemm)(const Product&, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end)) {
  if (rows == 0 || g.n == 0) return;
  const int64_t work = rows * g.n * g.k;
  const int64_t threads =
      work < 2 * kProductGrain ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), work / kProductGrain);
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) run_share(g, rows, gemm, begin, threads);
  });
}

static auto kernel_of(const Gemm& g) { return g.dynamic ? active().gemm_dynamic : active().gemm; }

void run_gemm(const Gemm& g, int64_t rows) { share_out(g, rows, kernel_of(g)); }

void run_gemm(const Gemm& g, int64_t rows, int64_t index, int64_t count) {
  if (rows > 0 && g.n > 0) run_share(g, rows, kernel_of(g), index, count);
}

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

// Sums of rows of int8 tables, step by step as fxq/numerics/embedding.py; a part of body.h.

struct AddRow {
  const int8_t* q;
  F scale;
  bool first;
  float* y;
  inline void operator()(int64_t i, int64_t count) const {
    const I signed_q = (widen(load_some<B>(q + i, count)) ^ 0x80) - 128;  // lanes widen from uint8
    const F value = __builtin_convertvector(signed_q, F) * scale;
    store_some(y + i, first ? value : load_some<F>(y + i, count) + value, count);
  }
};

static void embed(const TableRow* rows, int64_t count, int64_t k, float* y) {
  for (int64_t t = 0; t < count; ++t) for_each_vector(k, AddRow{rows[t].q, splat(rows[t].scale), t == 0, y});
}

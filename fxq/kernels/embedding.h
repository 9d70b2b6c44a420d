// Sums of rows of int8 tables, step by step as fxq/numerics/embedding.py; a part of body.h.

struct AddRows {
  const TableRow* rows;
  int64_t tables;
  float* y;
  static inline F value(const TableRow& row, int64_t i, int64_t count) {
    const I signed_q = (widen(load_some<B>(row.q + i, count)) ^ 0x80) - 128;  // lanes widen from uint8
    return __builtin_convertvector(signed_q, F) * row.scale;
  }
  inline void operator()(int64_t i, int64_t count) const {
    F sum = value(rows[0], i, count);
    for (int64_t t = 1; t < tables; ++t) sum += value(rows[t], i, count);
    store_some(y + i, sum, count);
  }
};

static void embed(const TableRow* rows, int64_t count, int64_t k, float* y) {
  for_each_vector(k, AddRows{rows, count, y});
}

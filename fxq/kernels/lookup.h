// Bytes through tables of 256 bytes; a part of body.h.

static void lookup_bytes(const uint8_t* q, const uint8_t* table, uint8_t* y, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t from, to = 0;
    memcpy(&from, q + i, 8);
    UNROLL for (int j = 0; j < 8; ++j) to |= uint64_t(table[from >> 8 * j & 255]) << 8 * j;
    memcpy(y + i, &to, 8);
  }
  for (; i < count; ++i) y[i] = table[q[i]];
}

#ifndef PERMUTES_BYTES
static void lookup(const uint8_t* q, const uint8_t* table, uint8_t* y, int64_t count) {
  lookup_bytes(q, table, y, count);
}
#else
// The table in four registers: vpermi2b takes bytes from two of them by the low seven bits of each index, and the top
// bit chooses the pair.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi"))) static void permute_bytes(
    const uint8_t* q, const uint8_t* table, uint8_t* y, int64_t count) {
  __m512i part[4];
  UNROLL for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(table + 64 * i);
  for (; count >= 64; q += 64, y += 64, count -= 64) {  // what a masked store leaves is slow to load again
    const __m512i index = _mm512_loadu_si512(q);
    const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
    const __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
    _mm512_storeu_si512(y, _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high));
  }
  lookup_bytes(q, table, y, count);
}

static void lookup(const uint8_t* q, const uint8_t* table, uint8_t* y, int64_t count) {
  static const bool permutes = __builtin_cpu_supports("avx512vbmi");
  (permutes ? permute_bytes : lookup_bytes)(q, table, y, count);
}
#endif

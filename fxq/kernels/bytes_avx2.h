// Bytes of several pixels and their lanes, for the kernels of AVX2 and AVX-VNNI.

static inline __m128i load_half(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

template <int kPieces>
static inline Bytes pieces(const uint8_t* const* p, int64_t offset) {
  if constexpr (kPieces == 1) {
    return (Bytes)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p[0] + offset));
  } else {
    const __m256i v = _mm256_castsi128_si256(load_half(p[0] + offset));
    return (Bytes)_mm256_inserti128_si256(v, load_half(p[1] + offset), 1);
  }
}

template <int kPieces>
static inline void store_pieces(uint8_t* const* p, Bytes bytes) {
  const __m256i v = (__m256i)bytes;
  if constexpr (kPieces == 1) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p[0]), v);
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p[0]), _mm256_castsi256_si128(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p[1]), _mm256_extracti128_si256(v, 1));
  }
}

static inline void interleave(Bytes a, Bytes b, Bytes c, Bytes d, I (&lanes)[4]) {
  const __m256i low_ab = _mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
  const __m256i high_ab = _mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
  const __m256i low_cd = _mm256_unpacklo_epi8((__m256i)c, (__m256i)d);
  const __m256i high_cd = _mm256_unpackhi_epi8((__m256i)c, (__m256i)d);
  lanes[0] = (I)_mm256_unpacklo_epi16(low_ab, low_cd);
  lanes[1] = (I)_mm256_unpackhi_epi16(low_ab, low_cd);
  lanes[2] = (I)_mm256_unpacklo_epi16(high_ab, high_cd);
  lanes[3] = (I)_mm256_unpackhi_epi16(high_ab, high_cd);
}

static inline Bytes deinterleave(const I (&lanes)[4]) {
  const __m256i low = _mm256_packus_epi32((__m256i)lanes[0], (__m256i)lanes[1]);
  return (Bytes)_mm256_packus_epi16(low, _mm256_packus_epi32((__m256i)lanes[2], (__m256i)lanes[3]));
}

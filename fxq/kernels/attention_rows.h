// What attention does beside its two products: keys and values packed, masks read, scores as steps of the softmax; a part
// of body.h.

static constexpr float kMinusInfinity = -__builtin_inff();

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Four rows of four int32 in each 128 bits of four vectors, as columns.
static inline void transpose(const I (&rows)[4], I (&columns)[4]) {
  const I low_even = unpacked<0>(rows[0], rows[2]), low_odd = unpacked<0>(rows[1], rows[3]);
  const I high_even = unpacked<2>(rows[0], rows[2]), high_odd = unpacked<2>(rows[1], rows[3]);
  columns[0] = unpacked<0>(low_even, low_odd);
  columns[1] = unpacked<2>(low_even, low_odd);
  columns[2] = unpacked<0>(high_even, high_odd);
  columns[3] = unpacked<2>(high_even, high_odd);
}

// Keys as vectors: [vector of W keys][group of four d][W][4] int8, k - 128, zeros where there is no key or no d.
static void pack_keys(const Attention& a, const uint8_t* k, int8_t* packed) {
  const int64_t groups = ceil_div(a.depth, 4), stride = a.k_stride[2];
  for (int64_t s = 0; s < a.keys; s += W, packed += groups * 4 * W) {
    for (int64_t d = 0; d < a.depth; d += 16) {
      const uint8_t* from = k + s * stride + d;
      int64_t step = stride;
      alignas(64) uint8_t rest[W * 16];
      if (s + W > a.keys || d + 16 > a.depth) {
        memset(rest, 0x80, sizeof rest);
        for (int64_t i = 0; i < W && s + i < a.keys; ++i)
          copy(rest + 16 * i, from + i * stride, a.depth - d < 16 ? a.depth - d : 16);
        from = rest;
        step = 16;
      }
      I rows[4], lanes[4];
      UNROLL for (int i = 0; i < 4; ++i) {
        const uint8_t* fourth[W / 4];
        UNROLL for (int j = 0; j < W / 4; ++j) fourth[j] = from + (i + 4 * j) * step;
        rows[i] = (I)pieces<W / 4>(fourth, 0) ^ int32_t(0x80808080);
      }
      transpose(rows, lanes);
      UNROLL for (int i = 0; i < 4; ++i) {
        if (d / 4 + i < groups) store(packed + (d / 4 + i) * 4 * W, lanes[i]);
      }
    }
  }
}

// Values as vectors: [vector of W e][group of four keys][W][4] int8, v - 128. This is the vector of e, from a group on.
static void pack_values(const Attention& a, const uint8_t* v, int8_t* packed, int64_t e, int64_t group) {
  const int64_t groups = ceil_div(a.keys, 4), row = a.v_stride[2], lanes = a.width - e < W ? a.width - e : W;
  packed += (e / W * groups + group) * 4 * W;
  for (; group < groups; ++group, packed += 4 * W) {
    I word = I{};
    for (int64_t i = 0; i < 4 && 4 * group + i < a.keys; ++i)
      word |= widen(load_some<B>(v + (4 * group + i) * row + e, lanes)) << int32_t(8 * i);
    store(packed, word ^ int32_t(0x80808080));
  }
}

// As many vectors from e on as Bytes of kPieces groups fill; returns where those that are left begin.
template <int kPieces>
static int64_t pack_values(const Attention& a, const uint8_t* v, int8_t* packed, int64_t e) {
  constexpr int64_t kVectors = 4 / kPieces;  // of each group
  const int64_t groups = ceil_div(a.keys, 4), row = a.v_stride[2];
  for (; e + kVectors * W <= a.width; e += kVectors * W) {
    int64_t group = 0;
    for (; group + kPieces <= a.keys / 4; group += kPieces) {
      Bytes keys[4];
      UNROLL for (int i = 0; i < 4; ++i) {
        const uint8_t* own[kPieces];
        UNROLL for (int j = 0; j < kPieces; ++j) own[j] = v + (4 * (group + j) + i) * row + e;
        const I words = (I)pieces<kPieces>(own, 0) ^ int32_t(0x80808080);
        keys[i] = (Bytes)shuffled(words, [](int lane) { return lane % 4 * (W / 4) + lane / 4; });
      }
      I lanes[4];
      interleave(keys[0], keys[1], keys[2], keys[3], lanes);
      UNROLL for (int i = 0; i < 4; ++i)
        store(packed + ((e / W + i % kVectors) * groups + group + i / kVectors) * 4 * W, lanes[i]);
    }
    for (int64_t c = 0; c < kVectors; ++c) pack_values(a, v, packed, e + c * W, group);
  }
  return e;
}

static void pack_values(const Attention& a, const uint8_t* v, int8_t* packed) {
  int64_t e = pack_values<1>(a, v, packed, 0);
  if constexpr (W > 4) e = pack_values<2>(a, v, packed, e);
  for (; e < a.width; e += W) pack_values(a, v, packed, e, 0);
}

struct FillMasked {
  const uint8_t* from;
  float* to;
  inline void operator()(int64_t i, int64_t count) const {
    const I hidden = widen(load_some<B>(from + i, count)) == 0;
    store_some(to + i, (F)(hidden & int32_t(0xFF800000)), count);
  }
};

// A row of the mask as what is added to the scores.
static void read_mask(const Attention& a, int64_t offset, float* to) {
  const int64_t step = a.mask_stride[3];
  if (a.mask_is_float) {
    const float* from = static_cast<const float*>(a.mask) + offset;
    if (step == 1) return void(memcpy(to, from, a.keys * sizeof(float)));
    for (int64_t s = 0; s < a.keys; ++s) to[s] = from[s * step];
  } else {
    const uint8_t* from = static_cast<const uint8_t*>(a.mask) + offset;
    if (step == 1)
      for_each_vector(a.keys, FillMasked{from, to});
    else
      for (int64_t s = 0; s < a.keys; ++s) to[s] = from[s * step] ? 0.0f : kMinusInfinity;
  }
}

// rne(255 * 2**(-9 i / 255)).
struct Exponentials {
  uint8_t p[256] = {};
  constexpr Exponentials() {
    double value = 255;
    for (uint8_t& entry : p) {
      entry = uint8_t(value + 0.5);
      value *= 0.9758328005684533;  // 2**(-9 / 255)
    }
  }
};
alignas(64) constexpr Exponentials kExponentials;

struct SoftmaxSteps {  // i = min(rne((top - x) * 255 / (9 ln 2)), 255) of a row of scores; NaN compares false
  const float* x;
  float top;
  inline I operator()(int64_t i, int64_t) const {
    const F d = (top - load<F>(x + i)) * 40.876358f;
    return (I)(minimum(d, splat(255.0f)) + 12582912.0f) - 0x4B400000;
  }
};
static void softmax_steps(const float* x, float top, uint8_t* steps, int64_t count) {
  bytes_of(count, Narrow(), SoftmaxSteps{x, top}, steps);
}

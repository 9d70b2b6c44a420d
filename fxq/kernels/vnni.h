// Products by VNNI: in every lane, vpdpbusd adds four products of uint8 and int8 to an int32, without saturation. What
// products.h asks for, where VEX is the prefix of the instructions' encoding.

using Input = I;
using Weights = I;

static inline Input input(uint32_t group) { return int32_t(group) - I{}; }

static inline Input input_lanes(I groups) { return groups; }

static inline Weights weights(const int8_t* p) {
  Weights w = load<I>(p);
  asm("" : "+v"(w));  // keeps it in its register, where g++ would rather load it again for every row
  return w;
}

// Not the intrinsic: with it g++ 12 keeps the 24 accumulators on the stack, at 40 % of the speed.
static inline I dot(I acc, Input a, Weights b) {
  asm(VEX "vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

static inline I dot_pairs(I acc, I a, I b) {
  asm(VEX "vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

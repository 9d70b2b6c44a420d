// What one core can do at most: a loop of 8-bit dot products that touches registers only, and a plain read of memory.
// Compiled on its own by peak.py; the kernels of fxq take no part in it.
#include <immintrin.h>

#include <cstdint>

namespace {

// Twelve independent accumulators, more than latency times issue width asks for. The loop is written out in assembly,
// registers and all: left to the compiler, accumulators go to the stack and the figure halves.
#define TWELVE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define CLOBBER(i) "xmm" #i,
#define LOOP(BODY)                               \
  asm volatile("1:\n\t" TWELVE(BODY)             \
               "dec %0\n\tjnz 1b"                \
               : "+r"(rounds)::TWELVE(CLOBBER) "xmm12", "xmm13", "cc")

#define AVX512_VNNI(i) "vpdpbusd %%zmm12, %%zmm12, %%zmm" #i "\n\t"
#define AVX_VNNI(i) "%{vex%} vpdpbusd %%ymm12, %%ymm12, %%ymm" #i "\n\t"
// Without VNNI an exact product of 8-bit numbers goes through 16 bits.
#define AVX2(i) "vpmaddwd %%ymm12, %%ymm12, %%ymm13\n\tvpaddd %%ymm13, %%ymm" #i ", %%ymm" #i "\n\t"

bool has_avx_vnni() {
  uint32_t a = 7, b, c = 1, d;  // CPUID leaf 7, subleaf 1, EAX bit 4
  asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return a >> 4 & 1;
}

__attribute__((target("avx2"))) int64_t read_avx2(const uint8_t* data, int64_t bytes) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (auto *p = reinterpret_cast<const __m256i*>(data), *end = p + bytes / 32; p != end; p += 4) {
    a = _mm256_or_si256(a, _mm256_loadu_si256(p));
    b = _mm256_or_si256(b, _mm256_loadu_si256(p + 1));
    c = _mm256_or_si256(c, _mm256_loadu_si256(p + 2));
    d = _mm256_or_si256(d, _mm256_loadu_si256(p + 3));
  }
  return _mm256_movemask_epi8(_mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d)));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Runs `rounds` rounds; returns how many operations a round has, a multiplication and an addition being two.
// `exact_avx2` leaves VNNI aside. 0: this processor has not even AVX2.
EXPORT int64_t dot_rounds(int64_t rounds, bool exact_avx2) {
  if (!exact_avx2 && __builtin_cpu_supports("avx512vnni")) {
    LOOP(AVX512_VNNI);
    return 12 * 128;
  }
  if (!exact_avx2 && has_avx_vnni()) {
    LOOP(AVX_VNNI);
    return 12 * 64;
  }
  if (!__builtin_cpu_supports("avx2")) return 0;
  LOOP(AVX2);
  return 12 * 32;
}

// Reads bytes (a multiple of 128) once; the result is there so that the reads must happen.
EXPORT int64_t read_bytes(const uint8_t* data, int64_t bytes) {
  return __builtin_cpu_supports("avx2") ? read_avx2(data, bytes) : 0;
}

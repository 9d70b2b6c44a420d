// Which instruction set serves: the best that this processor has, or the one asked for.
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fxq {

namespace generic { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_vnni { extern const Kernels kernels; }
namespace zmm { void brain_gemm(const FloatGemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end); }
namespace avx_vnni { extern const Kernels kernels; }
#endif

#if defined(__x86_64__)
static bool converts_halves() {  // older compilers cannot be asked by name
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

static std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_halves();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&avx512_vnni::kernels);
  if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&avx_vnni::kernels);
  if (avx512) found.push_back(&avx512::kernels);
  if (avx2) found.push_back(&avx2::kernels);
#endif
  found.push_back(&generic::kernels);
  return found;
}

static const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = detect();
  return found;
}

static std::atomic<const Kernels*> in_use{nullptr};

const Kernels& active() {
  const Kernels* kernels = in_use.load(std::memory_order_relaxed);
  return kernels ? *kernels : *available().front();
}

void (*brain_gemm())(const FloatGemm&, int64_t, int64_t, int64_t, int64_t) {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  if (supported && &active() == &avx512_vnni::kernels) return zmm::brain_gemm;
#endif
  return nullptr;
}

bool use_isa(const char* isa) {
  for (const Kernels* kernels : available())
    if (!strcmp(kernels->isa, isa)) return in_use = kernels, true;
  return false;
}

const char* available_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* kernels : available()) joined += (joined.empty() ? "" : ",") + std::string(kernels->isa);
    return joined;
  }();
  return names.c_str();
}

}  // namespace fxq

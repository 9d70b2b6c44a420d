// Which instruction set serves: the best that this processor has and this binary holds, or the one asked for.
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fxq {

// Each of these is null where the binary was compiled without it (binary.py).
#define FXQ_ISA(name) namespace name { [[gnu::weak]] extern const Kernels kernels; }
FXQ_ISA(generic)
FXQ_ISA(avx2)
FXQ_ISA(avx_vnni)
FXQ_ISA(avx512)
FXQ_ISA(avx512_vnni)

#if defined(__x86_64__)
static bool converts_halves() {  // older compilers cannot be asked by name
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

static std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> found;
  const auto add = [&](const Kernels* kernels, bool supported) {
    if (kernels && supported) found.push_back(kernels);
  };
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_halves();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  add(&avx512_vnni::kernels, has_avx512 && __builtin_cpu_supports("avx512vnni"));
  add(&avx_vnni::kernels, has_avx2 && __builtin_cpu_supports("avxvnni"));
  add(&avx512::kernels, has_avx512);
  add(&avx2::kernels, has_avx2);
#endif
  add(&generic::kernels, true);
  return found;
}

static const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = detect();
  return found;
}

static std::atomic<const Kernels*> in_use{nullptr};

const Kernels& active() {
  if (const Kernels* kernels = in_use.load(std::memory_order_relaxed)) return *kernels;
  if (available().empty()) throw std::runtime_error("fxq: this binary holds no kernels that this processor can run");
  return *available().front();
}

void (*brain_gemm())(const FloatGemm&, int64_t, int64_t, int64_t, int64_t) {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  if (supported) return active().brain_gemm;
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

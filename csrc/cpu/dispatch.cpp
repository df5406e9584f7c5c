// Chooses the kernels for the processor that runs them.
#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fogzo::cpu {

#if defined(__x86_64__)
const bool on_intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));

// not every compiler's __builtin_cpu_supports() knows it; the system's part is that of AVX2
static bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#else
const bool on_intel = false;
#endif

std::vector<const Kernels *> usable_kernels() {
  std::vector<const Kernels *> usable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    usable.push_back(avx512_kernels());
  if (avx2)
    usable.push_back(avx2_kernels());
#endif
  usable.push_back(portable_kernels());
  return usable;
}

const Kernels &kernels() {
  static const std::vector<const Kernels *> usable = usable_kernels();
  const char *wanted = std::getenv("FOGZO_CPU_ISA");
  if (!wanted || !*wanted)
    return *usable.front();
  std::string names;
  for (const Kernels *kernels : usable) {
    if (kernels->isa == std::string(wanted))
      return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument("FOGZO_CPU_ISA must be one that this processor runs, " + names + ", got " +
                              wanted);
}

} // namespace fogzo::cpu

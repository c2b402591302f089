#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu_isa.h"
#include "stable_abi.h"

namespace mamba_ssm {
namespace {

CpuIsa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return CpuIsa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return CpuIsa::avx2;
#endif
  return CpuIsa::generic;
}

CpuIsa choose_isa() {
  const CpuIsa best = best_isa();
  const char* wish = std::getenv("MAMBA_SSM_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  for (CpuIsa isa : {CpuIsa::generic, CpuIsa::avx2, CpuIsa::avx512}) {
    if (std::string(wish) == cpu_isa_name(isa) && isa <= best) return isa;
  }
  throw std::runtime_error(std::string("MAMBA_SSM_CPU_ISA=") + wish +
                           " is not one of generic, avx2, avx512 that this processor has (its best: " +
                           cpu_isa_name(best) + "); unset it to choose automatically");
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = choose_isa();
  return isa;
}

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::avx512:
      return "avx512";
    case CpuIsa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

std::string cpu_isa_op() { return cpu_isa_name(cpu_isa()); }

}  // namespace mamba_ssm

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&mamba_ssm::cpu_isa_op));
}

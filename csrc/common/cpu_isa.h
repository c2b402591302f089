// Which of the compiled instruction sets the CPU kernels use, decided once per process.
#pragma once

namespace mamba_ssm {

enum class CpuIsa { generic, avx2, avx512 };

// The best instruction set this processor has. The environment variable MAMBA_SSM_CPU_ISA
// (generic | avx2 | avx512) asks for a lesser one; asking for one the processor lacks is an error.
CpuIsa cpu_isa();
const char* cpu_isa_name(CpuIsa isa);

}  // namespace mamba_ssm

// Picks `table_<isa>` of a kernel family: every family has one table of function pointers per instruction set.
#if defined(__x86_64__)
#define MAMBA_SSM_SELECT_ISA(table)                                                    \
  (::mamba_ssm::cpu_isa() == ::mamba_ssm::CpuIsa::avx512 ? ::mamba_ssm::table##_avx512 \
   : ::mamba_ssm::cpu_isa() == ::mamba_ssm::CpuIsa::avx2 ? ::mamba_ssm::table##_avx2   \
                                                         : ::mamba_ssm::table##_generic)
#else
#define MAMBA_SSM_SELECT_ISA(table) (::mamba_ssm::table##_generic)
#endif

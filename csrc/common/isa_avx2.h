// First include of a *_cpu_avx2.cpp: everything after it, up to isa_end.h, is compiled for this instruction set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define MAMBA_SSM_ISA avx2
#define MAMBA_SSM_LANES 8

// First include of a *_cpu_avx512.cpp: everything after it, up to isa_end.h, is compiled for this instruction set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define MAMBA_SSM_ISA avx512
#define MAMBA_SSM_LANES 16

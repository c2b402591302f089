// Last include of a *_cpu_<isa>.cpp.
#if defined(__clang__) && MAMBA_SSM_LANES > 4
#pragma clang attribute pop
#endif

// First include of a *_cpu_generic.cpp: 128-bit lanes, which SSE2 and Arm's NEON both have.
#define MAMBA_SSM_ISA generic
#define MAMBA_SSM_LANES 4

// Compiles every method's forward and gradient for the device, on one float; run by tests/test_build.py, never linked.
#include "../selective_scan/discretization.h"

namespace mamba_ssm {

template <class Method>
__global__ void forward(const float* delta, const float* A, float* out) {
  const Transition<float> step = Method::forward(delta[threadIdx.x], Method::prepare(A[threadIdx.x]));
  out[2 * threadIdx.x] = step.a_bar;
  out[2 * threadIdx.x + 1] = step.c;
}

template <class Method>
__global__ void gradient(const float* delta, const float* A, float* out) {
  using AnyA = ForAnyA<Method>;
  const TransitionGradient<float> step = AnyA::gradient(delta[threadIdx.x], AnyA::prepare(A[threadIdx.x]));
  out[5 * threadIdx.x] = step.a_bar;
  out[5 * threadIdx.x + 1] = step.slope;
  out[5 * threadIdx.x + 2] = step.c;
  out[5 * threadIdx.x + 3] = step.c_delta;
  out[5 * threadIdx.x + 4] = step.c_A;
}

#define MAMBA_SSM_INSTANTIATE(Method)                                           \
  template __global__ void forward<Method>(const float*, const float*, float*); \
  template __global__ void gradient<Method>(const float*, const float*, float*);
MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_INSTANTIATE)
#undef MAMBA_SSM_INSTANTIATE

}  // namespace mamba_ssm

// SPDX-License-Identifier: Apache-2.0
// sm89_{nvfp4,mxfp4}_moe_w4a16: routed experts with 16-bit activations, sm_80 and later.
#pragma once

#include "gemm_w4a16.cuh"
#include "moe.cuh"

namespace moe_w4a16 {

template <class Config>
using Smem = w4a16::Smem<Config>;

struct Gemm {
  template <class Config>
  static constexpr float kUndo = w4a16::kUndo<Config>;

  template <class Config, class Work>
  __device__ __forceinline__ static void multiply(uint32_t smem, const GemmParams& p,
                                                  const Work& work,
                                                  epilogue::Accumulators<Config>& accumulators) {
    w4a16::multiply<Config>(smem, p, work, accumulators);
  }
};

}  // namespace moe_w4a16

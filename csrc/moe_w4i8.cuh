// SPDX-License-Identifier: Apache-2.0
// sm80_{nvfp4,mxfp4}_moe_w4i8: routed experts with INT8 activations, sm_80 and later. Rows are
// quantised before each product (quantize_i8.cuh), as for FP8 (moe_w4a8.cuh).
#pragma once

#include "gemm_w4i8.cuh"
#include "moe.cuh"

namespace moe_w4i8 {

template <class Config>
using Smem = w4i8::Smem<Config>;

struct Gemm {
  template <class Config>
  static constexpr float kUndo = w4i8::kUndo<Config>;

  template <class Config, class Work>
  __device__ __forceinline__ static void multiply(uint32_t smem, const GemmParams& p,
                                                  const Work& work,
                                                  epilogue::Accumulators<Config>& accumulators) {
    w4i8::multiply<Config>(smem, p, work, accumulators);
  }
};

}  // namespace moe_w4i8

// SPDX-License-Identifier: Apache-2.0
// sm80_{nvfp4,mxfp4}_moe_w4i8: routed experts with INT8 activations, sm_80 and later. Rows are
// quantised before each product (quantize_i8.cuh), as for FP8 (moe_w4a8.cuh).
#pragma once

#include "gemm_w4i8.cuh"
#include "moe.cuh"

namespace moe_w4i8 {

template <class Config>
using Smem = w4i8::Smem<Config>;

using Gemm = w4i8::Gemm;

}  // namespace moe_w4i8

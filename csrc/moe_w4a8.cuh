// SPDX-License-Identifier: Apache-2.0
// sm89_{nvfp4,mxfp4}_moe_w4a8: routed experts with FP8 activations, sm_89 and later. Rows are
// quantised between the products (quantize_a8.cuh): a row's one scale needs all of its columns,
// which no tile of w13 has.
#pragma once

#include "gemm_w4a8.cuh"
#include "moe.cuh"

namespace moe_w4a8 {

template <class Config>
using Smem = w4a8::Smem<Config>;

using Gemm = w4a8::Gemm;

}  // namespace moe_w4a8

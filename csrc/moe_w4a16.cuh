// SPDX-License-Identifier: Apache-2.0
// sm89_{nvfp4,mxfp4}_moe_w4a16: routed experts with 16-bit activations, sm_80 and later.
#pragma once

#include "gemm_w4a16.cuh"
#include "moe.cuh"

namespace moe_w4a16 {

template <class Config>
using Smem = w4a16::Smem<Config>;

using Gemm = w4a16::Gemm;

}  // namespace moe_w4a16

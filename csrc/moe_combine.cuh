// SPDX-License-Identifier: Apache-2.0
// sm89_moe_combine: a token's result from those of its choices, added in f32 in their order, so
// that it does not depend on timing. Eight columns per thread; grid (M, column blocks).
#pragma once

#include "epilogue.cuh"
#include "moe_params.cuh"

namespace moe_combine {

template <Dtype kDtype>
__device__ __forceinline__ void add_pair(float (&sum)[8], int i, uint32_t pair, float weight) {
  const float low = epilogue::to_float<kDtype>(static_cast<uint16_t>(pair));
  const float high = epilogue::to_float<kDtype>(static_cast<uint16_t>(pair >> 16));
  sum[2 * i] = fmaf(weight, low, sum[2 * i]);
  sum[2 * i + 1] = fmaf(weight, high, sum[2 * i + 1]);
}

template <Dtype kDtype, int kThreads>
__device__ __forceinline__ void run(const CombineParams& p) {
  const int column = (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) * 8;
  if (column >= p.hidden_size) return;
  const int64_t token = blockIdx.x;
  const auto* x =
      static_cast<const uint16_t*>(p.x) + token * p.num_choices * p.hidden_size + column;
  float sum[8] = {};
#pragma unroll 4
  for (int j = 0; j < p.num_choices; ++j) {
    const int choice = static_cast<int>(token) * p.num_choices + j;
    // What no expert here has written is not even read: it may be NaN.
    if (moe::local_expert(p, choice) < 0) continue;
    const float weight = p.weights == nullptr ? 1.0f : p.weights[choice];
    const uint4 v = ptx::ld_global_nc_v4(x + int64_t{j} * p.hidden_size);
    add_pair<kDtype>(sum, 0, v.x, weight);
    add_pair<kDtype>(sum, 1, v.y, weight);
    add_pair<kDtype>(sum, 2, v.z, weight);
    add_pair<kDtype>(sum, 3, v.w, weight);
  }
  uint16_t* y = static_cast<uint16_t*>(p.y) + token * p.hidden_size + column;
  ptx::st_global_v4(y, make_uint4(epilogue::round_pair<kDtype>(sum[0], sum[1]),
                                  epilogue::round_pair<kDtype>(sum[2], sum[3]),
                                  epilogue::round_pair<kDtype>(sum[4], sum[5]),
                                  epilogue::round_pair<kDtype>(sum[6], sum[7])));
}

}  // namespace moe_combine

// SPDX-License-Identifier: Apache-2.0
// sm89_quantize_a8: q[m, k] = e4m3(a[m, k] / a_scale[m]), a_scale[m] = max_k |a[m, k]| / 448, and 1
// for a row of zeros. Nearest even, saturating; columns stay in their order (fragments.cuh).
//
// One thread block per token. The row is read twice, the second time from L1 or L2: a long row does
// not fit the registers.
#pragma once

#include "dequant.cuh"

// Mirrors QuantizeParams of vllm_nvfp4/kernels/cuda/configs.py.
struct QuantizeParams {
  const void* a;   // [M, K] bf16 or fp16; rows a_stride elements apart, 16-byte aligned
  void* q;         // [M, K] e4m3; rows q_stride bytes apart, 16-byte aligned
  float* a_scale;  // [M]
  int m, k;        // k is a multiple of 16
  int a_stride, q_stride;
};

namespace quantize_a8 {

constexpr float kLargestE4m3 = 448.0f;

template <Dtype kDtype>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (kDtype == Dtype::kBf16) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
  } else {
    return __half22float2(dequant::bit_cast<__half2>(pair));
  }
}

__device__ __forceinline__ uint32_t word(uint4 v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The largest magnitude of the row, in every thread. NaN counts as nothing here and becomes NaN in
// the division.
template <Dtype kDtype, int kThreads>
__device__ __forceinline__ float row_maximum(const uint8_t* row, int num_bytes) {
  float maximum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x) * 16; i < num_bytes; i += kThreads * 16) {
    const uint4 piece = ptx::ld_global_nc_v4(row + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 v = unpack<kDtype>(word(piece, j));
      maximum = fmaxf(maximum, fmaxf(fabsf(v.x), fabsf(v.y)));
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    maximum = fmaxf(maximum, __shfl_xor_sync(0xFFFFFFFFu, maximum, distance));
  }
  const uint32_t warps = ptx::smem_address(ptx::dynamic_smem());
  if (threadIdx.x % 32 == 0) {
    ptx::st_shared_u32(warps + threadIdx.x / 32 * 4, __float_as_uint(maximum));
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    maximum = fmaxf(maximum, __uint_as_float(ptx::ld_shared_u32(warps + i * 4)));
  }
  return maximum;
}

template <Dtype kDtype>
__device__ __forceinline__ uint32_t quantize_four(uint32_t low, uint32_t high, float scale) {
  const float2 a = unpack<kDtype>(low), b = unpack<kDtype>(high);
  // A division, not a product with the reciprocal: the same bits as the reference.
  const uint32_t first = ptx::cvt_f32x2_to_e4m3x2(a.x / scale, a.y / scale);
  const uint32_t second = ptx::cvt_f32x2_to_e4m3x2(b.x / scale, b.y / scale);
  return first | second << 16;
}

template <Dtype kDtype, int kThreads>
__device__ __forceinline__ void run(const QuantizeParams& p) {
  const int64_t token = blockIdx.x;
  const auto* row = static_cast<const uint8_t*>(p.a) + token * p.a_stride * 2;
  auto* q = static_cast<uint8_t*>(p.q) + token * p.q_stride;
  const float maximum = row_maximum<kDtype, kThreads>(row, p.k * 2);
  const float scale = maximum > 0.0f ? maximum / kLargestE4m3 : 1.0f;
  if (threadIdx.x == 0) p.a_scale[token] = scale;
  for (int i = static_cast<int>(threadIdx.x) * 16; i < p.k * 2; i += kThreads * 16) {
    const uint4 piece = ptx::ld_global_nc_v4(row + i);
    ptx::st_global_v2(q + i / 2, make_uint2(quantize_four<kDtype>(piece.x, piece.y, scale),
                                            quantize_four<kDtype>(piece.z, piece.w, scale)));
  }
}

}  // namespace quantize_a8

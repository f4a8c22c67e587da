// SPDX-License-Identifier: Apache-2.0
// sm80_quantize_i8: q[m, k] = a[m, k] / a_scale[m, g] to the nearest integer, ties to even, with
// a_scale[m, g] = max |a[m, k]| / 127 over the 64 columns of group g = k / 64, and 1 where that is
// below the normal numbers. A NaN or an infinity spoils its group's scale and becomes a q of 0.
//
// One thread block per token; eight neighbouring threads hold a group, each eight of its columns.
#pragma once

#include "quantize_a8.cuh"

namespace quantize_i8 {

constexpr int kGroup = 64, kColumns = 8;  // of a thread: 16 bytes
constexpr float kLargest = 127.0f, kSmallestScale = 1.1754944e-38f;

// The largest magnitude of the group, in each of its threads. As integers, magnitudes sort like the
// numbers, and NaN above all.
template <Dtype kDtype>
__device__ __forceinline__ float group_maximum(uint4 piece) {
  uint32_t maximum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 v = quantize_a8::unpack<kDtype>(quantize_a8::word(piece, j));
    maximum = max(maximum, max(__float_as_uint(fabsf(v.x)), __float_as_uint(fabsf(v.y))));
  }
#pragma unroll
  for (int distance = kGroup / kColumns / 2; distance > 0; distance /= 2) {
    maximum = max(maximum, __shfl_xor_sync(0xFFFFFFFFu, maximum, distance));
  }
  return __uint_as_float(maximum);
}

// The low byte of the result is q. A division, not a product with the reciprocal: the same bits as
// the reference.
__device__ __forceinline__ uint32_t quantize_one(float a, float scale) {
  const float quotient = a / scale;
  return __float_as_uint((quotient == quotient ? quotient : 0.0f) + dequant::kMagic);
}

template <Dtype kDtype>
__device__ __forceinline__ uint32_t quantize_four(uint32_t low, uint32_t high, float scale) {
  const float2 a = quantize_a8::unpack<kDtype>(low), b = quantize_a8::unpack<kDtype>(high);
  const uint32_t first = ptx::prmt(quantize_one(a.x, scale), quantize_one(a.y, scale), 0x0040);
  const uint32_t second = ptx::prmt(quantize_one(b.x, scale), quantize_one(b.y, scale), 0x0040);
  return ptx::prmt(first, second, 0x5410);
}

template <Dtype kDtype, int kThreads>
__device__ __forceinline__ void run(const QuantizeParams& p) {
  const int64_t token = blockIdx.x;
  const auto* row = static_cast<const uint8_t*>(p.a) + token * p.a_stride * 2;
  auto* q = static_cast<uint8_t*>(p.q) + token * p.q_stride;
  const int groups = (p.k + kGroup - 1) / kGroup;
  float* scales = p.a_scale + token * groups;
  // Whole warps go round, so that all threads of a group meet.
  for (int first = 0; first < p.k; first += kThreads * kColumns) {
    const int column = first + static_cast<int>(threadIdx.x) * kColumns;
    const bool is_inside = column < p.k;
    const uint4 piece = is_inside ? ptx::ld_global_nc_v4(row + column * 2) : make_uint4(0, 0, 0, 0);
    const float quotient = group_maximum<kDtype>(piece) / kLargest;
    const float scale = quotient < kSmallestScale ? 1.0f : quotient;
    if (!is_inside) continue;
    if (column % kGroup == 0) scales[column / kGroup] = scale;
    ptx::st_global_v2(q + column, make_uint2(quantize_four<kDtype>(piece.x, piece.y, scale),
                                             quantize_four<kDtype>(piece.z, piece.w, scale)));
  }
}

}  // namespace quantize_i8

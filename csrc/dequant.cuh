// SPDX-License-Identifier: Apache-2.0
// Codes and block scales to numbers, by moving bits. Nothing here rounds.
//
// E2M1 is s ee m: (-1)^s * 2^(ee-1) * 1.m, and 0.m for ee = 0. Put its three bits eem at the seam
// of exponent and mantissa of a wider type, m on the highest mantissa bit, and the wider type reads
// the same number times 2^(1 - bias): its subnormals at ee = 0 are E2M1's. So a conversion is two
// masks and a shift, and the power of two joins a scale that is multiplied later anyway.
//
//   type   bias   number read         where eem goes
//   fp16    15    value * 2^-14       bits 11..9
//   bf16   127    value * 2^-126      bits 8..6
//   e4m3     7    value * 2^-6        bits 4..2
#pragma once

#include "gemm_params.cuh"

namespace dequant {

// --- bit casts -----------------------------------------------------------------------------------

template <class To, class From>
__device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The product of two packed pairs.
template <Dtype kDtype>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  if constexpr (kDtype == Dtype::kFp16) {
    return bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
  } else {
    return bit_cast<uint32_t>(__hmul2(bit_cast<__nv_bfloat162>(a), bit_cast<__nv_bfloat162>(b)));
  }
}

// (a & b) | c, one instruction: truth table (0xF0 & 0xCC) | 0xAA.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  return ptx::lop3<(0xF0 & 0xCC) | 0xAA>(a, b, c);
}

// --- E2M1 to 16 bits -----------------------------------------------------------------------------

template <Dtype kDtype>
struct Half;
template <>
struct Half<Dtype::kFp16> {
  static constexpr int kShift = 3;                    // eem from bits 14..12 to 11..9
  static constexpr uint32_t kMagnitude = 0x0E000E00;  // bits 11..9 of both halves
  static constexpr int kExponentGain = 14;            // what is read is value * 2^-14
};
template <>
struct Half<Dtype::kBf16> {
  static constexpr int kShift = 6;                    // eem from bits 14..12 to 8..6
  static constexpr uint32_t kMagnitude = 0x01C001C0;  // bits 8..6 of both halves
  static constexpr int kExponentGain = 126;           // what is read is value * 2^-126
};
constexpr uint32_t kSignOfHalves = 0x80008000;

// The pair of codes in the highest nibbles of q's halves, times 2^-kExponentGain.
template <Dtype kDtype>
__device__ __forceinline__ uint32_t e2m1_pair(uint32_t q) {
  return and_or(q, kSignOfHalves, (q >> Half<kDtype>::kShift) & Half<kDtype>::kMagnitude);
}

// The eight codes of a word (fragments.cuh) as the A operand of m16n8k16 with 16-bit elements:
// a[0] row g columns 4t, 4t+1; a[1] row g+8, the same; a[2] row g columns 4t+2, 4t+3; a[3] row g+8.
template <Dtype kDtype>
__device__ __forceinline__ void e2m1_fragment(uint32_t word, uint32_t (&a)[4]) {
  // Bytes 0 2 1 3: each half now holds one column of each of the two pairs.
  const uint32_t q = ptx::prmt(word, 0, 0x3120);
  a[2] = e2m1_pair<kDtype>(q);
  a[3] = e2m1_pair<kDtype>(q << 4);
  a[0] = e2m1_pair<kDtype>(q << 8);
  a[1] = e2m1_pair<kDtype>(q << 12);
}

// --- E4M3 block scales to 16 bits ----------------------------------------------------------------
// A non-negative e4m3 byte with its mantissa shifted to the top of the wide mantissa reads as
// scale * 2^(7 - bias), subnormals included; exact multiplications by powers of two follow.
//
// What the MMA sees is code * scale, at most six significant bits:
//   fp16: E2M1 * 2^-14 times scale           = a multiple of 2^-24 (fp16's least subnormal) below
//         2688 * 2^-14 < 1: exact, never overflows
//   bf16: E2M1 * 2^-126 times scale * 2^119  = E2M1 * scale * 2^-7: all normal numbers. The scale
//         itself reaches 448 * 2^119 = 1.75 * 2^127, bf16's range ends at 1.99 * 2^127.

template <Dtype kDtype>
struct ScaledHalf;
template <>
struct ScaledHalf<Dtype::kFp16> {
  static constexpr float kUndo = 16384.0f;  // 2^14
};
template <>
struct ScaledHalf<Dtype::kBf16> {
  static constexpr float kUndo = 128.0f;  // 2^7
};

// Two blocks of two rows in one word (fragments.cuh) to pairs (row g, row g + 8), one per block.
template <Dtype kDtype>
__device__ __forceinline__ void e4m3_scale_pairs(uint32_t word, uint32_t (&pair)[2]) {
  constexpr uint32_t kEvenBytes = 0x007F007F, kOddBytes = 0x7F007F00;
  if constexpr (kDtype == Dtype::kFp16) {
    constexpr uint32_t k2Pow8 = 0x5C005C00;
    pair[0] = multiply_pairs<kDtype>((word & kEvenBytes) << 7, k2Pow8);
    pair[1] = multiply_pairs<kDtype>((word & kOddBytes) >> 1, k2Pow8);
  } else {
    // 2^239 does not fit a bf16: in two steps.
    constexpr uint32_t k2Pow127 = 0x7F007F00, k2Pow112 = 0x77807780;
    const uint32_t even = multiply_pairs<kDtype>((word & kEvenBytes) << 4, k2Pow127);
    const uint32_t odd = multiply_pairs<kDtype>((word & kOddBytes) >> 4, k2Pow127);
    pair[0] = multiply_pairs<kDtype>(even, k2Pow112);
    pair[1] = multiply_pairs<kDtype>(odd, k2Pow112);
  }
}

// A pair of weights of one row times that row's scale: the low half of a scale pair is row g, the
// high half row g + 8. CUDA's own broadcasts become operand modifiers (.H0_H0), which are free; a
// prmt would not.
template <Dtype kDtype>
__device__ __forceinline__ uint32_t scale_row_g(uint32_t weights, uint32_t pair) {
  if constexpr (kDtype == Dtype::kFp16) {
    const __half2 scale = __half2half2(__low2half(bit_cast<__half2>(pair)));
    return bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(weights), scale));
  } else {
    const __nv_bfloat162 scale =
        __bfloat162bfloat162(__low2bfloat16(bit_cast<__nv_bfloat162>(pair)));
    return bit_cast<uint32_t>(__hmul2(bit_cast<__nv_bfloat162>(weights), scale));
  }
}
template <Dtype kDtype>
__device__ __forceinline__ uint32_t scale_row_g8(uint32_t weights, uint32_t pair) {
  if constexpr (kDtype == Dtype::kFp16) {
    const __half2 scale = __half2half2(__high2half(bit_cast<__half2>(pair)));
    return bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(weights), scale));
  } else {
    const __nv_bfloat162 scale =
        __bfloat162bfloat162(__high2bfloat16(bit_cast<__nv_bfloat162>(pair)));
    return bit_cast<uint32_t>(__hmul2(bit_cast<__nv_bfloat162>(weights), scale));
  }
}

// --- E2M1 to e4m3 --------------------------------------------------------------------------------

constexpr float kUndoE4m3 = 64.0f;  // the bytes read value * 2^-6

// The eight codes of a word as the A operand of m16n8k16 with 8-bit elements:
// a[0] row g, columns 4t..4t+3; a[1] row g + 8. Seven instructions for eight weights.
__device__ __forceinline__ void e2m1_to_e4m3(uint32_t word, uint32_t& row_g, uint32_t& row_g8) {
  constexpr uint32_t kSigns = 0x80808080, kMagnitudes = 0x1C1C1C1C;  // bit 7; bits 4..2
  row_g = and_or(word, kSigns, (word >> 2) & kMagnitudes);
  row_g8 = and_or(word << 4, kSigns, (word << 2) & kMagnitudes);
}

// --- E2M1 to int8 --------------------------------------------------------------------------------

constexpr float kUndoS8 = 0.5f;  // the bytes hold value * 2
// 1.5 * 2^23: an integer added to these bits is added to the number.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4B400000;
// 1.5 * 2^6: the same for the number times 2^-17. A block's sum reaches 2^15.6 and an E8M0 scale
// 2^127: their product stays in f32's range.
constexpr float kSmallMagic = 96.0f;
constexpr int32_t kSmallMagicBits = 0x42C00000;
constexpr float kUndoSmallMagic = 131072.0f;

// (mask & b) | (~mask & a), one instruction: truth table (0xF0 & 0xCC) | (0x0F & 0xAA).
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  return ptx::lop3<(0xF0 & 0xCC) | (0x0F & 0xAA)>(mask, b, a);
}

// The eight codes of a word as the A operand of an integer MMA, times 2: row g, columns 4t..4t+3,
// and row g + 8. Three bits of a code look a byte up, in a table for either sign; 15 instructions.
__device__ __forceinline__ void e2m1_to_s8(uint32_t word, uint32_t& row_g, uint32_t& row_g8) {
  constexpr uint32_t kLow = 0x03020100, kHigh = 0x0C080604;            // 0 1 2 3 | 4 6 8 12
  constexpr uint32_t kMinusLow = 0xFDFEFF00, kMinusHigh = 0xF4F8FAFC;  // the same, negative
  constexpr uint32_t kOdd = 0x7531, kEven = 0x6420, kSignOfBytes = 0xBA98;
  // prmt looks at four nibbles.
  const uint32_t first = word & 0x77777777, second = first >> 16;
  const uint32_t plus[2] = {ptx::prmt(kLow, kHigh, first), ptx::prmt(kLow, kHigh, second)};
  const uint32_t minus[2] = {ptx::prmt(kMinusLow, kMinusHigh, first),
                             ptx::prmt(kMinusLow, kMinusHigh, second)};
  row_g = select_bits(ptx::prmt(word, 0, kSignOfBytes), ptx::prmt(plus[0], plus[1], kOdd),
                      ptx::prmt(minus[0], minus[1], kOdd));
  row_g8 = select_bits(ptx::prmt(word << 4, 0, kSignOfBytes), ptx::prmt(plus[0], plus[1], kEven),
                       ptx::prmt(minus[0], minus[1], kEven));
}

// --- block scales to f32 -------------------------------------------------------------------------

#if defined(VNVFP4_HOST) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
// NVFP4, sm_89 and later: scale[block][row] of the two blocks and two rows of a word.
__device__ __forceinline__ void e4m3_scales_f32(uint32_t word, float (&scale)[2][2]) {
  const float2 row_g = __half22float2(
      bit_cast<__half2>(ptx::cvt_e4m3x2_to_f16x2(static_cast<uint16_t>(word & 0xFFFF))));
  const float2 row_g8 = __half22float2(
      bit_cast<__half2>(ptx::cvt_e4m3x2_to_f16x2(static_cast<uint16_t>(word >> 16))));
  scale[0][0] = row_g.x;
  scale[1][0] = row_g.y;
  scale[0][1] = row_g8.x;
  scale[1][1] = row_g8.y;
}
#endif

#if defined(VNVFP4_HOST) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
// NVFP4 in f16, times a power of two, 2^-5 for f16 partial sums (gemm_w4a8.cuh says why) and 2^3
// where it is folded: the pairs (block 2p, block 2p + 1) of row g and of row g + 8 from a word.
// Exact: the least scale, 2^-9, becomes 2^-14, still a normal number, the largest 448 * 8.
constexpr float kUndoF16Scale = 32.0f;
constexpr uint32_t k2PowMinus5 = 0x28002800, k2Pow3 = 0x48004800;  // pairs of f16
template <uint32_t kFactor>
__device__ __forceinline__ void e4m3_scales_f16(uint32_t word, __half2& row_g, __half2& row_g8) {
  const __half2 factor = bit_cast<__half2>(kFactor);
  row_g = __hmul2(bit_cast<__half2>(ptx::cvt_e4m3x2_to_f16x2(static_cast<uint16_t>(word & 0xFFFF))),
                  factor);
  row_g8 = __hmul2(bit_cast<__half2>(ptx::cvt_e4m3x2_to_f16x2(static_cast<uint16_t>(word >> 16))),
                   factor);
}

// Four codes as e4m3, times 2^-6, times the block scale, times 2^3: e4m3(code * scale / 8), the one
// rounding there is. The product is at most 2688 / 8 = 336, and exact in f16: six significant bits
// from 2^-13 on.
constexpr float kUndoFolded = 8.0f;
__device__ __forceinline__ uint32_t fold_scale(uint32_t codes, __half2 scale) {
  const uint32_t low = ptx::cvt_e4m3x2_to_f16x2(static_cast<uint16_t>(codes & 0xFFFF));
  const uint32_t high = ptx::cvt_e4m3x2_to_f16x2(static_cast<uint16_t>(codes >> 16));
  return ptx::cvt_f16x2_to_e4m3x2(bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(low), scale))) |
         uint32_t{
             ptx::cvt_f16x2_to_e4m3x2(bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(high), scale)))}
             << 16;
}
#endif

// NVFP4 on any GPU, times 2^-8: scale[block][row] of the two blocks and two rows of a word. A byte
// whose mantissa lies on top of an f16's reads as scale * 2^-8, subnormals included.
constexpr float kUndoScaleBits = 256.0f;
__device__ __forceinline__ void e4m3_scales_by_bits(uint32_t word, float (&scale)[2][2]) {
  const float2 first = __half22float2(bit_cast<__half2>((word & 0x007F007F) << 7));
  const float2 second = __half22float2(bit_cast<__half2>((word & 0x7F007F00) >> 1));
  scale[0][0] = first.x;
  scale[0][1] = first.y;
  scale[1][0] = second.x;
  scale[1][1] = second.y;
}

// 2^(e - 127) for e = 0..254: the byte is the exponent field of an f32; only 2^-127 is subnormal
// there, bit 22 alone.
__device__ __forceinline__ float e8m0_to_f32(uint32_t e) {
  constexpr uint32_t k2PowMinus127 = 0x00400000;
  const uint32_t bits = e << 23;
  return __uint_as_float(bits < k2PowMinus127 ? k2PowMinus127 : bits);
}

// MXFP4: scale[block][row] of the two blocks and two rows of a word.
__device__ __forceinline__ void e8m0_scales_f32(uint32_t word, float (&scale)[2][2]) {
  scale[0][0] = e8m0_to_f32(word & 0xFF);
  scale[1][0] = e8m0_to_f32(word >> 8 & 0xFF);
  scale[0][1] = e8m0_to_f32(word >> 16 & 0xFF);
  scale[1][1] = e8m0_to_f32(word >> 24);
}

}  // namespace dequant

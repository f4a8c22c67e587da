// SPDX-License-Identifier: Apache-2.0
// The asm statements that compute. Included by ptx.cuh alone, which has the types.
#pragma once

namespace ptx {

// --- mma.sync: d = a * b + c ---------------------------------------------------------------------
// Not volatile: an MMA is a function of its registers and the compiler may schedule it freely.

// HMMA.16816.F32.BF16, sm_80 and later; k = 16 halves the issue slots of k = 8.
__device__ __forceinline__ void mma_m16n8k16_bf16_f32(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2], const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}
__device__ __forceinline__ void mma_m16n8k16_f16_f32(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2], const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}
// Accumulates in f16: twice the rate on GeForce, and only 11 bits.
__device__ __forceinline__ void mma_m16n8k16_f16_f16(uint32_t (&d)[2], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2],
                                                     const uint32_t (&c)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, "
      "{%8, %9};"
      : "=r"(d[0]), "=r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]));
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
// FP8. PTX ISA 8.4 has K = 32 with f32 results, 8.7 (CUDA 12.8) the other three. What becomes of a
// subnormal operand PTX leaves open: the kernels count on its value (dequant.cuh makes them).
//
// QMMA.16816 on sm_89: K = 16 is one NVFP4 block, so that a block scale can be applied to the sum.
// sm_89 keeps 13 fractional bits of the largest term: never chain it over K. sm_90 and sm_100 have
// no FP8 mma.sync and take F16 ones in its place (HMMA.1688 twice for K = 16), whose sums differ in
// the last bits.
__device__ __forceinline__ void mma_m16n8k16_e4m3_f32(float (&d)[4], const uint32_t (&a)[2],
                                                      const uint32_t (&b)[1], const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, "
      "%8, %9, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
// QMMA.16832, one MXFP4 block; sm_89 executes it as two steps of K = 16.
__device__ __forceinline__ void mma_m16n8k32_e4m3_f32(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2], const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}
// f16 results: twice the rate on GeForce. A block's sum is at most 16 * 6 * 448 = 43,008 < 65,504.
// sm_89 rounds it once for K = 16; sm_90's two HMMA.1688.F16 round it twice.
__device__ __forceinline__ void mma_m16n8k16_e4m3_f16(uint32_t (&d)[2], const uint32_t (&a)[2],
                                                      const uint32_t (&b)[1],
                                                      const uint32_t (&c)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.e4m3.e4m3.f16 {%0, %1}, {%2, %3}, {%4}, {%5, %6};"
      : "=r"(d[0]), "=r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(c[0]), "r"(c[1]));
}
__device__ __forceinline__ void mma_m16n8k32_e4m3_f16(uint32_t (&d)[2], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2],
                                                      const uint32_t (&c)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, "
      "{%8, %9};"
      : "=r"(d[0]), "=r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]));
}
#endif
// IMMA, native on every GPU since sm_80, with the shapes and register counts of e4m3.
__device__ __forceinline__ void mma_m16n8k16_s8_s32(int32_t (&d)[4], const uint32_t (&a)[2],
                                                    const uint32_t (&b)[1], const int32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, "
      "%9, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
__device__ __forceinline__ void mma_m16n8k32_s8_s32(int32_t (&d)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2], const int32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
}

// --- integer and conversion instructions ---------------------------------------------------------

// Byte i of the result is byte (selector nibble i) of high:low; nibble bit 3 replicates its sign.
__device__ __forceinline__ uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
  return d;
}

// Any function of three bits in one instruction; the compiler does not always merge and/or chains.
// Truth table: bit i = f(a, b, c) for i = a << 2 | b << 1 | c.
template <int kTable>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(kTable >= 0 && kTable < 256, "lop3 takes an 8-bit truth table");
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
// Two e4m3 (low byte first) to two f16 (low half first), exact: one F2FP for two numbers.
__device__ __forceinline__ uint32_t cvt_e4m3x2_to_f16x2(uint16_t codes) {
  uint32_t d;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(codes));
  return d;
}
// Nearest even, saturating to 448. The instruction takes the high operand first.
__device__ __forceinline__ uint16_t cvt_f32x2_to_e4m3x2(float low, float high) {
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
  return d;
}
// Two f16 to two e4m3 (low half to the low byte): nearest even, saturating to 448.
__device__ __forceinline__ uint16_t cvt_f16x2_to_e4m3x2(uint32_t halves) {
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(d) : "r"(halves));
  return d;
}
#endif
// Nearest even; the instruction takes the high operand first.
__device__ __forceinline__ uint32_t cvt_f32x2_to_f16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ uint32_t cvt_f32x2_to_bf16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

}  // namespace ptx

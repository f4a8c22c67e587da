// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one warp's tile product, c[m][n] += sum_k a[m][k] b[k][n], on raw codes.
#pragma once

#include <stdint.h>

namespace vnvfp4_host {

enum class Element : uint8_t { kBf16, kF16, kE4m3, kS8 };

struct Tile {
  uint32_t a[16][32];
  uint32_t b[32][8];
  uint32_t c[16][8];  // bits of f32, s32, or (in the low half) f16; replaced by the result
};

// Two's complement, wrapping at 32 bits.
void multiply_int8(Tile& tile, int k);

// Every product and sum in double, rounded once to the output type (nearest even).
void multiply_exact(Tile& tile, Element element, int k, bool has_half_output);

// FP8 on Ada, as measured and published by MMA-Sim (simulator/nv_ptx.py): per 16 of k, the 16
// products and c are shifted to the largest of their exponents (a product's is the sum of its
// factors', unnormalised), cut toward zero to 13 fractional bits and added exactly. An f32 result
// is cut to 13 fractional bits too; an f16 result is rounded to nearest even. k = 32 is two such
// steps.
void multiply_ada_fp8(Tile& tile, int k, bool has_half_output);

// bf16 and f16 on Ada, same source: per 8 of k, 24 fractional bits; an f32 result is cut toward
// zero, an f16 result rounded to nearest even.
void multiply_ada_half(Tile& tile, Element element, bool has_half_output);

}  // namespace vnvfp4_host

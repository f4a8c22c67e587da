// SPDX-License-Identifier: Apache-2.0
// mma.sync.m16n8k{16,32}.row.col: gathers the lanes' registers into tiles by the PTX ISA's lane
// maps, multiplies once per warp, and scatters. With g = lane / 4, t = lane % 4 and E elements per
// 32-bit register:
//   A register r, element i: row g + 8 (r % 2), k = E t + i + 4 E (r / 2)
//   B register r, element i: k = E t + i + 4 E r, column g
//   C, D, 32-bit element i:  row g + 8 (i / 2), column 2 t + i % 2
//   C, D, f16x2 register r:  row g + 8 r, columns 2 t (low half) and 2 t + 1

#include <math.h>
#include <string.h>

#include "accumulate.h"
#include "machine.h"

namespace vnvfp4_host {

namespace {

struct MmaArgs {
  Mma kind;
  void* d;
  const uint32_t* a;
  const uint32_t* b;
  const void* c;
};

struct Shape {
  Element element;
  int k;
  bool has_half_output;
};

constexpr Shape kShapes[] = {
    {Element::kBf16, 16, false}, {Element::kF16, 16, false},  {Element::kF16, 16, true},
    {Element::kE4m3, 16, false}, {Element::kE4m3, 32, false}, {Element::kE4m3, 16, true},
    {Element::kE4m3, 32, true},  {Element::kS8, 16, false},   {Element::kS8, 32, false},
};
static_assert(sizeof(kShapes) / sizeof(kShapes[0]) == static_cast<int>(Mma::kCount),
              "one shape per instruction, in the order of enum Mma");

void gather_operands(Thread* warp, const Shape& shape, Tile& tile) {
  const int bits = shape.element == Element::kE4m3 || shape.element == Element::kS8 ? 8 : 16;
  const int per_register = 32 / bits;
  const uint32_t element_mask = (1u << bits) - 1;
  const int num_b = shape.k / (4 * per_register);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MmaArgs& args = *static_cast<MmaArgs*>(warp[lane].args);
    const int group = lane / 4;
    const int k_lane = per_register * (lane % 4);
    for (int r = 0; r < num_b; ++r) {
      const int k = k_lane + 4 * per_register * r;
      for (int i = 0; i < per_register; ++i) {
        tile.a[group][k + i] = args.a[2 * r] >> (bits * i) & element_mask;
        tile.a[group + 8][k + i] = args.a[2 * r + 1] >> (bits * i) & element_mask;
        tile.b[k + i][group] = args.b[r] >> (bits * i) & element_mask;
      }
    }
  }
}

void gather_accumulator(Thread* warp, const Shape& shape, Tile& tile) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const void* c = static_cast<MmaArgs*>(warp[lane].args)->c;
    const int column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      uint32_t& to = tile.c[lane / 4 + 8 * (i / 2)][column + i % 2];
      if (shape.has_half_output) {
        to = static_cast<const uint32_t*>(c)[i / 2] >> (16 * (i % 2)) & 0xFFFF;
      } else {
        to = static_cast<const uint32_t*>(c)[i];
      }
    }
  }
}

void scatter_result(Thread* warp, const Shape& shape, const Tile& tile) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    uint32_t* d = static_cast<uint32_t*>(static_cast<MmaArgs*>(warp[lane].args)->d);
    const int row = lane / 4;
    const int column = lane % 4 * 2;
    if (shape.has_half_output) {
      for (int r = 0; r < 2; ++r) {
        const uint32_t* from = &tile.c[row + 8 * r][column];
        d[r] = from[0] | from[1] << 16;
      }
    } else {
      for (int i = 0; i < 4; ++i) d[i] = tile.c[row + 8 * (i / 2)][column + i % 2];
    }
  }
}

void combine_mma(Thread* warp, uint32_t) {
  const Mma kind = static_cast<MmaArgs*>(warp[0].args)->kind;
  for (int lane = 1; lane < kWarpSize; ++lane) {
    if (static_cast<MmaArgs*>(warp[lane].args)->kind != kind) {
      fail_at(warp[lane].file, warp[lane].line,
              "warp divergence: lanes 0 and %d are at different mma.sync instructions", lane);
    }
  }
  const Shape& shape = kShapes[static_cast<int>(kind)];
  Tile tile;
  gather_operands(warp, shape, tile);
  gather_accumulator(warp, shape, tile);
  const bool is_ada = shape.element == Element::kE4m3 ? machine.config.fp8_accumulator == 0
                                                      : machine.config.half_accumulator == 1;
  if (shape.element == Element::kS8) {
    multiply_int8(tile, shape.k);
  } else if (!is_ada) {
    multiply_exact(tile, shape.element, shape.k, shape.has_half_output);
  } else if (shape.element == Element::kE4m3) {
    multiply_ada_fp8(tile, shape.k, shape.has_half_output);
  } else {
    multiply_ada_half(tile, shape.element, shape.has_half_output);
  }
  scatter_result(warp, shape, tile);
}

}  // namespace

void mma(Mma kind, void* d, const void* a, const void* b, const void* c, const char* file,
         int line) {
  MmaArgs args{kind, d, static_cast<const uint32_t*>(a), static_cast<const uint32_t*>(b), c};
  gather_warp(WarpOp::kMma, ~0u, &args, file, line, combine_mma);
}

}  // namespace vnvfp4_host

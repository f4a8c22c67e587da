// SPDX-License-Identifier: Apache-2.0
// sm89_{nvfp4,mxfp4}_gemm_w4a8: y = a @ w^T with 4-bit weights and FP8 (e4m3) activations, sm_89
// and later. QMMA at twice the rate of 16-bit MMA.
//
// E2M1 is exact in e4m3. Each MMA starts from zero and covers one block of the weight's row: its
// block scale multiplies the partial sum in f32. So nothing is rounded but the sum of one block:
// Ada's FP8 MMA keeps 13 fractional bits of the largest term and truncates, which a chain over K
// would turn into a bias of percents on data of one sign.
//
// The partial sums cost four FFMA for every MMA; a warp tile of 32 rows x 64 tokens spreads the
// dequantisation and the loads so thinly that these are most of what is issued besides the MMAs.
#pragma once

#include "dequant.cuh"
#include "gemm.cuh"

namespace w4a8 {

// 16 bytes of padding: ldmatrix reads 16 bytes of eight rows in one phase.
template <class Config>
using Stage = pipeline::Stage<Config, 1, 16>;

template <class Config>
using Smem = gemm::Smem<Config, Stage<Config>>;

// One block's sum, from zero: K = 16 (NVFP4, two words of codes) or K = 32 (MXFP4, four).
// A zero accumulator becomes RZ and costs nothing.
template <Partial kPartial>
struct BlockSum {
  __device__ __forceinline__ static void run(float (&sum)[4], const uint32_t (&a)[2],
                                             const uint32_t (&b)[1]) {
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    ptx::mma_m16n8k16_e4m3_f32(sum, a, b, zero);
  }
  __device__ __forceinline__ static void run(float (&sum)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    ptx::mma_m16n8k32_e4m3_f32(sum, a, b, zero);
  }
};

__device__ __forceinline__ void unpack_halves(float (&sum)[4], const uint32_t (&halves)[2]) {
  const float2 row_g = __half22float2(dequant::bit_cast<__half2>(halves[0]));
  const float2 row_g8 = __half22float2(dequant::bit_cast<__half2>(halves[1]));
  sum[0] = row_g.x;
  sum[1] = row_g.y;
  sum[2] = row_g8.x;
  sum[3] = row_g8.y;
}

// f16 sums: twice the MMA rate on GeForce cards, for a rounding of each block's sum to 11 bits (one
// on sm_89 with K = 16, two on sm_90, where a block is two MMAs of K = 8).
// With codes times 2^-6 (dequant.cuh) a sum is a multiple of 2^-16 and at most 32 * 6 * 448 / 64 =
// 1,344: neither end of f16's range is near.
template <>
struct BlockSum<Partial::kF16> {
  // As pairs of tokens, of rows g and g + 8.
  __device__ __forceinline__ static void run_packed(uint32_t (&halves)[2], const uint32_t (&a)[2],
                                                    const uint32_t (&b)[1]) {
    const uint32_t zero[2] = {0, 0};
    ptx::mma_m16n8k16_e4m3_f16(halves, a, b, zero);
  }
  __device__ __forceinline__ static void run(float (&sum)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    const uint32_t zero[2] = {0, 0};
    uint32_t halves[2];
    ptx::mma_m16n8k32_e4m3_f16(halves, a, b, zero);
    unpack_halves(sum, halves);
  }
};

#if defined(VNVFP4_IMMA_STAND_IN)
// Integer MMA has the same shapes and is native where FP8 MMA is emulated: the schedule can be
// timed there. The numbers mean nothing.
template <>
struct BlockSum<Partial::kF32> {
  __device__ __forceinline__ static void run(float (&sum)[4], const uint32_t (&a)[2],
                                             const uint32_t (&b)[1]) {
    const int32_t zero[4] = {0, 0, 0, 0};
    int32_t d[4];
    ptx::mma_m16n8k16_s8_s32(d, a, b, zero);
    for (int i = 0; i < 4; ++i) sum[i] = __int_as_float(d[i]);
  }
  __device__ __forceinline__ static void run(float (&sum)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    const int32_t zero[4] = {0, 0, 0, 0};
    int32_t d[4];
    ptx::mma_m16n8k32_s8_s32(d, a, b, zero);
    for (int i = 0; i < 4; ++i) sum[i] = __int_as_float(d[i]);
  }
};
#endif

// c += scale * sum, rows g and g + 8.
__device__ __forceinline__ void accumulate(float (&c)[4], const float (&scale)[2],
                                           const float (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = fmaf(scale[i / 2], sum[i], c[i]);
}

// sum (+)= halves * one half of the scale pair: the broadcast is an operand modifier.
__device__ __forceinline__ void add_scaled(__half2& sum, uint32_t halves, __half2 scale_pair,
                                           bool is_low, bool is_first) {
  const __half2 scale = __half2half2(is_low ? __low2half(scale_pair) : __high2half(scale_pair));
  const __half2 product = dequant::bit_cast<__half2>(halves);
  sum = is_first ? __hmul2(product, scale) : __hfma2(product, scale, sum);
}

// The activations of 8 tokens over a packed tile's 64 columns: matrix q of the ldmatrix is the 16
// bytes of columns 16q..16q+15, so that word q of a lane is the B operand of MMA q.
template <class Config>
__device__ __forceinline__ void load_token_tile(uint32_t activations, int first_column,
                                                int token_tile, uint32_t (&b)[4]) {
  const int lane = fragments::lane();
  const uint32_t at =
      activations + lane % 8 * Stage<Config>::kRowPitch + first_column + lane / 8 * 16;
  ptx::ldmatrix_x4(b, at + token_tile * 8 * Stage<Config>::kRowPitch);
}
template <class Config>
__device__ __forceinline__ void load_tokens(uint32_t activations, int first_column,
                                            uint32_t (&b)[Config::kTokenTiles][4]) {
#pragma unroll
  for (int i = 0; i < Config::kTokenTiles; ++i) {
    load_token_tile<Config>(activations, first_column, i, b[i]);
  }
}

// Two blocks of 16 columns: words 2 * pair and 2 * pair + 1 of the codes.
template <class Config>
__device__ __forceinline__ void multiply_nvfp4(epilogue::Accumulators<Config>& c,
                                               const uint4 (&codes)[Config::kRowTiles],
                                               const uint32_t (&scales)[Config::kRowTiles],
                                               const uint32_t (&b)[Config::kTokenTiles][4],
                                               int pair) {
#pragma unroll
  for (int r = 0; r < Config::kRowTiles; ++r) {
    float scale[2][2];
    dequant::e4m3_scales_f32(scales[r], scale);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int block = 2 * pair + half;
      uint32_t a[2];
      dequant::e2m1_to_e4m3(fragments::word(codes[r], block), a[0], a[1]);
#pragma unroll
      for (int i = 0; i < Config::kTokenTiles; ++i) {
        const uint32_t tokens[1] = {b[i][block]};
        float sum[4];
        BlockSum<Config::kPartial>::run(sum, a, tokens);
        accumulate(c[r][i], scale[half], sum);
      }
    }
  }
}

// f16 partial sums, a whole tile: four blocks are scaled and added in f16, two numbers to an
// instruction, before one addition in f32; four conversions for every MMA would cost more than the
// doubled MMA rate brings. With scales times 2^-5 the four sums stay below
// 4 * 16 * 6 * 448 / 64 * 448 / 32 = 37,632.
template <class Config>
__device__ __forceinline__ void multiply_nvfp4_f16(epilogue::Accumulators<Config>& c,
                                                   const uint4 (&codes)[Config::kRowTiles],
                                                   const uint32_t (&first)[Config::kRowTiles],
                                                   const uint32_t (&second)[Config::kRowTiles],
                                                   const uint32_t (&b)[Config::kTokenTiles][4]) {
#pragma unroll
  for (int r = 0; r < Config::kRowTiles; ++r) {
    __half2 row_g[2], row_g8[2];  // [pair of blocks]
    dequant::e4m3_scales_f16<dequant::k2PowMinus5>(first[r], row_g[0], row_g8[0]);
    dequant::e4m3_scales_f16<dequant::k2PowMinus5>(second[r], row_g[1], row_g8[1]);
    uint32_t a[4][2];
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      dequant::e2m1_to_e4m3(fragments::word(codes[r], block), a[block][0], a[block][1]);
    }
#pragma unroll
    for (int i = 0; i < Config::kTokenTiles; ++i) {
      __half2 sum[2];  // rows g and g + 8
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        const uint32_t tokens[1] = {b[i][block]};
        uint32_t halves[2];
        BlockSum<Partial::kF16>::run_packed(halves, a[block], tokens);
        const bool is_low = block % 2 == 0;
        add_scaled(sum[0], halves[0], row_g[block / 2], is_low, block == 0);
        add_scaled(sum[1], halves[1], row_g8[block / 2], is_low, block == 0);
      }
      const float2 row_g_sum = __half22float2(sum[0]), row_g8_sum = __half22float2(sum[1]);
      c[r][i][0] += row_g_sum.x;
      c[r][i][1] += row_g_sum.y;
      c[r][i][2] += row_g8_sum.x;
      c[r][i][3] += row_g8_sum.y;
    }
  }
}

// One block of 32 columns: words 2 * block and 2 * block + 1 of the codes.
template <class Config>
__device__ __forceinline__ void multiply_mxfp4(epilogue::Accumulators<Config>& c,
                                               const uint4 (&codes)[Config::kRowTiles],
                                               const uint32_t (&scales)[Config::kRowTiles],
                                               const uint32_t (&b)[Config::kTokenTiles][4],
                                               int block) {
#pragma unroll
  for (int r = 0; r < Config::kRowTiles; ++r) {
    float scale[2][2];
    dequant::e8m0_scales_f32(scales[r], scale);
    uint32_t a[4];
    dequant::e2m1_to_e4m3(fragments::word(codes[r], 2 * block), a[0], a[1]);
    dequant::e2m1_to_e4m3(fragments::word(codes[r], 2 * block + 1), a[2], a[3]);
#pragma unroll
    for (int i = 0; i < Config::kTokenTiles; ++i) {
      const uint32_t tokens[2] = {b[i][2 * block], b[i][2 * block + 1]};
      float sum[4];
      BlockSum<Config::kPartial>::run(sum, a, tokens);
      accumulate(c[r][i], scale[block], sum);
    }
  }
}

// The A operands of a tile's two MMAs of K = 32 for one row tile, block scales folded in.
__device__ __forceinline__ void fold_tile(const uint4& codes, const uint32_t (&scales)[2],
                                          uint32_t (&a)[2][4]) {
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    __half2 row_g, row_g8;  // blocks 2p and 2p + 1
    dequant::e4m3_scales_f16<dequant::k2Pow3>(scales[block / 2], row_g, row_g8);
    const bool is_low = block % 2 == 0;
    const __half2 scale_g = __half2half2(is_low ? __low2half(row_g) : __high2half(row_g));
    const __half2 scale_g8 = __half2half2(is_low ? __low2half(row_g8) : __high2half(row_g8));
    uint32_t codes_g, codes_g8;
    dequant::e2m1_to_e4m3(fragments::word(codes, block), codes_g, codes_g8);
    a[block / 2][2 * (block % 2)] = dequant::fold_scale(codes_g, scale_g);
    a[block / 2][2 * (block % 2) + 1] = dequant::fold_scale(codes_g8, scale_g8);
  }
}

// Folded block scales: the weight code * scale rounded to e4m3, 2 to 4 % of a row off,
// and in exchange MMAs of K = 32 whose sums need no scaling. One K step is one chain: Ada's FP8
// accumulator truncates at each of its four MMAs, and what it holds goes on in f32 after them.
template <class Config>
__device__ __forceinline__ void compute_step_folded(uint32_t stage,
                                                    epilogue::Accumulators<Config>& c) {
  using S = Stage<Config>;
  constexpr int kTiles = S::kTilesK / Config::kWarpsK;
  const fragments::WarpPlace<Config> place;
  const uint32_t activations = stage + S::kActivations + place.m * Config::WARP_M * S::kRowPitch;
  uint32_t a[Config::kRowTiles][kTiles][2][4];
#pragma unroll
  for (int r = 0; r < Config::kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int tile_n = place.n * Config::kRowTiles + r, tile_k = i * Config::kWarpsK + place.k;
      const uint32_t at =
          stage + S::scales(tile_n, tile_k) + fragments::scale_offset<Config::kFormat>();
      const uint32_t scales[2] = {ptx::ld_shared_u32(at), ptx::ld_shared_u32(at + 4)};
      fold_tile(ptx::ld_shared_v4(stage + S::codes(tile_n, tile_k) + fragments::code_offset()),
                scales, a[r][i]);
    }
  }
#pragma unroll
  for (int token_tile = 0; token_tile < Config::kTokenTiles; ++token_tile) {
    float sum[Config::kRowTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      uint32_t b[4];
      load_token_tile<Config>(activations, (i * Config::kWarpsK + place.k) * fragments::kTileK,
                              token_tile, b);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t tokens[2] = {b[2 * half], b[2 * half + 1]};
#pragma unroll
        for (int r = 0; r < Config::kRowTiles; ++r) {
          ptx::mma_m16n8k32_e4m3_f32(sum[r], a[r][i][half], tokens, sum[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[r][token_tile][i] += sum[r][i];
    }
  }
}

// The words of block scales of the warp's row tiles.
template <class Config>
__device__ __forceinline__ void load_scales(uint32_t stage, int tile_k, int index,
                                            uint32_t (&scales)[Config::kRowTiles]) {
  const fragments::WarpPlace<Config> place;
#pragma unroll
  for (int r = 0; r < Config::kRowTiles; ++r) {
    const int at = Stage<Config>::scales(place.n * Config::kRowTiles + r, tile_k) +
                   fragments::scale_offset<Config::kFormat>();
    scales[r] = ptx::ld_shared_u32(stage + at + index * 4);
  }
}

// The packed tiles of one K step that fall to this warp.
template <class Config>
__device__ __forceinline__ void compute_step(uint32_t stage, epilogue::Accumulators<Config>& c) {
  using S = Stage<Config>;
  const fragments::WarpPlace<Config> place;
  const uint32_t activations = stage + S::kActivations + place.m * Config::WARP_M * S::kRowPitch;
  // Not unrolled: a second tile's loads in flight would not fit the registers.
#pragma unroll 1
  for (int i = 0; i < S::kTilesK / Config::kWarpsK; ++i) {
    const int tile_k = i * Config::kWarpsK + place.k;
    uint32_t b[Config::kTokenTiles][4];
    load_tokens<Config>(activations, tile_k * fragments::kTileK, b);
    uint4 codes[Config::kRowTiles];
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
      const int tile_n = place.n * Config::kRowTiles + r;
      codes[r] = ptx::ld_shared_v4(stage + S::codes(tile_n, tile_k) + fragments::code_offset());
    }
    if constexpr (Config::kFormat == Format::kMxfp4) {
      uint32_t scales[Config::kRowTiles];  // one word for both blocks of a tile
      load_scales<Config>(stage, tile_k, 0, scales);
      multiply_mxfp4<Config>(c, codes, scales, b, 0);
      multiply_mxfp4<Config>(c, codes, scales, b, 1);
    } else if constexpr (Config::kPartial == Partial::kF16) {
      uint32_t first[Config::kRowTiles], second[Config::kRowTiles];
      load_scales<Config>(stage, tile_k, 0, first);
      load_scales<Config>(stage, tile_k, 1, second);
      multiply_nvfp4_f16<Config>(c, codes, first, second, b);
    } else {
      // A word for each pair of blocks, loaded when it is needed: registers are scarce.
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t scales[Config::kRowTiles];
        load_scales<Config>(stage, tile_k, pair, scales);
        multiply_nvfp4<Config>(c, codes, scales, b, pair);
      }
    }
  }
}

// What gemm.cuh and moe.cuh ask of a product.
struct Gemm {
  // What remains to be multiplied to a sum in the epilogue.
  template <class Config>
  static constexpr float kUndo =
      Config::kPartial == Partial::kFolded ? dequant::kUndoFolded
      : Config::kPartial == Partial::kF16 && Config::kFormat == Format::kNvfp4
          ? dequant::kUndoE4m3 * dequant::kUndoF16Scale
          : dequant::kUndoE4m3;

  // The sums of one output tile.
  template <class Config, class Work>
  __device__ __forceinline__ static void multiply(uint32_t smem, const GemmParams& p,
                                                  const Work& work,
                                                  epilogue::Accumulators<Config>& accumulators) {
    static_assert(Config::kPartial != Partial::kFolded || Config::kFormat == Format::kNvfp4,
                  "the range of an E8M0 scale does not fit an e4m3 weight");
    pipeline::run<Config, Stage<Config>, 1>(smem, p, work, [&](uint32_t stage, int) {
      if constexpr (Config::kPartial == Partial::kFolded) {
        compute_step_folded<Config>(stage, accumulators);
      } else {
        compute_step<Config>(stage, accumulators);
      }
    });
  }
};

}  // namespace w4a8

// SPDX-License-Identifier: Apache-2.0
// sm80_{nvfp4,mxfp4}_gemm_w4i8: y = a @ w^T with 4-bit weights and INT8 activations that have one
// scale for each token and 64 columns, sm_80 and later.
//
// Twice an E2M1 value is an integer, so the sum of one block is an integer MMA's, and exact. Block
// scales multiply those sums in f32 (4 by 16 bits: exact too), and the sum over the blocks of a
// packed tile, which is a group of the activations, is multiplied by the token's scale once.
//
// An integer becomes a float without a conversion: the MMA starts from the bits of 1.5 * 2^23,
// whose last place is 1, and a subtraction takes that off again. That and the scaling, eight
// instructions for each MMA, are most of what is issued: the rest is spread over all tokens of the
// thread block, by giving each warp 16 rows and all tokens. The tokens' tiles are the outer loop
// inside of a packed tile, so that a group's sum lives in four registers.
#pragma once

#include "dequant.cuh"
#include "gemm.cuh"

namespace w4i8 {

// 16 bytes of padding: ldmatrix reads 16 bytes of eight rows in one phase.
template <class Config>
using Stage = pipeline::Stage<Config, 1, 16>;

template <class Config>
using Smem = gemm::Smem<Config, Stage<Config>>;

// Blocks of a packed tile, words of codes of each (two registers of the A operand), and registers
// of the B operand.
template <class Config>
constexpr int kBlocks = fragments::kTileK / Config::kScaleBlock;
template <class Config>
constexpr int kWords = Config::kScaleBlock / 16;

// Tiles of tokens whose loads may be under way at once.
template <class Config>
constexpr int kTilesInFlight = Config::kFormat == Format::kNvfp4 ? 4 : 2;

// One packed tile of 16 rows: the A operands of its MMAs, and the scales of its blocks.
template <class Config>
struct Weights {
  uint32_t a[kBlocks<Config>][2 * kWords<Config>];
  float scale[kBlocks<Config>][2];  // of rows g and g + 8

  __device__ __forceinline__ Weights(uint32_t codes, uint32_t scales) {
    const uint4 words = ptx::ld_shared_v4(codes + fragments::code_offset());
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t* operand = &a[i / kWords<Config>][2 * (i % kWords<Config>)];
      dequant::e2m1_to_s8(word[i], operand[0], operand[1]);
    }
    const uint32_t at = scales + fragments::scale_offset<Config::kFormat>();
#pragma unroll
    for (int pair = 0; pair < kBlocks<Config> / 2; ++pair) {
      float both[2][2];
      if constexpr (Config::kFormat == Format::kNvfp4) {
        dequant::e4m3_scales_by_bits(ptx::ld_shared_u32(at + pair * 4), both);
      } else {
        dequant::e8m0_scales_f32(ptx::ld_shared_u32(at), both);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) scale[2 * pair + i / 2][i % 2] = both[i / 2][i % 2];
    }
  }
};

// A block's sum from zero, as floats: K = 16 is NVFP4's block, K = 32 MXFP4's.
__device__ __forceinline__ void to_floats(const int32_t (&d)[4], float magic, float (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = __int_as_float(d[i]) - magic;
}
__device__ __forceinline__ void multiply_block(const uint32_t (&a)[2], const uint32_t (&b)[4],
                                               int block, float (&sum)[4]) {
  const int32_t magic[4] = {dequant::kMagicBits, dequant::kMagicBits, dequant::kMagicBits,
                            dequant::kMagicBits};
  const uint32_t tokens[1] = {b[block]};
  int32_t d[4];
  ptx::mma_m16n8k16_s8_s32(d, a, tokens, magic);
  to_floats(d, dequant::kMagic, sum);
}
__device__ __forceinline__ void multiply_block(const uint32_t (&a)[4], const uint32_t (&b)[4],
                                               int block, float (&sum)[4]) {
  const int32_t magic[4] = {dequant::kSmallMagicBits, dequant::kSmallMagicBits,
                            dequant::kSmallMagicBits, dequant::kSmallMagicBits};
  const uint32_t tokens[2] = {b[2 * block], b[2 * block + 1]};
  int32_t d[4];
  ptx::mma_m16n8k32_s8_s32(d, a, tokens, magic);
  to_floats(d, dequant::kSmallMagic, sum);
}

// The sum over a packed tile's blocks, each times its scale.
template <class Config>
__device__ __forceinline__ void multiply_tile(const Weights<Config>& weights,
                                              const uint32_t (&b)[4], float (&total)[4]) {
#pragma unroll
  for (int block = 0; block < kBlocks<Config>; ++block) {
    float sum[4];
    multiply_block(weights.a[block], b, block, sum);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = weights.scale[block][i / 2];
      total[i] = block == 0 ? sum[i] * scale : fmaf(sum[i], scale, total[i]);
    }
  }
}

// The activations of 8 tokens over a packed tile's 64 columns: matrix q of the ldmatrix is the 16
// bytes of columns 16q..16q+15, so that word q of a lane is the B operand of MMA q.
template <class Config>
__device__ __forceinline__ void load_tokens(uint32_t activations, int tile_k, int token_tile,
                                            uint32_t (&b)[4]) {
  const int lane = fragments::lane();
  const int row = token_tile * 8 + lane % 8;
  ptx::ldmatrix_x4(
      b, activations + row * Stage<Config>::kRowPitch + tile_k * fragments::kTileK + lane / 8 * 16);
}

// The packed tiles of one K step that fall to this warp.
template <class Config>
__device__ __forceinline__ void compute_step(uint32_t stage, epilogue::Accumulators<Config>& c) {
  using S = Stage<Config>;
  const fragments::WarpPlace<Config> place;
  const uint32_t activations = stage + S::kActivations;
  static_assert(Config::kWarpsM == 1, "a warp's token scales begin at a multiple of 16 tokens");
  const uint32_t token_scales = stage + S::kTokenScales + fragments::thread_in_group() * 16;
  // Not unrolled: a second tile's weights would not fit the registers.
#pragma unroll 1
  for (int i = 0; i < S::kTilesK / Config::kWarpsK; ++i) {
    const int tile_k = i * Config::kWarpsK + place.k;
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
      const int tile_n = place.n * Config::kRowTiles + r;
      const Weights<Config> weights(stage + S::codes(tile_n, tile_k),
                                    stage + S::scales(tile_n, tile_k));
      uint4 scales_of_two;  // two token tiles'
#pragma unroll
      for (int token_tile = 0; token_tile < Config::kTokenTiles; ++token_tile) {
        // Loads would all be moved to the front, where the registers do not hold them.
        if (token_tile % kTilesInFlight<Config> == 0 && token_tile > 0) __syncwarp();
        uint32_t b[4];
        load_tokens<Config>(activations, tile_k, token_tile, b);
        if (token_tile % 2 == 0) {
          const uint32_t at = token_scales + tile_k * S::kTokenScaleRow + token_tile / 2 * 64;
          if (token_tile + 1 < Config::kTokenTiles) {
            scales_of_two = ptx::ld_shared_v4(at);
          } else {
            const uint2 one = ptx::ld_shared_v2(at);
            scales_of_two = make_uint4(one.x, one.y, 0, 0);
          }
        }
        const float a_scale[2] = {
            __uint_as_float(token_tile % 2 == 0 ? scales_of_two.x : scales_of_two.z),
            __uint_as_float(token_tile % 2 == 0 ? scales_of_two.y : scales_of_two.w)};
        float total[4];
        multiply_tile<Config>(weights, b, total);
        float (&sum)[4] = c[r][token_tile];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] = fmaf(total[j], a_scale[j % 2], sum[j]);
      }
    }
  }
}

// What gemm.cuh and moe.cuh ask of a product.
struct Gemm {
  // What remains to be multiplied to a sum in the epilogue.
  template <class Config>
  static constexpr float kUndo =
      Config::kFormat == Format::kNvfp4 ? dequant::kUndoS8 * dequant::kUndoScaleBits
                                        : dequant::kUndoS8 * dequant::kUndoSmallMagic;

  // The sums of one output tile.
  template <class Config, class Work>
  __device__ __forceinline__ static void multiply(uint32_t smem, const GemmParams& p,
                                                  const Work& work,
                                                  epilogue::Accumulators<Config>& accumulators) {
    pipeline::run<Config, Stage<Config>, 1>(
        smem, p, work, [&](uint32_t stage, int) { compute_step<Config>(stage, accumulators); });
  }
};

}  // namespace w4i8

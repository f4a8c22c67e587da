// SPDX-License-Identifier: Apache-2.0
// sm89_{nvfp4,mxfp4}_gemm_w4a16: y = a @ w^T with 4-bit weights and 16-bit activations, sm_80 and
// later. HMMA with f32 accumulators; the weights are the 16-row operand.
//
// NVFP4: code * block scale is exact in fp16 and bf16 (dequant.cuh) and the MMAs chain over K.
// MXFP4: a block scale reaches 2^+-127, so it multiplies the f32 sum of its block instead.
#pragma once

#include "dequant.cuh"
#include "gemm.cuh"
#include "weight_stream.cuh"

namespace w4a16 {

// 32 bytes of padding: half a warp reads 32 bytes of four rows in one phase of an 8-byte load.
template <class Config>
using Stage = pipeline::Stage<Config, 2, 32>;

template <class Config>
using Smem = gemm::Smem<Config, Stage<Config>>;

template <class Config>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint2 b_words) {
  const uint32_t b[2] = {b_words.x, b_words.y};
  if constexpr (Config::kDtype == Dtype::kFp16) {
    ptx::mma_m16n8k16_f16_f32(c, a, b, c);
  } else {
    ptx::mma_m16n8k16_bf16_f32(c, a, b, c);
  }
}

// The activations of 8 tokens for one MMA: a lane reads columns 4t..4t+3 of token g, 8 bytes.
template <class Config>
__device__ __forceinline__ void load_tokens(uint32_t activations, int column,
                                            uint2 (&b)[Config::kTokenTiles]) {
  const uint32_t at = activations + fragments::group_of_lane() * Stage<Config>::kRowPitch +
                      column * 2 + fragments::thread_in_group() * 8;
#pragma unroll
  for (int i = 0; i < Config::kTokenTiles; ++i) {
    b[i] = ptx::ld_shared_v2(at + i * 8 * Stage<Config>::kRowPitch);
  }
}

// NVFP4, one packed tile of K: the scaled weights multiply, the sums chain.
template <class Config>
__device__ __forceinline__ void multiply_nvfp4(epilogue::Accumulators<Config>& c,
                                               const uint4 (&codes)[Config::kRowTiles],
                                               const uint2 (&scales)[Config::kRowTiles],
                                               uint32_t activations, int first_column) {
  constexpr Dtype kDtype = Config::kDtype;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t scale[Config::kRowTiles][2];  // [block of the pair], rows g and g + 8
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
      dequant::e4m3_scale_pairs<kDtype>(fragments::word(scales[r], pair), scale[r]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int block = 2 * pair + half;
      uint2 b[Config::kTokenTiles];
      load_tokens<Config>(activations, first_column + 16 * block, b);
#pragma unroll
      for (int r = 0; r < Config::kRowTiles; ++r) {
        uint32_t a[4];
        dequant::e2m1_fragment<kDtype>(fragments::word(codes[r], block), a);
        a[0] = dequant::scale_row_g<kDtype>(a[0], scale[r][half]);
        a[1] = dequant::scale_row_g8<kDtype>(a[1], scale[r][half]);
        a[2] = dequant::scale_row_g<kDtype>(a[2], scale[r][half]);
        a[3] = dequant::scale_row_g8<kDtype>(a[3], scale[r][half]);
#pragma unroll
        for (int i = 0; i < Config::kTokenTiles; ++i) mma<Config>(c[r][i], a, b[i]);
      }
    }
  }
}

// The codes of a word as they enter the MMA: times 2^-14 in fp16, as they are in bf16, where
// 2^-126 would push the f32 products of small activations below the normal numbers.
template <Dtype kDtype>
__device__ __forceinline__ void unscaled_fragment(uint32_t codes, uint32_t (&a)[4]) {
  dequant::e2m1_fragment<kDtype>(codes, a);
  if constexpr (kDtype == Dtype::kBf16) {
    constexpr uint32_t k2Pow126 = 0x7E807E80;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = dequant::multiply_pairs<kDtype>(a[i], k2Pow126);
  }
}

// MXFP4, one packed tile of K: two MMAs give a block's sum, which its scale multiplies in f32.
template <class Config>
__device__ __forceinline__ void multiply_mxfp4(epilogue::Accumulators<Config>& c,
                                               const uint4 (&codes)[Config::kRowTiles],
                                               const uint2 (&scales)[Config::kRowTiles],
                                               uint32_t activations, int first_column) {
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    uint2 b[2][Config::kTokenTiles];
    load_tokens<Config>(activations, first_column + 32 * block, b[0]);
    load_tokens<Config>(activations, first_column + 32 * block + 16, b[1]);
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
      uint32_t a[2][4];
      unscaled_fragment<Config::kDtype>(fragments::word(codes[r], 2 * block), a[0]);
      unscaled_fragment<Config::kDtype>(fragments::word(codes[r], 2 * block + 1), a[1]);
      float scale[2][2];
      dequant::e8m0_scales_f32(scales[r].x, scale);
#pragma unroll
      for (int i = 0; i < Config::kTokenTiles; ++i) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma<Config>(sum, a[0], b[0][i]);
        mma<Config>(sum, a[1], b[1][i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) c[r][i][j] = fmaf(scale[block][j / 2], sum[j], c[r][i][j]);
      }
    }
  }
}

// One packed tile of K for this warp.
template <class Config>
__device__ __forceinline__ void multiply_tile(epilogue::Accumulators<Config>& c,
                                              const uint4 (&codes)[Config::kRowTiles],
                                              const uint2 (&scales)[Config::kRowTiles],
                                              uint32_t activations, int tile_k) {
  const int first_column = tile_k * fragments::kTileK;
  if constexpr (Config::kFormat == Format::kNvfp4) {
    multiply_nvfp4<Config>(c, codes, scales, activations, first_column);
  } else {
    multiply_mxfp4<Config>(c, codes, scales, activations, first_column);
  }
}

// The warp's tokens in a stage.
template <class Config>
__device__ __forceinline__ uint32_t warp_activations(uint32_t stage) {
  const fragments::WarpPlace<Config> place;
  return stage + Stage<Config>::kActivations + place.m * Config::WARP_M * Stage<Config>::kRowPitch;
}

// The packed tiles of one K step that fall to this warp, from shared memory.
template <class Config>
__device__ __forceinline__ void compute_step(uint32_t stage, epilogue::Accumulators<Config>& c) {
  using S = Stage<Config>;
  const fragments::WarpPlace<Config> place;
#pragma unroll
  for (int i = 0; i < S::kTilesK / Config::kWarpsK; ++i) {
    const int tile_k = i * Config::kWarpsK + place.k;
    uint4 codes[Config::kRowTiles];
    uint2 scales[Config::kRowTiles];
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
      const int tile_n = place.n * Config::kRowTiles + r;
      codes[r] = ptx::ld_shared_v4(stage + S::codes(tile_n, tile_k) + fragments::code_offset());
      const uint32_t scale =
          stage + S::scales(tile_n, tile_k) + fragments::scale_offset<Config::kFormat>();
      if constexpr (Config::kFormat == Format::kNvfp4) {
        scales[r] = ptx::ld_shared_v2(scale);
      } else {
        scales[r] = make_uint2(ptx::ld_shared_u32(scale), 0);
      }
    }
    multiply_tile<Config>(c, codes, scales, warp_activations<Config>(stage), tile_k);
  }
}

// The same from registers, where every tile makes room for one of a later step.
template <class Config>
__device__ __forceinline__ void compute_step(uint32_t stage,
                                             pipeline::WeightStream<Config>& weights, int phase,
                                             epilogue::Accumulators<Config>& c) {
  const fragments::WarpPlace<Config> place;
#pragma unroll
  for (int i = 0; i < pipeline::WeightStream<Config>::kDepth; ++i) {
    multiply_tile<Config>(c, weights.codes[phase][i], weights.scales[phase][i],
                          warp_activations<Config>(stage), i * Config::kWarpsK + place.k);
    weights.load_next(phase, i);
  }
  weights.advance();
}

// What gemm.cuh and moe.cuh ask of a product.
struct Gemm {
  // What remains to be multiplied to a sum in the epilogue.
  template <class Config>
  static constexpr float kUndo =
      Config::kFormat == Format::kNvfp4 ? dequant::ScaledHalf<Config::kDtype>::kUndo
                                        : (Config::kDtype == Dtype::kFp16 ? 16384.0f : 1.0f);

  // The sums of one output tile.
  template <class Config, class Work>
  __device__ __forceinline__ static void multiply(uint32_t smem, const GemmParams& p,
                                                  const Work& work,
                                                  epilogue::Accumulators<Config>& accumulators) {
    if constexpr (Config::kStreamsWeights) {
      using Weights = pipeline::WeightStream<Config>;
      Weights weights(p, work);
      pipeline::run<Config, Stage<Config>, Weights::kSteps>(
          smem, p, work, [&](uint32_t stage, int phase) {
            compute_step<Config>(stage, weights, phase, accumulators);
          });
    } else {
      pipeline::run<Config, Stage<Config>, 1>(
          smem, p, work, [&](uint32_t stage, int) { compute_step<Config>(stage, accumulators); });
    }
  }
};

}  // namespace w4a16

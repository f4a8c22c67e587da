// SPDX-License-Identifier: Apache-2.0
// What a GEMM kernel is given (GemmParams) and what it is compiled for (GemmConfig). Both mirror
// vllm_nvfp4/kernels/cuda/configs.py.
#pragma once

#include "ptx.cuh"

enum class Dtype { kBf16, kFp16 };
enum class Format { kNvfp4, kMxfp4 };
// The type in which FP8 MMA delivers the sum of one block, or no such sums: the block scales are
// folded into the weights (gemm_w4a8.cuh). kS32: integer MMA (gemm_w4i8.cuh).
enum class Partial { kF32, kF16, kFolded, kS32 };
// Whether the weights pass through shared memory (pipeline.cuh) or not (weight_stream.cuh).
enum class Weights { kShared, kStreamed };

// y[m, n] = a_scale[m] * global_scale[n] * sum_k a[m, k] * code[n, k] * block_scale[n, k] + bias[n]
struct GemmParams {
  const void* a;               // [M, K]; rows a_stride elements apart, 16-byte aligned
  const float* a_scale;        // [M] (w4a8), [M, ceil(K / 64)] (w4i8)
  const uint8_t* codes;        // fragment order, see fragments.cuh
  const uint8_t* block_scale;  // fragment order
  const float* global_scale;   // [N]
  const void* bias;            // [N] or null
  void* y;                     // [M, N]; rows y_stride elements apart
  float* partials;             // [split][tile][BLOCK_M][BLOCK_N] where num_splits > 1
  int* semaphores;             // [tile], zero before and after a launch
  int m, n, k;
  int a_stride, y_stride;
  int num_splits;
};

// One instantiation. M counts tokens (the n of mma.sync), N weight rows (its m), K their product's
// depth. WARPS_K > 1 deals the packed tiles of a K step out among groups of warps.
template <Dtype kDtypeValue, Format kFormatValue, int kBlockM, int kBlockN, int kBlockK,
          int kStagesValue, int kWarpsMValue, int kWarpsNValue, int kWarpsKValue,
          Partial kPartialValue = Partial::kF32, Weights kWeightsValue = Weights::kShared>
struct GemmConfig {
  static constexpr Dtype kDtype = kDtypeValue;
  static constexpr Format kFormat = kFormatValue;
  static constexpr Partial kPartial = kPartialValue;
  // Whether a token has a scale for every packed tile, which its products need, and not one alone.
  static constexpr bool kHasTokenScales = kPartial == Partial::kS32;
  static constexpr bool kStreamsWeights = kWeightsValue == Weights::kStreamed;
  static constexpr int BLOCK_M = kBlockM, BLOCK_N = kBlockN, BLOCK_K = kBlockK;
  static constexpr int kStages = kStagesValue;
  static constexpr int kWarpsM = kWarpsMValue, kWarpsN = kWarpsNValue, kWarpsK = kWarpsKValue;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kWarpsK;
  static constexpr int WARP_M = BLOCK_M / kWarpsM, WARP_N = BLOCK_N / kWarpsN;
  static constexpr int kTokenTiles = WARP_M / 8;  // MMA tiles of a warp along the tokens
  static constexpr int kRowTiles = WARP_N / 16;   // and along the weight rows
  static constexpr int kScaleBlock = kFormat == Format::kNvfp4 ? 16 : 32;

  static_assert(BLOCK_M % (8 * kWarpsM) == 0, "a warp's tokens come in MMA tiles of 8");
  static_assert(BLOCK_N % (16 * kWarpsN) == 0, "a warp's weight rows come in MMA tiles of 16");
  static_assert(BLOCK_K % (64 * kWarpsK) == 0, "a warp's K step comes in packed tiles of 64");
  static_assert(kStages >= 2, "the pipeline needs a stage to fill while another is used");
  static_assert(kThreads % (BLOCK_K / 2) == 0 && kThreads % (BLOCK_N / 4) == 0,
                "a thread's share of a tile is a column of 16-byte pieces");
};

// SPDX-License-Identifier: Apache-2.0
// Lane maps: which thread holds which element. vllm_nvfp4/kernels/layout.py writes the packed
// weight in this order; tests compare the two.
//
// g = lane / 4 and t = lane % 4 throughout.
//
// The weight is the 16-row operand (A) of mma.sync, so that tokens come in granules of 8. A packed
// tile is 16 rows x 64 columns: 512 bytes of codes, 16 for each lane, in which word j is the
// lane's share of the 16 columns 16j..16j+15, and byte i of that word holds
//
//   high nibble: row g,     column 16j + 4t + i
//   low nibble:  row g + 8, column 16j + 4t + i
//
// For FP8 MMA this is the natural order of columns (m16n8k16 gives a lane columns 4t..4t+3 of rows
// g and g + 8; m16n8k32 those of two such blocks), so that any FP8 quantiser's output will do. A
// 16-bit MMA gives a lane columns {2t, 2t+1, 2t+8, 2t+9}: there the 16 columns are taken in a
// permuted order, the same for both operands, in which these four are the memory's 4t..4t+3.
//
// Block scales lie beside the codes in an array of their own. A tile has, for each g, one word for
// every two blocks of a row: bytes {block 2p, block 2p+1} of row g, then of row g + 8. NVFP4 (16
// columns to a block): 2 words, 64 bytes a tile. MXFP4 (32): 1 word, 32 bytes.
#pragma once

#include "gemm_params.cuh"

namespace fragments {

constexpr int kTileN = 16;
constexpr int kTileK = 64;
constexpr int kTileCodeBytes = kTileN * kTileK / 2;
constexpr int kBlocksOf16 = kTileK / 16;  // MMAs of K = 16 in a tile

template <Format kFormat>
constexpr int kTileScaleBytes = kTileN * kTileK / (kFormat == Format::kNvfp4 ? 16 : 32);

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ int group_of_lane() { return lane() / 4; }    // g
__device__ __forceinline__ int thread_in_group() { return lane() % 4; }  // t

// Where a lane's share of a tile starts, in bytes.
__device__ __forceinline__ int code_offset() { return lane() * 16; }
template <Format kFormat>
__device__ __forceinline__ int scale_offset() {
  return group_of_lane() * (kTileScaleBytes<kFormat> / 8);
}

// Word i of a lane's share.
__device__ __forceinline__ uint32_t word(uint4 v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ uint32_t word(uint2 v, int i) { return i == 0 ? v.x : v.y; }

// Accumulators of m16n8: c[0], c[1] are row g, tokens 2t and 2t + 1; c[2], c[3] row g + 8.
__device__ __forceinline__ int accumulator_row(int i) { return group_of_lane() + 8 * (i / 2); }
__device__ __forceinline__ int accumulator_token(int i) { return 2 * thread_in_group() + i % 2; }

// The place of a warp in the thread block: along N, then M, then K.
template <class Config>
struct WarpPlace {
  int n, m, k;
  __device__ __forceinline__ WarpPlace()
      : n(warp() % Config::kWarpsN),
        m(warp() / Config::kWarpsN % Config::kWarpsM),
        k(warp() / (Config::kWarpsN * Config::kWarpsM)) {}
};

}  // namespace fragments

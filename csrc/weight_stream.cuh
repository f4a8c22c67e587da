// SPDX-License-Identifier: Apache-2.0
// Weights straight from global memory to registers, for tiles of few tokens: nothing there is read
// by two warps, so shared memory would only cost instructions and barriers.
#pragma once

#include "pipeline.cuh"

namespace pipeline {

// A lane's codes and block scales of some K steps of its warp. As soon as a tile has been used its
// registers receive that of kSteps steps later. With a single step the stream would stop in every
// turn: the compiler unpacks all tiles of a step before the barrier and asks for the next ones
// after it. With two, all of one step is in flight wherever the warp is.
template <class Config>
class WeightStream {
 public:
  static constexpr int kTilesK = Config::BLOCK_K / fragments::kTileK;
  static constexpr int kDepth = kTilesK / Config::kWarpsK;  // tiles of a step for one warp
  static constexpr int kSteps = kDepth == 1 ? 3 : 2;        // a step of one tile carries little
  static constexpr int kScaleTileBytes = fragments::kTileScaleBytes<Config::kFormat>;

  // [step % kSteps], counted from the thread block's first
  uint4 codes[kSteps][kDepth][Config::kRowTiles];
  uint2 scales[kSteps][kDepth][Config::kRowTiles];  // MXFP4 uses x

  template <class Work>
  __device__ __forceinline__ WeightStream(const GemmParams& p, const Work& work)
      : codes{}, scales{} {
    const fragments::WarpPlace<Config> place;
    const int64_t tiles_k = (p.k + fragments::kTileK - 1) / fragments::kTileK;
    const int64_t first_tile_k = int64_t{work.first_step} * kTilesK + place.k;
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
      const int64_t row_tile =
          work.base_row_tile() + work.row_tile(place.n * Config::kRowTiles + r);
      const int64_t tile = row_tile * tiles_k + first_tile_k;
      codes_from_[r] = p.codes + tile * fragments::kTileCodeBytes + fragments::code_offset();
      scales_from_[r] =
          p.block_scale + tile * kScaleTileBytes + fragments::scale_offset<Config::kFormat>();
    }
    const int64_t end = min(int64_t{work.end_step} * kTilesK, tiles_k);
    tiles_left_ = static_cast<int>(end - first_tile_k);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kDepth; ++i) load_next(step, i);
      advance();
    }
  }

  // The i-th tile of the next step that is not loaded yet, a step of this phase. Beyond the last
  // one the registers keep what they hold: there the activations are zeros.
  __device__ __forceinline__ void load_next(int phase, int i) {
    if (i * Config::kWarpsK >= tiles_left_) return;
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
      codes[phase][i][r] =
          ptx::ld_global_nc_v4(codes_from_[r] + i * Config::kWarpsK * fragments::kTileCodeBytes);
      const uint8_t* scale = scales_from_[r] + i * Config::kWarpsK * kScaleTileBytes;
      if constexpr (Config::kFormat == Format::kNvfp4) {
        scales[phase][i][r] = ptx::ld_global_nc_v2(scale);
      } else {
        scales[phase][i][r].x = ptx::ld_global_nc_u32(scale);
      }
    }
  }

  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
      codes_from_[r] += kTilesK * fragments::kTileCodeBytes;
      scales_from_[r] += kTilesK * kScaleTileBytes;
    }
    tiles_left_ -= kTilesK;
  }

 private:
  const uint8_t* codes_from_[Config::kRowTiles];
  const uint8_t* scales_from_[Config::kRowTiles];
  int tiles_left_;  // from the warp's first tile of the next step to load on
};

}  // namespace pipeline

// SPDX-License-Identifier: Apache-2.0
// The K loop both GEMM kernels share: a ring of stages in shared memory, filled by cp.async while
// the warps compute on older ones.
#pragma once

#include "fragments.cuh"

namespace pipeline {

// Shared memory of one stage: codes, block scales, activation rows. Rows are padded by kRowPad
// bytes so that the rows a warp reads together fall into different banks.
template <class Config, int kElementBytesValue, int kRowPad>
struct Stage {
  static constexpr int kElementBytes = kElementBytesValue;
  static constexpr int kTilesN = Config::BLOCK_N / fragments::kTileN;
  static constexpr int kTilesK = Config::BLOCK_K / fragments::kTileK;
  static constexpr int kScaleTileBytes = fragments::kTileScaleBytes<Config::kFormat>;
  static constexpr int kRowBytes = Config::BLOCK_K * kElementBytes;
  static constexpr int kRowPitch = kRowBytes + kRowPad;
  static constexpr int kCodes = 0;
  static constexpr int kScales = kCodes + kTilesN * kTilesK * fragments::kTileCodeBytes;
  static constexpr int kActivations = kScales + kTilesN * kTilesK * kScaleTileBytes;
  static constexpr int kBytes = kActivations + Config::BLOCK_M * kRowPitch;

  // Where a packed tile starts in a stage.
  __device__ __forceinline__ static int codes(int tile_n, int tile_k) {
    return kCodes + (tile_n * kTilesK + tile_k) * fragments::kTileCodeBytes;
  }
  __device__ __forceinline__ static int scales(int tile_n, int tile_k) {
    return kScales + (tile_n * kTilesK + tile_k) * kScaleTileBytes;
  }
};

// The output tile and the K steps of a thread block.
template <class Config>
struct Work {
  int tile_index;          // of the output tile, tokens fastest: neighbours share weights in L2
  int first_token, first_row;
  int first_step, end_step;  // K steps of BLOCK_K

  __device__ __forceinline__ explicit Work(const GemmParams& p) {
    const int tiles_m = (p.m + Config::BLOCK_M - 1) / Config::BLOCK_M;
    const int steps = (p.k + Config::BLOCK_K - 1) / Config::BLOCK_K;
    tile_index = static_cast<int>(blockIdx.x);
    first_token = tile_index % tiles_m * Config::BLOCK_M;
    first_row = tile_index / tiles_m * Config::BLOCK_N;
    const int split = static_cast<int>(blockIdx.y);
    first_step = steps * split / p.num_splits;
    end_step = steps * (split + 1) / p.num_splits;
  }
};

// A column of 16-byte pieces that one thread copies in every stage: its rows lie kRowStep apart.
template <class Config, int kRows, int kPiecesPerRow>
struct Column {
  static constexpr int kRowStep = Config::kThreads / kPiecesPerRow;
  static constexpr int kCount = (kRows + kRowStep - 1) / kRowStep;
  static constexpr bool kIsWhole = kRows % kRowStep == 0;
  static_assert(Config::kThreads % kPiecesPerRow == 0, "threads cover whole rows");

  __device__ __forceinline__ static int row(int i) {
    return static_cast<int>(threadIdx.x) / kPiecesPerRow + i * kRowStep;
  }
  // Byte offset of the piece in its row.
  __device__ __forceinline__ static int offset() {
    return static_cast<int>(threadIdx.x) % kPiecesPerRow * 16;
  }
  // Whether this thread has an i-th piece at all.
  __device__ __forceinline__ static bool exists(int i) { return kIsWhole || row(i) < kRows; }
};

// One thread's share of the copies of one array, stage after stage. What lies beyond the matrix
// becomes zeros, without being read.
template <class Column, int kSharedPitch, int kStepBytes>
struct Copier {
  const uint8_t* from;              // the thread's column of pieces, at the next step
  uint32_t offsets[Column::kCount];  // of its rows
  bool is_row[Column::kCount];       // whether the matrix has them
  int bytes_left;                   // of a row, from this thread's piece on
  uint32_t to;                      // of its first piece in a stage

  // base: the array at its first row and first step; row_bytes: from one row to the next;
  // num_rows, num_bytes: what there is from base on.
  __device__ __forceinline__ Copier(const uint8_t* base, int64_t row_bytes, int num_rows,
                                    int num_bytes, int stage_offset)
      : from(base + Column::offset()),
        bytes_left(num_bytes - Column::offset()),
        to(stage_offset + Column::row(0) * kSharedPitch + Column::offset()) {
#pragma unroll
    for (int i = 0; i < Column::kCount; ++i) {
      is_row[i] = Column::row(i) < num_rows;
      offsets[i] = static_cast<uint32_t>(Column::row(i) * row_bytes);
    }
  }

  __device__ __forceinline__ void copy_step(uint32_t stage) {
    const bool is_column = bytes_left > 0;
#pragma unroll
    for (int i = 0; i < Column::kCount; ++i) {
      if (!Column::exists(i)) continue;
      ptx::cp_async_16(stage + to + i * Column::kRowStep * kSharedPitch, from + offsets[i],
                       is_column && is_row[i]);
    }
    from += kStepBytes;
    bytes_left -= kStepBytes;
  }
};

// Fills the stages of a thread block's K steps, in order.
template <class Config, class Stage>
class Loader {
  static constexpr int kCodeRow = Stage::kTilesK * fragments::kTileCodeBytes;
  static constexpr int kScaleRow = Stage::kTilesK * Stage::kScaleTileBytes;
  Copier<Column<Config, Stage::kTilesN, kCodeRow / 16>, kCodeRow, kCodeRow> codes_;
  Copier<Column<Config, Stage::kTilesN, kScaleRow / 16>, kScaleRow, kScaleRow> scales_;
  Copier<Column<Config, Config::BLOCK_M, Stage::kRowBytes / 16>, Stage::kRowPitch,
         Stage::kRowBytes>
      activations_;

  __device__ __forceinline__ static int tiles_k(const GemmParams& p) {
    return (p.k + fragments::kTileK - 1) / fragments::kTileK;
  }
  __device__ __forceinline__ static int64_t first_tile(const GemmParams& p,
                                                       const Work<Config>& work) {
    return static_cast<int64_t>(work.first_row / fragments::kTileN) * tiles_k(p) +
           work.first_step * Stage::kTilesK;
  }
  __device__ __forceinline__ static int tile_rows_left(const GemmParams& p,
                                                       const Work<Config>& work) {
    return (p.n - work.first_row + fragments::kTileN - 1) / fragments::kTileN;
  }
  __device__ __forceinline__ static int tiles_left(const GemmParams& p, const Work<Config>& work) {
    return tiles_k(p) - work.first_step * Stage::kTilesK;
  }

 public:
  __device__ __forceinline__ Loader(const GemmParams& p, const Work<Config>& work)
      : codes_(p.codes + first_tile(p, work) * fragments::kTileCodeBytes,
               int64_t{tiles_k(p)} * fragments::kTileCodeBytes, tile_rows_left(p, work),
               tiles_left(p, work) * fragments::kTileCodeBytes, Stage::kCodes),
        scales_(p.block_scale + first_tile(p, work) * Stage::kScaleTileBytes,
                int64_t{tiles_k(p)} * Stage::kScaleTileBytes, tile_rows_left(p, work),
                tiles_left(p, work) * Stage::kScaleTileBytes, Stage::kScales),
        activations_(static_cast<const uint8_t*>(p.a) +
                         (static_cast<int64_t>(work.first_token) * p.a_stride +
                          work.first_step * Config::BLOCK_K) *
                             Stage::kElementBytes,
                     int64_t{p.a_stride} * Stage::kElementBytes, p.m - work.first_token,
                     (p.k - work.first_step * Config::BLOCK_K) * Stage::kElementBytes,
                     Stage::kActivations) {}

  __device__ __forceinline__ void load_next(uint32_t stage) {
    codes_.copy_step(stage);
    scales_.copy_step(stage);
    activations_.copy_step(stage);
  }
};

// Calls compute(shared address of a stage) for each K step, in order.
template <class Config, class Stage, class Compute>
__device__ __forceinline__ void run(uint32_t smem, const GemmParams& p, const Work<Config>& work,
                                    Compute&& compute) {
  constexpr int kStages = Config::kStages;
  constexpr uint32_t kRingBytes = kStages * Stage::kBytes;
  Loader<Config, Stage> loader(p, work);
  int steps_to_load = work.end_step - work.first_step;
  // A group is committed for every step, empty or not: the wait below counts groups.
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    if (steps_to_load-- > 0) loader.load_next(smem + i * Stage::kBytes);
    ptx::cp_async_commit();
  }
  uint32_t read = 0, write = kRingBytes - Stage::kBytes;
#pragma unroll 1
  for (int step = work.first_step; step < work.end_step; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    // Everybody's part of this stage has landed, and everybody is done with the stage before,
    // which is the one filled next.
    __syncthreads();
    if (steps_to_load-- > 0) loader.load_next(smem + write);
    ptx::cp_async_commit();
    compute(smem + read);
    read = read + Stage::kBytes == kRingBytes ? 0 : read + Stage::kBytes;
    write = write + Stage::kBytes == kRingBytes ? 0 : write + Stage::kBytes;
  }
  // The epilogue reuses this memory.
  ptx::cp_async_wait<0>();
  __syncthreads();
}

}  // namespace pipeline

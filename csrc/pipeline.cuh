// SPDX-License-Identifier: Apache-2.0
// The K loop both GEMM kernels share: a ring of stages in shared memory, filled by cp.async while
// the warps compute on older ones.
#pragma once

#include "fragments.cuh"

namespace pipeline {

// Shared memory of one stage: codes and block scales (unless they are streamed), activation rows,
// and, where a token has one for every packed tile, its scales, [tile along K][token] in the order
// of scale_place.
// Rows are padded by kRowPad bytes so that the rows a warp reads together fall into different
// banks.
template <class Config, int kElementBytesValue, int kRowPad>
struct Stage {
  static constexpr int kElementBytes = kElementBytesValue;
  static constexpr int kTilesN = Config::BLOCK_N / fragments::kTileN;
  static constexpr int kTilesK = Config::BLOCK_K / fragments::kTileK;
  static constexpr int kScaleTileBytes = fragments::kTileScaleBytes<Config::kFormat>;
  static constexpr int kRowBytes = Config::BLOCK_K * kElementBytes;
  static constexpr int kRowPitch = kRowBytes + kRowPad;
  static constexpr int kCodes = 0;
  static constexpr int kTiles = Config::kStreamsWeights ? 0 : kTilesN * kTilesK;
  static constexpr int kScales = kCodes + kTiles * fragments::kTileCodeBytes;
  static constexpr int kActivations = kScales + kTiles * kScaleTileBytes;
  static constexpr int kTokenScales = kActivations + Config::BLOCK_M * kRowPitch;
  static constexpr int kTokenScaleRow = (Config::BLOCK_M + 15) / 16 * 16 * 4;  // of a tile along K
  static constexpr int kBytes =
      kTokenScales + (Config::kHasTokenScales ? kTilesK * kTokenScaleRow : 0);

  // Where a packed tile starts in a stage.
  __device__ __forceinline__ static int codes(int tile_n, int tile_k) {
    return kCodes + (tile_n * kTilesK + tile_k) * fragments::kTileCodeBytes;
  }
  __device__ __forceinline__ static int scales(int tile_n, int tile_k) {
    return kScales + (tile_n * kTilesK + tile_k) * kScaleTileBytes;
  }
};

// The output tile and the K steps of a thread block, and where its rows lie. The loaders below ask
// a Work for them; that of the routed experts (moe.cuh) gathers its tokens.
template <class Config>
struct Work {
  int tile_index;  // of the output tile, tokens fastest: neighbours share weights in L2
  int first_token, first_row;
  int first_step, end_step;  // K steps of BLOCK_K
  int num_tokens, num_row_tiles;

  __device__ __forceinline__ explicit Work(const GemmParams& p) {
    const int tiles_m = (p.m + Config::BLOCK_M - 1) / Config::BLOCK_M;
    const int steps = (p.k + Config::BLOCK_K - 1) / Config::BLOCK_K;
    tile_index = static_cast<int>(blockIdx.x);
    first_token = tile_index % tiles_m * Config::BLOCK_M;
    first_row = tile_index / tiles_m * Config::BLOCK_N;
    const int split = static_cast<int>(blockIdx.y);
    first_step = steps * split / p.num_splits;
    end_step = steps * (split + 1) / p.num_splits;
    num_tokens = p.m - first_token;
    num_row_tiles = (p.n - first_row + fragments::kTileN - 1) / fragments::kTileN;
  }

  // Packed tiles of rows, counted from the base. Rows beyond the weight repeat its last ones: they
  // are never stored.
  __device__ __forceinline__ int base_row_tile() const { return first_row / fragments::kTileN; }
  __device__ __forceinline__ int row_tile(int i) const { return min(i, num_row_tiles - 1); }

  // Tokens, counted from the base.
  __device__ __forceinline__ int base_token() const { return first_token; }
  __device__ __forceinline__ int token(int i) const { return i; }
  __device__ __forceinline__ bool has_token(int i) const { return i < num_tokens; }
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

// One thread's share of the copies of one array, stage after stage. Columns beyond the matrix
// become zeros, without being read, so that no stray NaN meets a zero there. So do rows without a
// token, where a single token may stand for a tile of eight: they cost no traffic.
template <class Column, int kSharedPitch, int kStepBytes>
struct Copier {
  const uint8_t* from;               // the thread's pieces at the next step, without the rows'
  uint32_t offsets[Column::kCount];  // offsets: 32 bits span the rows of a tile
  bool is_row[Column::kCount];
  int column;   // of the matrix, counted from the step's first, that tells if there are pieces
  uint32_t to;  // of the first piece, in a stage

  // row_of(i), has_row(i): the i-th row of the tile, counted in rows of row_bytes from base.
  template <class RowOf, class HasRow>
  __device__ __forceinline__ Copier(const uint8_t* base, int64_t row_bytes, int first_column,
                                    int stage_offset, RowOf&& row_of, HasRow&& has_row)
      : from(base + Column::offset()),
        column(first_column),
        to(stage_offset + Column::row(0) * kSharedPitch + Column::offset()) {
#pragma unroll
    for (int i = 0; i < Column::kCount; ++i) {
      const int row = Column::row(i);
      is_row[i] = has_row(row);
      offsets[i] = static_cast<uint32_t>(row_of(row) * row_bytes);
    }
  }

  __device__ __forceinline__ void copy_step(uint32_t stage, int columns_left) {
    const bool is_column = column < columns_left;
#pragma unroll
    for (int i = 0; i < Column::kCount; ++i) {
      if (!Column::exists(i)) continue;
      ptx::cp_async_16(stage + to + i * Column::kRowStep * kSharedPitch, from + offsets[i],
                       is_column && is_row[i]);
    }
    from += kStepBytes;
  }
};

// Where a token's scale lies: a lane's four tokens of two MMA tiles, 2t and 2t + 1 of either, side
// by side, to be one load.
__device__ __forceinline__ int scale_place(int token) {
  return token / 16 * 16 + token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2;
}

// The scales of the tokens, one for each packed tile: a thread's share of their copies. Four bytes
// each: a token's scales need not begin at a multiple of more.
template <class Config, class Stage>
struct TokenScaleCopier {
  static constexpr int kPieces = Config::BLOCK_M * Stage::kTilesK;
  static constexpr int kCount = (kPieces + Config::kThreads - 1) / Config::kThreads;
  const float* from;
  uint32_t offsets[kCount];
  bool is_row[kCount];

  __device__ __forceinline__ static int piece(int i) {
    return static_cast<int>(threadIdx.x) + i * Config::kThreads;
  }

  template <class Work>
  __device__ __forceinline__ TokenScaleCopier(const GemmParams& p, const Work& work) {
    const int tiles = (p.k + fragments::kTileK - 1) / fragments::kTileK;
    from = p.a_scale + int64_t{work.base_token()} * tiles + work.first_step * Stage::kTilesK;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = piece(i) / Stage::kTilesK;
      is_row[i] = row < Config::BLOCK_M && work.has_token(row);
      offsets[i] = is_row[i] ? static_cast<uint32_t>(work.token(row) * tiles) : 0;
    }
  }

  __device__ __forceinline__ void copy_step(uint32_t stage, int columns_left) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (kPieces % Config::kThreads != 0 && piece(i) >= kPieces) continue;
      const int tile = piece(i) % Stage::kTilesK, row = piece(i) / Stage::kTilesK;
      const bool is_there = is_row[i] && tile * fragments::kTileK < columns_left;
      ptx::cp_async_4(
          stage + Stage::kTokenScales + tile * Stage::kTokenScaleRow + scale_place(row) * 4,
          from + offsets[i] + (is_there ? tile : 0), is_there);
    }
    from += Stage::kTilesK;
  }
};

// In the place of one where tokens have one scale, or none.
struct NoTokenScales {
  template <class Work>
  __device__ __forceinline__ NoTokenScales(const GemmParams&, const Work&) {}
  __device__ __forceinline__ void copy_step(uint32_t, int) {}
};
template <bool kIsThere, class Config, class Stage>
struct TokenScalesOf {
  using Type = NoTokenScales;
};
template <class Config, class Stage>
struct TokenScalesOf<true, Config, Stage> {
  using Type = TokenScaleCopier<Config, Stage>;
};

// Fills the stages of a thread block's K steps, in order.
template <class Config, class Stage>
class Loader {
  static constexpr int kCodeRow = Stage::kTilesK * fragments::kTileCodeBytes;
  static constexpr int kScaleRow = Stage::kTilesK * Stage::kScaleTileBytes;
  using CodePieces = Column<Config, Stage::kTilesN, kCodeRow / 16>;
  using ScalePieces = Column<Config, Stage::kTilesN, kScaleRow / 16>;
  using TokenPieces = Column<Config, Config::BLOCK_M, Stage::kRowBytes / 16>;
  using CodeCopier = Copier<CodePieces, kCodeRow, kCodeRow>;
  using ScaleCopier = Copier<ScalePieces, kScaleRow, kScaleRow>;
  using TokenCopier = Copier<TokenPieces, Stage::kRowPitch, Stage::kRowBytes>;
  CodeCopier codes_;
  ScaleCopier scales_;
  TokenCopier activations_;
  typename TokenScalesOf<Config::kHasTokenScales, Config, Stage>::Type token_scales_;
  int columns_left_;  // of the matrix, from the next step on

  // The copier of codes or block scales.
  template <class PackedCopier, class Pieces, int kTileBytes, class Work>
  __device__ __forceinline__ static PackedCopier packed(const uint8_t* array, const GemmParams& p,
                                                        const Work& work, int stage_offset) {
    const int64_t tiles_k = (p.k + fragments::kTileK - 1) / fragments::kTileK;
    const int64_t first = work.base_row_tile() * tiles_k + work.first_step * Stage::kTilesK;
    return PackedCopier(
        array + first * kTileBytes, tiles_k * kTileBytes,
        Pieces::offset() / kTileBytes * fragments::kTileK, stage_offset,
        [&](int i) { return work.row_tile(i); }, [](int) { return true; });
  }
  template <class Work>
  __device__ __forceinline__ static TokenCopier tokens(const GemmParams& p, const Work& work) {
    // A single token's stride may be anything. The copies of absent rows read nothing, but their
    // source has to be aligned all the same.
    const int64_t row_bytes = p.m == 1 ? 0 : int64_t{p.a_stride} * Stage::kElementBytes;
    return TokenCopier(
        static_cast<const uint8_t*>(p.a) + work.base_token() * row_bytes +
            int64_t{work.first_step} * Stage::kRowBytes,
        row_bytes, TokenPieces::offset() / Stage::kElementBytes, Stage::kActivations,
        [&](int i) { return work.token(i); }, [&](int i) { return work.has_token(i); });
  }

 public:
  template <class Work>
  __device__ __forceinline__ Loader(const GemmParams& p, const Work& work)
      : codes_(packed<CodeCopier, CodePieces, fragments::kTileCodeBytes>(p.codes, p, work,
                                                                         Stage::kCodes)),
        scales_(packed<ScaleCopier, ScalePieces, Stage::kScaleTileBytes>(p.block_scale, p, work,
                                                                         Stage::kScales)),
        activations_(tokens(p, work)),
        token_scales_(p, work),
        columns_left_(p.k - work.first_step * Config::BLOCK_K) {}

  __device__ __forceinline__ void load_next(uint32_t stage) {
    if constexpr (!Config::kStreamsWeights) {
      codes_.copy_step(stage, columns_left_);
      scales_.copy_step(stage, columns_left_);
    }
    activations_.copy_step(stage, columns_left_);
    token_scales_.copy_step(stage, columns_left_);
    columns_left_ -= Config::BLOCK_K;
  }
};

// Calls compute(shared address of a stage, phase) for each K step, in order: phase counts 0 ..
// kPhases - 1 and again. The loop is unrolled over the phases, so that each is a constant in it.
template <class Config, class Stage, int kPhases, class Work, class Compute>
__device__ __forceinline__ void run(uint32_t smem, const GemmParams& p, const Work& work,
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
  int steps_left = work.end_step - work.first_step;
#pragma unroll 1
  while (steps_left > 0) {
#pragma unroll
    for (int phase = 0; phase < kPhases; ++phase) {
      ptx::cp_async_wait<kStages - 2>();
      // Everybody's part of this stage has landed, and everybody is done with the stage before,
      // which is the one filled next.
      __syncthreads();
      if (steps_to_load-- > 0) loader.load_next(smem + write);
      ptx::cp_async_commit();
      compute(smem + read, phase);
      read = read + Stage::kBytes == kRingBytes ? 0 : read + Stage::kBytes;
      write = write + Stage::kBytes == kRingBytes ? 0 : write + Stage::kBytes;
      if (--steps_left <= 0) break;
    }
  }
  // The epilogue reuses this memory.
  ptx::cp_async_wait<0>();
  __syncthreads();
}

}  // namespace pipeline

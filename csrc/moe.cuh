// SPDX-License-Identifier: Apache-2.0
// The grouped product of routed experts, around the dense kernels' main loop: thread blocks that
// stay on the GPU walk a list of tiles that the GPU itself has made (moe_route.cuh).
//
// Every choice of a token (a token and one of its top-k experts) is a row of y, whatever the order
// in which tiles run, so that the result does not depend on timing; moe_combine.cuh adds a token's
// rows in the order of its choices. Rows of choices that no expert here serves are not touched.
#pragma once

#include "epilogue.cuh"
#include "moe_params.cuh"
#include "weight_stream.cuh"

namespace moe {

// --- what a tile is ------------------------------------------------------------------------------

// One entry of the schedule: tokens that chose one expert, at most `tile` of them.
struct Entry {
  int expert, first, count, tile;

  __device__ __forceinline__ Entry(const int* schedule, int i) {
    const uint4 v = ptx::ld_global_nc_v4(schedule + kScheduleHeader + i * kScheduleEntry);
    expert = static_cast<int>(v.x);
    first = static_cast<int>(v.y);
    count = static_cast<int>(v.z);
    tile = static_cast<int>(v.w);
  }
};

// Columns of the output in a tile: half of its weight rows are gates where there are gates.
template <class Config>
__device__ __forceinline__ int columns_of_tile(const MoeParams& p) {
  return p.is_gated ? Config::BLOCK_N / 2 : Config::BLOCK_N;
}

__device__ __forceinline__ int num_columns(const MoeParams& p) {
  return p.is_gated ? p.n / 2 : p.n;
}

// What the loaders ask (pipeline.cuh): one entry and the tile_n-th tile of its expert's weight. A
// tile's first half are gate rows and its second half the up rows of the same columns, so that one
// thread block has both.
template <class Config>
struct Work {
  static constexpr int first_step = 0;
  static constexpr int kRowTiles = Config::BLOCK_N / fragments::kTileN;
  int end_step;

  __device__ __forceinline__ Work(const MoeParams& p, const Entry& entry, int tile_n)
      : end_step((p.k + Config::BLOCK_K - 1) / Config::BLOCK_K),
        choices_(p.choices + entry.first),
        num_tokens_(entry.count),
        choices_per_row_(p.choices_per_row),
        first_row_tile_(tile_n * columns_of_tile<Config>(p) / fragments::kTileN),
        num_row_tiles_((num_columns(p) + fragments::kTileN - 1) / fragments::kTileN),
        is_gated_(p.is_gated != 0) {}

  __device__ __forceinline__ int base_row_tile() const { return 0; }
  __device__ __forceinline__ int row_tile(int i) const {
    const bool is_up = is_gated_ && i >= kRowTiles / 2;
    const int tile = min(first_row_tile_ + (is_up ? i - kRowTiles / 2 : i), num_row_tiles_ - 1);
    return is_up ? num_row_tiles_ + tile : tile;
  }
  __device__ __forceinline__ int base_token() const { return 0; }
  __device__ __forceinline__ bool has_token(int i) const { return i < num_tokens_; }
  __device__ __forceinline__ int token(int i) const {
    return has_token(i) ? choice(i) / choices_per_row_ : 0;
  }
  __device__ __forceinline__ int choice(int i) const {
    return static_cast<int>(ptx::ld_global_nc_u32(choices_ + i));
  }

 private:
  const int* choices_;
  int num_tokens_, choices_per_row_;
  int first_row_tile_, num_row_tiles_;
  bool is_gated_;
};

// The weight of one expert, as the dense loaders take it.
template <class Config>
__device__ __forceinline__ GemmParams weight_of(const MoeParams& p, int expert) {
  const int64_t row_tiles = (p.n + fragments::kTileN - 1) / fragments::kTileN;
  const int64_t tiles = row_tiles * ((p.k + fragments::kTileK - 1) / fragments::kTileK) * expert;
  GemmParams g = {};
  g.a = p.a;
  g.a_stride = p.a_stride;
  g.a_scale = p.a_scale;
  g.codes = p.codes + tiles * fragments::kTileCodeBytes;
  g.block_scale = p.block_scale + tiles * fragments::kTileScaleBytes<Config::kFormat>;
  g.n = p.n;
  g.k = p.k;
  return g;
}

// --- activation functions ------------------------------------------------------------------------

// __expf is off by up to 2 + 1.173 |v| units in the last place of an f32, 105 where it is about to
// overflow: 2^-16, still far below the rounding to 16 bits.
__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.0f, 1.0f + __expf(-v)); }

// A NaN stays one, which fminf would drop.
__device__ __forceinline__ float clamp_above(float v, float limit) { return v > limit ? limit : v; }

__device__ __forceinline__ float apply(const MoeParams& p, float v) {
  if (p.function == kLinear) return v;
  if (p.function == kRelu2) return v < 0.0f ? 0.0f : v * v;
  if (p.function == kGelu) return 0.5f * v * (1.0f + erff(v * 0.707106781f));
  // tanh's form of GELU is v * sigmoid(2 z), z = sqrt(2 / pi) (v + 0.044715 v^3).
  const float z =
      p.function == kGeluTanh ? 1.595769122f * fmaf(0.044715f * v * v, v, v) : p.alpha * v;
  return v * sigmoid(z);
}

__device__ __forceinline__ float apply_gated(const MoeParams& p, float gate, float up) {
  gate = clamp_above(gate, p.limit);
  up = clamp_above(up, p.limit);
  up = up < -p.limit ? -p.limit : up;
  return apply(p, gate) * (up + p.beta);
}

// --- epilogue ------------------------------------------------------------------------------------

// Multipliers and biases of four neighbouring weight rows.
template <Dtype kDtype>
struct RowQuad {
  float scale[4], bias[4];

  __device__ __forceinline__ RowQuad(const MoeParams& p, int64_t row, float undo) {
    const float4 s = epilogue::as_floats(ptx::ld_global_nc_v4(p.global_scale + row));
    scale[0] = s.x * undo;
    scale[1] = s.y * undo;
    scale[2] = s.z * undo;
    scale[3] = s.w * undo;
    uint2 pairs = make_uint2(0, 0);
    if (p.bias != nullptr) pairs = ptx::ld_global_nc_v2(static_cast<const uint16_t*>(p.bias) + row);
    bias[0] = epilogue::to_float<kDtype>(static_cast<uint16_t>(pairs.x));
    bias[1] = epilogue::to_float<kDtype>(static_cast<uint16_t>(pairs.x >> 16));
    bias[2] = epilogue::to_float<kDtype>(static_cast<uint16_t>(pairs.y));
    bias[3] = epilogue::to_float<kDtype>(static_cast<uint16_t>(pairs.y >> 16));
  }

  __device__ __forceinline__ float4 finish(float4 sum, float a_scale) const {
    return make_float4(
        fmaf(sum.x * a_scale, scale[0], bias[0]), fmaf(sum.y * a_scale, scale[1], bias[1]),
        fmaf(sum.z * a_scale, scale[2], bias[2]), fmaf(sum.w * a_scale, scale[3], bias[3]));
  }
};

// From a tile of sums in shared memory to rows of y: scales, bias, activation, rounding.
template <class Config, bool kIsGated>
__device__ __forceinline__ void store(uint32_t smem, const MoeParams& p, const Entry& entry,
                                      const Work<Config>& work, int tile_n, float undo) {
  constexpr int kColumns = kIsGated ? Config::BLOCK_N / 2 : Config::BLOCK_N;
  constexpr int kQuads = kColumns / 4;
  static_assert(Config::kThreads % kQuads == 0, "a thread handles the same columns of each token");
  const int in_tile = static_cast<int>(threadIdx.x) % kQuads * 4;
  const int column = tile_n * kColumns + in_tile;
  if (column >= num_columns(p)) return;
  const int64_t row = int64_t{entry.expert} * p.n + column;
  const RowQuad<Config::kDtype> first(p, row, undo);
  const RowQuad<Config::kDtype> second(p, kIsGated ? row + p.n / 2 : row, undo);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / kQuads; i < entry.count;
       i += Config::kThreads / kQuads) {
    const int choice = work.choice(i);
    // Where a row has several, they are multiplied already.
    const bool has_scale = !Config::kHasTokenScales && p.a_scale != nullptr;
    const float a_scale = has_scale ? p.a_scale[choice / p.choices_per_row] : 1.0f;
    float4 v = first.finish(epilogue::load_tile<Config>(smem, i, in_tile), a_scale);
    if constexpr (kIsGated) {
      const float4 up =
          second.finish(epilogue::load_tile<Config>(smem, i, in_tile + kColumns), a_scale);
      v = make_float4(apply_gated(p, v.x, up.x), apply_gated(p, v.y, up.y),
                      apply_gated(p, v.z, up.z), apply_gated(p, v.w, up.w));
    } else {
      v = make_float4(apply(p, v.x), apply(p, v.y), apply(p, v.z), apply(p, v.w));
    }
    uint16_t* y = static_cast<uint16_t*>(p.y) + int64_t{choice} * p.y_stride + column;
    ptx::st_global_v2(y, make_uint2(epilogue::round_pair<Config::kDtype>(v.x, v.y),
                                    epilogue::round_pair<Config::kDtype>(v.z, v.w)));
  }
}

// --- the kernel ----------------------------------------------------------------------------------

template <class Gemm, class Config>
__device__ __forceinline__ void run_tile(uint32_t smem, const MoeParams& p, const Entry& entry,
                                         int tile_n) {
  const Work<Config> work(p, entry, tile_n);
  epilogue::Accumulators<Config> accumulators = {};
  Gemm::template multiply<Config>(smem, weight_of<Config>(p, entry.expert), work, accumulators);
  epilogue::store_accumulators<Config>(smem, accumulators);
  __syncthreads();
  if (p.is_gated) {
    store<Config, true>(smem, p, entry, work, tile_n, Gemm::template kUndo<Config>);
  } else {
    store<Config, false>(smem, p, entry, work, tile_n, Gemm::template kUndo<Config>);
  }
}

template <class First, class... Others>
constexpr bool kAgree =
    ((First::BLOCK_N == Others::BLOCK_N && First::kThreads == Others::kThreads &&
      First::BLOCK_M < Others::BLOCK_M) &&
     ...);

// Configs: one for each size of tile that the schedule may ask for.
template <class Gemm, class First, class... Others>
__device__ __forceinline__ void run(const MoeParams& p) {
  static_assert(kAgree<First, Others...>, "the tiles of a kernel differ in their tokens alone");
  const uint32_t smem = ptx::smem_address(ptx::dynamic_smem());
  const int columns = columns_of_tile<First>(p);
  const int tiles_n = (num_columns(p) + columns - 1) / columns;
  const int num_tiles = static_cast<int>(ptx::ld_global_nc_u32(p.schedule)) * tiles_n;
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x); i < num_tiles; i += static_cast<int>(gridDim.x)) {
    const Entry entry(p.schedule, i / tiles_n);
    const int tile_n = i % tiles_n;
    if (entry.tile == First::BLOCK_M) run_tile<Gemm, First>(smem, p, entry, tile_n);
    ((entry.tile == Others::BLOCK_M ? run_tile<Gemm, Others>(smem, p, entry, tile_n) : void()),
     ...);
    // The next tile's copies go where this one's sums lie.
    __syncthreads();
  }
}

}  // namespace moe

// SPDX-License-Identifier: Apache-2.0
// From accumulators to y, both GEMM kernels: sum the warps along K, sum the splits, scale, add the
// bias, round, store. Every sum is taken in a fixed order: the same input gives the same bits.
#pragma once

#include "pipeline.cuh"

namespace epilogue {

// The tile in shared memory: one slab of BLOCK_M rows of f32 for each warp along K. Four floats of
// padding put the rows 2t that a fragment's lanes write into different banks.
template <class Config>
struct Tile {
  static constexpr int kPitch = (Config::BLOCK_N + 4) * 4;
  static constexpr int kSlab = Config::BLOCK_M * kPitch;
  static constexpr int kBytes = Config::kWarpsK * kSlab;
};

template <class Config>
using Accumulators = float[Config::kRowTiles][Config::kTokenTiles][4];

template <class Config>
__device__ __forceinline__ void store_accumulators(uint32_t smem,
                                                   const Accumulators<Config>& accumulators) {
  const fragments::WarpPlace<Config> place;
  const uint32_t slab = smem + place.k * Tile<Config>::kSlab;
#pragma unroll
  for (int row_tile = 0; row_tile < Config::kRowTiles; ++row_tile) {
#pragma unroll
    for (int token_tile = 0; token_tile < Config::kTokenTiles; ++token_tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = place.n * Config::WARP_N + row_tile * 16 + fragments::accumulator_row(i);
        const int token =
            place.m * Config::WARP_M + token_tile * 8 + fragments::accumulator_token(i);
        ptx::st_shared_u32(slab + token * Tile<Config>::kPitch + row * 4,
                           __float_as_uint(accumulators[row_tile][token_tile][i]));
      }
    }
  }
}

__device__ __forceinline__ float4 as_floats(uint4 bits) {
  return make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                     __uint_as_float(bits.w));
}
__device__ __forceinline__ uint4 as_bits(float4 v) {
  return make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z),
                    __float_as_uint(v.w));
}
__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Four neighbouring rows of the weight, that is four neighbouring outputs of a token: what every
// thread handles, token after token.
template <class Config>
struct Quad {
  static constexpr int kPerToken = Config::BLOCK_N / 4;
  static constexpr int kTokenStep = Config::kThreads / kPerToken;
  static constexpr int kTokens = Config::BLOCK_M / kTokenStep;
  static_assert(Config::BLOCK_M % kTokenStep == 0, "every thread handles as many tokens");
  __device__ __forceinline__ static int row() {
    return static_cast<int>(threadIdx.x) % kPerToken * 4;
  }
  // The i-th token of this thread.
  __device__ __forceinline__ static int token(int i) {
    return static_cast<int>(threadIdx.x) / kPerToken + i * kTokenStep;
  }
};

// The sum over the warps along K.
template <class Config>
__device__ __forceinline__ float4 load_tile(uint32_t smem, int token, int row) {
  const uint32_t at = smem + token * Tile<Config>::kPitch + row * 4;
  float4 sum = as_floats(ptx::ld_shared_v4(at));
#pragma unroll
  for (int k = 1; k < Config::kWarpsK; ++k) {
    sum = add(sum, as_floats(ptx::ld_shared_v4(at + k * Tile<Config>::kSlab)));
  }
  return sum;
}

template <Dtype kDtype>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  if constexpr (kDtype == Dtype::kFp16) return ptx::cvt_f32x2_to_f16x2(low, high);
  return ptx::cvt_f32x2_to_bf16x2(low, high);
}

template <Dtype kDtype>
__device__ __forceinline__ float to_float(uint16_t bits) {
  if constexpr (kDtype == Dtype::kBf16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  return __half2float(__ushort_as_half(bits));
}

// Scales, bias, rounding and the store of a quad: y = sum * undo * global_scale * a_scale + bias.
template <class Config>
class Output {
 public:
  __device__ __forceinline__ Output(const GemmParams& p, int first_token, int row, float undo)
      : p_(p), first_token_(first_token), row_(row), num_rows_(min(4, p.n - row)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_inside = i < num_rows_;
      const auto* bias = static_cast<const uint16_t*>(p.bias);
      scale_[i] = is_inside ? p.global_scale[row + i] * undo : 0.0f;
      bias_[i] = is_inside && bias != nullptr ? to_float<Config::kDtype>(bias[row + i]) : 0.0f;
    }
    // Four outputs go out as one 8-byte store where every token's row is aligned for it.
    is_wide_ = num_rows_ == 4 && p.y_stride % 4 == 0 && reinterpret_cast<uint64_t>(p.y) % 8 == 0;
  }

  __device__ __forceinline__ bool wants(int token) const {
    return num_rows_ > 0 && first_token_ + token < p_.m;
  }

  __device__ __forceinline__ float a_scale(int token) const {
    if constexpr (Config::kHasTokenScales) return 1.0f;  // multiplied already
    return p_.a_scale != nullptr ? p_.a_scale[first_token_ + token] : 1.0f;
  }

  __device__ __forceinline__ void store(int token, float4 sum, float a_scale) const {
    const int64_t m = first_token_ + token;
    const uint32_t low =
        round_pair<Config::kDtype>(finish(sum.x, a_scale, 0), finish(sum.y, a_scale, 1));
    const uint32_t high =
        round_pair<Config::kDtype>(finish(sum.z, a_scale, 2), finish(sum.w, a_scale, 3));
    uint16_t* y = static_cast<uint16_t*>(p_.y) + m * p_.y_stride + row_;
    if (is_wide_) {
      ptx::st_global_v2(y, make_uint2(low, high));
      return;
    }
    const uint32_t pairs[2] = {low, high};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < num_rows_) {
        ptx::st_global_u16(y + i, static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16)));
      }
    }
  }

 private:
  __device__ __forceinline__ float finish(float sum, float a_scale, int i) const {
    return fmaf(sum * a_scale, scale_[i], bias_[i]);
  }

  const GemmParams& p_;
  int first_token_, row_, num_rows_;
  bool is_wide_;
  float scale_[4], bias_[4];
};

// Where a split's sum of a quad waits for the others.
template <class Config>
__device__ __forceinline__ float* partial(const GemmParams& p, int split, int tile_index, int token,
                                          int row) {
  const int64_t tile = static_cast<int64_t>(split) * gridDim.x + tile_index;
  return p.partials + (tile * Config::BLOCK_M + token) * Config::BLOCK_N + row;
}

// Whether this thread block is the last of its tile's splits to arrive. The last one puts the
// semaphore back to zero for the next launch, which the end of this one orders behind it: a release
// would only make the block wait for a second fence.
__device__ __forceinline__ bool arrive_last(const GemmParams& p, int tile_index) {
  __syncthreads();  // every thread's partial sums before the one release below
  bool is_last = false;
  if (threadIdx.x == 0) {
    int* semaphore = p.semaphores + tile_index;
    is_last = ptx::atom_acq_rel_gpu_add(semaphore, 1) == p.num_splits - 1;
    if (is_last) ptx::st_relaxed_gpu(semaphore, 0);
  }
  return __syncthreads_or(is_last);
}

// All splits' sums of a tile, in the order of the splits and not of arrival, to y. The loads of a
// round, one of each split where they are few, are all under way before the first is waited for.
template <class Config>
__device__ __forceinline__ void add_splits(const GemmParams& p, int tile_index, int row,
                                           const Output<Config>& output) {
  using Q = Quad<Config>;
  constexpr int kLoads = 16;  // 64 registers; the accumulators' are free by now
  constexpr int kTokens = Q::kTokens < 4 ? Q::kTokens : 4;
  constexpr int kSplits = kLoads / kTokens;
  const int64_t next_split = int64_t{gridDim.x} * Config::BLOCK_M * Config::BLOCK_N;
#pragma unroll 1
  for (int first = 0; first < Q::kTokens; first += kTokens) {
    const float* from = partial<Config>(p, 0, tile_index, Q::token(first), row);
    int num_splits[kTokens];  // 0 for a token that is not there
    float a_scale[kTokens];
    float4 sum[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int token = Q::token(first + i);
      num_splits[i] = output.wants(token) ? p.num_splits : 0;
      a_scale[i] = output.wants(token) ? output.a_scale(token) : 0.0f;
      sum[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll 1
    for (int s = 0; s < p.num_splits; s += kSplits) {
      // What is not loaded is +0, which changes no sum: none is -0, for each began as +0.
      uint4 parts[kSplits][kTokens] = {};
#pragma unroll
      for (int j = 0; j < kSplits; ++j) {
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
          if (s + j < num_splits[i]) {
            parts[j][i] = ptx::ld_global_v4(from + i * Q::kTokenStep * Config::BLOCK_N);
          }
        }
        from += next_split;
      }
#pragma unroll
      for (int j = 0; j < kSplits; ++j) {
#pragma unroll
        for (int i = 0; i < kTokens; ++i) sum[i] = add(sum[i], as_floats(parts[j][i]));
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int token = Q::token(first + i);
      if (output.wants(token)) output.store(token, sum[i], a_scale[i]);
    }
  }
}

// undo: the power of two that the codes' conversion left out.
template <class Config>
__device__ __forceinline__ void run(uint32_t smem, const GemmParams& p,
                                    const pipeline::Work<Config>& work,
                                    const Accumulators<Config>& accumulators, float undo) {
  store_accumulators<Config>(smem, accumulators);
  __syncthreads();
  using Q = Quad<Config>;
  const int row = Q::row();
  const Output<Config> output(p, work.first_token, work.first_row + row, undo);
  const int split = static_cast<int>(blockIdx.y);
#pragma unroll 1
  for (int i = 0; i < Q::kTokens; ++i) {
    const int token = Q::token(i);
    if (!output.wants(token)) continue;
    const float4 sum = load_tile<Config>(smem, token, row);
    if (p.num_splits == 1) {
      output.store(token, sum, output.a_scale(token));
    } else {
      ptx::st_global_v4(partial<Config>(p, split, work.tile_index, token, row), as_bits(sum));
    }
  }
  if (p.num_splits > 1 && arrive_last(p, work.tile_index)) {
    add_splits<Config>(p, work.tile_index, row, output);
  }
}

}  // namespace epilogue

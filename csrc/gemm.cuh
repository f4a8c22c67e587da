// SPDX-License-Identifier: Apache-2.0
// The frame of the dense products: what gemm_w4a16.cuh, gemm_w4a8.cuh and gemm_w4i8.cuh share.
#pragma once

#include "epilogue.cuh"

namespace gemm {

// A thread block's shared memory: the stages of its inputs, and after them its output's tile.
template <class Config, class Stage>
struct Smem {
  static constexpr int kPipeline = Config::kStages * Stage::kBytes;
  static constexpr int kEpilogue = epilogue::Tile<Config>::kBytes;
  static constexpr int kBytes = kPipeline > kEpilogue ? kPipeline : kEpilogue;
};

// y = a @ w^T. Product has the sums of one output tile, multiply<Config>, and the factor that they
// still need, kUndo<Config>.
template <class Product, class Config>
__device__ __forceinline__ void run(const GemmParams& p) {
  const uint32_t smem = ptx::smem_address(ptx::dynamic_smem());
  const pipeline::Work<Config> work(p);
  epilogue::Accumulators<Config> accumulators = {};
  Product::template multiply<Config>(smem, p, work, accumulators);
  epilogue::run<Config>(smem, p, work, accumulators, Product::template kUndo<Config>);
}

}  // namespace gemm

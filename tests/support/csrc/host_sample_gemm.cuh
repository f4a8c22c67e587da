// SPDX-License-Identifier: Apache-2.0
// A small bf16 GEMM that uses what real kernels use, with places to plant faults: the emulator has
// to run it right with none and to name each one.
//
//   y[m, n] = sum_k a[m, k] * b[n, k]      a: [M, K] bf16, b: [N, K] bf16, y: [M, N] f32
//
// Block: 64 rows x 32 columns, four warps of 16 rows each; K split over blockIdx.z, whose blocks
// add to y in turn.
#pragma once

#include "host/ptx_host.h"

enum Fault {
  kNone,
  kMissingWait,
  kMissingBarrierAfterWait,
  kMissingBarrierBeforeOverwrite,
  kWrongLaneMap,
  kGlobalOutOfBounds,
  kSharedOutOfBounds,
  kMisalignedCopy,
  kMisalignedEmptyCopy,
  kReadsUninitialised,
  kWritesInput,
  kNonCoherentLoad,
  kDivergentBarrier,
  kBarrierInOneBranch,
  kForgottenWarp,
  kDivergentWarp,
  kExitedLane,
  kRelaxedSemaphore,
  kNeverReleased,
  kEndlessLoop,
  kNullPointer,
  kMisalignedVector,
  kArrayIndex,
  kUndefinedShift,
  kDivisionByZero,
  kStackOverflow,
  kUninitialisedLocal,
};

struct SampleParams {
  const uint16_t* a;
  const uint16_t* b;
  float* y;
  int* turns;  // one per output tile, zero at the start
  int rows, cols, depth;
};

constexpr int kTileM = 64;
constexpr int kTileN = 32;
constexpr int kTileK = 32;
constexpr int kPitch = (kTileK + 8) * 2;  // bytes of a row in shared memory
constexpr int kStageBytes = (kTileM + kTileN) * kPitch;

__device__ inline void copy_stage(uint32_t stage, const SampleParams& p, int k) {
  for (int i = threadIdx.x; i < (kTileM + kTileN) * 4; i += blockDim.x) {
    const int row = i / 4;
    const int column = i % 4 * 8;
    const bool is_a = row < kTileM;
    const int global_row = is_a ? blockIdx.x * kTileM + row : blockIdx.y * kTileN + row - kTileM;
    const uint16_t* from = (is_a ? p.a : p.b) + global_row * p.depth + k + column;
    const bool is_valid = global_row < (is_a ? p.rows : p.cols);
    ptx::cp_async_16(stage + row * kPitch + column * 2, from, is_valid);
  }
}

template <int kFault>
__device__ inline void multiply_stage(uint32_t stage, float (&c)[4][4]) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int k = 0; k < kTileK; k += 16) {
    uint32_t a[4];
    ptx::ldmatrix_x4(a, stage + (warp * 16 + lane % 16) * kPitch + (k + lane / 16 * 8) * 2);
    if (kFault == kWrongLaneMap) {
      const uint32_t keep = a[1];
      a[1] = a[2];
      a[2] = keep;
    }
    for (int n = 0; n < 4; ++n) {
      uint32_t b[2];
      ptx::ldmatrix_x2(b,
                       stage + (kTileM + n * 8 + lane % 8) * kPitch + (k + lane / 8 % 2 * 8) * 2);
      ptx::mma_m16n8k16_bf16_f32(c[n], a, b, c[n]);
    }
  }
}

template <int kFault>
__device__ inline void plant_memory_fault(const SampleParams& p, uint32_t stage) {
  if (kFault == kGlobalOutOfBounds) p.y[p.rows * p.cols + threadIdx.x] = 0.0f;
  if (kFault == kSharedOutOfBounds) ptx::st_shared_u32(stage + 2 * kStageBytes, 1);
  if (kFault == kMisalignedCopy) ptx::cp_async_16(stage, p.a + 1);
  if (kFault == kMisalignedEmptyCopy) ptx::cp_async_16(stage, p.a + 1, false);
  if (kFault == kReadsUninitialised) p.y[threadIdx.x] = ptx::ld_shared_u32(stage + kTileK * 2);
  if (kFault == kWritesInput) const_cast<uint16_t*>(p.a)[threadIdx.x] = 0;
  if (kFault == kNonCoherentLoad) {
    p.y[threadIdx.x] = 0.0f;
    p.y[threadIdx.x] = ptx::ld_global_nc_u32(p.y + threadIdx.x);
  }
  if (kFault == kNullPointer) p.y[0] = *reinterpret_cast<volatile float*>(p.turns - p.turns);
  if (kFault == kEndlessLoop) {
    for (volatile int i = 1; i;) {
    }
  }
}

__device__ inline int recurse(volatile int depth) {
  volatile int frame[256];
  frame[depth % 256] = depth;
  return depth < 1 << 20 ? recurse(depth + 1) + frame[depth % 256] : 0;
}

template <int kFault>
__device__ inline void plant_arithmetic_fault(const SampleParams& p) {
  volatile int one = 1;
  if (kFault == kMisalignedVector) p.turns[0] = reinterpret_cast<const uint4*>(p.a + 2 * one)->x;
  if (kFault == kArrayIndex) {
    int values[4] = {1, 2, 3, 4};
    p.turns[0] = values[one + p.depth];
  }
  if (kFault == kUndefinedShift) p.turns[0] = one << (p.depth + 31);
  if (kFault == kDivisionByZero) p.turns[0] = p.depth / (one - 1);
  if (kFault == kStackOverflow) p.turns[0] = recurse(0);
}

template <int kFault>
__device__ inline void plant_control_fault() {
  const int thread = threadIdx.x;
  if (kFault == kDivergentBarrier && thread % 32 < 16) __syncthreads();
  if (kFault == kBarrierInOneBranch) {
    if (thread < 64) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (kFault == kForgottenWarp && thread < 96) ptx::bar_sync(1, 128);
  if (kFault == kDivergentWarp) {
    if (thread % 32 < 8) {
      __syncwarp();
    } else {
      __shfl_xor_sync(~0u, thread, 1);
    }
  }
}

// Splits of one tile add in the order of their index, so the sum does not depend on timing.
template <int kFault>
__device__ inline void add_in_turn(const SampleParams& p, const float (&c)[4][4]) {
  int* turn = p.turns + blockIdx.y * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) {
    while (ptx::ld_acquire_gpu(turn) != static_cast<int>(blockIdx.z)) {
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * kTileM + threadIdx.x / 32 * 16 + lane / 4;
  for (int n = 0; n < 4; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + i / 2 * 8;
      const int column = blockIdx.y * kTileN + n * 8 + lane % 4 * 2 + i % 2;
      if (row < p.rows && column < p.cols) p.y[row * p.cols + column] += c[n][i];
    }
  }
  __syncthreads();
  if (threadIdx.x != 0 || kFault == kNeverReleased) return;
  if (kFault == kRelaxedSemaphore) {
    atomicAdd(turn, 1);
  } else {
    ptx::st_release_gpu(turn, blockIdx.z + 1);
  }
}

template <int kFault>
__global__ void __launch_bounds__(128) sample_gemm(const __grid_constant__ SampleParams p) {
  const uint32_t shared = ptx::smem_address(ptx::dynamic_smem());
  plant_memory_fault<kFault>(p, shared);
  plant_arithmetic_fault<kFault>(p);
  plant_control_fault<kFault>();
  if (kFault == kExitedLane) {
    if (threadIdx.x == 7) return;
    __ballot_sync(~0u, threadIdx.x & 1);
  }
  const int num_steps = p.depth / kTileK / gridDim.z;
  const int first = blockIdx.z * num_steps * kTileK;
  float c[4][4];
  for (int i = 0; i < 16 && kFault != kUninitialisedLocal; ++i) c[i / 4][i % 4] = 0.0f;
  copy_stage(shared, p, first);
  ptx::cp_async_commit();
  for (int step = 0; step < num_steps; ++step) {
    if (step + 1 < num_steps) {
      copy_stage(shared + (step + 1) % 2 * kStageBytes, p, first + (step + 1) * kTileK);
    }
    ptx::cp_async_commit();
    if (kFault != kMissingWait) ptx::cp_async_wait<1>();
    if (kFault != kMissingBarrierAfterWait) __syncthreads();
    multiply_stage<kFault>(shared + step % 2 * kStageBytes, c);
    if (kFault != kMissingBarrierBeforeOverwrite) __syncthreads();
  }
  add_in_turn<kFault>(p, c);
}

// SPDX-License-Identifier: Apache-2.0
// One kernel per group of instructions: lanes load their operands from global memory and store the
// result registers, so that a test can compare with tables and formulas of its own.
#pragma once

#include "host/ptx_host.h"

struct MmaParams {
  const uint32_t* a;  // [steps][32 lanes][registers]
  const uint32_t* b;
  const uint32_t* c;  // [32 lanes][registers]
  uint32_t* d;
  int num_steps;
  int is_chained;  // else each step starts from zero and is added in f32
};

#define MMA_PROBE(name, type, num_cd, num_a, num_b)                               \
  __global__ void probe_##name(const __grid_constant__ MmaParams p) {             \
    const int lane = threadIdx.x;                                                 \
    type c[num_cd], total[num_cd] = {};                                           \
    memcpy(c, p.c + lane * num_cd, sizeof(c));                                    \
    for (int step = 0; step < p.num_steps; ++step) {                              \
      uint32_t a[num_a], b[num_b];                                                \
      for (int i = 0; i < num_a; ++i) a[i] = p.a[(step * 32 + lane) * num_a + i]; \
      for (int i = 0; i < num_b; ++i) b[i] = p.b[(step * 32 + lane) * num_b + i]; \
      ptx::name(c, a, b, c);                                                      \
      for (int i = 0; i < num_cd && !p.is_chained; ++i) {                         \
        total[i] += c[i];                                                         \
        c[i] = 0;                                                                 \
      }                                                                           \
    }                                                                             \
    for (int i = 0; i < num_cd; ++i) {                                            \
      uint32_t bits;                                                              \
      memcpy(&bits, p.is_chained ? &c[i] : &total[i], 4);                         \
      p.d[lane * num_cd + i] = bits;                                              \
    }                                                                             \
  }
MMA_PROBE(mma_m16n8k16_bf16_f32, float, 4, 4, 2)
MMA_PROBE(mma_m16n8k16_f16_f32, float, 4, 4, 2)
MMA_PROBE(mma_m16n8k16_f16_f16, uint32_t, 2, 4, 2)
MMA_PROBE(mma_m16n8k16_e4m3_f32, float, 4, 2, 1)
MMA_PROBE(mma_m16n8k32_e4m3_f32, float, 4, 4, 2)
MMA_PROBE(mma_m16n8k16_e4m3_f16, uint32_t, 2, 2, 1)
MMA_PROBE(mma_m16n8k32_e4m3_f16, uint32_t, 2, 4, 2)
MMA_PROBE(mma_m16n8k16_s8_s32, int32_t, 4, 2, 1)
MMA_PROBE(mma_m16n8k32_s8_s32, int32_t, 4, 4, 2)

struct Buffers {
  const uint32_t* in;
  uint32_t* out;
  int n;
};

// in: 32 rows of 16 bytes; out: [lane][x1, x2, x4, then the transposed ones]
__global__ void probe_ldmatrix(const __grid_constant__ Buffers p) {
  uint8_t* shared = ptx::dynamic_smem();
  const int lane = threadIdx.x;
  const uint32_t row = ptx::smem_address(shared) + lane * 16;
  ptx::st_shared_v4(row, ptx::ld_global_nc_v4(p.in + lane * 4));
  __syncwarp();
  uint32_t d1[1], d2[2], d4[4];
  uint32_t* out = p.out + lane * 14;
  ptx::ldmatrix_x1(d1, row);
  ptx::ldmatrix_x2(d2, row);
  ptx::ldmatrix_x4(d4, row);
  out[0] = d1[0];
  for (int i = 0; i < 2; ++i) out[1 + i] = d2[i];
  for (int i = 0; i < 4; ++i) out[3 + i] = d4[i];
  ptx::ldmatrix_x1_trans(d1, row);
  ptx::ldmatrix_x2_trans(d2, row);
  ptx::ldmatrix_x4_trans(d4, row);
  out[7] = d1[0];
  for (int i = 0; i < 2; ++i) out[8 + i] = d2[i];
  for (int i = 0; i < 4; ++i) out[10 + i] = d4[i];
}

// out: [lane][idx, up, down, xor at width 32, then the same at width 8], operand 3
__global__ void probe_shuffles(const __grid_constant__ Buffers p) {
  const uint32_t value = p.in[threadIdx.x];
  uint32_t* out = p.out + threadIdx.x * 8;
  for (int i = 0; i < 2; ++i) {
    const int width = i ? 8 : 32;
    out[4 * i + 0] = __shfl_sync(~0u, value, 3, width);
    out[4 * i + 1] = __shfl_up_sync(~0u, value, 3, width);
    out[4 * i + 2] = __shfl_down_sync(~0u, value, 3, width);
    out[4 * i + 3] = __shfl_xor_sync(~0u, value, 3, width);
  }
}

// out: [thread][ballot, any, all, reduce add, reduce max (signed), block count, block and, block
// or]
__global__ void probe_votes(const __grid_constant__ Buffers p) {
  const int value = static_cast<int>(p.in[threadIdx.x]);
  const int is_odd = value & 1;
  uint32_t* out = p.out + threadIdx.x * 8;
  out[0] = __ballot_sync(~0u, is_odd);
  out[1] = __any_sync(~0u, is_odd);
  out[2] = __all_sync(~0u, is_odd);
  out[3] = __reduce_add_sync(~0u, static_cast<unsigned>(value));
  out[4] = static_cast<uint32_t>(__reduce_max_sync(~0u, value));
  out[5] = __syncthreads_count(is_odd);
  out[6] = __syncthreads_and(is_odd);
  out[7] = __syncthreads_or(is_odd);
}

// Four groups of one copy each; the second is padding. out: what is there after each wait.
__global__ void probe_async_copies(const __grid_constant__ Buffers p) {
  const uint32_t shared = ptx::smem_address(ptx::dynamic_smem()) + threadIdx.x * 64;
  const uint32_t* in = p.in + threadIdx.x * 16;
  ptx::cp_async_16(shared, in);
  ptx::cp_async_commit();
  ptx::cp_async_16(shared + 16, in + 4, false);
  ptx::cp_async_commit();
  ptx::cp_async_8(shared + 32, in + 8);
  ptx::cp_async_8(shared + 40, in + 10);
  ptx::cp_async_commit();
  ptx::cp_async_4(shared + 48, in + 12);
  ptx::cp_async_commit();
  uint32_t* out = p.out + threadIdx.x * 13;
  ptx::cp_async_wait<3>();
  for (int i = 0; i < 4; ++i) out[i] = ptx::ld_shared_u32(shared + 4 * i);
  ptx::cp_async_wait<2>();
  for (int i = 4; i < 8; ++i) out[i] = ptx::ld_shared_u32(shared + 4 * i);
  if (p.n) out[8] = ptx::ld_shared_u32(shared + 32);  // its group is still pending
  ptx::cp_async_wait<0>();
  for (int i = 8; i < 13; ++i) out[i] = ptx::ld_shared_u32(shared + 4 * i);
}

// out: per input word [prmt, lop3 0xEA, e4m3x2 -> f16x2, f32 -> e4m3, f32 -> bf16, f32 -> f16]
__global__ void probe_conversions(const __grid_constant__ Buffers p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.n) return;
  const uint32_t x = p.in[i];
  const float value = __uint_as_float(x);
  uint32_t* out = p.out + i * 6;
  out[0] = ptx::prmt(x, ~x, 0x9F16);
  out[1] = ptx::lop3<0xEA>(x, x >> 3, x >> 5);
  out[2] = ptx::cvt_e4m3x2_to_f16x2(x & 0xFFFF);
  out[3] = ptx::cvt_f32x2_to_e4m3x2(value, -value);
  out[4] = ptx::cvt_f32x2_to_bf16x2(value, -value);
  out[5] = ptx::cvt_f32x2_to_f16x2(value, -value);
}

// in: three halves / bfloat16 per word pair. out: [half add, mul, fma, bf16 add, mul, fma]
__global__ void probe_half_arithmetic(const __grid_constant__ Buffers p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.n) return;
  const uint16_t* in = reinterpret_cast<const uint16_t*>(p.in) + i * 3;
  const __half a = __ushort_as_half(in[0]), b = __ushort_as_half(in[1]),
               c = __ushort_as_half(in[2]);
  const __nv_bfloat16 x = __ushort_as_bfloat16(in[0]), y = __ushort_as_bfloat16(in[1]),
                      z = __ushort_as_bfloat16(in[2]);
  uint32_t* out = p.out + i * 6;
  out[0] = __half_as_ushort(__hadd(a, b));
  out[1] = __half_as_ushort(__hmul2(__half2(a, a), __half2(c, b)).y);
  out[2] = __half_as_ushort(__hfma(a, b, c));
  out[3] = __bfloat16_as_ushort(__hadd(x, y));
  out[4] = __bfloat16_as_ushort(__hmul2(__nv_bfloat162(x, x), __nv_bfloat162(z, y)).y);
  out[5] = __bfloat16_as_ushort(__hfma(x, y, z));
}

// Warps 0 and 1 fill a buffer, warps 2 and 3 drain it, through two named barriers. n: rounds;
// negative: the consumers do not tell when they are done.
__global__ void probe_named_barriers(const __grid_constant__ Buffers p) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(ptx::dynamic_smem());
  const int thread = threadIdx.x % 64;
  const int rounds = p.n < 0 ? -p.n : p.n;
  if (threadIdx.x < 64) {
    for (int i = 0; i < rounds; ++i) {
      if (i > 0 && p.n > 0) ptx::bar_sync(2, 128);
      shared[thread] = p.in[i * 64 + thread];
      ptx::bar_arrive(1, 128);
    }
  } else {
    for (int i = 0; i < rounds; ++i) {
      ptx::bar_sync(1, 128);
      p.out[i * 64 + thread] = shared[63 - thread];
      if (i + 1 < rounds && p.n > 0) ptx::bar_arrive(2, 128);
    }
  }
}

// The classic: each block adds up its part, the last block to finish adds up the parts. n == 0
// leaves out the fence.
__global__ void probe_last_block(const __grid_constant__ Buffers p) {
  __shared__ uint32_t partial[64];
  __shared__ bool is_last;
  partial[threadIdx.x] = p.in[blockIdx.x * 64 + threadIdx.x];
  for (int half = 32; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  int* counter = reinterpret_cast<int*>(p.out);
  if (threadIdx.x == 0) {
    p.out[2 + blockIdx.x] = partial[0];
    if (p.n) __threadfence();
    is_last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!is_last || threadIdx.x) return;
  __threadfence();
  uint32_t sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += p.out[2 + i];
  p.out[1] = sum;
}

// Neighbouring lanes exchange through shared memory; n == 0 leaves out the __syncwarp.
__global__ void probe_warp_exchange(const __grid_constant__ Buffers p) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(ptx::dynamic_smem());
  if (p.n == 0) shared[threadIdx.x] = 0;
  if (p.n == 0) __syncthreads();
  shared[threadIdx.x] = p.in[threadIdx.x];
  if (p.n) __syncwarp();
  p.out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// Lane 0 of each warp counts in shared memory; lane 0 of warp 0 starts the counter with a volatile
// store, which must not count as a read. n == 0 leaves that store out.
__global__ void probe_shared_counter(const __grid_constant__ Buffers p) {
  int* counter = reinterpret_cast<int*>(ptx::dynamic_smem());
  if (threadIdx.x == 0 && p.n) *static_cast<volatile int*>(counter) = p.n;
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicAdd(counter, 1);
  __syncthreads();
  p.out[threadIdx.x] = *counter;
}

// Block 0 reads what block 1 writes, in either order, and nothing orders them.
__global__ void probe_unordered_blocks(const __grid_constant__ Buffers p) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    p.out[0] = p.out[1];
  } else {
    p.out[1] = p.in[0];
  }
}

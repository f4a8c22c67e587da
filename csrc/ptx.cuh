// SPDX-License-Identifier: Apache-2.0
// Every asm statement of the kernels, one function per instruction, with no knowledge of layouts:
// here those that move data and order it, in ptx_math.cuh those that compute.
//
// csrc/host/ptx_host.h defines the same names for a CPU. A kernel source includes only this file,
// so that both compilers see the same text.
#pragma once

#if defined(VNVFP4_HOST)
#include "host/ptx_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#if defined(__CUDACC_RTC__)
// NVRTC's wheel has no <stdint.h>.
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <stdint.h>
#endif

#include "ptx_math.cuh"

namespace ptx {

// --- shared memory addresses ---------------------------------------------------------------------

// 1,024 bytes is the alignment the largest swizzle of later architectures needs; 16 would do here.
__device__ __forceinline__ uint8_t* dynamic_smem() {
  extern __shared__ __align__(1024) uint8_t dynamic_smem_bytes[];
  return dynamic_smem_bytes;
}

// Shared addresses are 32 bits wide: kernels keep them as such, so that address arithmetic takes
// one instruction instead of two.
__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- loads and stores ----------------------------------------------------------------------------

// .nc: the data does not change during the kernel, so the load may use the read-only path and the
// compiler may move it over stores.
__device__ __forceinline__ uint4 ld_global_nc_v4(const void* from) {
  uint4 d;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
      : "l"(from));
  return d;
}
__device__ __forceinline__ uint2 ld_global_nc_v2(const void* from) {
  uint2 d;
  asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "l"(from));
  return d;
}
__device__ __forceinline__ uint32_t ld_global_nc_u32(const void* from) {
  uint32_t d;
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(d) : "l"(from));
  return d;
}
__device__ __forceinline__ uint16_t ld_global_nc_u16(const void* from) {
  uint16_t d;
  asm("ld.global.nc.u16 %0, [%1];" : "=h"(d) : "l"(from));
  return d;
}
__device__ __forceinline__ uint8_t ld_global_nc_u8(const void* from) {
  uint32_t d;  // the narrowest register of inline asm has 16 bits; 32 need no extra move
  asm("ld.global.nc.u8 %0, [%1];" : "=r"(d) : "l"(from));
  return static_cast<uint8_t>(d);
}

// Not .nc: for what other thread blocks of the same launch have written. volatile, and a memory
// clobber, keep it behind the semaphore that was waited for.
__device__ __forceinline__ uint4 ld_global_v4(const void* from) {
  uint4 d;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "l"(from)
               : "memory");
  return d;
}
__device__ __forceinline__ void st_global_v4(void* to, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}
__device__ __forceinline__ void st_global_v2(void* to, uint2 value) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(value.x), "r"(value.y) : "memory");
}
__device__ __forceinline__ void st_global_u32(void* to, uint32_t value) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void st_global_u16(void* to, uint16_t value) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"(value) : "memory");
}

// volatile and the clobber order shared loads against barriers and cp.async waits, which the
// compiler does not see as writes to this memory.
__device__ __forceinline__ uint4 ld_shared_v4(uint32_t from) {
  uint4 d;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "r"(from)
               : "memory");
  return d;
}
__device__ __forceinline__ uint2 ld_shared_v2(uint32_t from) {
  uint2 d;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "r"(from) : "memory");
  return d;
}
__device__ __forceinline__ uint32_t ld_shared_u32(uint32_t from) {
  uint32_t d;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(d) : "r"(from) : "memory");
  return d;
}
__device__ __forceinline__ uint16_t ld_shared_u16(uint32_t from) {
  uint16_t d;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(d) : "r"(from) : "memory");
  return d;
}
__device__ __forceinline__ uint8_t ld_shared_u8(uint32_t from) {
  uint32_t d;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(d) : "r"(from) : "memory");
  return static_cast<uint8_t>(d);
}
__device__ __forceinline__ void st_shared_v4(uint32_t to, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}
__device__ __forceinline__ void st_shared_v2(uint32_t to, uint2 value) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(value.x), "r"(value.y) : "memory");
}
__device__ __forceinline__ void st_shared_u32(uint32_t to, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void st_shared_u16(uint32_t to, uint16_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(value) : "memory");
}
__device__ __forceinline__ void st_shared_u8(uint32_t to, uint8_t value) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(to), "r"(static_cast<uint32_t>(value)) : "memory");
}

// --- ldmatrix ------------------------------------------------------------------------------------

// Eight rows of 16 bytes per matrix, one row address per lane; lane (g, t) receives bytes 4t..4t+3
// of row g. One instruction in the place of four 32-bit loads per lane.
__device__ __forceinline__ void ldmatrix_x1(uint32_t (&d)[1], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(d[0])
               : "r"(row_address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&d)[1], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(d[0])
               : "r"(row_address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&d)[2], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(row_address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&d)[2], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(row_address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row_address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row_address)
               : "memory");
}

// --- cp.async ------------------------------------------------------------------------------------

// .cg: weights and activations pass once, L1 would only be thrashed. Exists for 16 bytes alone.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// src-size 0 writes 16 zero bytes without reading: padding costs no branch and no access outside.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool is_valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(is_valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_8(uint32_t to, const void* from, bool is_valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from),
               "r"(is_valid ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_4(uint32_t to, const void* from, bool is_valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(is_valid ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPendingGroups>
__device__ __forceinline__ void cp_async_wait() {
  static_assert(kPendingGroups >= 0, "cp.async.wait_group takes a count of groups");
  asm volatile("cp.async.wait_group %0;" ::"n"(kPendingGroups) : "memory");
}

// --- barriers, fences, semaphores ----------------------------------------------------------------

// A part of the block, by barrier id (0 is __syncthreads); num_threads is a multiple of 32.
__device__ __forceinline__ void bar_sync(int id, int num_threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int num_threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void fence_acq_rel_gpu() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}
// Semaphores between thread blocks. Acquire and release carry the ordering, so that no separate
// fence is needed between the flag and the data.
__device__ __forceinline__ int ld_acquire_gpu(const int* at) {
  int d;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(d) : "l"(at) : "memory");
  return d;
}
__device__ __forceinline__ int ld_relaxed_gpu(const int* at) {
  int d;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(d) : "l"(at) : "memory");
  return d;
}
__device__ __forceinline__ void st_release_gpu(int* at, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ __forceinline__ void st_relaxed_gpu(int* at, int value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ __forceinline__ void red_release_gpu_add(int* at, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ __forceinline__ int atom_acq_rel_gpu_add(int* at, int value) {
  int d;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(d)
               : "l"(at), "r"(value)
               : "memory");
  return d;
}
__device__ __forceinline__ void red_global_add_f32(float* at, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at), "f"(value) : "memory");
}

}  // namespace ptx

#endif  // VNVFP4_HOST

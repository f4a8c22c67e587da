// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/ptx.cuh and ptx_math.cuh, on the emulator: same names, same arguments, same
// lane maps. A function here that has no asm twin there, or the reverse, is an error in either
// file.
#pragma once

#include "abi.h"
#include "cuda_half.h"
#include "cuda_host.h"

// The place of a call, as trailing arguments that the device versions do not have.
#define VNVFP4_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace ptx {

// --- shared memory addresses ---------------------------------------------------------------------

inline uint8_t* dynamic_smem() { return vnvfp4_host::dynamic_shared(); }
inline uint32_t smem_address(const void* pointer) { return vnvfp4_host::shared_address(pointer); }

// --- loads and stores ----------------------------------------------------------------------------

namespace detail {

template <typename T>
inline T load_global(const void* from) {
  T value;
  vnvfp4_host::load(vnvfp4_host::kGlobal, from, &value, sizeof(T));
  return value;
}
template <typename T>
inline T load_read_only(const void* from) {
  T value;
  vnvfp4_host::load(vnvfp4_host::kReadOnly, from, &value, sizeof(T));
  return value;
}
template <typename T>
inline void store_global(void* to, T value) {
  vnvfp4_host::store(vnvfp4_host::kGlobal, to, &value, sizeof(T));
}
template <typename T>
inline T load_shared(uint32_t from) {
  T value;
  vnvfp4_host::load(vnvfp4_host::kShared, vnvfp4_host::shared_pointer(from), &value, sizeof(T));
  return value;
}
template <typename T>
inline void store_shared(uint32_t to, T value) {
  vnvfp4_host::store(vnvfp4_host::kShared, vnvfp4_host::shared_pointer(to), &value, sizeof(T));
}

}  // namespace detail

inline uint4 ld_global_nc_v4(const void* from) { return detail::load_read_only<uint4>(from); }
inline uint2 ld_global_nc_v2(const void* from) { return detail::load_read_only<uint2>(from); }
inline uint32_t ld_global_nc_u32(const void* from) {
  return detail::load_read_only<uint32_t>(from);
}
inline uint16_t ld_global_nc_u16(const void* from) {
  return detail::load_read_only<uint16_t>(from);
}
inline uint8_t ld_global_nc_u8(const void* from) { return detail::load_read_only<uint8_t>(from); }

inline uint4 ld_global_v4(const void* from) { return detail::load_global<uint4>(from); }
inline void st_global_v4(void* to, uint4 value) { detail::store_global(to, value); }
inline void st_global_v2(void* to, uint2 value) { detail::store_global(to, value); }
inline void st_global_u32(void* to, uint32_t value) { detail::store_global(to, value); }
inline void st_global_u16(void* to, uint16_t value) { detail::store_global(to, value); }

inline uint4 ld_shared_v4(uint32_t from) { return detail::load_shared<uint4>(from); }
inline uint2 ld_shared_v2(uint32_t from) { return detail::load_shared<uint2>(from); }
inline uint32_t ld_shared_u32(uint32_t from) { return detail::load_shared<uint32_t>(from); }
inline uint16_t ld_shared_u16(uint32_t from) { return detail::load_shared<uint16_t>(from); }
inline uint8_t ld_shared_u8(uint32_t from) { return detail::load_shared<uint8_t>(from); }
inline void st_shared_v4(uint32_t to, uint4 value) { detail::store_shared(to, value); }
inline void st_shared_v2(uint32_t to, uint2 value) { detail::store_shared(to, value); }
inline void st_shared_u32(uint32_t to, uint32_t value) { detail::store_shared(to, value); }
inline void st_shared_u16(uint32_t to, uint16_t value) { detail::store_shared(to, value); }
inline void st_shared_u8(uint32_t to, uint8_t value) { detail::store_shared(to, value); }

// --- ldmatrix ------------------------------------------------------------------------------------

#define VNVFP4_LDMATRIX(name, count, is_transposed)                             \
  inline void name(uint32_t (&d)[count], uint32_t row_address, VNVFP4_SITE) {   \
    vnvfp4_host::load_matrix(count, is_transposed, d, row_address, file, line); \
  }
VNVFP4_LDMATRIX(ldmatrix_x1, 1, false)
VNVFP4_LDMATRIX(ldmatrix_x2, 2, false)
VNVFP4_LDMATRIX(ldmatrix_x4, 4, false)
VNVFP4_LDMATRIX(ldmatrix_x1_trans, 1, true)
VNVFP4_LDMATRIX(ldmatrix_x2_trans, 2, true)
VNVFP4_LDMATRIX(ldmatrix_x4_trans, 4, true)
#undef VNVFP4_LDMATRIX

// --- cp.async ------------------------------------------------------------------------------------

inline void cp_async_16(uint32_t to, const void* from) {
  vnvfp4_host::copy_async(to, from, 16, 16);
}
// is_valid == false writes 16 zero bytes and does not read `from` (src-size 0).
inline void cp_async_16(uint32_t to, const void* from, bool is_valid) {
  vnvfp4_host::copy_async(to, from, 16, is_valid ? 16 : 0);
}
inline void cp_async_8(uint32_t to, const void* from, bool is_valid = true) {
  vnvfp4_host::copy_async(to, from, 8, is_valid ? 8 : 0);
}
inline void cp_async_4(uint32_t to, const void* from, bool is_valid = true) {
  vnvfp4_host::copy_async(to, from, 4, is_valid ? 4 : 0);
}
inline void cp_async_commit() { vnvfp4_host::copy_async_commit(); }
template <int kPendingGroups>
inline void cp_async_wait() {
  static_assert(kPendingGroups >= 0, "cp.async.wait_group takes a count of groups");
  vnvfp4_host::copy_async_wait(kPendingGroups);
}

// --- mma.sync: d = a * b + c ---------------------------------------------------------------------

#define VNVFP4_MMA(name, kind, type_cd, num_cd, num_a, num_b)                                   \
  inline void name(type_cd(&d)[num_cd], const uint32_t (&a)[num_a], const uint32_t (&b)[num_b], \
                   const type_cd(&c)[num_cd], VNVFP4_SITE) {                                    \
    vnvfp4_host::mma(vnvfp4_host::Mma::kind, d, a, b, c, file, line);                           \
  }
VNVFP4_MMA(mma_m16n8k16_bf16_f32, kBf16K16F32, float, 4, 4, 2)
VNVFP4_MMA(mma_m16n8k16_f16_f32, kF16K16F32, float, 4, 4, 2)
VNVFP4_MMA(mma_m16n8k16_f16_f16, kF16K16F16, uint32_t, 2, 4, 2)
VNVFP4_MMA(mma_m16n8k16_e4m3_f32, kE4m3K16F32, float, 4, 2, 1)
VNVFP4_MMA(mma_m16n8k32_e4m3_f32, kE4m3K32F32, float, 4, 4, 2)
VNVFP4_MMA(mma_m16n8k16_e4m3_f16, kE4m3K16F16, uint32_t, 2, 2, 1)
VNVFP4_MMA(mma_m16n8k32_e4m3_f16, kE4m3K32F16, uint32_t, 2, 4, 2)
VNVFP4_MMA(mma_m16n8k16_s8_s32, kS8K16S32, int32_t, 4, 2, 1)
VNVFP4_MMA(mma_m16n8k32_s8_s32, kS8K32S32, int32_t, 4, 4, 2)
#undef VNVFP4_MMA

// --- integer and conversion instructions ---------------------------------------------------------

inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  return vnvfp4_host::permute_bytes(low, high, selector);
}

// One lop3.b32 with the truth table kTable (bit i = f of a's, b's, c's bits of i = a<<2|b<<1|c).
template <int kTable>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(kTable >= 0 && kTable < 256, "lop3 takes an 8-bit truth table");
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if (kTable >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

// Two e4m3 (low byte first) to two f16 (low half first), exact. cvt.rn.f16x2.e4m3x2
inline uint32_t cvt_e4m3x2_to_f16x2(uint16_t codes) {
  return vnvfp4_host::e4m3_to_half_bits(codes & 0xFF) |
         uint32_t{vnvfp4_host::e4m3_to_half_bits(codes >> 8)} << 16;
}
// Two f32 to e4m3x2, `low` in the low byte: nearest even, saturating to 448.
// cvt.rn.satfinite.e4m3x2.f32 (which takes the high operand first; this function does not)
inline uint16_t cvt_f32x2_to_e4m3x2(float low, float high) {
  return static_cast<uint16_t>(vnvfp4_host::float_to_e4m3(low) | vnvfp4_host::float_to_e4m3(high)
                                                                     << 8);
}
// Two f16 to e4m3x2, the low half in the low byte. cvt.rn.satfinite.e4m3x2.f16x2
inline uint16_t cvt_f16x2_to_e4m3x2(uint32_t halves) {
  return cvt_f32x2_to_e4m3x2(
      vnvfp4_host::half_bits_to_float(static_cast<uint16_t>(halves & 0xFFFF)),
      vnvfp4_host::half_bits_to_float(static_cast<uint16_t>(halves >> 16)));
}
// Two f32 to f16x2 / bf16x2, `low` in the low half: nearest even. cvt.rn.{f16x2,bf16x2}.f32
inline uint32_t cvt_f32x2_to_f16x2(float low, float high) {
  return vnvfp4_host::float_to_half_bits(low) | uint32_t{vnvfp4_host::float_to_half_bits(high)}
                                                    << 16;
}
inline uint32_t cvt_f32x2_to_bf16x2(float low, float high) {
  return vnvfp4_host::float_to_bfloat16_bits(low) |
         uint32_t{vnvfp4_host::float_to_bfloat16_bits(high)} << 16;
}

// --- barriers, fences, semaphores ----------------------------------------------------------------

inline void bar_sync(int id, int num_threads, VNVFP4_SITE) {
  vnvfp4_host::block_barrier(id, num_threads, true, file, line);
}
inline void bar_arrive(int id, int num_threads, VNVFP4_SITE) {
  vnvfp4_host::block_barrier(id, num_threads, false, file, line);
}
inline void fence_acq_rel_gpu() { vnvfp4_host::fence(); }

namespace detail {
inline int32_t atomic_i32(vnvfp4_host::AtomicOp op, vnvfp4_host::MemoryOrder order, const int* at,
                          int value) {
  return static_cast<int32_t>(vnvfp4_host::atomic(op, vnvfp4_host::AtomicType::kI32, order, at,
                                                  static_cast<uint32_t>(value), 0));
}
}  // namespace detail

inline int ld_acquire_gpu(const int* at) {
  return detail::atomic_i32(vnvfp4_host::AtomicOp::kLoad, vnvfp4_host::MemoryOrder::kAcquire, at,
                            0);
}
inline int ld_relaxed_gpu(const int* at) {
  return detail::atomic_i32(vnvfp4_host::AtomicOp::kLoad, vnvfp4_host::MemoryOrder::kRelaxed, at,
                            0);
}
inline void st_release_gpu(int* at, int value) {
  detail::atomic_i32(vnvfp4_host::AtomicOp::kStore, vnvfp4_host::MemoryOrder::kRelease, at, value);
}
inline void st_relaxed_gpu(int* at, int value) {
  detail::atomic_i32(vnvfp4_host::AtomicOp::kStore, vnvfp4_host::MemoryOrder::kRelaxed, at, value);
}
inline void red_release_gpu_add(int* at, int value) {
  detail::atomic_i32(vnvfp4_host::AtomicOp::kAdd, vnvfp4_host::MemoryOrder::kRelease, at, value);
}
inline int atom_acq_rel_gpu_add(int* at, int value) {
  return detail::atomic_i32(vnvfp4_host::AtomicOp::kAdd, vnvfp4_host::MemoryOrder::kAcqRel, at,
                            value);
}
inline void red_global_add_f32(float* at, float value) { atomicAdd(at, value); }

}  // namespace ptx

#undef VNVFP4_SITE

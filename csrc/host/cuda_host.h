// SPDX-License-Identifier: Apache-2.0
// CUDA C++ for g++: qualifiers, vector types, thread indices, synchronisation, warp functions,
// atomics and integer intrinsics, on the emulator's runtime (abi.h).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "abi.h"
#include "numerics.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// One section holds every static __shared__ array of the object, so its extent is known at link
// time; the runtime swaps its contents when it switches blocks.
#define __shared__ static __attribute__((section("vnvfp4_smem")))

// --- vector types --------------------------------------------------------------------------------

#define VNVFP4_VECTOR_2(name, T, alignment)         \
  struct __attribute__((aligned(alignment))) name { \
    T x, y;                                         \
  };                                                \
  inline name make_##name(T x, T y) { return {x, y}; }
#define VNVFP4_VECTOR_3(name, T) \
  struct name {                  \
    T x, y, z;                   \
  };                             \
  inline name make_##name(T x, T y, T z) { return {x, y, z}; }
#define VNVFP4_VECTOR_4(name, T, alignment)         \
  struct __attribute__((aligned(alignment))) name { \
    T x, y, z, w;                                   \
  };                                                \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
VNVFP4_VECTOR_2(char2, signed char, 2)
VNVFP4_VECTOR_4(char4, signed char, 4)
VNVFP4_VECTOR_2(uchar2, unsigned char, 2)
VNVFP4_VECTOR_4(uchar4, unsigned char, 4)
VNVFP4_VECTOR_2(short2, short, 4)
VNVFP4_VECTOR_4(short4, short, 8)
VNVFP4_VECTOR_2(ushort2, unsigned short, 4)
VNVFP4_VECTOR_4(ushort4, unsigned short, 8)
VNVFP4_VECTOR_2(int2, int, 8)
VNVFP4_VECTOR_3(int3, int)
VNVFP4_VECTOR_4(int4, int, 16)
VNVFP4_VECTOR_2(uint2, unsigned, 8)
VNVFP4_VECTOR_3(uint3, unsigned)
VNVFP4_VECTOR_4(uint4, unsigned, 16)
VNVFP4_VECTOR_2(float2, float, 8)
VNVFP4_VECTOR_3(float3, float)
VNVFP4_VECTOR_4(float4, float, 16)
VNVFP4_VECTOR_2(double2, double, 16)
VNVFP4_VECTOR_2(longlong2, long long, 16)
VNVFP4_VECTOR_2(ulonglong2, unsigned long long, 16)
#undef VNVFP4_VECTOR_2
#undef VNVFP4_VECTOR_3
#undef VNVFP4_VECTOR_4

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#define threadIdx (::vnvfp4_host::thread_index())
#define blockIdx (::vnvfp4_host::block_index())
#define blockDim (::vnvfp4_host::block_dim())
#define gridDim (::vnvfp4_host::grid_dim())
#define warpSize 32

// --- bit casts and integer intrinsics ------------------------------------------------------------

inline unsigned __float_as_uint(float x) { return vnvfp4_host::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return vnvfp4_host::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return vnvfp4_host::bit_cast<float>(x); }
inline float __int_as_float(int x) { return vnvfp4_host::bit_cast<float>(x); }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  return vnvfp4_host::permute_bytes(low, high, selector & 0x7777);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1u) << (31 - i);
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<unsigned>(both << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<unsigned>(both >> (shift & 31));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }

template <typename T, typename U>
inline std::common_type_t<T, U> min(T a, U b) {
  using Common = std::common_type_t<T, U>;
  return Common(b) < Common(a) ? Common(b) : Common(a);
}
template <typename T, typename U>
inline std::common_type_t<T, U> max(T a, U b) {
  using Common = std::common_type_t<T, U>;
  return Common(a) < Common(b) ? Common(b) : Common(a);
}

// --- floating point ------------------------------------------------------------------------------
// The device's approximate functions are replaced by the accurate ones: a kernel's tolerance must
// leave room for theirs, in units in the last place (CUDA C++ Programming Guide, mathematical
// functions): 2 of __fdividef and rsqrtf, 2 + 1.173 |x| of __expf, which is 105 at |x| = 88.

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline float __saturatef(float a) { return fminf(fmaxf(a, 0.0f), 1.0f); }
inline int __float2int_rn(float a) { return static_cast<int>(lrintf(a)); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }

// --- synchronisation -----------------------------------------------------------------------------

#define VNVFP4_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
constexpr unsigned kVnvfp4FullWarp = 0xFFFFFFFFu;

inline void __syncthreads(VNVFP4_SITE) { vnvfp4_host::block_barrier(0, 0, true, file, line); }
inline int __syncthreads_and(int predicate, VNVFP4_SITE) {
  return vnvfp4_host::block_barrier_vote(vnvfp4_host::Vote::kAnd, predicate, file, line);
}
inline int __syncthreads_or(int predicate, VNVFP4_SITE) {
  return vnvfp4_host::block_barrier_vote(vnvfp4_host::Vote::kOr, predicate, file, line);
}
inline int __syncthreads_count(int predicate, VNVFP4_SITE) {
  return vnvfp4_host::block_barrier_vote(vnvfp4_host::Vote::kCount, predicate, file, line);
}
inline void __syncwarp(unsigned mask = kVnvfp4FullWarp, VNVFP4_SITE) {
  vnvfp4_host::warp_barrier(mask, file, line);
}
inline void __threadfence() { vnvfp4_host::fence(); }
inline void __threadfence_block() {}

// --- warp functions ------------------------------------------------------------------------------

namespace vnvfp4_host {
template <typename T>
inline T shuffle_value(Shuffle kind, uint32_t mask, T value, unsigned operand, int width,
                       const char* file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width, file, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace vnvfp4_host

#define VNVFP4_SHUFFLE(name, kind)                                                             \
  template <typename T>                                                                        \
  inline T name(unsigned mask, T value, unsigned operand, int width = 32, VNVFP4_SITE) {       \
    return vnvfp4_host::shuffle_value(vnvfp4_host::Shuffle::kind, mask, value, operand, width, \
                                      file, line);                                             \
  }
VNVFP4_SHUFFLE(__shfl_sync, kIdx)
VNVFP4_SHUFFLE(__shfl_up_sync, kUp)
VNVFP4_SHUFFLE(__shfl_down_sync, kDown)
VNVFP4_SHUFFLE(__shfl_xor_sync, kXor)
#undef VNVFP4_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, VNVFP4_SITE) {
  return vnvfp4_host::ballot(mask, predicate != 0, file, line);
}
inline int __any_sync(unsigned mask, int predicate, VNVFP4_SITE) {
  return vnvfp4_host::ballot(mask, predicate != 0, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, VNVFP4_SITE) {
  return vnvfp4_host::ballot(mask, predicate == 0, file, line) == 0;
}
#define VNVFP4_REDUCE(name, kind)                                                                \
  inline unsigned name(unsigned mask, unsigned value, VNVFP4_SITE) {                             \
    return vnvfp4_host::warp_reduce(vnvfp4_host::Reduce::kind, false, mask, value, file, line);  \
  }                                                                                              \
  inline int name(unsigned mask, int value, VNVFP4_SITE) {                                       \
    return static_cast<int>(vnvfp4_host::warp_reduce(vnvfp4_host::Reduce::kind, true, mask,      \
                                                     static_cast<unsigned>(value), file, line)); \
  }
VNVFP4_REDUCE(__reduce_add_sync, kAdd)
VNVFP4_REDUCE(__reduce_min_sync, kMin)
VNVFP4_REDUCE(__reduce_max_sync, kMax)
VNVFP4_REDUCE(__reduce_and_sync, kAnd)
VNVFP4_REDUCE(__reduce_or_sync, kOr)
VNVFP4_REDUCE(__reduce_xor_sync, kXor)
#undef VNVFP4_REDUCE
#undef VNVFP4_SITE

// --- memory --------------------------------------------------------------------------------------

template <typename T>
inline T __ldg(const T* pointer) {
  T value;
  vnvfp4_host::load(vnvfp4_host::kReadOnly, pointer, &value, sizeof(T));
  return value;
}
template <typename T>
inline T __ldcg(const T* pointer) {
  return *pointer;
}
template <typename T>
inline T __ldcs(const T* pointer) {
  return *pointer;
}
template <typename T>
inline void __stcg(T* pointer, T value) {
  *pointer = value;
}
template <typename T>
inline void __stcs(T* pointer, T value) {
  *pointer = value;
}
inline void __nanosleep(unsigned) {}  // the load of a polling loop already gives way
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return vnvfp4_host::shared_address(pointer);
}

#define VNVFP4_ATOMIC(name, op, T, type)                                                  \
  inline T name(T* at, T value) {                                                         \
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;                  \
    return vnvfp4_host::bit_cast<T>(static_cast<Bits>(vnvfp4_host::atomic(                \
        vnvfp4_host::AtomicOp::op, vnvfp4_host::AtomicType::type,                         \
        vnvfp4_host::MemoryOrder::kRelaxed, at, vnvfp4_host::bit_cast<Bits>(value), 0))); \
  }
#define VNVFP4_INTEGER_ATOMIC(name, op)   \
  VNVFP4_ATOMIC(name, op, int, kI32)      \
  VNVFP4_ATOMIC(name, op, unsigned, kU32) \
  VNVFP4_ATOMIC(name, op, unsigned long long, kU64)
VNVFP4_INTEGER_ATOMIC(atomicAdd, kAdd)
VNVFP4_INTEGER_ATOMIC(atomicMin, kMin)
VNVFP4_INTEGER_ATOMIC(atomicMax, kMax)
VNVFP4_INTEGER_ATOMIC(atomicAnd, kAnd)
VNVFP4_INTEGER_ATOMIC(atomicOr, kOr)
VNVFP4_INTEGER_ATOMIC(atomicXor, kXor)
VNVFP4_INTEGER_ATOMIC(atomicExch, kExchange)
VNVFP4_ATOMIC(atomicAdd, kAdd, float, kF32)
VNVFP4_ATOMIC(atomicExch, kExchange, float, kF32)
#undef VNVFP4_INTEGER_ATOMIC
#undef VNVFP4_ATOMIC

inline int atomicCAS(int* at, int compare, int value) {
  return static_cast<int>(
      vnvfp4_host::atomic(vnvfp4_host::AtomicOp::kCas, vnvfp4_host::AtomicType::kI32,
                          vnvfp4_host::MemoryOrder::kRelaxed, at, static_cast<uint32_t>(value),
                          static_cast<uint32_t>(compare)));
}
inline unsigned atomicCAS(unsigned* at, unsigned compare, unsigned value) {
  return static_cast<unsigned>(
      vnvfp4_host::atomic(vnvfp4_host::AtomicOp::kCas, vnvfp4_host::AtomicType::kU32,
                          vnvfp4_host::MemoryOrder::kRelaxed, at, value, compare));
}

// Device code may call it; it ends the launch.
inline void __trap() { vnvfp4_host::fail_kernel("__trap() was executed"); }

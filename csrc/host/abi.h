// SPDX-License-Identifier: Apache-2.0
// What a kernel compiled for the host calls in the emulator's runtime (csrc/host/runtime/).
// The runtime is compiled without instrumentation and linked to the instrumented kernel, so this
// header holds declarations only.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace vnvfp4_host {

struct Index3 {
  unsigned x, y, z;
};

// The const attribute holds although fibers share one OS thread: a fiber never migrates to another
// CUDA thread, so each call within one activation of a kernel returns the same value.
__attribute__((const)) Index3 thread_index();
__attribute__((const)) Index3 block_index();
__attribute__((const)) Index3 block_dim();
__attribute__((const)) Index3 grid_dim();

// Shared memory as the 32-bit addresses that PTX uses.
uint8_t* dynamic_shared();
uint32_t shared_address(const void* pointer);
uint8_t* shared_pointer(uint32_t address);

// One load or store instruction. `size` is also the alignment it needs.
// kReadOnly is global memory that the launch does not write (ld.global.nc).
enum Space : int { kGlobal, kShared, kReadOnly };
void load(Space space, const void* from, void* to, size_t size);
void store(Space space, void* to, const void* from, size_t size);

void block_barrier(int id, int num_threads, bool is_waiting, const char* file, int line);
enum class Vote : int { kAnd, kOr, kCount };
int block_barrier_vote(Vote vote, int predicate, const char* file, int line);
void warp_barrier(uint32_t mask, const char* file, int line);
void fence();

enum class Shuffle : int { kIdx, kUp, kDown, kXor };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, unsigned operand, int width,
                 const char* file, int line);
uint32_t ballot(uint32_t mask, bool predicate, const char* file, int line);
enum class Reduce : int { kAdd, kMin, kMax, kAnd, kOr, kXor };
uint32_t warp_reduce(Reduce kind, bool is_signed, uint32_t mask, uint32_t value, const char* file,
                     int line);

void load_matrix(int num_matrices, bool is_transposed, uint32_t* registers, uint32_t address,
                 const char* file, int line);

enum class Mma : int {
  kBf16K16F32,
  kF16K16F32,
  kF16K16F16,
  kE4m3K16F32,
  kE4m3K32F32,
  kE4m3K16F16,
  kE4m3K32F16,
  kS8K16S32,
  kS8K32S32,
  kCount,
};
void mma(Mma kind, void* d, const void* a, const void* b, const void* c, const char* file,
         int line);

void copy_async(uint32_t destination, const void* source, int size, int source_size);
void copy_async_commit();
void copy_async_wait(int num_pending_groups);

enum class AtomicOp : int { kLoad, kStore, kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCas };
enum class AtomicType : int { kI32, kU32, kU64, kF32, kF16x2, kBf16x2 };
enum class MemoryOrder : int { kRelaxed, kAcquire, kRelease, kAcqRel };
uint64_t atomic(AtomicOp op, AtomicType type, MemoryOrder order, const void* pointer,
                uint64_t value, uint64_t compare);

// Ends the launch with `message`; the kernel's line is found from the caller's address.
[[noreturn]] void fail_kernel(const char* message);

// Entry points are collected when the shared object is loaded; see kernel_entry.h.
struct KernelEntry {
  KernelEntry(const char* symbol, size_t params_size, void (*call)(const void*));
  const char* symbol;
  size_t params_size;
  void (*call)(const void* params);
  KernelEntry* next;
};

}  // namespace vnvfp4_host

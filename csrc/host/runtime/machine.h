// SPDX-License-Identifier: Apache-2.0
// The state of one launch: the grid's resident blocks, their warps and their threads (fibers).
#pragma once

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../abi.h"

namespace vnvfp4_host {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr int kNumBarriers = 16;
constexpr uint32_t kSharedBase = 0x10000;  // so that a null or a plain offset is no valid address
constexpr int kCellsPerWord = 4;

// A vector clock shared by all threads that left the same barrier; immutable once published.
// clock[t] is the last step of thread t that the holder is ordered after.
struct Snapshot {
  std::vector<uint32_t> clock;
};
using SnapshotRef = std::shared_ptr<const Snapshot>;

// What a block knows of other blocks: for each, the snapshot that a release made visible.
using ForeignKnowledge = std::vector<std::pair<uint32_t, SnapshotRef>>;
using ForeignRef = std::shared_ptr<const ForeignKnowledge>;

enum class State : uint8_t { kRunnable, kAtWarpOp, kAtBarrier, kPolling, kDone };

enum class WarpOp : uint8_t { kSync, kShuffle, kBallot, kReduce, kLoadMatrix, kMma };

struct AsyncCopy {
  uint32_t offset;  // in shared memory
  const uint8_t* source;
  uint8_t size;
  uint8_t source_size;
};

struct Block;

struct Thread {
  void* stack_pointer = nullptr;
  uint8_t* stack = nullptr;
  Block* block = nullptr;
  uint16_t id = 0;
  uint8_t lane = 0;
  State state = State::kRunnable;
  Index3 index{};

  // What the thread waits for, with the place of the call.
  WarpOp op{};
  uint32_t mask = 0;
  void* args = nullptr;
  int barrier = 0;
  bool vote = false;
  const char* file = "";
  int line = 0;
  const void* polled = nullptr;

  // Happens-before: the thread's own step, and what it is ordered after.
  uint32_t clock = 1;
  uint32_t arrival_step = 0;        // the step of its last bar.arrive
  const uint32_t* known = nullptr;  // snapshot->clock.data()
  SnapshotRef snapshot;
  ForeignRef foreign;

  std::vector<AsyncCopy> copies;  // not yet landed, oldest first
  std::vector<uint32_t> groups;   // number of copies in each committed group, oldest first
  uint32_t num_uncommitted = 0;

  ForeignRef fenced;    // what a fence has made ready for the next relaxed store to publish
  ForeignRef unfenced;  // what relaxed loads saw and the next fence will acquire
};

// Lanes that wait for the rest of their mask at one warp instruction.
struct Gathering {
  WarpOp op;
  uint32_t mask;
  uint32_t arrived;
};

struct Warp {
  uint32_t exists = 0;    // lanes that the block has
  uint32_t runnable = 0;  // lanes that can run now
  uint32_t polling = 0;
  int rotation = 0;  // the lane that runs first
  std::vector<Gathering> gatherings;
};

struct Barrier {
  int expected = 0;  // threads; 0: __syncthreads, all that have not exited
  bool is_in_use = false;
  std::vector<Thread*> waiting;
  std::vector<Thread*> arrived;  // by bar.arrive
};

// One access: step 32 | thread 16 | byte mask 4 | write 1 | atomic 1. Zero is an empty cell.
struct Word {
  uint64_t cells[kCellsPerWord];
};

struct Block {
  uint32_t linear = 0;
  Index3 index{};
  uint8_t* shared = nullptr;  // dynamic shared memory
  std::vector<uint8_t> static_shared;
  std::vector<Word> words;      // shadow of dynamic, then static shared memory, 4 bytes each
  std::vector<uint8_t> status;  // per word: low nibble initialised bytes, high nibble pending bytes
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kNumBarriers];
  int num_live = 0;
};

struct History {
  std::vector<uint64_t> cells;   // packed like a Word's
  std::vector<uint32_t> blocks;  // linear index + 1; 0: none in this launch
};

struct Region {
  const uint8_t* begin;
  const uint8_t* end;
  bool is_writable;
  std::string name;
  // Of each 4-byte word the last write and one of the last reads; sized by the first one.
  History writes;
  History reads;
};

struct LaunchConfig {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;
  uint32_t shared_limit;  // bytes a block may have, static arrays included
  uint32_t max_resident;  // blocks that may be on the machine at once; 0: no limit
  uint64_t seed;
  uint32_t fp8_accumulator;   // 0 ada, 1 exact
  uint32_t half_accumulator;  // 0 exact, 1 ada
  double time_limit;          // seconds of CPU time
};

struct Machine {
  LaunchConfig config{};
  const char* kernel = "";
  void (*call)(const void*) = nullptr;
  const void* params = nullptr;
  std::vector<Region> regions;
  size_t last_region = 0;

  std::vector<std::unique_ptr<Block>> resident;
  std::vector<std::unique_ptr<Block>> free_blocks;
  std::vector<uint32_t> order;  // of the blocks that have not started, last first
  uint32_t num_resident_peak = 0;
  Block* loaded_static = nullptr;  // whose static shared memory is in place
  std::mt19937_64 random;
  SnapshotRef origin;  // all clocks zero

  Thread* current = nullptr;
  void* scheduler_stack_pointer = nullptr;
  uint64_t num_changes = 0;  // to memory seen by other threads, or barriers passed
  volatile bool has_failed = false;
  std::string error;
  const void* error_pc = nullptr;
  const char* error_file = nullptr;
  int error_line = 0;
  bool is_running = false;
  volatile bool is_time_up = false;
  sigjmp_buf crash_exit;
};

extern Machine machine;

// --- errors.cpp ---
__attribute__((format(printf, 2, 3))) [[noreturn]] void fail(const void* pc, const char* format,
                                                             ...);
__attribute__((format(printf, 3, 4))) [[noreturn]] void fail_at(const char* file, int line,
                                                                const char* format, ...);
__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...);
std::string describe(const Thread& thread);
void install_crash_handlers(double time_limit);
void remove_crash_handlers();

// --- fibers.cpp ---
void prepare_fiber(Thread& thread, void (*entry)());
void switch_fiber(void** save, void* next);
uint8_t* acquire_stack();
void release_stack(uint8_t* stack);

// --- scheduler.cpp ---
void run_grid();
void block_current();  // leaves the current fiber until make_runnable() is called on its thread
void poll_current(const void* address);
void make_runnable(Thread& thread);
[[noreturn]] void leave_to_scheduler();
inline Warp& warp_of(Thread& thread) { return thread.block->warps[thread.id / kWarpSize]; }

// --- clocks.cpp ---
void join_clocks(const std::vector<Thread*>& waiting, const std::vector<Thread*>& arrived);
bool is_ordered_after(const Thread& thread, uint32_t block, uint32_t other_thread, uint32_t step);
void publish(Thread& thread, MemoryOrder order, const void* address, bool is_replacing);
void observe(Thread& thread, MemoryOrder order, const void* address);
void forget_publications();

// --- barriers.cpp ---
void after_exit(Thread& thread);
const char* name_of(WarpOp op);
// Waits until all lanes of `mask` have called it; the last one runs `combine` on them all.
void gather_warp(WarpOp op, uint32_t mask, void* args, const char* file, int line,
                 void (*combine)(Thread* warp, uint32_t mask));

// --- memory.cpp ---
// kUpdate: a write that reads first.
enum AccessKind : int { kRead = 0, kWrite = 1, kAtomic = 2, kUpdate = 4 };
void check_access(Thread& thread, const void* pointer, size_t size, int kind, const void* pc);
// --- shared.cpp ---
void check_shared(Thread& thread, uint32_t offset, size_t size, int kind, const void* pc);
void mark_pending(Thread& thread, uint32_t offset, size_t size, const void* pc);
void mark_landed(Thread& thread, uint32_t offset, size_t size);
uint32_t static_shared_bytes();
void load_static_shared(Block& block);
bool reset_shared(Block& block);  // false: no memory
void unmap_shared(Block& block);
bool find_shared(const Block& block, const void* pointer, uint32_t* offset);
uint8_t* shared_at(const Block& block, uint32_t offset);

constexpr uint64_t kCellWrite = 1ull << 52;
constexpr uint64_t kCellAtomic = 1ull << 53;
inline uint64_t pack_cell(const Thread& thread, uint32_t mask, int kind) {
  return thread.clock | static_cast<uint64_t>(thread.id) << 32 | static_cast<uint64_t>(mask) << 48 |
         (kind & kWrite ? kCellWrite : 0) | (kind & kAtomic ? kCellAtomic : 0);
}
inline uint32_t cell_step(uint64_t cell) { return static_cast<uint32_t>(cell); }
inline uint32_t cell_thread(uint64_t cell) { return cell >> 32 & 0xFFFF; }
inline uint32_t cell_mask(uint64_t cell) { return cell >> 48 & 0xF; }

// --- mma.cpp ---
void run_mma(Thread* warp, uint32_t mask);

}  // namespace vnvfp4_host

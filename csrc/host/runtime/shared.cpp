// SPDX-License-Identifier: Apache-2.0
// Shared memory and its shadow. Each 4-byte word remembers which bytes hold data, which ones a
// cp.async has claimed and not yet written, and its last accesses; from these come the errors for
// uninitialised reads, unfinished copies and races.

#include <string.h>
#include <sys/mman.h>

#include "machine.h"

// The linker bounds the section of static __shared__ arrays; absent if the object has none.
extern "C" {
extern uint8_t __start_vnvfp4_smem[] __attribute__((weak, visibility("hidden")));
extern uint8_t __stop_vnvfp4_smem[] __attribute__((weak, visibility("hidden")));
}

namespace vnvfp4_host {

namespace {

constexpr uint32_t kArenaBytes = 256 * 1024;  // more than any GPU's block may have
constexpr uint8_t kPoison = 0xA5;

// Static arrays come after dynamic memory in offsets.
uint32_t static_begin() { return (machine.config.shared_bytes + 1023) & ~1023u; }

uint32_t extent() { return static_begin() + static_shared_bytes(); }

bool is_inside(uint32_t offset, size_t size) {
  if (offset < static_begin()) return offset + size <= machine.config.shared_bytes;
  return offset + size <= extent();
}

const char* kind_name(int kind) {
  return kind & kUpdate ? "an update of" : kind & kWrite ? "a write of" : "a read of";
}

[[noreturn]] void fail_race(const Thread& thread, uint64_t cell, uint32_t offset, size_t size,
                            int kind, const void* pc) {
  const uint32_t other = cell_thread(cell);
  fail(pc,
       "shared memory race: %s %zu bytes at shared offset %u, %s by thread %u (warp %u lane %u) "
       "with "
       "no %s in between",
       kind_name(kind), size, offset, cell & kCellWrite ? "written" : "read", other,
       other / kWarpSize, other % kWarpSize,
       other / kWarpSize == thread.id / kWarpSize ? "__syncwarp or barrier" : "barrier");
}

// Looks for a race with the word's earlier accesses, then records this one. An earlier access may
// be forgotten if it is ordered before this one and any later race with it is one with this too.
void record_access(Thread& thread, Word& word, uint64_t cell, uint32_t offset, size_t size,
                   int kind, const void* pc) {
  const uint32_t mask = cell_mask(cell);
  const bool is_write = kind & kWrite;
  int slot = -1;
  int empty = -1;
  for (int i = 0; i < kCellsPerWord; ++i) {
    const uint64_t other = word.cells[i];
    if (other == cell) return;
    if (!other) {
      empty = i;
      break;
    }
    const bool other_writes = other & kCellWrite;
    const bool is_own = cell_thread(other) == thread.id;
    const bool is_ordered = is_own || cell_step(other) <= thread.known[cell_thread(other)];
    if (!is_ordered && (cell_mask(other) & mask) && (is_write || other_writes) &&
        !((other & kCellAtomic) && (kind & kAtomic))) {
      fail_race(thread, other, offset, size, kind, pc);
    }
    if (is_ordered && !(cell_mask(other) & ~mask) && (is_write || !other_writes)) slot = i;
  }
  if (slot < 0) slot = empty;
  if (slot < 0) {  // full: forget a read before a write
    slot = static_cast<int>(machine.random() % kCellsPerWord);
    for (int i = 0; i < kCellsPerWord && (word.cells[slot] & kCellWrite); ++i) {
      slot = (slot + 1) % kCellsPerWord;
    }
  }
  word.cells[slot] = cell;
}

uint32_t byte_mask(uint32_t offset, uint32_t end, uint32_t word) {
  const uint32_t first = word * 4 < offset ? offset - word * 4 : 0;
  const uint32_t last = end - word * 4 < 4 ? end - word * 4 : 4;
  return ((1u << last) - 1) & ~((1u << first) - 1);
}

}  // namespace

uint32_t static_shared_bytes() {
  if (!__start_vnvfp4_smem) return 0;
  return static_cast<uint32_t>(__stop_vnvfp4_smem - __start_vnvfp4_smem);
}

void load_static_shared(Block& block) {
  const uint32_t size = static_shared_bytes();
  if (!size || machine.loaded_static == &block) return;
  if (machine.loaded_static) {
    memcpy(machine.loaded_static->static_shared.data(), __start_vnvfp4_smem, size);
  }
  memcpy(__start_vnvfp4_smem, block.static_shared.data(), size);
  machine.loaded_static = &block;
}

bool reset_shared(Block& block) {
  if (!block.shared) {
    void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    block.shared = static_cast<uint8_t*>(memory);
  }
  memset(block.shared, kPoison, machine.config.shared_bytes);
  block.static_shared.assign(static_shared_bytes(), kPoison);
  if (machine.loaded_static == &block) machine.loaded_static = nullptr;
  block.words.assign((extent() + 3) / 4, Word());
  block.status.assign((extent() + 3) / 4, 0);
  return true;
}

void unmap_shared(Block& block) {
  if (block.shared) munmap(block.shared, kArenaBytes);
  block.shared = nullptr;
}

bool find_shared(const Block& block, const void* pointer, uint32_t* offset) {
  const uint8_t* address = static_cast<const uint8_t*>(pointer);
  if (static_cast<size_t>(address - block.shared) < kArenaBytes) {
    *offset = static_cast<uint32_t>(address - block.shared);
    return true;
  }
  if (static_cast<size_t>(address - __start_vnvfp4_smem) < static_shared_bytes()) {
    *offset = static_begin() + static_cast<uint32_t>(address - __start_vnvfp4_smem);
    return true;
  }
  return false;
}

uint8_t* shared_at(const Block& block, uint32_t offset) {
  if (offset < static_begin() || !static_shared_bytes()) return block.shared + offset;
  return __start_vnvfp4_smem + (offset - static_begin());
}

void check_shared(Thread& thread, uint32_t offset, size_t size, int kind, const void* pc) {
  Block& block = *thread.block;
  if (!is_inside(offset, size)) {
    fail(pc, "out of bounds: %s %zu bytes at shared offset %u; the block has %u bytes%s",
         kind_name(kind), size, offset, machine.config.shared_bytes,
         static_shared_bytes() ? " and its static arrays" : "");
  }
  const uint32_t end = offset + static_cast<uint32_t>(size);
  for (uint32_t word = offset / 4; word * 4 < end; ++word) {
    const uint32_t mask = byte_mask(offset, end, word);
    uint8_t& status = block.status[word];
    if (status >> 4 & mask) {
      fail(pc,
           "unfinished cp.async: %s %zu bytes at shared offset %u, for which a cp.async is under "
           "way "
           "that its issuing thread has not waited for",
           kind_name(kind), size, offset);
    }
    if ((!(kind & kWrite) || (kind & kUpdate)) && (status & mask) != mask) {
      fail(pc, "uninitialised: %s %zu bytes at shared offset %u, where nothing was written",
           kind_name(kind), size, offset);
    }
    if (kind & kWrite) status |= static_cast<uint8_t>(mask);
    record_access(thread, block.words[word], pack_cell(thread, mask, kind), offset, size, kind, pc);
  }
}

void mark_pending(Thread& thread, uint32_t offset, size_t size, const void* pc) {
  // The copy may land at any time from now on, so it counts as a write already.
  check_shared(thread, offset, size, kWrite, pc);
  memset(shared_at(*thread.block, offset), kPoison, size);
  for (uint32_t word = offset / 4; word * 4 < offset + size; ++word) {
    thread.block->status[word] = 0xF0;
  }
}

void mark_landed(Thread& thread, uint32_t offset, size_t size) {
  for (uint32_t word = offset / 4; word * 4 < offset + size; ++word) {
    thread.block->status[word] = 0x0F;
    record_access(thread, thread.block->words[word], pack_cell(thread, 0xF, kWrite), offset, size,
                  kWrite, nullptr);
  }
}

uint8_t* dynamic_shared() { return machine.current->block->shared; }

uint32_t shared_address(const void* pointer) {
  uint32_t offset;
  if (!find_shared(*machine.current->block, pointer, &offset)) {
    fail(__builtin_return_address(0), "address %p is not in shared memory", pointer);
  }
  return kSharedBase + offset;
}

uint8_t* shared_pointer(uint32_t address) {
  const uint32_t offset = address - kSharedBase;
  if (address < kSharedBase || offset >= kArenaBytes) {
    fail(__builtin_return_address(0),
         "0x%x is not a shared memory address: use ptx::smem_address(), not an offset", address);
  }
  return shared_at(*machine.current->block, offset);
}

}  // namespace vnvfp4_host

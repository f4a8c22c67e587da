// SPDX-License-Identifier: Apache-2.0
// Every access of a kernel to memory: global buffers (bounds, permission, order between writers and
// readers), and the instrumentation that g++ puts before plain loads and stores. The compiler's
// thread and alignment sanitizers call the functions at the end of this file; no sanitizer runtime
// is linked.

#include <string.h>

#include <algorithm>

#include "machine.h"

extern "C" {
extern const uint8_t __ehdr_start[] __attribute__((visibility("hidden")));
extern const uint8_t _end[] __attribute__((visibility("hidden")));
}

namespace vnvfp4_host {

namespace {

const char* verb(int kind) {
  return kind & kUpdate ? "updates" : kind & kWrite ? "writes" : "reads";
}

[[noreturn]] void fail_outside(const uint8_t* address, size_t size, int kind, const void* pc) {
  const Region* nearest = nullptr;
  size_t best = SIZE_MAX;
  for (const Region& region : machine.regions) {
    const size_t distance =
        static_cast<size_t>(address < region.begin ? region.begin - address : address - region.end);
    if (distance < best) {
      best = distance;
      nearest = &region;
    }
  }
  if (!nearest) {
    fail(pc, "out of bounds: %s %zu bytes at %p; the launch has no buffers", verb(kind), size,
         static_cast<const void*>(address));
  }
  const size_t bytes = static_cast<size_t>(nearest->end - nearest->begin);
  fail(pc,
       "out of bounds: %s %zu bytes at %p, which is in no buffer; the nearest is '%s' (%zu bytes), "
       "at byte %td of it",
       verb(kind), size, static_cast<const void*>(address), nearest->name.c_str(), bytes,
       address - nearest->begin);
}

Region* find_region(const uint8_t* address) {
  Region* regions = machine.regions.data();
  const size_t count = machine.regions.size();
  if (machine.last_region < count && address >= regions[machine.last_region].begin &&
      address < regions[machine.last_region].end) {
    return &regions[machine.last_region];
  }
  for (size_t i = 0; i < count; ++i) {
    if (address >= regions[i].begin && address < regions[i].end) {
      machine.last_region = i;
      return &regions[i];
    }
  }
  return nullptr;
}

[[noreturn]] void fail_race(const Thread& thread, const Region& region, size_t offset, size_t size,
                            int kind, uint64_t cell, uint32_t block, const void* pc) {
  const bool is_same_block = block == thread.block->linear;
  fail(pc,
       "global memory race: %s %zu bytes at byte %zu of '%s', %s by thread %u of %s with no %s in "
       "between",
       verb(kind), size, offset, region.name.c_str(), cell & kCellWrite ? "written" : "read",
       cell_thread(cell), is_same_block ? "this block" : text("block #%u", block).c_str(),
       is_same_block ? "barrier" : "release and acquire");
}

// Whether the word's entry, if it concerns these bytes, is ordered before this access.
bool is_ordered(const Thread& thread, const History& history, size_t word, uint32_t mask,
                int kind) {
  const uint32_t block = history.blocks[word];
  const uint64_t cell = history.cells[word];
  if (!block || !(cell_mask(cell) & mask)) return true;
  if ((cell & kCellAtomic) && (kind & kAtomic)) return true;
  return is_ordered_after(thread, block - 1, cell_thread(cell), cell_step(cell));
}

void remember(Thread& thread, const Region& region, History& history, size_t word, uint32_t mask,
              int kind) {
  if (history.cells.empty()) {
    const size_t num_words = (static_cast<size_t>(region.end - region.begin) + 3) / 4;
    history.cells.assign(num_words, 0);
    history.blocks.assign(num_words, 0);
  }
  // Accesses to neighbouring bytes by one thread in one step are one access.
  uint64_t& cell = history.cells[word];
  const bool is_same = history.blocks[word] == thread.block->linear + 1 &&
                       (cell & 0xFFFFFFFFFFFFull) == pack_cell(thread, 0, 0);
  cell = pack_cell(thread, is_same ? mask | cell_mask(cell) : mask, kind);
  history.blocks[word] = thread.block->linear + 1;
}

// An access to what another thread wrote, or a write of what it read, needs a barrier (same block)
// or a release/acquire pair (another block) in between.
void check_order(Thread& thread, Region& region, size_t offset, size_t size, int kind,
                 const void* pc) {
  for (size_t word = offset / 4; word * 4 < offset + size; ++word) {
    const size_t first = std::max(offset, word * 4) - word * 4;
    const size_t last = std::min(offset + size, word * 4 + 4) - word * 4;
    const uint32_t mask = ((1u << last) - 1) & ~((1u << first) - 1);
    const bool is_write = kind & kWrite;
    for (const History* history : {&region.writes, &region.reads}) {
      if (history->cells.empty() || (history == &region.reads && !is_write)) continue;
      if (is_ordered(thread, *history, word, mask, kind)) continue;
      fail_race(thread, region, offset, size, kind, history->cells[word], history->blocks[word] - 1,
                pc);
    }
    if (is_write) {
      remember(thread, region, region.writes, word, mask, kind);
    } else if (region.reads.cells.empty() || is_ordered(thread, region.reads, word, 0xF, kRead) ||
               machine.random() % 2) {
      // Of several unordered reads one is kept, by chance.
      remember(thread, region, region.reads, word, mask, kind);
    }
  }
}

void check_global(Thread& thread, const uint8_t* address, size_t size, int kind, const void* pc) {
  Region* region = find_region(address);
  if (!region) {
    const bool is_module = address >= __ehdr_start && address < _end;
    if (is_module && !(kind & kWrite)) return;  // constant tables
    if (is_module) {
      fail(pc,
           "writes a static variable at %p: a static __shared__ array in a template cannot be told "
           "from it; use ptx::dynamic_smem() there",
           static_cast<const void*>(address));
    }
    fail_outside(address, size, kind, pc);
  }
  if (size > static_cast<size_t>(region->end - address)) {
    fail(pc, "out of bounds: %s %zu bytes at byte %td of '%s', which has %td bytes", verb(kind),
         size, address - region->begin, region->name.c_str(), region->end - region->begin);
  }
  if ((kind & kWrite) && !region->is_writable) {
    fail(pc, "writes %zu bytes at byte %td of '%s', which is an input", size,
         address - region->begin, region->name.c_str());
  }
  if (region->is_writable) {
    check_order(thread, *region, static_cast<size_t>(address - region->begin), size, kind, pc);
  }
}

}  // namespace

void check_access(Thread& thread, const void* pointer, size_t size, int kind, const void* pc) {
  const uint8_t* address = static_cast<const uint8_t*>(pointer);
  if (machine.is_time_up) {
    fail(pc, "still running after the time limit of %g s of CPU time: an endless loop, or raise it",
         machine.config.time_limit);
  }
  if (static_cast<size_t>(address - thread.stack) < kStackBytes) return;
  uint32_t offset;
  if (find_shared(*thread.block, address, &offset)) {
    check_shared(thread, offset, size, kind, pc);
  } else {
    check_global(thread, address, size, kind, pc);
  }
}

namespace {

// The read-only path is not coherent: it may return what was there before the launch.
void check_unwritten(const uint8_t* address, size_t size, const void* pc) {
  const Region* region = find_region(address);
  if (!region || region->writes.cells.empty()) return;
  const size_t offset = static_cast<size_t>(address - region->begin);
  for (size_t word = offset / 4; word * 4 < offset + size; ++word) {
    if (!region->writes.blocks[word]) continue;
    fail(pc,
         "non-coherent: ld.global.nc of %zu bytes at byte %zu of '%s', which this launch has "
         "written: use ld.global",
         size, offset, region->name.c_str());
  }
}

void check_instruction(Space space, const void* pointer, size_t size, int kind, const void* pc) {
  Thread& thread = *machine.current;
  uint32_t offset = 0;
  const bool is_shared = find_shared(*thread.block, pointer, &offset);
  if (is_shared != (space == kShared)) {
    fail(pc, "%p is %s shared memory, where this instruction does not reach", pointer,
         is_shared ? "in" : "not in");
  }
  const uintptr_t address = is_shared ? offset : reinterpret_cast<uintptr_t>(pointer);
  if (address % size) {
    fail(pc, "misaligned: a %zu-byte access at %s %p", size,
         is_shared ? "shared memory address" : "address", pointer);
  }
  check_access(thread, pointer, size, kind, pc);
  if (space == kReadOnly) check_unwritten(static_cast<const uint8_t*>(pointer), size, pc);
}

}  // namespace

void load(Space space, const void* from, void* to, size_t size) {
  check_instruction(space, from, size, kRead, __builtin_return_address(0));
  memcpy(to, from, size);
}
void store(Space space, void* to, const void* from, size_t size) {
  check_instruction(space, to, size, kWrite, __builtin_return_address(0));
  memcpy(to, from, size);
}

}  // namespace vnvfp4_host

// --- what instrumented code calls ----------------------------------------------------------------

using vnvfp4_host::kRead;
using vnvfp4_host::kWrite;
using vnvfp4_host::machine;

namespace {

inline void on_access(const void* address, size_t size, int kind, const void* pc) {
  vnvfp4_host::Thread* thread = machine.current;
  if (thread) vnvfp4_host::check_access(*thread, address, size, kind, pc);
}

// A volatile access is a relaxed one that may be a poll: others get to run.
inline void on_volatile(const void* address, size_t size, int kind, const void* pc) {
  vnvfp4_host::Thread* thread = machine.current;
  if (!thread) return;
  if (static_cast<size_t>(static_cast<const uint8_t*>(address) - thread->stack) <
      vnvfp4_host::kStackBytes) {
    return on_access(address, size, kind, pc);
  }
  if (kind == kRead) vnvfp4_host::poll_current(address);
  vnvfp4_host::check_access(*thread, address, size, kind | vnvfp4_host::kAtomic, pc);
  if (kind == kRead) {
    vnvfp4_host::observe(*thread, vnvfp4_host::MemoryOrder::kRelaxed, address);
  } else {
    vnvfp4_host::publish(*thread, vnvfp4_host::MemoryOrder::kRelaxed, address, true);
    ++machine.num_changes;
  }
}

}  // namespace

#define VNVFP4_HOOK __attribute__((visibility("hidden"))) void
#define VNVFP4_SIZED_HOOKS(size)                               \
  VNVFP4_HOOK __tsan_read##size(void* p) {                     \
    on_access(p, size, kRead, __builtin_return_address(0));    \
  }                                                            \
  VNVFP4_HOOK __tsan_write##size(void* p) {                    \
    on_access(p, size, kWrite, __builtin_return_address(0));   \
  }                                                            \
  VNVFP4_HOOK __tsan_unaligned_read##size(void* p) {           \
    on_access(p, size, kRead, __builtin_return_address(0));    \
  }                                                            \
  VNVFP4_HOOK __tsan_unaligned_write##size(void* p) {          \
    on_access(p, size, kWrite, __builtin_return_address(0));   \
  }                                                            \
  VNVFP4_HOOK __tsan_volatile_read##size(void* p) {            \
    on_volatile(p, size, kRead, __builtin_return_address(0));  \
  }                                                            \
  VNVFP4_HOOK __tsan_volatile_write##size(void* p) {           \
    on_volatile(p, size, kWrite, __builtin_return_address(0)); \
  }                                                            \
  VNVFP4_HOOK __tsan_unaligned_volatile_read##size(void* p) {  \
    on_volatile(p, size, kRead, __builtin_return_address(0));  \
  }                                                            \
  VNVFP4_HOOK __tsan_unaligned_volatile_write##size(void* p) { \
    on_volatile(p, size, kWrite, __builtin_return_address(0)); \
  }

extern "C" {
VNVFP4_SIZED_HOOKS(1)
VNVFP4_SIZED_HOOKS(2)
VNVFP4_SIZED_HOOKS(4)
VNVFP4_SIZED_HOOKS(8)
VNVFP4_SIZED_HOOKS(16)
VNVFP4_HOOK __tsan_read_range(void* p, size_t size) {
  on_access(p, size, kRead, __builtin_return_address(0));
}
VNVFP4_HOOK __tsan_write_range(void* p, size_t size) {
  on_access(p, size, kWrite, __builtin_return_address(0));
}
VNVFP4_HOOK __tsan_vptr_update(void*, void*) {}
VNVFP4_HOOK __tsan_vptr_read(void*) {}
VNVFP4_HOOK __tsan_func_entry(void*) {}
VNVFP4_HOOK __tsan_func_exit() {}
VNVFP4_HOOK __tsan_init() {}

// The layouts that the undefined-behaviour checks pass, as GCC and Clang document them.
struct SourcePlace {
  const char* file;
  uint32_t line;
  uint32_t column;
};
struct TypeMismatch {
  SourcePlace place;
  const void* type;
  uint8_t log_alignment;
  uint8_t kind;
};

VNVFP4_HOOK __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
  vnvfp4_host::fail_at(data->place.file, static_cast<int>(data->place.line),
                       "misaligned: address 0x%zx where the type needs a multiple of %u",
                       static_cast<size_t>(address), 1u << data->log_alignment);
}
VNVFP4_HOOK __ubsan_handle_out_of_bounds(SourcePlace* place, uintptr_t index) {
  vnvfp4_host::fail_at(place->file, static_cast<int>(place->line),
                       "out of bounds: index %td of an array", static_cast<ptrdiff_t>(index));
}
VNVFP4_HOOK __ubsan_handle_shift_out_of_bounds(SourcePlace* place, uintptr_t, uintptr_t by) {
  vnvfp4_host::fail_at(place->file, static_cast<int>(place->line),
                       "undefined shift: by %td bits, or of a negative value",
                       static_cast<ptrdiff_t>(by));
}
}

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

const char* verb(int kind) { return kind & kAtomic ? "updates" : kind & kWrite ? "writes" : "reads"; }

[[noreturn]] void fail_outside(const uint8_t* address, size_t size, int kind, const void* pc) {
  const Region* nearest = nullptr;
  size_t best = SIZE_MAX;
  for (const Region& region : machine.regions) {
    const size_t distance = static_cast<size_t>(address < region.begin ? region.begin - address
                                                                       : address - region.end);
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

// Reads of what another thread wrote, and second writes, need a barrier (same block) or a
// release/acquire pair (another block) in between. Writes after unordered reads are not tracked.
void check_order(Thread& thread, Region& region, size_t offset, size_t size, int kind,
                 const void* pc) {
  if (region.writer.empty()) {
    if (!(kind & kWrite)) return;
    const size_t num_words = (static_cast<size_t>(region.end - region.begin) + 3) / 4;
    region.writer.assign(num_words, 0);
    region.writer_block.assign(num_words, 0);
  }
  for (size_t word = offset / 4; word * 4 < offset + size; ++word) {
    const size_t first = std::max(offset, word * 4) - word * 4;
    const size_t last = std::min(offset + size, word * 4 + 4) - word * 4;
    const uint32_t mask = ((1u << last) - 1) & ~((1u << first) - 1);
    const uint64_t cell = region.writer[word];
    const uint32_t block = region.writer_block[word];
    if (block && (cell_mask(cell) & mask) && !((cell & kCellAtomic) && (kind & kAtomic)) &&
        !is_ordered_after(thread, block - 1, cell_thread(cell), cell_step(cell))) {
      const bool is_same_block = block - 1 == thread.block->linear;
      fail(pc,
           "global memory race: %s %zu bytes at byte %zu of '%s', written by thread %u of %s with no "
           "%s in between",
           verb(kind), size, offset, region.name.c_str(), cell_thread(cell),
           is_same_block ? "this block" : text("block #%u", block - 1).c_str(),
           is_same_block ? "barrier" : "release and acquire");
    }
    if (!(kind & kWrite)) continue;
    // Writes of neighbouring bytes by one thread in one step are one write.
    const bool is_same = block == thread.block->linear + 1 &&
                         (cell & 0xFFFFFFFFFFFFull) == (pack_cell(thread, 0, 0));
    region.writer[word] = pack_cell(thread, is_same ? mask | cell_mask(cell) : mask, kind);
    region.writer_block[word] = thread.block->linear + 1;
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
    fail(pc, "out of bounds: %s %zu bytes at byte %td of '%s', which has %td bytes", verb(kind), size,
         address - region->begin, region->name.c_str(), region->end - region->begin);
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
#define VNVFP4_SIZED_HOOKS(size)                                                              \
  VNVFP4_HOOK __tsan_read##size(void* p) {                                                    \
    on_access(p, size, kRead, __builtin_return_address(0));                                   \
  }                                                                                           \
  VNVFP4_HOOK __tsan_write##size(void* p) {                                                   \
    on_access(p, size, kWrite, __builtin_return_address(0));                                  \
  }                                                                                           \
  VNVFP4_HOOK __tsan_unaligned_read##size(void* p) {                                          \
    on_access(p, size, kRead, __builtin_return_address(0));                                   \
  }                                                                                           \
  VNVFP4_HOOK __tsan_unaligned_write##size(void* p) {                                         \
    on_access(p, size, kWrite, __builtin_return_address(0));                                  \
  }                                                                                           \
  VNVFP4_HOOK __tsan_volatile_read##size(void* p) {                                           \
    on_volatile(p, size, kRead, __builtin_return_address(0));                                 \
  }                                                                                           \
  VNVFP4_HOOK __tsan_volatile_write##size(void* p) {                                          \
    on_volatile(p, size, kWrite, __builtin_return_address(0));                                \
  }                                                                                           \
  VNVFP4_HOOK __tsan_unaligned_volatile_read##size(void* p) {                                 \
    on_volatile(p, size, kRead, __builtin_return_address(0));                                 \
  }                                                                                           \
  VNVFP4_HOOK __tsan_unaligned_volatile_write##size(void* p) {                                \
    on_volatile(p, size, kWrite, __builtin_return_address(0));                                \
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

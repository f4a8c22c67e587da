// SPDX-License-Identifier: Apache-2.0
// cp.async: nothing lands before the issuing thread waits for its group. Until then the destination
// holds poison and belongs to the copy; after that other threads still need a barrier.

#include <string.h>

#include "machine.h"

namespace vnvfp4_host {

void copy_async(uint32_t destination, const void* source, int size, int source_size) {
  const void* pc = __builtin_return_address(0);
  Thread& thread = *machine.current;
  const uint32_t offset = destination - kSharedBase;
  if (destination < kSharedBase) {
    fail(pc, "cp.async: 0x%x is not a shared memory address: use ptx::smem_address()", destination);
  }
  if (offset % static_cast<uint32_t>(size)) {
    fail(pc, "misaligned: cp.async of %d bytes to shared offset %u", size, offset);
  }
  // Even where nothing is read: PTX leaves a misaligned source undefined whatever the src-size.
  if (reinterpret_cast<uintptr_t>(source) % static_cast<uintptr_t>(size)) {
    fail(pc, "misaligned: cp.async of %d bytes from %p", size, source);
  }
  if (source_size) {
    uint32_t unused;
    if (find_shared(*thread.block, source, &unused)) {
      fail(pc, "cp.async reads from %p, which is shared memory: its source is global", source);
    }
    check_access(thread, source, static_cast<size_t>(source_size), kRead, pc);
  }
  mark_pending(thread, offset, static_cast<size_t>(size), pc);
  thread.copies.push_back({offset, static_cast<const uint8_t*>(source), static_cast<uint8_t>(size),
                           static_cast<uint8_t>(source_size)});
  ++thread.num_uncommitted;
}

void copy_async_commit() {
  Thread& thread = *machine.current;
  thread.groups.push_back(thread.num_uncommitted);
  thread.num_uncommitted = 0;
}

void copy_async_wait(int num_pending_groups) {
  Thread& thread = *machine.current;
  if (thread.groups.size() <= static_cast<size_t>(num_pending_groups)) return;
  const size_t num_done = thread.groups.size() - static_cast<size_t>(num_pending_groups);
  size_t num_copies = 0;
  for (size_t i = 0; i < num_done; ++i) num_copies += thread.groups[i];
  for (size_t i = 0; i < num_copies; ++i) {
    const AsyncCopy& copy = thread.copies[i];
    uint8_t* to = shared_at(*thread.block, copy.offset);
    memset(to, 0, copy.size);
    if (copy.source_size) memcpy(to, copy.source, copy.source_size);
    mark_landed(thread, copy.offset, copy.size);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<long>(num_copies));
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + static_cast<long>(num_done));
}

}  // namespace vnvfp4_host

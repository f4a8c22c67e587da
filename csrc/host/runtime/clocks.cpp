// SPDX-License-Identifier: Apache-2.0
// Happens-before by vector clocks (the FastTrack idea: an access is a (thread, step) pair, and it
// is ordered before a thread that has seen that step). All threads that leave one barrier share one
// snapshot, so a barrier costs one copy of the clock and not one per thread.
//
// Between blocks only release/acquire orders: what a block learns of another is a snapshot of that
// block's clocks, carried by the address that the two synchronise on.

#include <algorithm>
#include <unordered_map>

#include "machine.h"

namespace vnvfp4_host {

namespace {

std::unordered_map<const void*, ForeignRef> publications;

void take_maximum(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

ForeignRef merge(const ForeignRef& a, const ForeignRef& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto merged = std::make_shared<ForeignKnowledge>(*a);
  for (const auto& [block, snapshot] : *b) {
    auto found = std::find_if(merged->begin(), merged->end(),
                              [block = block](const auto& entry) { return entry.first == block; });
    if (found == merged->end()) {
      merged->push_back({block, snapshot});
    } else if (found->second != snapshot) {
      auto joined = std::make_shared<Snapshot>(*found->second);
      take_maximum(joined->clock, snapshot->clock);
      found->second = joined;
    }
  }
  return merged;
}

// All that the thread has seen, its own block included, as another block may learn it. Starts a new
// step: what the thread does from now on is not covered.
ForeignRef knowledge_of(Thread& thread) {
  auto own = std::make_shared<Snapshot>(*thread.snapshot);
  own->clock[thread.id] = thread.clock++;
  auto result = std::make_shared<ForeignKnowledge>();
  result->push_back({thread.block->linear, own});
  return merge(result, thread.foreign);
}

// Knowledge of the own block that comes back through another one.
void absorb(Thread& thread, const ForeignRef& learnt) {
  thread.foreign = merge(thread.foreign, learnt);
  if (!learnt) return;
  for (const auto& [block, snapshot] : *learnt) {
    if (block != thread.block->linear) continue;
    auto joined = std::make_shared<Snapshot>(*thread.snapshot);
    take_maximum(joined->clock, snapshot->clock);
    thread.snapshot = joined;
    thread.known = joined->clock.data();
  }
}

}  // namespace

void join_clocks(const std::vector<Thread*>& waiting, const std::vector<Thread*>& arrived) {
  auto joined = std::make_shared<Snapshot>();
  const Snapshot* last = nullptr;
  ForeignRef foreign;
  auto include = [&](Thread* thread) {
    if (thread->snapshot.get() != last) {
      last = thread->snapshot.get();
      if (joined->clock.empty()) {
        joined->clock = last->clock;
      } else {
        take_maximum(joined->clock, last->clock);
      }
    }
    if (thread->foreign != foreign) foreign = merge(foreign, thread->foreign);
  };
  for (Thread* thread : waiting) include(thread);
  for (Thread* thread : arrived) include(thread);
  for (Thread* thread : waiting) joined->clock[thread->id] = thread->clock++;
  // A thread that only arrived took its step at that time.
  for (Thread* thread : arrived) {
    joined->clock[thread->id] = std::max(joined->clock[thread->id], thread->arrival_step);
  }
  SnapshotRef shared = joined;
  for (Thread* thread : waiting) {
    thread->snapshot = shared;
    thread->known = shared->clock.data();
    thread->foreign = foreign;
  }
}

bool is_ordered_after(const Thread& thread, uint32_t block, uint32_t other_thread, uint32_t step) {
  if (block == thread.block->linear) {
    return other_thread == thread.id || step <= thread.known[other_thread];
  }
  if (!thread.foreign) return false;
  for (const auto& [known_block, snapshot] : *thread.foreign) {
    if (known_block == block) return step <= snapshot->clock[other_thread];
  }
  return false;
}

void publish(Thread& thread, MemoryOrder order, const void* address, bool is_replacing) {
  const bool is_release = order == MemoryOrder::kRelease || order == MemoryOrder::kAcqRel;
  const ForeignRef message = is_release ? knowledge_of(thread) : thread.fenced;
  ForeignRef& slot = publications[address];
  // A plain store ends the release sequence; an atomic read-modify-write continues it.
  slot = is_replacing ? message : merge(slot, message);
}

void observe(Thread& thread, MemoryOrder order, const void* address) {
  auto found = publications.find(address);
  if (found == publications.end() || !found->second) return;
  if (order == MemoryOrder::kAcquire || order == MemoryOrder::kAcqRel) {
    absorb(thread, found->second);
  } else {
    thread.unfenced = merge(thread.unfenced, found->second);
  }
}

void fence() {
  Thread& thread = *machine.current;
  if (thread.unfenced) absorb(thread, thread.unfenced);
  thread.unfenced = nullptr;
  thread.fenced = knowledge_of(thread);
}

void forget_publications() { publications.clear(); }

}  // namespace vnvfp4_host

// SPDX-License-Identifier: Apache-2.0
// Block barriers (bar.sync, bar.arrive, __syncthreads and its votes) and the gathering of a warp's
// lanes at a warp instruction.

#include <string.h>

#include "machine.h"

namespace vnvfp4_host {

namespace {

int expected_threads(const Block& block, const Barrier& barrier) {
  return barrier.expected ? barrier.expected : block.num_live;
}

void release_if_complete(Block& block, Barrier& barrier) {
  if (!barrier.is_in_use) return;
  const size_t count = barrier.waiting.size() + barrier.arrived.size();
  if (count < static_cast<size_t>(expected_threads(block, barrier))) return;
  join_clocks(barrier.waiting, barrier.arrived);
  for (Thread* thread : barrier.waiting) make_runnable(*thread);
  barrier.waiting.clear();
  barrier.arrived.clear();
  barrier.is_in_use = false;
  ++machine.num_changes;
}

// __syncthreads is one barrier for the whole block: CUDA allows it in conditional code only if all
// threads take the same branch. Named barriers may pair different places, but not within a warp.
void check_same_place(const Barrier& barrier, int id, const Thread& thread, bool is_whole_block) {
  if (barrier.waiting.empty()) return;
  const Thread& other = *barrier.waiting.back();
  if (other.line == thread.line && strcmp(other.file, thread.file) == 0) return;
  if (!is_whole_block && other.id / kWarpSize != thread.id / kWarpSize) return;
  fail_at(thread.file, thread.line,
          "barrier divergence: this thread is at barrier %d at %s:%d while thread %u waits for the "
          "same barrier at %s:%d",
          id, thread.file, thread.line, other.id, other.file, other.line);
}

void check_arguments(const Barrier& barrier, const Thread& thread, int id, int num_threads) {
  const int in_block = static_cast<int>(thread.block->threads.size());
  if (id < 0 || id >= kNumBarriers) {
    fail_at(thread.file, thread.line, "barrier %d does not exist: there are %d", id, kNumBarriers);
  }
  if (num_threads < 0 || num_threads % kWarpSize || num_threads > in_block) {
    fail_at(thread.file, thread.line,
            "barrier %d is called for %d threads: it needs a multiple of %d, at most the block's "
            "%d",
            id, num_threads, kWarpSize, in_block);
  }
  if (barrier.is_in_use && barrier.expected != num_threads) {
    fail_at(thread.file, thread.line,
            "barrier %d is called for %d threads while others wait there for %d (0: all)", id,
            num_threads, barrier.expected);
  }
}

}  // namespace

void block_barrier(int id, int num_threads, bool is_waiting, const char* file, int line) {
  Thread& thread = *machine.current;
  thread.file = file;
  thread.line = line;
  Barrier& barrier = thread.block->barriers[id & (kNumBarriers - 1)];
  check_arguments(barrier, thread, id, num_threads);
  check_same_place(barrier, id, thread, num_threads == 0);
  barrier.expected = num_threads;
  barrier.is_in_use = true;
  if (!is_waiting) {
    thread.arrival_step = thread.clock++;
    barrier.arrived.push_back(&thread);
    release_if_complete(*thread.block, barrier);
    return;
  }
  thread.barrier = id;
  thread.state = State::kAtBarrier;
  barrier.waiting.push_back(&thread);
  release_if_complete(*thread.block, barrier);
  if (thread.state != State::kRunnable) block_current();
}

int block_barrier_vote(Vote vote, int predicate, const char* file, int line) {
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  thread.vote = predicate != 0;
  // Two barriers: no thread may set its next vote before all have counted this one.
  block_barrier(0, 0, true, file, line);
  int count = 0;
  int num_threads = 0;
  for (const Thread& other : block.threads) {
    if (other.state == State::kDone) continue;
    count += other.vote;
    ++num_threads;
  }
  block_barrier(0, 0, true, file, line);
  if (vote == Vote::kCount) return count;
  return vote == Vote::kAnd ? count == num_threads : count > 0;
}

const char* name_of(WarpOp op) {
  static const char* const names[] = {"__syncwarp",       "a shuffle", "a ballot",
                                      "a warp reduction", "ldmatrix",  "mma.sync"};
  return names[static_cast<int>(op)];
}

void after_exit(Thread& thread) {
  const Warp& warp = warp_of(thread);
  for (const Gathering& gathering : warp.gatherings) {
    if (gathering.mask >> thread.lane & 1) {
      const Thread& waiting = (&thread - thread.lane)[__builtin_ctz(gathering.arrived)];
      fail_at(waiting.file, waiting.line,
              "exits while lanes 0x%08x of its warp wait for it at %s (mask 0x%08x)",
              gathering.arrived, name_of(gathering.op), gathering.mask);
    }
  }
  release_if_complete(*thread.block, thread.block->barriers[0]);
}

namespace {

// Another gathering holds lanes this one needs, and needs this lane: neither can ever complete.
void check_divergence(const Warp& warp, const Thread& thread) {
  const uint32_t own = 1u << thread.lane;
  for (const Gathering& other : warp.gatherings) {
    if (!(other.arrived & thread.mask) || !(other.mask & own)) continue;
    const int lane = __builtin_ctz(other.arrived & thread.mask);
    const Thread& waiting = (&thread - thread.lane)[lane];
    fail_at(thread.file, thread.line,
            "warp divergence: this lane is at %s with mask 0x%08x (%s:%d) while lane %d is at %s "
            "with mask 0x%08x (%s:%d)",
            name_of(thread.op), thread.mask, thread.file, thread.line, lane, name_of(waiting.op),
            waiting.mask, waiting.file, waiting.line);
  }
}

void check_mask(const Warp& warp, const Thread& thread) {
  if (!(thread.mask >> thread.lane & 1)) {
    fail_at(thread.file, thread.line, "%s with mask 0x%08x, which leaves out the calling lane",
            name_of(thread.op), thread.mask);
  }
  if (thread.mask & ~warp.exists) {
    fail_at(thread.file, thread.line,
            "%s with mask 0x%08x, but lanes 0x%08x have exited or do not exist", name_of(thread.op),
            thread.mask, thread.mask & ~warp.exists);
  }
}

// mma.sync and ldmatrix are .aligned: all lanes have to execute the very same instruction.
void check_aligned(const Thread& thread, const Gathering& gathering) {
  if (thread.op != WarpOp::kMma && thread.op != WarpOp::kLoadMatrix) return;
  const int lane = __builtin_ctz(gathering.arrived);
  const Thread& other = (&thread - thread.lane)[lane];
  if (other.line == thread.line && strcmp(other.file, thread.file) == 0) return;
  fail_at(thread.file, thread.line,
          "warp divergence: this lane is at %s at %s:%d while lane %d is at another one at %s:%d",
          name_of(thread.op), thread.file, thread.line, lane, other.file, other.line);
}

}  // namespace

void gather_warp(WarpOp op, uint32_t mask, void* args, const char* file, int line,
                 void (*combine)(Thread* warp, uint32_t mask)) {
  Thread& thread = *machine.current;
  thread.op = op;
  thread.mask = mask;
  thread.args = args;
  thread.file = file;
  thread.line = line;
  Warp& warp = warp_of(thread);
  check_mask(warp, thread);
  Gathering* own = nullptr;
  for (Gathering& gathering : warp.gatherings) {
    if (gathering.op == op && gathering.mask == mask && !(gathering.arrived >> thread.lane & 1)) {
      own = &gathering;
    }
  }
  if (own) {
    check_aligned(thread, *own);
  } else {
    check_divergence(warp, thread);
    warp.gatherings.push_back({op, mask, 0});
    own = &warp.gatherings.back();
  }
  own->arrived |= 1u << thread.lane;
  if (own->arrived != mask) {
    thread.state = State::kAtWarpOp;
    block_current();
    return;
  }
  *own = warp.gatherings.back();
  warp.gatherings.pop_back();
  Thread* lanes = &thread - thread.lane;
  combine(lanes, mask);
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    lanes[__builtin_ctz(rest)].state = State::kRunnable;
  warp.runnable |= mask;
}

}  // namespace vnvfp4_host

// SPDX-License-Identifier: Apache-2.0
// Which fiber runs next. Warps (and resident blocks) are picked at random from a seed, so that an
// order the program does not enforce changes from seed to seed; a warp's lanes run one after the
// other until each waits. A thread that polls memory gives way to everything that can still run.

#include <algorithm>
#include <map>
#include <numeric>

#include "machine.h"

namespace vnvfp4_host {

Machine machine;

namespace {

constexpr int kMaxIdleRounds = 1000;  // rounds of polling in which no memory changes

int first_lane(const Warp& warp) {
  const int r = warp.rotation;
  const uint32_t rotated =
      r ? (warp.runnable >> r | warp.runnable << (kWarpSize - r)) : warp.runnable;
  return (__builtin_ctz(rotated) + r) % kWarpSize;
}

// Runs the next lane of the thread's warp, or the scheduler if none can run.
void leave(Thread& thread) {
  Warp& warp = warp_of(thread);
  if (warp.runnable && !machine.has_failed) {
    Thread& next = thread.block->threads[thread.id / kWarpSize * kWarpSize + first_lane(warp)];
    machine.current = &next;
    switch_fiber(&thread.stack_pointer, next.stack_pointer);
  } else {
    switch_fiber(&thread.stack_pointer, machine.scheduler_stack_pointer);
  }
}

void run_thread() {
  Thread& thread = *machine.current;
  machine.call(machine.params);
  thread.state = State::kDone;
  Warp& warp = warp_of(thread);
  warp.runnable &= ~(1u << thread.lane);
  warp.exists &= ~(1u << thread.lane);
  --thread.block->num_live;
  after_exit(thread);
  leave(thread);
  __builtin_unreachable();
}

// False if the process can map no more stacks.
bool start_thread(Block& block, uint32_t id) {
  Thread& thread = block.threads[id];
  uint8_t* stack = thread.stack ? thread.stack : acquire_stack();
  if (!stack) return false;
  thread = Thread();
  thread.stack = stack;
  thread.block = &block;
  thread.id = static_cast<uint16_t>(id);
  thread.lane = id % kWarpSize;
  const uint32_t* size = machine.config.block;
  thread.index = {id % size[0], id / size[0] % size[1], id / (size[0] * size[1])};
  thread.snapshot = machine.origin;
  thread.known = machine.origin->clock.data();
  prepare_fiber(thread, run_thread);
  return true;
}

void admit_block() {
  std::unique_ptr<Block> block;
  if (machine.free_blocks.empty()) {
    block = std::make_unique<Block>();
  } else {
    block = std::move(machine.free_blocks.back());
    machine.free_blocks.pop_back();
  }
  const uint32_t* grid = machine.config.grid;
  const uint32_t* size = machine.config.block;
  const uint32_t num_threads = size[0] * size[1] * size[2];
  block->linear = machine.order.back();
  machine.order.pop_back();
  block->index = {block->linear % grid[0], block->linear / grid[0] % grid[1],
                  block->linear / (grid[0] * grid[1])};
  block->num_live = static_cast<int>(num_threads);
  for (size_t id = num_threads; id < block->threads.size(); ++id) {
    release_stack(block->threads[id].stack);
  }
  block->threads.resize(num_threads);
  block->warps.assign((num_threads + kWarpSize - 1) / kWarpSize, Warp());
  for (Barrier& barrier : block->barriers) barrier = Barrier();
  bool has_memory = reset_shared(*block);
  for (uint32_t id = 0; id < num_threads && has_memory; ++id) {
    has_memory = start_thread(*block, id);
    block->warps[id / kWarpSize].exists |= 1u << id % kWarpSize;
  }
  if (!has_memory) {
    machine.has_failed = true;
    machine.error =
        text("kernel %s: no memory for the stacks of %zu blocks that wait for each other",
             machine.kernel, machine.resident.size() + 1);
    machine.free_blocks.push_back(std::move(block));
    return;
  }
  for (Warp& warp : block->warps) warp.runnable = warp.exists;
  machine.resident.push_back(std::move(block));
  machine.num_resident_peak =
      std::max(machine.num_resident_peak, static_cast<uint32_t>(machine.resident.size()));
}

bool can_admit() {
  const uint32_t limit = machine.config.max_resident;
  return !machine.order.empty() && (limit == 0 || machine.resident.size() < limit);
}

Warp* pick_warp(Block& block) {
  const size_t count = block.warps.size();
  const size_t start = machine.random() % count;
  for (size_t i = 0; i < count; ++i) {
    Warp& warp = block.warps[(start + i) % count];
    if (warp.runnable) return &warp;
  }
  return nullptr;
}

void run_warp(Block& block, Warp& warp) {
  warp.rotation = static_cast<int>(machine.random() % kWarpSize);
  const size_t index = &warp - block.warps.data();
  Thread& thread = block.threads[index * kWarpSize + first_lane(warp)];
  load_static_shared(block);
  machine.current = &thread;
  switch_fiber(&machine.scheduler_stack_pointer, thread.stack_pointer);
  machine.current = nullptr;
}

// Runs warps of one block until none can run, or until chance says to look at another block.
bool run_block(Block& block) {
  bool has_run = false;
  while (Warp* warp = pick_warp(block)) {
    has_run = true;
    run_warp(block, *warp);
    if (machine.has_failed || block.num_live == 0) break;
    if (machine.resident.size() > 1 && machine.random() % 8 == 0) break;
  }
  return has_run;
}

bool wake_pollers(Block& block) {
  bool has_any = false;
  for (Warp& warp : block.warps) {
    has_any |= warp.polling != 0;
    warp.runnable |= warp.polling;
    warp.polling = 0;
  }
  return has_any;
}

std::string describe_waiters() {
  std::map<std::string, int> groups;
  for (const auto& block : machine.resident) {
    for (const Thread& thread : block->threads) {
      if (thread.state == State::kDone) continue;
      std::string what;
      if (thread.state == State::kAtWarpOp) {
        what = text("at %s with mask 0x%08x (%s:%d)", name_of(thread.op), thread.mask, thread.file,
                    thread.line);
      } else if (thread.state == State::kAtBarrier) {
        what =
            text("at barrier %d (%s:%d), which waits for %d threads", thread.barrier, thread.file,
                 thread.line,
                 block->barriers[thread.barrier].expected ? block->barriers[thread.barrier].expected
                                                          : block->num_live);
      } else {
        what = text("polling address %p", thread.polled);
      }
      ++groups[text("block (%u,%u,%u) warp %u ", block->index.x, block->index.y, block->index.z,
                    thread.id / kWarpSize) +
               what];
    }
  }
  std::string result;
  int shown = 0;
  for (const auto& [what, count] : groups) {
    if (++shown > 8) return result + text("; and %zu more groups", groups.size() - 8);
    result += text("%s%d threads of %s", result.empty() ? "" : "; ", count, what.c_str());
  }
  return result;
}

void report_stuck(const char* what) {
  machine.has_failed = true;
  machine.error = std::string("kernel ") + machine.kernel + ": " + what + ": " + describe_waiters();
  if (!machine.order.empty()) {
    machine.error += text("; %zu blocks cannot start (max_resident is %u)", machine.order.size(),
                          machine.config.max_resident);
  }
}

// Nothing can run: let pollers look again, with one more block on the machine if there is one.
void resolve_stall(int* idle_rounds, uint64_t* last_changes) {
  bool has_pollers = false;
  for (const auto& block : machine.resident) has_pollers |= wake_pollers(*block);
  if (!has_pollers) return report_stuck("deadlock");
  if (can_admit()) return admit_block();
  *idle_rounds = machine.num_changes == *last_changes ? *idle_rounds + 1 : 0;
  *last_changes = machine.num_changes;
  if (*idle_rounds > kMaxIdleRounds) report_stuck("deadlock, polled memory no longer changes");
}

void retire_finished() {
  for (size_t i = 0; i < machine.resident.size();) {
    if (machine.resident[i]->num_live) {
      ++i;
      continue;
    }
    machine.free_blocks.push_back(std::move(machine.resident[i]));
    machine.resident.erase(machine.resident.begin() + static_cast<long>(i));
  }
}

void shuffle_order() {
  const uint32_t* grid = machine.config.grid;
  machine.order.resize(static_cast<size_t>(grid[0]) * grid[1] * grid[2]);
  std::iota(machine.order.begin(), machine.order.end(), 0u);
  for (size_t i = machine.order.size(); i > 1; --i) {
    std::swap(machine.order[i - 1], machine.order[machine.random() % i]);
  }
}

}  // namespace

void run_grid() {
  machine.random.seed(machine.config.seed);
  shuffle_order();
  const size_t target = 1 + machine.random() % 4;
  int idle_rounds = 0;
  uint64_t last_changes = 0;
  while (!machine.has_failed) {
    retire_finished();
    while (machine.resident.size() < target && can_admit()) admit_block();
    if (machine.resident.empty()) return;
    if (machine.is_time_up) return report_stuck("the time limit is used up");

    bool has_run = false;
    const size_t count = machine.resident.size();
    const size_t start = machine.random() % count;
    for (size_t i = 0; i < count && !has_run; ++i) {
      Block& block = *machine.resident[(start + i) % count];
      if (machine.random() % 4 == 0) wake_pollers(block);
      has_run = run_block(block);
    }
    if (has_run && !machine.has_failed) continue;
    if (!machine.has_failed) resolve_stall(&idle_rounds, &last_changes);
  }
}

void block_current() {
  Thread& thread = *machine.current;
  warp_of(thread).runnable &= ~(1u << thread.lane);
  leave(thread);
}

void poll_current(const void* address) {
  Thread& thread = *machine.current;
  thread.state = State::kPolling;
  thread.polled = address;
  Warp& warp = warp_of(thread);
  warp.polling |= 1u << thread.lane;
  warp.runnable &= ~(1u << thread.lane);
  leave(thread);
  thread.state = State::kRunnable;
}

void make_runnable(Thread& thread) {
  thread.state = State::kRunnable;
  warp_of(thread).runnable |= 1u << thread.lane;
}

void leave_to_scheduler() {
  void* abandoned = nullptr;
  if (machine.current) {
    switch_fiber(&machine.current->stack_pointer, machine.scheduler_stack_pointer);
  }
  switch_fiber(&abandoned, machine.scheduler_stack_pointer);
  __builtin_unreachable();
}

Index3 thread_index() { return machine.current->index; }
Index3 block_index() { return machine.current->block->index; }
Index3 block_dim() {
  const uint32_t* size = machine.config.block;
  return {size[0], size[1], size[2]};
}
Index3 grid_dim() {
  const uint32_t* size = machine.config.grid;
  return {size[0], size[1], size[2]};
}

}  // namespace vnvfp4_host

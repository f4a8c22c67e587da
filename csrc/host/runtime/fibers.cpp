// SPDX-License-Identifier: Apache-2.0
// Fibers: stacks with a guard page, and a context switch that saves what the ABI says a call keeps.

#include <sys/mman.h>

#include "machine.h"

#if !defined(__x86_64__) && !defined(VNVFP4_HOST_UCONTEXT)
#define VNVFP4_HOST_UCONTEXT 1
#endif
#if defined(VNVFP4_HOST_UCONTEXT)
#include <ucontext.h>
#endif

namespace vnvfp4_host {

namespace {
constexpr size_t kGuardBytes = 4096;
}  // namespace

uint8_t* acquire_stack() {
  // Pages are touched as they are used; the lowest page stays unmapped to catch overflow.
  void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  if (mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    munmap(memory, kStackBytes + kGuardBytes);
    return nullptr;
  }
  return static_cast<uint8_t*>(memory) + kGuardBytes;
}

void release_stack(uint8_t* stack) {
  if (stack) munmap(stack - kGuardBytes, kStackBytes + kGuardBytes);
}

#if !defined(VNVFP4_HOST_UCONTEXT)

extern "C" __attribute__((visibility("hidden"))) void vnvfp4_switch_stack(void** save, void* next);
// System V ABI: rbx, rbp, r12-r15 and the stack pointer survive a call; all else is the caller's.
asm(R"(
.text
.hidden vnvfp4_switch_stack
.globl vnvfp4_switch_stack
.type vnvfp4_switch_stack, @function
vnvfp4_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vnvfp4_switch_stack, .-vnvfp4_switch_stack
)");

void switch_fiber(void** save, void* next) { vnvfp4_switch_stack(save, next); }

void prepare_fiber(Thread& thread, void (*entry)()) {
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes);
  *--top = nullptr;  // a return address for entry(), which never returns; keeps 16-byte alignment
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

#else

// Elsewhere a fiber's "stack pointer" is its ucontext_t, which lives at the foot of its stack; the
// scheduler's lives in static storage.
namespace {
ucontext_t scheduler_context;
}

void switch_fiber(void** save, void* next) {
  ucontext_t* own = save == &machine.scheduler_stack_pointer ? &scheduler_context
                                                             : static_cast<ucontext_t*>(*save);
  *save = own;
  swapcontext(own, static_cast<ucontext_t*>(next));
}

void prepare_fiber(Thread& thread, void (*entry)()) {
  ucontext_t* context = reinterpret_cast<ucontext_t*>(thread.stack);
  getcontext(context);
  context->uc_stack.ss_sp = thread.stack + sizeof(ucontext_t);
  context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  thread.stack_pointer = context;
}

#endif

}  // namespace vnvfp4_host

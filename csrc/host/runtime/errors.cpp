// SPDX-License-Identifier: Apache-2.0
// How a launch fails: the message names kernel, block, thread and what happened, and the fiber is
// left for good. Crashes (SIGSEGV, SIGFPE) and a used-up time limit end the same way.

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "machine.h"

extern "C" void vnvfp4_host_error();

namespace vnvfp4_host {

std::string describe(const Thread& thread) {
  const Index3& b = thread.block->index;
  return text("block (%u,%u,%u) thread %u (warp %u lane %u)", b.x, b.y, b.z, thread.id,
              thread.id / kWarpSize, thread.lane);
}

namespace {

std::string format_text(const char* format, va_list arguments) {
  char buffer[1024];
  vsnprintf(buffer, sizeof(buffer), format, arguments);
  return buffer;
}

void record(const std::string& message) {
  if (machine.has_failed) return;
  machine.has_failed = true;
  machine.error = std::string("kernel ") + machine.kernel;
  if (machine.current) machine.error += ", " + describe(*machine.current);
  machine.error += ": " + message;
}

constexpr int kCrashSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct sigaction previous[4];
struct sigaction previous_timer;
stack_t previous_stack;
alignas(16) uint8_t signal_stack[64 * 1024];
timer_t timer;
bool has_timer = false;
pid_t launch_thread;

void on_crash(int signal_number, siginfo_t* info, void*) {
  if (!machine.is_running || syscall(SYS_gettid) != launch_thread) {
    // Not the emulator's: give the signal back to whoever handled it before.
    for (int i = 0; i < 4; ++i) {
      if (kCrashSignals[i] == signal_number) sigaction(signal_number, &previous[i], nullptr);
    }
    return;
  }
  const uint8_t* address = static_cast<const uint8_t*>(info->si_addr);
  const Thread* thread = machine.current;
  if (signal_number == SIGFPE) {
    record("integer division by zero or overflow");
  } else if (thread && address < thread->stack && address >= thread->stack - 4096) {
    record(
        text("stack overflow: the thread's local variables need more than %zu bytes", kStackBytes));
  } else {
    record(text("signal %d (%s) at address %p", signal_number, strsignal(signal_number),
                static_cast<const void*>(address)));
  }
  siglongjmp(machine.crash_exit, 1);
}

void on_time_limit(int, siginfo_t*, void*) {
  if (!machine.is_running || syscall(SYS_gettid) != launch_thread) return;
  if (!machine.is_time_up) {  // the scheduler and every checked access look at this
    machine.is_time_up = true;
    return;
  }
  // Second expiry: a loop that touches no memory and calls nothing.
  record(
      text("still running after the time limit of %g s of CPU time: an endless loop, or raise "
           "time_limit",
           machine.config.time_limit));
  siglongjmp(machine.crash_exit, 1);
}

}  // namespace

std::string text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string result = format_text(format, arguments);
  va_end(arguments);
  return result;
}

void fail(const void* pc, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(format_text(format, arguments));
  va_end(arguments);
  machine.error_pc = pc;
  vnvfp4_host_error();
  leave_to_scheduler();
}

void fail_at(const char* file, int line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(format_text(format, arguments));
  va_end(arguments);
  machine.error_file = file;
  machine.error_line = line;
  vnvfp4_host_error();
  leave_to_scheduler();
}

void fail_kernel(const char* message) { fail(__builtin_return_address(0), "%s", message); }

void install_crash_handlers(double time_limit) {
  launch_thread = static_cast<pid_t>(syscall(SYS_gettid));
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof(signal_stack);
  sigaltstack(&stack, &previous_stack);
  struct sigaction action{};
  action.sa_sigaction = on_crash;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 4; ++i) sigaction(kCrashSignals[i], &action, &previous[i]);

  // CPU time of this OS thread alone, so that neither another thread's work nor a debugger's stop
  // counts; SIGVTALRM leaves SIGALRM to test runners.
  action.sa_sigaction = on_time_limit;
  sigaction(SIGVTALRM, &action, &previous_timer);
  struct sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGVTALRM;
  event._sigev_un._tid = launch_thread;
  has_timer = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
  if (!has_timer) return;
  struct itimerspec spec{};
  spec.it_value.tv_sec = static_cast<time_t>(time_limit);
  spec.it_value.tv_nsec = static_cast<long>((time_limit - spec.it_value.tv_sec) * 1e9);
  spec.it_interval.tv_sec = 1;
  timer_settime(timer, 0, &spec, nullptr);
}

void remove_crash_handlers() {
  if (has_timer) timer_delete(timer);
  has_timer = false;
  sigaction(SIGVTALRM, &previous_timer, nullptr);
  for (int i = 0; i < 4; ++i) sigaction(kCrashSignals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace vnvfp4_host

// A breakpoint here stops a debugger in the failing fiber, with the kernel's frames on its stack.
extern "C" __attribute__((noinline, used)) void vnvfp4_host_error() { asm volatile(""); }

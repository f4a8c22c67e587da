// SPDX-License-Identifier: Apache-2.0
// The emulator's runtime as one translation unit, compiled once without instrumentation.

#include "accumulate.cpp"
#include "async_copy.cpp"
#include "atomics.cpp"
#include "barriers.cpp"
#include "clocks.cpp"
#include "errors.cpp"
#include "fibers.cpp"
#include "launch.cpp"
#include "memory.cpp"
#include "mma.cpp"
#include "scheduler.cpp"
#include "shared.cpp"
#include "warp_ops.cpp"

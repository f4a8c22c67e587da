// SPDX-License-Identifier: Apache-2.0
// Atomic operations and acquire/release accesses. Each is a point where other fibers may run first.

#include <string.h>

#include <algorithm>

#include "../numerics.h"
#include "machine.h"

namespace vnvfp4_host {

namespace {

template <typename T>
T apply(AtomicOp op, T old, T value, T compare) {
  switch (op) {
    case AtomicOp::kLoad:
      return old;
    case AtomicOp::kStore:
    case AtomicOp::kExchange:
      return value;
    case AtomicOp::kAdd:
      return old + value;
    case AtomicOp::kMin:
      return std::min(old, value);
    case AtomicOp::kMax:
      return std::max(old, value);
    case AtomicOp::kCas:
      return old == compare ? value : old;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (op == AtomicOp::kAnd) return old & value;
    if (op == AtomicOp::kOr) return old | value;
    if (op == AtomicOp::kXor) return old ^ value;
  }
  return old;
}

template <typename T>
uint64_t apply_bits(AtomicOp op, uint64_t old, uint64_t value, uint64_t compare) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  auto as_value = [](uint64_t bits) { return bit_cast<T>(static_cast<Bits>(bits)); };
  if constexpr (std::is_same_v<T, int32_t>) {  // wraps, as the hardware does
    if (op == AtomicOp::kAdd) return static_cast<uint32_t>(old + value);
  }
  return bit_cast<Bits>(apply<T>(op, as_value(old), as_value(value), as_value(compare)));
}

uint64_t new_bits(AtomicOp op, AtomicType type, uint64_t old, uint64_t value, uint64_t compare) {
  switch (type) {
    case AtomicType::kI32:
      return apply_bits<int32_t>(op, old, value, compare);
    case AtomicType::kU32:
      return apply_bits<uint32_t>(op, old, value, compare);
    case AtomicType::kU64:
      return apply_bits<uint64_t>(op, old, value, compare);
    default:
      return apply_bits<float>(op, old, value, compare);
  }
}

}  // namespace

uint64_t atomic(AtomicOp op, AtomicType type, MemoryOrder order, const void* pointer,
                uint64_t value, uint64_t compare) {
  const void* pc = __builtin_return_address(0);
  const size_t size = type == AtomicType::kU64 ? 8 : 4;
  Thread& thread = *machine.current;
  if (reinterpret_cast<uintptr_t>(pointer) % size) {
    fail(pc, "misaligned: a %zu-byte atomic operation at %p", size, pointer);
  }
  if (op == AtomicOp::kLoad || op == AtomicOp::kCas || machine.random() % 4 == 0) {
    poll_current(pointer);
  }
  const bool is_load = op == AtomicOp::kLoad;
  const bool is_store = op == AtomicOp::kStore;
  const int kind = is_load ? kAtomic : is_store ? kWrite | kAtomic : kWrite | kAtomic | kUpdate;
  check_access(thread, pointer, size, kind, pc);
  uint64_t old = 0;
  memcpy(&old, pointer, size);
  if (!is_store) observe(thread, order, pointer);
  if (is_load) return old;
  publish(thread, order, pointer, is_store);
  const uint64_t result = new_bits(op, type, old, value, compare);
  if (result != old) ++machine.num_changes;
  memcpy(const_cast<void*>(pointer), &result, size);
  return old;
}

}  // namespace vnvfp4_host

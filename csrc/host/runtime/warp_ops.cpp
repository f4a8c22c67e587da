// SPDX-License-Identifier: Apache-2.0
// Warp instructions other than mma.sync: shuffles, votes, reductions, ldmatrix.

#include <string.h>

#include "machine.h"

namespace vnvfp4_host {

namespace {

struct ShuffleArgs {
  Shuffle kind;
  uint64_t value;
  unsigned operand;
  int width;
  uint64_t result;
};

// PTX shfl.sync: `width` lanes form a segment that no lane reads out of; a lane whose source would
// be outside keeps its own value.
int source_lane(const ShuffleArgs& args, int lane) {
  const int first = lane & ~(args.width - 1);
  const int operand = static_cast<int>(args.operand & 31);
  int source = lane;
  if (args.kind == Shuffle::kIdx) return first + (operand & (args.width - 1));
  if (args.kind == Shuffle::kUp) source = lane - operand;
  if (args.kind == Shuffle::kDown) source = lane + operand;
  if (args.kind == Shuffle::kXor) source = lane ^ operand;
  // xor may reach a lower segment but not a higher one
  const bool is_inside = args.kind == Shuffle::kXor
                             ? source < first + args.width
                             : source >= first && source < first + args.width;
  return is_inside ? source : lane;
}

void combine_shuffle(Thread* warp, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    ShuffleArgs& args = *static_cast<ShuffleArgs*>(warp[lane].args);
    const int source = source_lane(args, lane);
    if (!(mask >> source & 1)) {
      fail_at(warp[lane].file, warp[lane].line,
              "shuffle: lane %d reads from lane %d, which the mask 0x%08x leaves out", lane, source,
              mask);
    }
    args.result = static_cast<ShuffleArgs*>(warp[source].args)->value;
  }
}

struct VoteArgs {
  bool predicate;
  uint32_t result;
};

void combine_ballot(Thread* warp, uint32_t mask) {
  uint32_t votes = 0;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    votes |= static_cast<uint32_t>(static_cast<VoteArgs*>(warp[lane].args)->predicate) << lane;
  }
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    static_cast<VoteArgs*>(warp[__builtin_ctz(rest)].args)->result = votes;
  }
}

struct ReduceArgs {
  Reduce kind;
  bool is_signed;
  uint32_t value;
};

bool is_less(bool is_signed, uint32_t a, uint32_t b) {
  return is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
}

uint32_t reduce(const ReduceArgs& args, uint32_t a, uint32_t b) {
  switch (args.kind) {
    case Reduce::kAdd:
      return a + b;
    case Reduce::kMin:
      return is_less(args.is_signed, b, a) ? b : a;
    case Reduce::kMax:
      return is_less(args.is_signed, a, b) ? b : a;
    case Reduce::kAnd:
      return a & b;
    case Reduce::kOr:
      return a | b;
    case Reduce::kXor:
      return a ^ b;
  }
  __builtin_unreachable();
}

void combine_reduce(Thread* warp, uint32_t mask) {
  const int first = __builtin_ctz(mask);
  const ReduceArgs& args = *static_cast<ReduceArgs*>(warp[first].args);
  uint32_t result = args.value;
  for (uint32_t rest = mask & (mask - 1); rest; rest &= rest - 1) {
    result = reduce(args, result, static_cast<ReduceArgs*>(warp[__builtin_ctz(rest)].args)->value);
  }
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    static_cast<ReduceArgs*>(warp[__builtin_ctz(rest)].args)->value = result;
  }
}

void combine_sync(Thread* warp, uint32_t mask) {
  static std::vector<Thread*> lanes;
  static const std::vector<Thread*> none;
  lanes.clear();
  for (uint32_t rest = mask; rest; rest &= rest - 1) lanes.push_back(&warp[__builtin_ctz(rest)]);
  join_clocks(lanes, none);
}

struct LoadMatrixArgs {
  int count;
  bool is_transposed;
  uint32_t address;
  uint32_t* registers;
};

// Lane 8i+r supplies the address of row r of matrix i (8 rows of 8 16-bit elements). Lane l gets of
// each matrix the elements [l/4][2(l%4)] and [l/4][2(l%4)+1]; transposed, [2(l%4)][l/4] and
// [2(l%4)+1][l/4].
void combine_load_matrix(Thread* warp, uint32_t) {
  const LoadMatrixArgs& first = *static_cast<LoadMatrixArgs*>(warp[0].args);
  const int count = first.count;
  uint16_t rows[32][8];
  Thread* caller = machine.current;
  for (int i = 0; i < 8 * count; ++i) {
    const uint32_t address = static_cast<LoadMatrixArgs*>(warp[i].args)->address;
    machine.current = &warp[i];  // an error names the lane that gave the address
    if (address < kSharedBase || address % 16) {
      fail_at(warp[i].file, warp[i].line, "ldmatrix: row address 0x%x is %s", address,
              address < kSharedBase ? "not in shared memory" : "not a multiple of 16");
    }
    machine.error_file = warp[i].file;
    machine.error_line = warp[i].line;
    check_shared(warp[i], address - kSharedBase, 16, kRead, nullptr);
    memcpy(rows[i], shared_at(*warp[i].block, address - kSharedBase), 16);
  }
  machine.error_file = nullptr;
  machine.current = caller;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const LoadMatrixArgs& args = *static_cast<LoadMatrixArgs*>(warp[lane].args);
    const int row = lane / 4;
    const int column = lane % 4 * 2;
    for (int i = 0; i < count; ++i) {
      const auto* matrix = rows + 8 * i;
      const uint16_t low = args.is_transposed ? matrix[column][row] : matrix[row][column];
      const uint16_t high = args.is_transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      args.registers[i] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, unsigned operand, int width,
                 const char* file, int line) {
  if (width < 1 || width > kWarpSize || (width & (width - 1))) {
    fail_at(file, line, "shuffle: width %d is not a power of two up to 32", width);
  }
  ShuffleArgs args{kind, value, operand, width, value};
  gather_warp(WarpOp::kShuffle, mask, &args, file, line, combine_shuffle);
  return args.result;
}

uint32_t ballot(uint32_t mask, bool predicate, const char* file, int line) {
  VoteArgs args{predicate, 0};
  gather_warp(WarpOp::kBallot, mask, &args, file, line, combine_ballot);
  return args.result;
}

uint32_t warp_reduce(Reduce kind, bool is_signed, uint32_t mask, uint32_t value, const char* file,
                     int line) {
  ReduceArgs args{kind, is_signed, value};
  gather_warp(WarpOp::kReduce, mask, &args, file, line, combine_reduce);
  return args.value;
}

void warp_barrier(uint32_t mask, const char* file, int line) {
  gather_warp(WarpOp::kSync, mask, nullptr, file, line, combine_sync);
}

void load_matrix(int num_matrices, bool is_transposed, uint32_t* registers, uint32_t address,
                 const char* file, int line) {
  LoadMatrixArgs args{num_matrices, is_transposed, address, registers};
  gather_warp(WarpOp::kLoadMatrix, ~0u, &args, file, line, combine_load_matrix);
}

}  // namespace vnvfp4_host

// SPDX-License-Identifier: Apache-2.0
// sm89_moe_route: from the experts that tokens chose to a schedule (moe_params.cuh) of tiles of one
// expert each, and the choices in the order of experts. A counting sort without atomics on the
// order: the same choices give the same schedule.
//
// One thread block per expert. Each counts all choices for itself, which costs less than a second
// launch: they are few and lie in L2. While it counts it marks its expert's choices by a bit each
// in shared memory, so that it has to read none of them again to write them in order.
#pragma once

#include "moe_params.cuh"

namespace moe_route {

// How many tiles hold `count` tokens: whole ones of the largest size, then one that fits the rest.
__device__ __forceinline__ int num_tiles(const RouteParams& p, int count) {
  return (count + p.largest_tile - 1) / p.largest_tile;
}

__device__ __forceinline__ int fitting_tile(int count) {
  int tile = moe::kSmallestTile;
  while (tile < count) tile *= 2;
  return tile;
}

__device__ __forceinline__ int sum_over_warp(int v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    v += __shfl_xor_sync(0xFFFFFFFFu, v, distance);
  }
  return v;
}

// Where an expert's choices and tiles start, how many it has, and how many tiles there are in all.
struct Place {
  int first_choice, count, first_tile, all_tiles;
};

// counts: one for each expert, in shared memory, complete. Every warp adds them up for itself.
__device__ __forceinline__ Place place_of(const RouteParams& p, const int* counts, int expert) {
  int choices = 0, tiles = 0, all_tiles = 0;
  for (int e = static_cast<int>(threadIdx.x) % 32; e < p.num_experts; e += 32) {
    const int count = counts[e];
    all_tiles += num_tiles(p, count);
    if (e < expert) {
      choices += count;
      tiles += num_tiles(p, count);
    }
  }
  return {sum_over_warp(choices), counts[expert], sum_over_warp(tiles), sum_over_warp(all_tiles)};
}

__device__ __forceinline__ void write_entries(const RouteParams& p, int expert,
                                              const Place& place) {
  int* entries = p.schedule + moe::kScheduleHeader + place.first_tile * moe::kScheduleEntry;
  for (int i = static_cast<int>(threadIdx.x); i < num_tiles(p, place.count);
       i += static_cast<int>(blockDim.x)) {
    const int done = i * p.largest_tile;
    const int count = min(place.count - done, p.largest_tile);
    ptx::st_global_v4(entries + i * moe::kScheduleEntry,
                      make_uint4(expert, place.first_choice + done, count, fitting_tile(count)));
  }
}

// Marks which of the choices from `first` on, as many as the marks hold, are this expert's. With
// counts, also counts all experts' choices.
template <int kThreads, int kMarkWords>
__device__ __forceinline__ void mark(const RouteParams& p, int expert, int first, uint32_t* marks,
                                     int* counts) {
  const int end = min(p.num_choices, first + kMarkWords * 32);
  for (int start = first; start < end; start += kThreads) {
    const int choice = start + static_cast<int>(threadIdx.x);
    const int e = choice < end ? moe::local_expert(p, choice) : -1;
    if (counts != nullptr && e >= 0) atomicAdd(counts + e, 1);
    const uint32_t votes = __ballot_sync(0xFFFFFFFFu, e == expert);
    if (threadIdx.x % 32 == 0 && choice < end) marks[(choice - first) / 32] = votes;
  }
}

// Writes the marked choices in their own order and returns how many: each thread those of a few
// words, after all that are marked in the warps, and then the lanes, before it.
template <int kThreads, int kMarkWords>
__device__ __forceinline__ int write_choices(const RouteParams& p, int first, const uint32_t* marks,
                                             int* warp_counts, int* sorted) {
  const int words = min(kMarkWords, (p.num_choices - first + 31) / 32);
  const int thread_words = (words + kThreads - 1) / kThreads;
  const int begin = min(words, static_cast<int>(threadIdx.x) * thread_words);
  const int end = min(words, begin + thread_words);
  int count = 0;
  for (int i = begin; i < end; ++i) count += __popc(marks[i]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int at = count;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(0xFFFFFFFFu, at, distance);
    if (lane >= distance) at += before;
  }
  if (lane == 31) warp_counts[warp] = at;
  __syncthreads();
  at -= count;
  int all = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    at += w < warp ? warp_counts[w] : 0;
    all += warp_counts[w];
  }
  for (int i = begin; i < end; ++i) {
    for (uint32_t left = marks[i]; left != 0; left &= left - 1) {
      const int choice = first + i * 32 + __ffs(static_cast<int>(left)) - 1;
      ptx::st_global_u32(sorted + at++, choice);
    }
  }
  return all;
}

template <int kThreads, int kMarkWords>
__device__ __forceinline__ void run(const RouteParams& p) {
  constexpr int kMarked = kMarkWords * 32;
  static_assert(kMarked % kThreads == 0, "every thread of a warp votes on a word");
  int* counts = reinterpret_cast<int*>(ptx::dynamic_smem());
  int* warp_counts = counts + p.num_experts;
  uint32_t* marks = reinterpret_cast<uint32_t*>(warp_counts + kThreads / 32);
  const int expert = static_cast<int>(blockIdx.x);
  for (int e = static_cast<int>(threadIdx.x); e < p.num_experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  for (int first = 0; first < p.num_choices; first += kMarked) {
    mark<kThreads, kMarkWords>(p, expert, first, marks, counts);
  }
  __syncthreads();
  const Place place = place_of(p, counts, expert);
  if (expert == 0 && threadIdx.x == 0) ptx::st_global_u32(p.schedule, place.all_tiles);
  write_entries(p, expert, place);
  int* sorted = p.sorted + place.first_choice;
  for (int first = 0; first < p.num_choices; first += kMarked) {
    // More choices than marks: those that were marked last are no longer the first.
    if (p.num_choices > kMarked) {
      __syncthreads();
      mark<kThreads, kMarkWords>(p, expert, first, marks, nullptr);
      __syncthreads();
    }
    sorted += write_choices<kThreads, kMarkWords>(p, first, marks, warp_counts, sorted);
  }
}

}  // namespace moe_route

// SPDX-License-Identifier: Apache-2.0
// sm89_moe_route: from the experts that tokens chose to a schedule (moe_params.cuh) of tiles of one
// expert each, and the choices in the order of experts. A counting sort without atomics on the
// order: the same choices give the same schedule.
//
// One thread block per expert. Each counts all choices for itself, which costs less than a second
// launch: they are few and lie in L2.
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

// The expert's choices in their own order: a thread's place is the number of choices of this expert
// in the warps, and then the lanes, before it.
template <int kThreads>
__device__ __forceinline__ void write_choices(const RouteParams& p, int expert, int* warp_counts,
                                              const Place& place) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t lanes_before = (1u << threadIdx.x % 32) - 1;
  int written = 0;
  for (int first = 0; first < p.num_choices && written < place.count; first += kThreads) {
    const int choice = first + static_cast<int>(threadIdx.x);
    const bool is_here = choice < p.num_choices && moe::local_expert(p, choice) == expert;
    const uint32_t votes = __ballot_sync(0xFFFFFFFFu, is_here);
    if (threadIdx.x % 32 == 0) warp_counts[warp] = __popc(votes);
    __syncthreads();
    int before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) {
      before += w < warp ? warp_counts[w] : 0;
      all += warp_counts[w];
    }
    if (is_here) {
      const int at = place.first_choice + written + before + __popc(votes & lanes_before);
      ptx::st_global_u32(p.sorted + at, choice);
    }
    written += all;
    __syncthreads();
  }
}

template <int kThreads>
__device__ __forceinline__ void run(const RouteParams& p) {
  int* counts = reinterpret_cast<int*>(ptx::dynamic_smem());
  int* warp_counts = counts + p.num_experts;
  const int expert = static_cast<int>(blockIdx.x);
  for (int e = static_cast<int>(threadIdx.x); e < p.num_experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < p.num_choices; i += kThreads) {
    const int e = moe::local_expert(p, i);
    if (e >= 0) atomicAdd(counts + e, 1);
  }
  __syncthreads();
  const Place place = place_of(p, counts, expert);
  if (expert == 0 && threadIdx.x == 0) ptx::st_global_u32(p.schedule, place.all_tiles);
  write_entries(p, expert, place);
  write_choices<kThreads>(p, expert, warp_counts, place);
}

}  // namespace moe_route

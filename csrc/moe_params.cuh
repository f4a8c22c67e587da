// SPDX-License-Identifier: Apache-2.0
// What the kernels of routed experts are given. Mirrors vllm_nvfp4/kernels/cuda/moe_configs.py.
#pragma once

#include "gemm_params.cuh"

namespace moe {

// Applied to the gate, or to the only half where there is no gate. Mirrors FUNCTIONS of
// moe_configs.py.
enum Function { kLinear, kSilu, kGelu, kGeluTanh, kRelu2 };

// The schedule: a header whose first word counts the entries, then for each entry the expert, the
// first of its choices, their number, and the tile's size in tokens.
constexpr int kScheduleHeader = 4, kScheduleEntry = 4;
constexpr int kSmallestTile = 8;

}  // namespace moe

// One product of all experts, for each choice c of one of them, e, and its row r of a:
//   v[n] = a_scale[r] * global_scale[e, n] * sum_k a[r, k] * w[e, n, k] + bias[e, n]
//   y[c] = f(v), or with gates f(v[:N/2]) * (v[N/2:] + beta), both clamped by limit
struct MoeParams {
  const void* a;               // [rows, K]; rows a_stride elements apart, 16-byte aligned
  const float* a_scale;        // [rows] (w4a8), [rows, ceil(K / 64)] (w4i8)
  const uint8_t* codes;        // [experts] of fragment order, see fragments.cuh
  const uint8_t* block_scale;  // [experts] of fragment order
  const float* global_scale;   // [experts, N]
  const void* bias;            // [experts, N] or null
  void* y;                     // [choices, N or N/2]; rows y_stride elements apart, 8-byte aligned
  const int* schedule;         // see above
  const int* choices;          // numbers of choices, expert after expert
  int n, k;                    // n a multiple of 16, of 32 with gates
  int a_stride, y_stride;
  int choices_per_row;  // r = c / choices_per_row: top-k where a holds tokens, 1 where choices
  int is_gated;
  int function;
  float limit, alpha, beta;
};

// Sorts the choices by expert and cuts them into tiles.
struct RouteParams {
  const int* ids;         // [choices] the expert of each choice, of all ranks' experts
  const int* expert_map;  // [all experts] number on this rank or -1; or null
  int* schedule;          // kScheduleHeader + kScheduleEntry * entries
  int* sorted;            // [choices]
  int num_choices;
  int num_experts;   // on this rank
  int num_ids;       // all ranks' experts
  int largest_tile;  // of the kernel that takes the schedule, in tokens
};

// y[m] = sum_j weight[m, j] * x[m, j] over the choices served here, in the order of j.
struct CombineParams {
  const void* x;                             // [M, k, H]
  const float* weights;                      // [M, k], or null: ones
  const int* ids;                            // [M, k]
  const int* expert_map;                     // as above
  void* y;                                   // [M, H]
  int num_tokens, num_choices, hidden_size;  // M, k, H
  int num_experts, num_ids;
};

namespace moe {

// The expert's number on this rank, -1 where another rank has it (or nobody).
template <class Params>
__device__ __forceinline__ int local_expert(const Params& p, int choice) {
  const int id = static_cast<int>(ptx::ld_global_nc_u32(p.ids + choice));
  if (static_cast<unsigned>(id) >= static_cast<unsigned>(p.num_ids)) return -1;
  const int local =
      p.expert_map == nullptr ? id : static_cast<int>(ptx::ld_global_nc_u32(p.expert_map + id));
  return static_cast<unsigned>(local) < static_cast<unsigned>(p.num_experts) ? local : -1;
}

}  // namespace moe

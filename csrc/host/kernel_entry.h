// SPDX-License-Identifier: Apache-2.0
// VNVFP4_HOST_KERNEL(symbol, kernel) makes a __global__ function launchable by name.
//   symbol   an identifier that the launcher uses
//   kernel   the function, with its template arguments: it takes one params struct by value
#pragma once

#include <string.h>

#include <type_traits>

#include "abi.h"

namespace vnvfp4_host {

template <auto kKernel>
struct KernelCaller;

template <typename Params, void (*kKernel)(Params)>
struct KernelCaller<kKernel> {
  using Value = std::remove_cv_t<Params>;
  static_assert(std::is_trivially_copyable_v<Value>,
                "a kernel's params struct is copied as bytes: it must be trivially copyable");
  static constexpr size_t kParamsSize = sizeof(Value);

  // Uninstrumented: the launcher's parameter bytes are not part of the emulated memory.
  __attribute__((no_sanitize("thread"), noinline)) static void call(const void* bytes) {
    Value params;
    memcpy(&params, bytes, sizeof(params));
    kKernel(params);
  }
};

}  // namespace vnvfp4_host

#define VNVFP4_HOST_KERNEL(symbol, ...)                                 \
  static ::vnvfp4_host::KernelEntry vnvfp4_host_entry_##symbol(         \
      #symbol, ::vnvfp4_host::KernelCaller<(__VA_ARGS__)>::kParamsSize, \
      ::vnvfp4_host::KernelCaller<(__VA_ARGS__)>::call)

// SPDX-License-Identifier: Apache-2.0
// A stand-in for libcuda.so.1 where no GPU is: it runs nothing and records every launch, so that a
// test can read back what a kernel would have been given. Only the calls of kernels/driver.py.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], smem_bytes;
  void *stream, *attributes;
  unsigned num_attributes;
} LaunchConfig;

typedef struct {
  uint64_t function, stream;
  uint32_t grid[3], block[3], smem_bytes, num_attributes;
  uint64_t num_param_bytes;
  uint8_t params[512];
} Launch;

enum { kMaxLaunches = 4096, kInvalidValue = 1, kInvalidContext = 201, kNotFound = 500 };
enum { kContext = 0xC0 };

static Launch launches[kMaxLaunches];
static int num_launches, num_modules, fail_launches_with;
static int64_t dynamic_smem_of[256];
static __thread uintptr_t current_context;

// --- what a test reads and sets
int stub_num_launches(void) { return num_launches; }
const Launch *stub_launch(int i) { return &launches[i]; }
int64_t stub_dynamic_smem(uint64_t function) { return dynamic_smem_of[function & 255]; }
void stub_set_context(uintptr_t context) { current_context = context; }
void stub_fail_launches(int status) { fail_launches_with = status; }

// --- the driver API
int cuInit(unsigned flags) { return flags ? kInvalidValue : 0; }

int cuGetErrorName(int status, const char **name) {
  *name = status == kNotFound         ? "CUDA_ERROR_NOT_FOUND"
          : status == kInvalidContext ? "CUDA_ERROR_INVALID_CONTEXT"
          : status == 719             ? "CUDA_ERROR_LAUNCH_FAILED"
                                      : "CUDA_ERROR_INVALID_VALUE";
  return 0;
}

int cuDeviceGet(int *device, int index) {
  *device = index;
  return index == 0 ? 0 : 101;
}

// An RTX 4090.
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = 128; return 0;
    case 13: *value = 2520000; return 0;
    case 36: *value = 10501000; return 0;
    case 37: *value = 384; return 0;
    case 38: *value = 72 << 20; return 0;
    case 75: *value = 8; return 0;
    case 76: *value = 9; return 0;
    case 97: *value = 101376; return 0;
  }
  return kInvalidValue;
}

int cuCtxGetCurrent(void **context) {
  *context = (void *)current_context;
  return 0;
}

int cuCtxSetCurrent(void *context) {
  current_context = (uintptr_t)context;
  return 0;
}

int cuModuleLoadData(void **module, const void *image) {
  if (memcmp(image, "\x7f" "ELF", 4)) return 200;
  *module = (void *)(uintptr_t)(0x1000 + ++num_modules);
  return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  if (!strcmp(name, "missing")) return kNotFound;
  *function = (void *)((uintptr_t)module + 0x1000);
  dynamic_smem_of[(uintptr_t)*function & 255] = -1;
  return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
  if (attribute != 8 || value > 101376) return kInvalidValue;
  dynamic_smem_of[(uintptr_t)function & 255] = value;
  return 0;
}

int cuLaunchKernelEx(const LaunchConfig *config, void *function, void **params, void **extra) {
  if (current_context != kContext) return kInvalidContext;
  if (fail_launches_with) return fail_launches_with;
  // extra = {1, buffer, 2, pointer to its size, 0}
  if (params || (uintptr_t)extra[0] != 1 || (uintptr_t)extra[2] != 2 || extra[4])
    return kInvalidValue;
  size_t size = *(size_t *)extra[3];
  if (size > sizeof launches[0].params) return kInvalidValue;
  Launch *launch = &launches[num_launches % kMaxLaunches];
  launch->function = (uintptr_t)function;
  launch->stream = (uintptr_t)config->stream;
  memcpy(launch->grid, config->grid, sizeof launch->grid);
  memcpy(launch->block, config->block, sizeof launch->block);
  launch->smem_bytes = config->smem_bytes;
  launch->num_attributes = config->num_attributes;
  launch->num_param_bytes = size;
  memcpy(launch->params, extra[1], size);
  num_launches++;
  return 0;
}

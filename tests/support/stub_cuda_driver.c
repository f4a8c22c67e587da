// SPDX-License-Identifier: Apache-2.0
// A stand-in for libcuda.so.1 where no GPU is: it runs nothing and records every launch, so that a
// test can read back what a kernel would have been given. Only the calls of kernels/driver.py;
// types and constants are NVIDIA's own, from cuda.h.
#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  uint64_t function, stream;
  uint32_t grid[3], block[3], smem_bytes, num_attributes;
  uint64_t num_param_bytes;
  uint8_t params[512];
} Launch;

enum { kMaxLaunches = 4096, kContext = 0xC0, kMaxSmemBytes = 101376 };

static Launch launches[kMaxLaunches];
static int num_launches, num_modules, fail_launches_with, version = 13000;
static int64_t dynamic_smem_of[256];
static __thread uintptr_t current_context;

// --- what a test reads and sets
int stub_num_launches(void) { return num_launches; }
const Launch *stub_launch(int i) { return &launches[i]; }
int64_t stub_dynamic_smem(uint64_t function) { return dynamic_smem_of[function & 255]; }
void stub_set_context(uintptr_t context) { current_context = context; }
void stub_fail_launches(int status) { fail_launches_with = status; }
void stub_set_version(int cuda) { version = cuda; }

// --- the driver API
CUresult cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *found) {
  *found = version;
  return CUDA_SUCCESS;
}

// Device memory is the host's; what is allocated holds anything.
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
  void *memory = malloc(size);
  if (!memory) return CUDA_ERROR_OUT_OF_MEMORY;
  memset(memory, 0xA5, size);
  *address = (CUdeviceptr)(uintptr_t)memory;
  return CUDA_SUCCESS;
}

CUresult cuMemsetD8_v2(CUdeviceptr address, unsigned char value, size_t size) {
  memset((void *)(uintptr_t)address, value, size);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH_v2(void *target, CUdeviceptr address, size_t size) {
  memcpy(target, (const void *)(uintptr_t)address, size);
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult status, const char **name) {
  *name = status == CUDA_ERROR_NOT_FOUND         ? "CUDA_ERROR_NOT_FOUND"
          : status == CUDA_ERROR_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
          : status == CUDA_ERROR_LAUNCH_FAILED   ? "CUDA_ERROR_LAUNCH_FAILED"
          : status == CUDA_ERROR_INVALID_DEVICE  ? "CUDA_ERROR_INVALID_DEVICE"
                                                 : "CUDA_ERROR_INVALID_VALUE";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

// An RTX 4090.
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 128; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 2520000; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 10501000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 384; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 72 << 20; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 8; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 9; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)current_context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current_context = (uintptr_t)context;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, "\x7f" "ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)(uintptr_t)(0x1000 + ++num_modules);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (!strcmp(name, "missing")) return CUDA_ERROR_NOT_FOUND;
  *function = (CUfunction)((uintptr_t)module + 0x1000);
  dynamic_smem_of[(uintptr_t)*function & 255] = -1;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > kMaxSmemBytes)
    return CUDA_ERROR_INVALID_VALUE;
  dynamic_smem_of[(uintptr_t)function & 255] = value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params,
                          void **extra) {
  if (current_context != kContext) return CUDA_ERROR_INVALID_CONTEXT;
  if (fail_launches_with) return (CUresult)fail_launches_with;
  if (params || extra[0] != CU_LAUNCH_PARAM_BUFFER_POINTER ||
      extra[2] != CU_LAUNCH_PARAM_BUFFER_SIZE || extra[4] != CU_LAUNCH_PARAM_END)
    return CUDA_ERROR_INVALID_VALUE;
  const size_t size = *(size_t *)extra[3];
  if (size > sizeof launches[0].params) return CUDA_ERROR_INVALID_VALUE;
  *(&launches[num_launches % kMaxLaunches]) = (Launch){
      .function = (uintptr_t)function,
      .stream = (uintptr_t)config->hStream,
      .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
      .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
      .smem_bytes = config->sharedMemBytes,
      .num_attributes = config->numAttrs,
      .num_param_bytes = size,
  };
  memcpy(launches[num_launches % kMaxLaunches].params, extra[1], size);
  num_launches++;
  return CUDA_SUCCESS;
}

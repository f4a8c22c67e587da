// SPDX-License-Identifier: Apache-2.0
// A stand-in for libnvidia-ml.so.1 where no GPU is: two GPUs of which the second is idle, so that a
// test can see what is asked of NVML and what is made of its answers. They are RTX 4090, or what
// STUB_NVML_NAME, STUB_NVML_CAPABILITY ("9.0") and STUB_NVML_GIB say. Values and error numbers are
// those of nvml.h.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kSuccess = 0, kInvalidArgument = 2, kNotSupported = 3 };
enum { kSm = 1, kMem = 2 };

typedef struct {
  uint64_t total, free, used;
} Memory;

static int num_reads[2];
static char gpus[2];

static const char *setting(const char *name, const char *otherwise) {
  const char *found = getenv(name);
  return found ? found : otherwise;
}

int nvmlShutdown(void) { return kSuccess; }
const char *nvmlErrorString(int status) { return status ? "refused by the stand-in" : "success"; }

int nvmlInitWithFlags(unsigned int flags) { return flags ? kInvalidArgument : kSuccess; }
int nvmlDeviceGetCount_v2(unsigned int *count) { return *count = 2, kSuccess; }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
  if (index > 1) return kInvalidArgument;
  return *device = &gpus[index], kSuccess;
}

int nvmlDeviceGetName(void *device, char *name, unsigned int length) {
  strncpy(name, setting("STUB_NVML_NAME", "NVIDIA GeForce RTX 4090"), length);
  return kSuccess;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned int length) {
  snprintf(uuid, length, "GPU-0000000%d-0000-0000-0000-000000000000", device == &gpus[1]);
  return kSuccess;
}

int nvmlSystemGetDriverVersion(char *version, unsigned int length) {
  strncpy(version, "580.1", length);
  return kSuccess;
}

int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
  sscanf(setting("STUB_NVML_CAPABILITY", "8.9"), "%d.%d", major, minor);
  return kSuccess;
}

// GPU 0 gains 1 GiB with every look, GPU 1 nothing.
int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
  int gpu = device == &gpus[1];
  memory->total = strtoull(setting("STUB_NVML_GIB", "24"), NULL, 10) << 30;
  memory->used = (1ull << 30) * (gpu ? 1 : 1 + num_reads[gpu]++ / 2);
  memory->free = memory->total - memory->used;
  return kSuccess;
}

int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
  return *millijoules = 5000, kSuccess;
}

int nvmlDeviceGetClockInfo(void *device, int kind, unsigned int *mhz) {
  return *mhz = kind == kSm ? 2520 : 10501, kSuccess;
}

int nvmlDeviceGetMaxClockInfo(void *device, int kind, unsigned int *mhz) {
  return *mhz = kind == kSm ? 3105 : 10501, kSuccess;
}

int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned int *milliwatts) {
  return kNotSupported;
}

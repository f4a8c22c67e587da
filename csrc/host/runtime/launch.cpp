// SPDX-License-Identifier: Apache-2.0
// The C entry points of a compiled kernel library.

#include <string.h>
#include <sys/mman.h>

#include "machine.h"

extern "C" {
extern const uint8_t __ehdr_start[] __attribute__((visibility("hidden")));

// Mirrored by vllm_nvfp4/testing/host_kernel.py.
struct VnvfpBuffer {
  void* data;
  uint64_t bytes;
  uint32_t is_writable;
  const char* name;
};

struct VnvfpResult {
  uint64_t pc;  // of the failing access, as an offset in this shared object; 0: see `file`
  uint32_t num_resident;
  int32_t line;
  char file[512];
  char message[2048];
};
}

namespace vnvfp4_host {

namespace {

KernelEntry* first_entry = nullptr;

// A private copy with inaccessible pages around it: an address beyond a tensor never falls into
// another one, as it might in the allocator's heap.
struct BufferCopy {
  static constexpr size_t kGap = 64 * 1024;
  uint8_t* mapping = nullptr;
  size_t mapped_bytes = 0;
  uint8_t* begin = nullptr;

  bool create(const VnvfpBuffer& buffer) {
    // Device allocations are 256-byte aligned, the host's 64: keep what the tensor has below 64.
    const size_t offset = reinterpret_cast<uintptr_t>(buffer.data) % 64;
    mapped_bytes = (buffer.bytes + offset + 4095) / 4096 * 4096 + 2 * kGap;
    void* memory =
        mmap(nullptr, mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    mapping = static_cast<uint8_t*>(memory);
    if (mprotect(mapping + kGap, mapped_bytes - 2 * kGap, PROT_READ | PROT_WRITE) != 0)
      return false;
    begin = mapping + kGap + offset;
    memcpy(begin, buffer.data, buffer.bytes);
    return true;
  }
  ~BufferCopy() {
    if (mapping) munmap(mapping, mapped_bytes);
  }
};

// Words of the params struct that point into a tensor are made to point into its copy.
void relocate(std::vector<uint8_t>& params, const VnvfpBuffer* buffers,
              const std::vector<BufferCopy>& copies) {
  for (size_t at = 0; at + 8 <= params.size(); at += 8) {
    uint64_t word;
    memcpy(&word, params.data() + at, 8);
    for (size_t i = 0; i < copies.size(); ++i) {
      const uint64_t begin = reinterpret_cast<uint64_t>(buffers[i].data);
      if (word < begin || word > begin + buffers[i].bytes || !word) continue;
      if (word == begin + buffers[i].bytes && buffers[i].bytes) continue;
      word = reinterpret_cast<uint64_t>(copies[i].begin) + (word - begin);
      memcpy(params.data() + at, &word, 8);
      break;
    }
  }
}

// What the driver would refuse. Empty if nothing.
std::string find_problem(const LaunchConfig& config) {
  const uint64_t num_threads =
      static_cast<uint64_t>(config.block[0]) * config.block[1] * config.block[2];
  if (!num_threads || num_threads > 1024) {
    return text("%zu threads in a block: a block has 1 to 1024", static_cast<size_t>(num_threads));
  }
  if (!config.grid[0] || !config.grid[1] || !config.grid[2]) {
    return "an empty grid: a launch has at least one block";
  }
  if (config.grid[1] > 65535 || config.grid[2] > 65535) {
    return text("grid (%u, %u, %u): y and z are at most 65535", config.grid[0], config.grid[1],
                config.grid[2]);
  }
  if (config.shared_bytes + static_shared_bytes() > config.shared_limit) {
    return text("%u bytes of dynamic and %u of static shared memory: the GPU has %u for a block",
                config.shared_bytes, static_shared_bytes(), config.shared_limit);
  }
  return "";
}

const KernelEntry* find_entry(const char* symbol) {
  for (KernelEntry* entry = first_entry; entry; entry = entry->next) {
    if (strcmp(entry->symbol, symbol) == 0) return entry;
  }
  return nullptr;
}

void reset_machine() {
  for (auto& block : machine.resident) machine.free_blocks.push_back(std::move(block));
  machine.resident.clear();
  machine.regions.clear();
  machine.order.clear();
  machine.last_region = 0;
  machine.num_resident_peak = 0;
  machine.loaded_static = nullptr;
  machine.current = nullptr;
  machine.num_changes = 0;
  machine.has_failed = false;
  machine.is_time_up = false;
  machine.error.clear();
  machine.error_pc = nullptr;
  machine.error_file = nullptr;
  machine.error_line = 0;
  forget_publications();
}

void run(const LaunchConfig& config) {
  auto origin = std::make_shared<Snapshot>();
  origin->clock.assign(static_cast<size_t>(config.block[0]) * config.block[1] * config.block[2], 0);
  machine.origin = origin;
  machine.is_running = true;
  install_crash_handlers(config.time_limit);
  if (sigsetjmp(machine.crash_exit, 1) == 0) run_grid();
  remove_crash_handlers();
  machine.is_running = false;
  machine.current = nullptr;
}

void describe_result(VnvfpResult* result) {
  const auto* pc = static_cast<const uint8_t*>(machine.error_pc);
  result->pc = pc ? static_cast<uint64_t>(pc - __ehdr_start) : 0;
  result->line = machine.error_line;
  result->num_resident = machine.num_resident_peak;
  strncpy(result->file, machine.error_file ? machine.error_file : "", sizeof(result->file) - 1);
  strncpy(result->message, machine.error.c_str(), sizeof(result->message) - 1);
}

}  // namespace

KernelEntry::KernelEntry(const char* symbol, size_t params_size, void (*call)(const void*))
    : symbol(symbol), params_size(params_size), call(call), next(first_entry) {
  first_entry = this;
}

}  // namespace vnvfp4_host

using vnvfp4_host::machine;

extern "C" __attribute__((visibility("default"))) int vnvfp4_host_launch(
    const char* symbol, const vnvfp4_host::LaunchConfig* config, const void* params,
    uint64_t params_size, const VnvfpBuffer* buffers, uint64_t num_buffers, VnvfpResult* result) {
  memset(result, 0, sizeof(*result));
  auto refuse = [&](const std::string& message) {
    strncpy(result->message, message.c_str(), sizeof(result->message) - 1);
    return 1;
  };
  const vnvfp4_host::KernelEntry* entry = vnvfp4_host::find_entry(symbol);
  if (!entry) return refuse(std::string("no kernel named ") + symbol);
  if (entry->params_size != params_size) {
    return refuse(vnvfp4_host::text("kernel %s takes a params struct of %zu bytes, got %zu", symbol,
                                    entry->params_size, static_cast<size_t>(params_size)));
  }
  const std::string problem = vnvfp4_host::find_problem(*config);
  if (!problem.empty()) return refuse(std::string("kernel ") + symbol + ": " + problem);
  vnvfp4_host::reset_machine();
  std::vector<vnvfp4_host::BufferCopy> copies(num_buffers);
  for (uint64_t i = 0; i < num_buffers; ++i) {
    if (!copies[i].create(buffers[i])) return refuse("out of memory for the buffers' copies");
    machine.regions.push_back({copies[i].begin,
                               copies[i].begin + buffers[i].bytes,
                               buffers[i].is_writable != 0,
                               buffers[i].name,
                               {},
                               {}});
  }
  const uint8_t* bytes = static_cast<const uint8_t*>(params);
  std::vector<uint8_t> own_params(bytes, bytes + params_size);
  vnvfp4_host::relocate(own_params, buffers, copies);
  machine.config = *config;
  machine.kernel = symbol;
  machine.call = entry->call;
  machine.params = own_params.data();
  vnvfp4_host::run(*config);
  for (uint64_t i = 0; i < num_buffers; ++i) {
    if (buffers[i].is_writable) memcpy(buffers[i].data, copies[i].begin, buffers[i].bytes);
  }
  vnvfp4_host::describe_result(result);
  return machine.has_failed ? 1 : 0;
}

// Give back the memory of blocks and their threads, which launches keep for the next one. A process
// has a limited number of mappings, and every loaded module keeps its own.
extern "C" __attribute__((visibility("default"))) void vnvfp4_host_release() {
  vnvfp4_host::reset_machine();
  for (auto& block : machine.free_blocks) {
    for (vnvfp4_host::Thread& thread : block->threads) vnvfp4_host::release_stack(thread.stack);
    vnvfp4_host::unmap_shared(*block);
  }
  machine.free_blocks.clear();
}

// Appending and attending on CUDA, for callers without a CUDA compiler.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace sparsemm {

constexpr int32_t kMostGroups = 8;  // query heads a KV head

struct AppendAttend {
  const void* q;      // [sequences, groups, head_dim]
  const void* k_new;  // [sequences, head_dim]
  const void* v_new;
  void* k_cache;  // [slots, head_dim]
  void* v_cache;
  const int32_t* offsets;  // [sequences + 1]
  int32_t* lengths;        // [sequences]
  void* out;               // [sequences, groups, head_dim]
  void* workspace;         // of workspace_bytes(), 16-byte aligned
  int32_t sequences;
  int32_t groups;
  float scale;
};

enum class Element { kHalf, kBFloat16 };

// How a device runs it; the same for all lengths.
struct Plan {
  Element element;
  int32_t head_dim;
  int32_t workers;  // blocks that attend
  bool overlap;     // the second launch comes up while the first still works
};

inline bool has_kernel(int64_t head_dim, int64_t groups) {
  const bool dim = head_dim == 64 || head_dim == 96 || head_dim == 128;
  return dim && 1 <= groups && groups <= kMostGroups;
}

// For the current device. Asks the driver, so call it once a device and keep the answer.
cudaError_t make_plan(Element element, int32_t head_dim, Plan* plan);

size_t workspace_bytes(const Plan& plan, int32_t sequences, int32_t groups);

// Launches on the stream and returns; neither waits nor allocates.
cudaError_t append_attend(const AppendAttend& task, const Plan& plan, cudaStream_t stream);

}  // namespace sparsemm

// What the tests call: the op as it runs on an emulated device, and kernels that must fail.
#include <vector>

#include "../../../cuda_ext/append_attend.h"
#include "../../../cuda_ext/partition.h"
#include "../../../cuda_ext/primitives.cuh"

namespace {

constexpr uint8_t kPoison = 0xff;  // NaN, read as any kind of float
constexpr size_t kMargin = 64;

// Slots that hold a token before the step; a full sequence is not read at all.
std::vector<uint8_t> filled(const sparsemm::AppendAttend& task) {
  std::vector<uint8_t> open(task.offsets[task.sequences], 0);
  for (int32_t s = 0; s < task.sequences; ++s) {
    const int32_t start = task.offsets[s], capacity = task.offsets[s + 1] - start;
    if (!sparsemm::is_live(task.lengths[s], capacity)) continue;
    for (int32_t i = 0; i < task.lengths[s]; ++i) open[start + i] = 1;
  }
  return open;
}

void shuffle_in_half_a_warp(int) {
  if (threadIdx.x % 32 < 16) __shfl_sync(0xffffffff, 1, 0);
}
void barrier_of_one_warp(int) {
  if (threadIdx.x < 32) __syncthreads();
}
void different_collectives(int) {
  if (threadIdx.x % 2 == 0) {
    __shfl_sync(0xffffffff, 1, 0);
  } else {
    __syncthreads();
  }
}
void no_wait(int) {}

alignas(16) const uint16_t rows[4][8] = {};
const bool open_rows[3] = {true, false, true};
void read_of_a_closed_row(int) { sparsemm::stream16(rows[1]); }
void read_outside(int) { sparsemm::stream16(rows[3]); }
void read_off_alignment(int) { sparsemm::stream8(rows[0] + 1); }
void reads_that_are_allowed(int) {
  sparsemm::stream16(rows[0]);
  sparsemm::stream8(rows[2] + 4);
}

}  // namespace

extern "C" {

// Zero if all went well; the number of workers goes to `workers`.
int emulate_append_attend(
    sparsemm::AppendAttend* task, int bfloat16, int head_dim, int processors, int resident,
    int ptx_version, unsigned seed, int* workers) {
  emulator::device = {processors, resident, ptx_version, seed};
  sparsemm::Plan plan;
  const auto element = bfloat16 ? sparsemm::Element::kBFloat16 : sparsemm::Element::kHalf;
  if (const cudaError_t error = sparsemm::make_plan(element, head_dim, &plan)) return error;
  *workers = plan.workers;

  const size_t bytes = sparsemm::workspace_bytes(plan, task->sequences, task->groups);
  const size_t behind = (bytes + 15) / 16 * 16;
  std::vector<uint4> workspace(behind / 16 + kMargin / 16);
  uint8_t* poisoned = reinterpret_cast<uint8_t*>(workspace.data());
  std::memset(poisoned, kPoison, behind + kMargin);
  task->workspace = poisoned;

  const std::vector<uint8_t> open = filled(*task);
  const auto* slots = reinterpret_cast<const bool*>(open.data());
  const size_t row = 2 * head_dim, sequences = task->sequences;
  emulator::forget_reads();
  emulator::allow_reads(task->k_cache, open.size(), row, slots);
  emulator::allow_reads(task->v_cache, open.size(), row, slots);
  emulator::allow_reads(task->k_new, sequences, row, nullptr);
  emulator::allow_reads(task->v_new, sequences, row, nullptr);
  emulator::allow_reads(task->q, sequences * task->groups, row, nullptr);

  if (const cudaError_t error = sparsemm::append_attend(*task, plan, nullptr)) return error;
  for (size_t i = bytes; i < behind + kMargin; ++i) {
    if (poisoned[i] != kPoison) return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

int emulate_fault(int which) {
  void (*const kernels[])(int) = {
      shuffle_in_half_a_warp, barrier_of_one_warp, different_collectives, no_wait,
      read_of_a_closed_row, read_outside, read_off_alignment, reads_that_are_allowed};
  emulator::forget_reads();
  emulator::allow_reads(rows, 3, sizeof(rows[0]), open_rows);
  cudaLaunchAttribute attribute = {cudaLaunchAttributeProgrammaticStreamSerialization, {1}};
  cudaLaunchConfig_t config = {dim3(1), dim3(64), 0, nullptr, &attribute, which == 3 ? 1u : 0u};
  return cudaLaunchKernelEx(&config, kernels[which], 0);
}

uint16_t emulate_rounding(float value, int bfloat16) {
  return emulator::rounded(value, bfloat16 != 0);
}
float emulate_widening(uint16_t bits, int bfloat16) {
  return emulator::widened(bits, bfloat16 != 0);
}

const char* emulate_failure() { return emulator::failure(); }

}  // extern "C"

// sparsemm::append_attend on CUDA tensors; ops.cpp holds its schema.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>

#include "append_attend.h"
#include "checks.h"

namespace sparsemm {
namespace {

constexpr auto kOp = "sparsemm::append_attend: ";

bool is_aligned(const at::Tensor& x) {
  return reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// With rows one behind the other, the first at a multiple of 16 bytes, as all loads need it.
at::Tensor in_rows(const at::Tensor& x) {
  const at::Tensor rows = x.contiguous();
  return is_aligned(rows) ? rows : rows.clone();
}

// Asked once a device, as it is the same for all lengths.
Plan plan_of(Element element, int32_t head_dim) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Element, int32_t>, Plan> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(int{c10::cuda::current_device()}, element, head_dim);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  Plan plan;
  C10_CUDA_CHECK(make_plan(element, head_dim, &plan));
  return plans.emplace(key, plan).first->second;
}

at::Tensor append_attend_cuda(
    const at::Tensor& q, const at::Tensor& k_new, const at::Tensor& v_new,
    const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& offsets,
    const at::Tensor& lengths, double scale) {
  check_arguments(q, k_new, v_new, k_cache, v_cache, offsets, lengths);
  const int64_t sequences = q.size(0), groups = q.size(1), head_dim = q.size(2);
  const bool is_half = q.scalar_type() == at::kHalf;
  TORCH_CHECK_TYPE(is_half || q.scalar_type() == at::kBFloat16, kOp,
                   "on CUDA tensors must be Half or BFloat16, got ", q.scalar_type());
  TORCH_CHECK_VALUE(has_kernel(head_dim, groups), kOp,
                    "on CUDA D must be 64, 96 or 128 and G 1 to ", kMostGroups, ", got q ",
                    q.sizes());
  TORCH_CHECK_VALUE(sequences <= std::numeric_limits<int32_t>::max() / kMostGroups, kOp,
                    "too many sequences: ", sequences);
  TORCH_CHECK_VALUE(is_aligned(k_cache) && is_aligned(v_cache), kOp,
                    "k_cache and v_cache must begin at a multiple of 16 bytes");
  const c10::cuda::CUDAGuard guard(q.device());
  at::Tensor out = at::empty_like(q, at::MemoryFormat::Contiguous);
  if (sequences == 0) return out;

  const at::Tensor query = in_rows(q), key = in_rows(k_new), value = in_rows(v_new);
  const auto plan = plan_of(is_half ? Element::kHalf : Element::kBFloat16,
                            static_cast<int32_t>(head_dim));
  AppendAttend task;
  task.sequences = static_cast<int32_t>(sequences);
  task.groups = static_cast<int32_t>(groups);
  const auto bytes = static_cast<int64_t>(workspace_bytes(plan, task.sequences, task.groups));
  const at::Tensor workspace = at::empty({bytes}, q.options().dtype(at::kByte));
  task.q = query.const_data_ptr();
  task.k_new = key.const_data_ptr();
  task.v_new = value.const_data_ptr();
  task.k_cache = k_cache.mutable_data_ptr();
  task.v_cache = v_cache.mutable_data_ptr();
  task.offsets = offsets.const_data_ptr<int32_t>();
  task.lengths = lengths.mutable_data_ptr<int32_t>();
  task.out = out.mutable_data_ptr();
  task.workspace = workspace.mutable_data_ptr();
  task.scale = static_cast<float>(scale);
  C10_CUDA_CHECK(append_attend(task, plan, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparsemm, CUDA, m) { m.impl("append_attend", &append_attend_cuda); }

}  // namespace sparsemm

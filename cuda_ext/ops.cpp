// The ops' schemas, and their meta and CPU kernels; cuda.cpp adds the CUDA ones.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu.h"

namespace sparsemm {
namespace {

at::Tensor append_attend_meta(
    const at::Tensor& q, const at::Tensor& k_new, const at::Tensor& v_new,
    const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& offsets,
    const at::Tensor& lengths, double /*scale*/) {
  check_arguments(q, k_new, v_new, k_cache, v_cache, offsets, lengths);
  return at::empty_like(q, at::MemoryFormat::Contiguous);
}

at::Tensor append_attend(
    const at::Tensor& q, const at::Tensor& k_new, const at::Tensor& v_new,
    const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& offsets,
    const at::Tensor& lengths, double scale) {
  check_arguments(q, k_new, v_new, k_cache, v_cache, offsets, lengths);
  return append_attend_cpu(q, k_new, v_new, k_cache, v_cache, offsets, lengths, scale);
}

}  // namespace

TORCH_LIBRARY(sparsemm, m) {
  m.def(
      "append_attend(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor offsets, Tensor(c!) lengths, float scale) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sparsemm, Meta, m) { m.impl("append_attend", &append_attend_meta); }

TORCH_LIBRARY_IMPL(sparsemm, CPU, m) { m.impl("append_attend", &append_attend); }

}  // namespace sparsemm

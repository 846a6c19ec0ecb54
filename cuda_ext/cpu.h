#pragma once

#include <ATen/core/Tensor.h>

namespace sparsemm {

// sparsemm::append_attend on the CPU; the arguments' shapes have been checked.
at::Tensor append_attend_cpu(
    const at::Tensor& q, const at::Tensor& k_new, const at::Tensor& v_new,
    const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& offsets,
    const at::Tensor& lengths, double scale);

}  // namespace sparsemm

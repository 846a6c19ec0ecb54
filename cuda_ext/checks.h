// What every device asks of the arguments of sparsemm::append_attend.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <initializer_list>
#include <utility>

namespace sparsemm {

// Sizes are SymInts, so that the meta kernel may share these checks while a graph is traced.
inline void check_arguments(
    const at::Tensor& q, const at::Tensor& k_new, const at::Tensor& v_new,
    const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& offsets,
    const at::Tensor& lengths) {
  constexpr auto op = "sparsemm::append_attend: ";
  TORCH_CHECK_VALUE(q.dim() == 3, op, "q must be [S, G, D], got ", q.sym_sizes());
  const auto s = q.sym_size(0), g = q.sym_size(1), d = q.sym_size(2);
  TORCH_CHECK_VALUE(g > 0 && d > 0, op, "q [S, G, D] needs G and D of at least 1, got ",
                    q.sym_sizes());
  for (const auto& [name, x] : {std::pair{"k_new", &k_new}, std::pair{"v_new", &v_new}}) {
    TORCH_CHECK_VALUE(
        x->dim() == 2 && x->sym_size(0) == s && x->sym_size(1) == d, op, name,
        " must be [S, D] = [", s, ", ", d, "] as q says, got ", x->sym_sizes());
  }
  for (const auto& [name, x] : {std::pair{"k_cache", &k_cache}, std::pair{"v_cache", &v_cache}}) {
    TORCH_CHECK_VALUE(x->dim() == 2 && x->sym_size(1) == d, op, name,
                      " must be [T, D] with D = ", d, " as q says, got ", x->sym_sizes());
    TORCH_CHECK_VALUE(x->is_contiguous(), op, name, " must be contiguous, got strides ",
                      x->sym_strides());
  }
  TORCH_CHECK_VALUE(k_cache.sym_size(0) == v_cache.sym_size(0), op,
                    "k_cache and v_cache must have equally many slots, got ", k_cache.sym_size(0),
                    " and ", v_cache.sym_size(0));
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.sym_size(0) == s + 1, op,
                    "offsets must be [S + 1] = [", s + 1, "], got ", offsets.sym_sizes());
  TORCH_CHECK_VALUE(lengths.dim() == 1 && lengths.sym_size(0) == s, op, "lengths must be [S] = [",
                    s, "], got ", lengths.sym_sizes());

  for (const auto& [name, x] : {std::pair{"k_new", &k_new}, std::pair{"v_new", &v_new},
                                std::pair{"k_cache", &k_cache}, std::pair{"v_cache", &v_cache}}) {
    TORCH_CHECK_TYPE(x->scalar_type() == q.scalar_type(), op, name, " must be ", q.scalar_type(),
                     " as q is, got ", x->scalar_type());
    TORCH_CHECK_VALUE(x->device() == q.device(), op, name, " must be on ", q.device(),
                      " as q is, got ", x->device());
    TORCH_CHECK_NOT_IMPLEMENTED(!(at::GradMode::is_enabled() && x->requires_grad()), op, name,
                                " requires grad, but the op has no gradient: call it under "
                                "torch.no_grad()");
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!(at::GradMode::is_enabled() && q.requires_grad()), op,
                              "q requires grad, but the op has no gradient: call it under "
                              "torch.no_grad()");
  for (const auto& [name, x] : {std::pair{"offsets", &offsets}, std::pair{"lengths", &lengths}}) {
    TORCH_CHECK_TYPE(x->scalar_type() == at::kInt, op, name, " must be Int (int32), got ",
                     x->scalar_type());
    TORCH_CHECK_VALUE(x->device() == q.device(), op, name, " must be on ", q.device(),
                      " as q is, got ", x->device());
    TORCH_CHECK_VALUE(x->is_contiguous(), op, name, " must be contiguous, got strides ",
                      x->sym_strides());
  }
}

}  // namespace sparsemm

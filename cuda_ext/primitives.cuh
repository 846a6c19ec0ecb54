// The few instructions of the GPU that C++ has no word for, behind functions of plain meaning.
//
// Their bodies are PTX. A compiler without CUDA sees declarations only: whoever runs the kernels
// elsewhere (tests/cuda_ext/emulator) brings bodies of its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDACC__)
#define SPARSEMM_PRIMITIVE __device__ __forceinline__
#else
#define SPARSEMM_PRIMITIVE
#endif

namespace sparsemm {

struct alignas(16) Pairs4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Pairs2 {
  uint32_t x, y;
};

// Two 16-bit numbers of an element type lie in a register, the earlier one in the low half.
//
// mma: d += a b with a [16, 16] and b [16, 8] spread over the warp as m16n8k16 has it. With
// g = lane / 4 and c = lane % 4, a lane holds
//   a: rows g, g + 8, g, g + 8 at columns 2c, 2c + 1; the last two registers 8 columns on,
//   b: column g at rows 2c, 2c + 1 and, in the second register, 8 rows on,
//   d: row g at columns 2c, 2c + 1, then row g + 8 at the same.
// Volatile, as all lanes must come together: the compiler may not move it into a branch.
struct Half {
  static constexpr bool kIsCoarse = false;  // 11 binary digits
  static SPARSEMM_PRIMITIVE uint32_t pack(float low, float high);
  static SPARSEMM_PRIMITIVE void mma(float (&d)[4], Pairs4 a, Pairs2 b);
};
struct BFloat16 {
  static constexpr bool kIsCoarse = true;  // 8
  static SPARSEMM_PRIMITIVE uint32_t pack(float low, float high);
  static SPARSEMM_PRIMITIVE void mma(float (&d)[4], Pairs4 a, Pairs2 b);
};

// Reads that pass by the L1 cache: of what this kernel reads once and nobody writes meanwhile.
SPARSEMM_PRIMITIVE Pairs4 stream16(const void* address);
SPARSEMM_PRIMITIVE Pairs2 stream8(const void* address);

// Lets the next kernel of the stream come up while this one works, if it was launched to do so.
SPARSEMM_PRIMITIVE void let_next_kernel_start();
// Waits until the kernel before is through and all it wrote can be seen.
SPARSEMM_PRIMITIVE void wait_for_previous_kernel();

#if defined(__CUDACC__)

SPARSEMM_PRIMITIVE uint32_t Half::pack(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

SPARSEMM_PRIMITIVE uint32_t BFloat16::pack(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

SPARSEMM_PRIMITIVE void Half::mma(float (&d)[4], Pairs4 a, Pairs2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

SPARSEMM_PRIMITIVE void BFloat16::mma(float (&d)[4], Pairs4 a, Pairs2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

SPARSEMM_PRIMITIVE Pairs4 stream16(const void* address) {
  Pairs4 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(__cvta_generic_to_global(address)));
  return r;
}

SPARSEMM_PRIMITIVE Pairs2 stream8(const void* address) {
  Pairs2 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(r.x), "=r"(r.y)
               : "l"(__cvta_generic_to_global(address)));
  return r;
}

SPARSEMM_PRIMITIVE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

SPARSEMM_PRIMITIVE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif  // __CUDACC__

}  // namespace sparsemm

// Stands in for CUDA's header of this name, so that a C++ compiler takes kernels as they are.
//
// Only what the kernels of cuda_ext use is here. Blocks run one after the other in shuffled order,
// the threads of a block as fibers (runtime.cpp); a warp whose lanes do not meet at the same
// collective, or a block whose threads do not meet at a barrier, fails the launch with a message.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
using cudaStream_t = void*;

struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {

// What the emulated device says of itself, and the order its blocks run in.
struct Device {
  int processors = 1;
  int resident = 1;  // blocks a processor
  int ptx_version = 90;
  unsigned seed = 0;
};
extern Device device;

// Reads of primitives.cuh are held to these ranges, in which a row may be closed.
void allow_reads(const void* begin, size_t rows, size_t row_bytes, const bool* open);
void forget_reads();

const char* failure();  // of the last launch, empty if it went well
uint16_t rounded(float value, bool bfloat16);
float widened(uint16_t bits, bool bfloat16);
cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

enum class Collective { kBarrier, kShuffle, kShuffleUp, kShuffleXor, kHalfMma, kBFloat16Mma };
uint64_t shuffle(Collective kind, unsigned mask, uint64_t bits, int source);

template <typename T>
T shuffle(Collective kind, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

extern dim3 threadIdx;  // of the fiber that runs
extern dim3 blockIdx;

void __syncthreads();

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::shuffle(emulator::Collective::kShuffle, mask, value, lane % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip) {
  const int lane = threadIdx.x % 32;
  return emulator::shuffle(emulator::Collective::kShuffleXor, mask, value, lane ^ flip);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  const int lane = threadIdx.x % 32;
  const int source = lane >= delta ? lane - delta : lane;
  return emulator::shuffle(emulator::Collective::kShuffleUp, mask, value, source);
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    picked |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return picked;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = emulator::device.ptx_version;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = emulator::device.resident;
  return cudaSuccess;
}
template <typename Argument>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Argument), const Argument& argument) {
  return emulator::launch(*config, [&] { kernel(argument); });
}

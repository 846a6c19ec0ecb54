// A block's threads as fibers, and what they do together.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../../cuda_ext/primitives.cuh"

dim3 threadIdx;
dim3 blockIdx;

namespace emulator {

Device device;

namespace {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 * 1024;

enum class State { kReady, kWaiting, kDone };

struct Exchange {
  uint64_t bits;
  int source;
};
struct Product {
  float* d;
  sparsemm::Pairs4 a;
  sparsemm::Pairs2 b;
};

struct Fiber {
  State state;
  Collective at;
  void* operands;
  bool waited;  // for the kernel before
  bool started;
  jmp_buf place;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

std::vector<Fiber> fibers;
Fiber* running = nullptr;
const std::function<void()>* work = nullptr;
bool overlapped = false;
jmp_buf scheduler;
ucontext_t scheduler_context;
std::string message;

struct Readable {
  const char* begin;
  size_t rows, row_bytes;
  const bool* open;
};
std::vector<Readable> readable;

// Leaves the running fiber until it is resumed.
void leave() {
  if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
}

[[noreturn]] void fail(const std::string& what) {
  if (message.empty()) {
    message = what + " (block " + std::to_string(blockIdx.x) + ", thread " +
              std::to_string(threadIdx.x) + ")";
  }
  _longjmp(scheduler, 1);  // no fiber is resumed once there is a message
}

void meet(Collective at, void* operands) {
  if (overlapped && !running->waited) fail("a collective before the wait for the kernel before");
  running->state = State::kWaiting;
  running->at = at;
  running->operands = operands;
  leave();
}

// A fiber runs the same thread of one block after the other.
void body() {
  for (;;) {
    (*work)();
    if (overlapped && !running->waited) fail("a thread never waited for the kernel before");
    running->state = State::kDone;
    leave();
  }
}

void resume(int thread) {
  threadIdx = dim3(thread);
  running = &fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (running->started) _longjmp(running->place, 1);
  running->started = true;
  getcontext(&running->context);
  running->stack = std::make_unique<char[]>(kStack);
  running->context.uc_stack.ss_sp = running->stack.get();
  running->context.uc_stack.ss_size = kStack;
  running->context.uc_link = nullptr;
  makecontext(&running->context, body, 0);
  swapcontext(&scheduler_context, &running->context);
}

float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  if (exponent == 31) value = mantissa != 0 ? NAN : INFINITY;
  return bits & 0x8000 ? -value : value;
}

uint16_t to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520) return sign | 0x7c00;
  if (size == 0) return sign;
  int exponent = 0;
  std::frexp(size, &exponent);                    // size < 2^exponent
  const int unit = std::max(exponent - 11, -24);  // log2 of the last bit's worth
  const int count = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));  // ties to even
  // Counts of 1024 and more carry the leading bit, which adds one to the exponent's field.
  return sign | static_cast<uint16_t>(((unit + 24) << 10) + count);
}

float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Element `half` (0 low, 1 high) of a register.
template <float (*kFrom)(uint16_t)>
float element(uint32_t pair, int half) {
  return kFrom(static_cast<uint16_t>(pair >> 16 * half));
}

// mma.m16n8k16 as the PTX ISA lays its fragments out: element i of a lane's fragment, with
// group = lane / 4 and member = lane % 4, is
//   A: row group (+ 8 if i is 2, 3, 6 or 7), column 2 member + i % 2 (+ 8 if i >= 4)
//   B: row 2 member + i % 2 (+ 8 if i >= 2), column group
//   C, D: row group (+ 8 if i >= 2), column 2 member + i % 2
template <float (*kFrom)(uint16_t)>
void multiply(const Fiber* warp) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& product = *static_cast<const Product*>(warp[lane].operands);
    const int group = lane / 4, member = lane % 4;
    const uint32_t a_pairs[4] = {product.a.x, product.a.y, product.a.z, product.a.w};
    const uint32_t b_pairs[2] = {product.b.x, product.b.y};
    for (int i = 0; i < 8; ++i) {
      const int row = group + (i / 2 % 2 == 1 ? 8 : 0);
      const int column = 2 * member + i % 2 + (i >= 4 ? 8 : 0);
      a[row][column] = element<kFrom>(a_pairs[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      b[2 * member + i % 2 + (i >= 2 ? 8 : 0)][group] = element<kFrom>(b_pairs[i / 2], i % 2);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<const Product*>(warp[lane].operands)->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
      float sum = d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      d[i] = sum;
    }
  }
}

void exchange(const Fiber* warp) {
  std::array<uint64_t, kLanes> before;
  for (int lane = 0; lane < kLanes; ++lane) {
    before[lane] = static_cast<Exchange*>(warp[lane].operands)->bits;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    auto& mine = *static_cast<Exchange*>(warp[lane].operands);
    mine.bits = before[mine.source];
  }
}

// Runs a warp until it is through or at a barrier; true if it is through.
bool run_warp(int first) {
  Fiber* warp = &fibers[first];
  for (;;) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (warp[lane].state == State::kReady) resume(first + lane);
      if (!message.empty()) return true;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (warp[lane].state != warp[0].state ||
          (warp[0].state == State::kWaiting && warp[lane].at != warp[0].at)) {
        message = "lanes of a warp part ways: lane " + std::to_string(lane) + " of block " +
                  std::to_string(blockIdx.x) + " is not where lane 0 waits";
        return true;
      }
    }
    if (warp[0].state == State::kDone) return true;
    switch (warp[0].at) {
      case Collective::kBarrier: return false;
      case Collective::kHalfMma: multiply<from_half>(warp); break;
      case Collective::kBFloat16Mma: multiply<from_bfloat16>(warp); break;
      default: exchange(warp);
    }
    for (int lane = 0; lane < kLanes; ++lane) warp[lane].state = State::kReady;
  }
}

void run_block(int threads, std::mt19937& random) {
  for (int i = 0; i < threads; ++i) {
    fibers[i].state = State::kReady;
    fibers[i].waited = false;
  }
  std::vector<int> warps;
  for (int first = 0; first < threads; first += kLanes) warps.push_back(first);
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), random);
    size_t done = 0;
    for (const int first : warps) done += run_warp(first);
    if (!message.empty() || done == warps.size()) return;
    if (done != 0) {
      message = "a barrier that not all warps reach";
      return;
    }
    for (int i = 0; i < threads; ++i) fibers[i].state = State::kReady;
  }
}

void check_read(const void* address, size_t bytes) {
  const char* begin = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("a read off its alignment");
  for (const Readable& range : readable) {
    if (begin < range.begin || begin + bytes > range.begin + range.rows * range.row_bytes) continue;
    if (range.open != nullptr && !range.open[(begin - range.begin) / range.row_bytes]) {
      fail("a read of a slot that holds no token");
    }
    return;
  }
  fail("a read outside the tensors");
}

}  // namespace

void allow_reads(const void* begin, size_t rows, size_t row_bytes, const bool* open) {
  readable.push_back({static_cast<const char*>(begin), rows, row_bytes, open});
}

void forget_reads() { readable.clear(); }

const char* failure() { return message.c_str(); }

uint16_t rounded(float value, bool bfloat16) {
  return bfloat16 ? to_bfloat16(value) : to_half(value);
}
float widened(uint16_t bits, bool bfloat16) {
  return bfloat16 ? from_bfloat16(bits) : from_half(bits);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const int threads = static_cast<int>(config.blockDim.x);
  message.clear();
  work = &thread;
  overlapped = config.numAttrs > 0 && config.attrs[0].val.programmaticStreamSerializationAllowed;
  if (fibers.size() != static_cast<size_t>(threads)) {
    fibers.clear();
    fibers.resize(threads);
  }
  std::mt19937 random(device.seed);
  std::vector<unsigned> blocks(config.gridDim.x);
  for (unsigned i = 0; i < config.gridDim.x; ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const unsigned block : blocks) {
    blockIdx = dim3(block);
    run_block(threads, random);
    if (message.empty()) continue;
    fibers.clear();  // left in the middle of their work
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

uint64_t shuffle(Collective kind, unsigned mask, uint64_t bits, int source) {
  if (mask != 0xffffffff) fail("a shuffle among some lanes only");
  Exchange mine = {bits, source};
  meet(kind, &mine);
  return mine.bits;
}

}  // namespace emulator

void __syncthreads() { emulator::meet(emulator::Collective::kBarrier, nullptr); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::device.processors;
  return cudaSuccess;
}

namespace sparsemm {

uint32_t Half::pack(float low, float high) {
  return emulator::to_half(low) | static_cast<uint32_t>(emulator::to_half(high)) << 16;
}
uint32_t BFloat16::pack(float low, float high) {
  return emulator::to_bfloat16(low) | static_cast<uint32_t>(emulator::to_bfloat16(high)) << 16;
}

void Half::mma(float (&d)[4], Pairs4 a, Pairs2 b) {
  emulator::Product product = {d, a, b};
  emulator::meet(emulator::Collective::kHalfMma, &product);
}
void BFloat16::mma(float (&d)[4], Pairs4 a, Pairs2 b) {
  emulator::Product product = {d, a, b};
  emulator::meet(emulator::Collective::kBFloat16Mma, &product);
}

Pairs4 stream16(const void* address) {
  emulator::check_read(address, sizeof(Pairs4));
  return *static_cast<const Pairs4*>(address);
}
Pairs2 stream8(const void* address) {
  emulator::check_read(address, sizeof(Pairs2));
  return *static_cast<const Pairs2*>(address);
}

void let_next_kernel_start() {}
void wait_for_previous_kernel() { emulator::running->waited = true; }

}  // namespace sparsemm

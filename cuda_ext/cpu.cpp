// One new token of attention over ragged keys and values, on the CPU.
//
// A worker takes its span of the partition and goes through each sequence tile by tile: scores of a
// tile, an online softmax, then the tile's values weighed into the running sum. Every key and value
// is read where it lies and, once in registers, used for all query heads of its KV head.
#include "cpu.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "partition.h"

namespace sparsemm {
namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int kLanes = Vec::size();
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kHeads = kRegisters / 4;        // query heads that share a register of keys
constexpr int kSums = kRegisters * 3 / 4;     // registers that may hold running sums
constexpr int32_t kTile = 64;                 // tokens; their keys and values fit into L2
constexpr int32_t kSetup = 1;                 // tiles' worth of work that any sequence costs
constexpr int64_t kLeast = 1 << 15;           // multiplications that are worth a thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();
static_assert(kTile % kLanes == 0);

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline Vec load(const float* x) { return Vec::loadu(x); }

inline Vec load(const at::BFloat16* x) {
  Vec out;
  at::vec::load_fp32_from_bf16(x, out);
  return out;
}

inline Vec load(const at::Half* x) {
  Vec out;
  at::vec::load_fp32_from_fp16(x, out);
  return out;
}

// The first `count` < kLanes elements, and zeros.
template <typename T>
inline Vec load(const T* x, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, x, count * sizeof(T));
  return load(padded);
}

inline Vec load(const float* x, int64_t count) { return Vec::loadu(x, count); }

inline void store(Vec x, float* out, int64_t count) { x.store(out, count); }

template <typename T>
inline void store(Vec x, T* out, int64_t count) {
  at::vec::convert_from_float<T>(x, x).store(out, count);
}

// Largest power of two, at most `most`, of which `each` registers fit among the running sums.
constexpr int fitting(int each, int most) {
  int n = 1;
  while (2 * n <= most && 2 * n * each <= kSums) n *= 2;
  return n;
}

// What will be read next: while keys are scored, their values; while those are weighed, the next
// keys. Each step asks for as many bytes as it reads itself, into L2; without, a core waits for
// memory.
class Ahead {
 public:
  explicit Ahead(const void* at) : at_(static_cast<const char*>(at)) {}

  template <int Bytes>
  inline void step() {
#pragma GCC unroll 16
    for (int i = 0; i < Bytes; i += 64) __builtin_prefetch(at_ + i, 0, 2);
    at_ += Bytes;
  }

 private:
  const char* at_;
};

// Lane sums of N vectors: N groups of kLanes / N partial sums, in order.
template <int N>
inline Vec fold(Vec* x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      const auto [even, odd] = at::vec::deinterleave2(x[2 * i], x[2 * i + 1]);
      x[i] = even + odd;
    }
    return fold<N / 2>(x);
  }
}

// Scores of G query heads over kLanes tokens, of which the first `tokens` are there.
template <typename T, int G, bool Whole>
inline void score(
    const float* q, int64_t width, const T* keys, int64_t dim, int64_t tokens, float* scores,
    Ahead& ahead) {
  constexpr int kTokens = fitting(G, kLanes);  // whose sums are in registers at a time
  constexpr int kRounds = kLanes / kTokens;
  Vec part[G][kRounds];
#pragma GCC unroll 16
  for (int round = 0; round < kRounds; ++round) {
    const T* row[kTokens];
    Vec sum[G][kTokens];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      // A token that is not there may be another's, or NaN: the last one stands in for it.
      const int64_t token = round * kTokens + t;
      row[t] = keys + (Whole ? token : std::min(token, tokens - 1)) * dim;
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) sum[g][t] = Vec(0.f);
    }
    int64_t d = 0;
    const auto step = [&](auto... count) {
      ahead.step<kTokens * kLanes * sizeof(T)>();
      Vec x[G];
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) x[g] = Vec::loadu(q + g * width + d);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const Vec key = load(row[t] + d, count...);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) sum[g][t] = at::vec::fmadd(x[g], key, sum[g][t]);
      }
    };
    for (; d + kLanes <= dim; d += kLanes) step();
    if (d < dim) step(dim - d);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) part[g][round] = fold<kTokens>(sum[g]);
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) fold<kRounds>(part[g]).store(scores + g * kTile);
}

// sums = sums * fade + weights x values, over N vectors of columns (or `count` < kLanes columns).
template <typename T, int G, int N, typename... Count>
inline void weigh(
    const float* weights, const T* values, int64_t dim, int64_t tokens, const float* fade,
    float* sums, int64_t width, Ahead& ahead, Count... count) {
  // Few sums would wait for each other: tokens then take turns among more of them.
  constexpr int kTurns = fitting(G * N, G * N >= 8 ? 1 : 8 / (G * N));
  Vec sum[kTurns][G][N];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      sum[0][g][n] = Vec::loadu(sums + g * width + n * kLanes) * Vec(fade[g]);
#pragma GCC unroll 8
      for (int turn = 1; turn < kTurns; ++turn) sum[turn][g][n] = Vec(0.f);
    }
  }
  const auto step = [&](int64_t t, int turn) {
    ahead.step<N * kLanes * sizeof(T)>();
    Vec value[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) value[n] = load(values + t * dim + n * kLanes, count...);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const Vec weight(weights[g * kTile + t]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        sum[turn][g][n] = at::vec::fmadd(weight, value[n], sum[turn][g][n]);
      }
    }
  };
  int64_t t = 0;
  for (; t + kTurns <= tokens; t += kTurns) {
#pragma GCC unroll 8
    for (int turn = 0; turn < kTurns; ++turn) step(t + turn, turn);
  }
  for (; t < tokens; ++t) step(t, 0);
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
      for (int turn = 1; turn < kTurns; ++turn) {
        sum[0][g][n] = sum[0][g][n] + sum[turn][g][n];
      }
      sum[0][g][n].store(sums + g * width + n * kLanes);
    }
  }
}

// All columns from d on, as many at a time as registers allow.
template <typename T, int G, int N>
inline void weigh_columns(
    const float* weights, const T* values, int64_t dim, int64_t tokens, const float* fade,
    float* sums, int64_t width, Ahead& ahead, int64_t d) {
  for (; d + N * kLanes <= dim; d += N * kLanes) {
    weigh<T, G, N>(weights, values + d, dim, tokens, fade, sums + d, width, ahead);
  }
  if constexpr (N > 1) {
    weigh_columns<T, G, N / 2>(weights, values, dim, tokens, fade, sums, width, ahead, d);
  } else if (d < dim) {
    weigh<T, G, 1>(weights, values + d, dim, tokens, fade, sums + d, width, ahead, dim - d);
  }
}

// The state of a softmax over the tokens seen so far, of all query heads of a sequence.
struct State {
  float* most;   // [G] largest score
  float* total;  // [G] sum of exp(score - most)
  float* sums;   // [G, width] values weighed by exp(score - most)
};

// Turns a tile's scores into weights; returns by how much what was summed before must fade.
inline float soften(float* scores, int64_t tokens, float& most, float& total) {
  const int64_t padded = round_up(tokens, kLanes);
  std::fill(scores + tokens, scores + padded, -kInfinity);
  Vec largest(most);
  for (int64_t t = 0; t < padded; t += kLanes) {
    largest = at::vec::maximum(largest, Vec::loadu(scores + t));
  }
  const float now = at::vec::vec_reduce_all<float>(
      [](const Vec& x, const Vec& y) { return at::vec::maximum(x, y); }, largest);
  // Nothing but -inf so far: any finite reference keeps the weights at 0.
  const float reference = now == -kInfinity ? 0.f : now;
  Vec sum(0.f);
  for (int64_t t = 0; t < padded; t += kLanes) {
    const Vec weight = (Vec::loadu(scores + t) - Vec(reference)).exp_u20();
    weight.store(scores + t);
    sum = sum + weight;
  }
  const float fade = most == -kInfinity ? 0.f : std::exp(most - reference);
  total = total * fade + at::vec::vec_reduce_all<float>(
                             [](const Vec& x, const Vec& y) { return x + y; }, sum);
  most = now;
  return fade;
}

// One tile under G query heads.
template <typename T, int G>
void attend_tile(
    const float* q, int64_t width, const T* keys, const T* values, int64_t dim, int64_t tokens,
    const T* next, float* scores, State state) {
  Ahead ahead(values);
  int64_t t = 0;
  for (; t + kLanes <= tokens; t += kLanes) {
    score<T, G, true>(q, width, keys + t * dim, dim, kLanes, scores + t, ahead);
  }
  if (t < tokens) score<T, G, false>(q, width, keys + t * dim, dim, tokens - t, scores + t, ahead);
  float fade[G];
  for (int g = 0; g < G; ++g) {
    fade[g] = soften(scores + g * kTile, tokens, state.most[g], state.total[g]);
  }
  ahead = Ahead(next);
  weigh_columns<T, G, fitting(G, 8)>(
      scores, values, dim, tokens, fade, state.sums, width, ahead, 0);
}

template <typename T>
using AttendTile = void (*)(
    const float*, int64_t, const T*, const T*, int64_t, int64_t, const T*, float*, State);

template <typename T, int... Heads>
AttendTile<T> tile_function(int64_t heads, std::integer_sequence<int, Heads...>) {
  static constexpr AttendTile<T> functions[] = {attend_tile<T, Heads + 1>...};
  return functions[heads - 1];
}

template <typename T>
class Attention {
 public:
  Attention(
      const at::Tensor& q, const at::Tensor& k_new, const at::Tensor& v_new,
      const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& offsets,
      const at::Tensor& lengths, double scale, const at::Tensor& out)
      : sequences_(q.size(0)), group_(q.size(1)), dim_(q.size(2)), slots_(k_cache.size(0)),
        width_(round_up(dim_, kLanes)), scale_(static_cast<float>(scale)),
        q_(q.const_data_ptr<T>()), k_new_(k_new.const_data_ptr<T>()),
        v_new_(v_new.const_data_ptr<T>()), keys_(k_cache.data_ptr<T>()),
        values_(v_cache.data_ptr<T>()), offsets_(offsets.const_data_ptr<int32_t>()),
        lengths_(lengths.data_ptr<int32_t>()), out_(out.data_ptr<T>()),
        base_(sequences_ + 1) {}

  void run() {
    for (int64_t s = 0; s < sequences_; ++s) {
      TORCH_CHECK_VALUE(
          0 <= offsets_[s] && offsets_[s] <= offsets_[s + 1] && offsets_[s + 1] <= slots_,
          "sparsemm::append_attend: offsets must ascend from 0 to at most the ", slots_,
          " slots of the cache, got ", offsets_[s], " and ", offsets_[s + 1], " for sequence ", s);
      base_[s + 1] = base_[s] + Partition{kTile, kSetup, 0}.units(lengths_[s], capacity(s));
    }
    const int64_t units = base_[sequences_];
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t least = std::max<int64_t>(1, kLeast / (kTile * group_ * width_));
    partition_ = make_partition(units, threads, least, kTile, kSetup);
    const int64_t workers = (units + partition_.share - 1) / partition_.share;

    const int64_t state = group_ * (width_ + 2);
    const int64_t scratch = group_ * (width_ + kTile);
    const at::Tensor workspace = at::empty({workers * (2 * state + scratch)}, at::kFloat);
    float* const room = workspace.data_ptr<float>();
    std::vector<int64_t> unfinished(workers, -1);
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        unfinished[worker] =
            work(worker, room, room + 2 * workers * state + worker * scratch);
      }
    });
    for (int64_t worker = 0; worker < workers; ++worker) {
      if (unfinished[worker] >= 0) merge(unfinished[worker], worker, room);
    }
    for (int64_t s = 0; s < sequences_; ++s) {
      if (is_live(lengths_[s], capacity(s))) ++lengths_[s];
    }
  }

 private:
  int32_t capacity(int64_t s) const { return offsets_[s + 1] - offsets_[s]; }

  State slot(float* room, int64_t index) const {
    float* const at = room + index * group_ * (width_ + 2);
    return {at, at + group_, at + 2 * group_};
  }

  // Goes through a worker's span; returns the sequence that begins in it and goes on, or -1.
  int64_t work(int64_t worker, float* room, float* scratch) const {
    const int64_t first = worker * partition_.share;
    const int64_t after = first + partition_.share;
    int64_t s = std::upper_bound(base_.begin(), base_.end(), first) - base_.begin() - 1;
    for (; s < sequences_ && base_[s] < after; ++s) {
      const int64_t tiles = partition_.tiles(lengths_[s], capacity(s));
      if (tiles == 0) {
        if (base_[s] >= first) leave(s);
        continue;
      }
      const int64_t begin = partition_.begin(worker, base_[s]);
      const int64_t end = partition_.end(worker, base_[s], tiles);
      if (begin >= end) continue;
      // A sequence that goes on is the last of the span: those before it may use its place.
      const State state = slot(room, 2 * worker + (begin == 0 ? 1 : 0));
      attend(s, begin, end, scratch, state);
      if (end < tiles) return begin == 0 ? s : -1;
      if (begin == 0) finish(s, state);
    }
    return -1;
  }

  void attend(int64_t s, int64_t begin, int64_t end, float* scratch, State state) const {
    const int64_t length = lengths_[s], start = offsets_[s];
    if (end == length / kTile + 1) {
      const int64_t at = (start + length) * dim_;
      std::memcpy(keys_ + at, k_new_ + s * dim_, dim_ * sizeof(T));
      std::memcpy(values_ + at, v_new_ + s * dim_, dim_ * sizeof(T));
    }
    float* const q = scratch;
    float* const scores = scratch + group_ * width_;
    const Vec scale(scale_);
    for (int64_t g = 0; g < group_; ++g) {
      const T* const from = q_ + (s * group_ + g) * dim_;
      int64_t d = 0;
      for (; d + kLanes <= dim_; d += kLanes) (load(from + d) * scale).store(q + g * width_ + d);
      if (d < dim_) (load(from + d, dim_ - d) * scale).store(q + g * width_ + d);
    }
    std::fill_n(state.most, group_, -kInfinity);
    std::fill_n(state.total, group_, 0.f);
    std::fill_n(state.sums, group_ * width_, 0.f);

    const int64_t parts = (group_ + kHeads - 1) / kHeads;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t token = tile * kTile;
      const int64_t tokens = std::min<int64_t>(kTile, length + 1 - token);
      const T* const keys = keys_ + (start + token) * dim_;
      const T* const values = values_ + (start + token) * dim_;
      const int64_t after = tile + 1 < end ? start + token + kTile : offsets_[s + 1];
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t g = part * group_ / parts, heads = (part + 1) * group_ / parts - g;
        tile_function<T>(heads, std::make_integer_sequence<int, kHeads>())(
            q + g * width_, width_, keys, values, dim_, tokens, keys_ + after * dim_,
            scores + g * kTile,
            {state.most + g, state.total + g, state.sums + g * width_});
      }
    }
  }

  // Adds up the parts of a sequence that `first` and the workers after it hold, in their order.
  void merge(int64_t s, int64_t first, float* room) const {
    const int64_t tiles = partition_.tiles(lengths_[s], capacity(s));
    const int64_t last = partition_.last(base_[s], tiles);
    const State state = slot(room, 2 * first + 1);
    for (int64_t worker = first + 1; worker <= last; ++worker) {
      const State other = slot(room, 2 * worker);
      for (int64_t g = 0; g < group_; ++g) {
        const float most = std::isnan(other.most[g]) || other.most[g] > state.most[g]
                               ? other.most[g] : state.most[g];
        const float reference = most == -kInfinity ? 0.f : most;
        const float mine = std::exp(state.most[g] - reference);
        const float its = std::exp(other.most[g] - reference);
        state.most[g] = most;
        state.total[g] = state.total[g] * mine + other.total[g] * its;
        for (int64_t d = 0; d < width_; d += kLanes) {
          float* const at = state.sums + g * width_ + d;
          (Vec::loadu(at) * Vec(mine) + Vec::loadu(other.sums + g * width_ + d) * Vec(its))
              .store(at);
        }
      }
    }
    finish(s, state);
  }

  void finish(int64_t s, State state) const {
    for (int64_t g = 0; g < group_; ++g) {
      // Scores that are NaN or nothing but infinite have no softmax.
      const float factor = std::isfinite(state.most[g])
                               ? 1.f / state.total[g] : std::numeric_limits<float>::quiet_NaN();
      T* const to = out_ + (s * group_ + g) * dim_;
      for (int64_t d = 0; d < dim_; d += kLanes) {
        store(Vec::loadu(state.sums + g * width_ + d) * Vec(factor), to + d,
              std::min<int64_t>(kLanes, dim_ - d));
      }
    }
  }

  // A finished sequence gets 0, a full one NaN.
  void leave(int64_t s) const {
    const float with = is_finished(lengths_[s]) ? 0.f : std::numeric_limits<float>::quiet_NaN();
    std::fill_n(out_ + s * group_ * dim_, group_ * dim_, static_cast<T>(with));
  }

  const int64_t sequences_, group_, dim_, slots_;
  const int64_t width_;  // dim, padded to whole vectors
  const float scale_;
  const T *q_, *k_new_, *v_new_;
  T *keys_, *values_;
  const int32_t* offsets_;
  int32_t* lengths_;
  T* out_;
  std::vector<int64_t> base_;  // first unit of each sequence, and the number of all units
  Partition partition_{};
};

}  // namespace

at::Tensor append_attend_cpu(
    const at::Tensor& q, const at::Tensor& k_new, const at::Tensor& v_new,
    const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& offsets,
    const at::Tensor& lengths, double scale) {
  const at::Tensor query = q.contiguous(), key = k_new.contiguous(), value = v_new.contiguous();
  const at::Tensor out = at::empty_like(query, at::MemoryFormat::Contiguous);
  if (q.size(0) == 0) return out;
  const auto run = [&](auto zero) {
    Attention<decltype(zero)>(
        query, key, value, k_cache, v_cache, offsets, lengths, scale, out).run();
  };
  switch (q.scalar_type()) {
    case at::kFloat: run(float()); break;
    case at::kBFloat16: run(at::BFloat16()); break;
    case at::kHalf: run(at::Half()); break;
    default:
      TORCH_CHECK_TYPE(
          false, "sparsemm::append_attend: the CPU takes Float, BFloat16 and Half, got ",
          q.scalar_type());
  }
  return out;
}

}  // namespace sparsemm

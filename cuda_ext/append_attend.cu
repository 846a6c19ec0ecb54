// Append and attend over ragged keys and values: a launch that attends, a launch that merges.
//
// Blocks are the workers of partition.h. Each finds its own span of the work from the lengths as
// they lie on the device, so that a captured graph stays right while they grow. Of a sequence's
// tiles the warps of a block take turns; a warp multiplies a tile with all query heads at once on
// the tensor cores, from registers alone:
//   scores [heads, tokens]  = Q K^T   heads padded to 16 rows, two fragments of 8 tokens,
//   out^T  [dims, heads]   += V^T P^T the scores' fragment is the second product's as it lies.
// A product over dims may take them in any order that both sides share, and the rows of out^T may
// stand in any order: both are chosen so that every load is 16 bytes of one token.
#include "append_attend.h"

#include <cmath>

#include "partition.h"
#include "primitives.cuh"

namespace sparsemm {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16;       // tokens
constexpr int kSetup = 1;       // what a sequence costs by itself, in tiles
constexpr int kLeast = kWarps;  // below one tile a warp a block only waits
constexpr unsigned kAllLanes = 0xffffffff;
constexpr uint32_t kNaNPair = 0x7fff7fff;  // in both element types

// Who attended to a sequence; the merge has something to do where it was more than one.
struct Span {
  int32_t first;
  int32_t count;
};

// Fixed places for what a worker knows of a sequence it shares: slot 2 * worker if others come
// before it, slot 2 * worker + 1 if it is the first.
struct Workspace {
  float* sums;    // [2 * workers, groups, head_dim], weighted values
  float2* softs;  // [2 * workers, groups], greatest logit (base 2) and sum of weights
  Span* spans;    // [sequences]
};

struct Task {
  AppendAttend io;
  Workspace workspace;
  float scale_log2;  // logits are taken in base 2
  int32_t workers;
};

SPARSEMM_INLINE int64_t partial_slot(int64_t worker, bool continued) {
  return 2 * worker + (continued ? 0 : 1);
}

// 2^(a - b) for a softmax over maxima: with nothing seen yet (b = -inf) it is 0, not NaN.
__device__ __forceinline__ float decay(float a, float b) {
  return exp2f(a - (b == -INFINITY ? 0.0f : b));
}

__device__ __forceinline__ float4 scaled(float4 x, float factor) {
  return make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
}

// Adds the sums of some tokens, `soft` = their greatest logit and sum of weights, to sums that
// stand at `greatest`.
__device__ __forceinline__ void add_part(
    float4& sum, float& weight, float4 part, float2 soft, float greatest) {
  const float factor = decay(soft.x, greatest);
  weight += soft.y * factor;
  sum.x += part.x * factor;
  sum.y += part.y * factor;
  sum.z += part.z * factor;
  sum.w += part.w * factor;
}

template <typename T>
__device__ __forceinline__ void store_four(void* out, int64_t index, float4 x) {
  const uint2 packed = {T::pack(x.x, x.y), T::pack(x.z, x.w)};
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out) + index) = packed;
}

template <int D>
struct Shared {
  float sums[kWarps][kMostGroups][D + 4];  // 4 more: rows of two heads meet fewer equal banks
  float2 softs[kWarps][kMostGroups];
  int32_t warp_units[kWarps];
  int32_t base;      // first unit of ...
  int32_t sequence;  // ... the first sequence this block meets
};

// Where a worker stands: the sequence, and what the lengths say of it.
struct Sequence {
  int32_t index;
  int32_t start;
  int32_t length;
  int32_t capacity;
};

__device__ __forceinline__ Sequence read_sequence(const Task& task, int32_t index) {
  const int32_t start = task.io.offsets[index];
  return {index, start, task.io.lengths[index], task.io.offsets[index + 1] - start};
}

// Shares the units of all sequences out and finds the sequence where this block's span begins.
// False if nothing is left for it. Every block does this by itself: it costs less than a launch.
// Units fit 32 bits, as slots do.
template <int D>
__device__ __forceinline__ bool find_span(
    const Task& task, Shared<D>& shared, Partition* partition) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int32_t sequences = task.io.sequences;
  const int32_t chunk = (sequences + kThreads - 1) / kThreads;
  const int32_t begin = min(thread * chunk, sequences), end = min(begin + chunk, sequences);
  const Partition measure = {kTile, kSetup, 1};
  int32_t units = 0;
#pragma unroll 8
  for (int32_t s = begin; s < end; ++s) {
    const Sequence sequence = read_sequence(task, s);
    units += static_cast<int32_t>(measure.units(sequence.length, sequence.capacity));
  }
  int32_t through = units;  // of this warp's threads up to this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t before = __shfl_up_sync(kAllLanes, through, step);
    through += lane >= step ? before : 0;
  }
  if (lane == 31) shared.warp_units[warp] = through;
  __syncthreads();
  int32_t total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    through += w < warp ? shared.warp_units[w] : 0;
    total += shared.warp_units[w];
  }
  *partition = make_partition(total, task.workers, kLeast, kTile, kSetup);
  const int64_t wanted = blockIdx.x * partition->share;
  if (wanted >= total) return false;
  int32_t base = through - units;
  if (base <= wanted && wanted < through) {
    for (int32_t s = begin; s < end; ++s) {
      const Sequence sequence = read_sequence(task, s);
      const int32_t next =
          base + static_cast<int32_t>(measure.units(sequence.length, sequence.capacity));
      if (wanted < next) {
        shared.sequence = s;
        break;
      }
      base = next;
    }
    shared.base = base;
  }
  __syncthreads();
  return true;
}

// What lane (g, c) = (lane / 4, lane % 4) holds of a tile.
template <int D>
struct Tile {
  // Keys of tokens g and 8 + g. Piece i is dims 32 i + 8 c ... + 7: the rows 2c, 2c + 1 and
  // 2c + 8, 2c + 9 of two k-steps, by agreement with the queries.
  Pairs4 keys[2][D / 32];
  // Values of tokens 2c, 2c + 1, 2c + 8, 2c + 9: a pair of dims for each m-tile, which are its
  // rows g and g + 8. Of every 64 dims lane g has 8 g ... + 7; of a rest of 32, 4 g ... + 3.
  uint32_t values[4][D / 16];
};

// Token of a lane's j-th values, counted from 2c on.
SPARSEMM_INLINE constexpr int32_t value_token(int j) { return j / 2 * 8 + j % 2; }

template <int D>
__device__ __forceinline__ int first_dim(int m_tile, int g) {
  return m_tile < D / 64 * 4 ? m_tile / 4 * 64 + 8 * g + 2 * (m_tile % 4)
                             : D / 64 * 64 + 4 * g + 2 * (m_tile % 4);
}

template <int D>
__device__ __forceinline__ void load_key(Pairs4 (&piece)[D / 32], const uint16_t* row, int c) {
#pragma unroll
  for (int i = 0; i < D / 32; ++i) piece[i] = stream16(row + 32 * i + 8 * c);
}

template <int D>
__device__ __forceinline__ void load_value(uint32_t (&piece)[D / 16], const uint16_t* row, int g) {
#pragma unroll
  for (int i = 0; i < D / 64; ++i) {
    const Pairs4 pairs = stream16(row + 64 * i + 8 * g);
    piece[4 * i] = pairs.x;
    piece[4 * i + 1] = pairs.y;
    piece[4 * i + 2] = pairs.z;
    piece[4 * i + 3] = pairs.w;
  }
  if constexpr (D % 64 != 0) {
    const Pairs2 pairs = stream8(row + D / 64 * 64 + 4 * g);
    piece[D / 16 - 2] = pairs.x;
    piece[D / 16 - 1] = pairs.y;
  }
}

// The rows of one sequence in the cache, and its new row. The new token is read where it came
// from, so that no thread waits for it to be written; slots behind it are not read at all.
struct Rows {
  const uint16_t* cache;  // the sequence's first row
  const uint16_t* fresh;
  int32_t length;

  template <int D>
  __device__ __forceinline__ const uint16_t* at(int32_t token) const {
    return token < length ? cache + static_cast<int64_t>(token) * D : fresh;
  }
};

template <int D>
__device__ __forceinline__ void load_keys(Tile<D>& tile, const Rows& rows, int32_t token) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  if (token + kTile <= rows.length) {
    const uint16_t* row = rows.cache + static_cast<int64_t>(token + g) * D;
    load_key<D>(tile.keys[0], row, c);
    load_key<D>(tile.keys[1], row + 8 * D, c);
    return;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int32_t mine = token + 8 * j + g;
    if (mine <= rows.length) {
      load_key<D>(tile.keys[j], rows.at<D>(mine), c);
    } else {
#pragma unroll
      for (int i = 0; i < D / 32; ++i) tile.keys[j][i] = {0, 0, 0, 0};
    }
  }
}

template <int D>
__device__ __forceinline__ void load_values(Tile<D>& tile, const Rows& rows, int32_t token) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  if (token + kTile <= rows.length) {
    const uint16_t* row = rows.cache + static_cast<int64_t>(token + 2 * c) * D;
#pragma unroll
    for (int j = 0; j < 4; ++j) load_value<D>(tile.values[j], row + value_token(j) * D, g);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int32_t mine = token + 2 * c + value_token(j);
    if (mine <= rows.length) {
      load_value<D>(tile.values[j], rows.at<D>(mine), g);
    } else {  // their weight is 0, and 0 times a NaN would not be
#pragma unroll
      for (int i = 0; i < D / 16; ++i) tile.values[j][i] = 0;
    }
  }
}

// Softmax over the tokens a warp has seen. A lane keeps head g's maximum and its own share of the
// sum of weights; `out` is out^T as the second product leaves it, for heads 2c and 2c + 1.
template <int D>
struct Running {
  float greatest = -INFINITY;
  float weights = 0;
  float out[D / 16][4] = {};
};

// Scores of a tile: [fragment of 8 tokens][token 2c, 2c + 1 of it, for head g; two rows unused].
template <typename T, int D>
__device__ __forceinline__ void score(
    float (&scores)[2][4], const Pairs4 (&query)[D / 32], const Tile<D>& tile) {
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Pairs4 key = tile.keys[j][i];
      T::mma(scores[j], {query[i].x, 0, query[i].y, 0}, {key.x, key.y});
      T::mma(scores[j], {query[i].z, 0, query[i].w, 0}, {key.z, key.w});
    }
  }
}

// Weights of a tile's tokens: heads g, tokens 2c, 2c + 1 and 2c + 8, 2c + 9. BFloat16 has so few
// digits that what rounding takes off is carried along; it costs a product, no memory.
struct Weights {
  Pairs2 rounded;
  Pairs2 rest;
};

template <typename T>
__device__ __forceinline__ void round_pair(float low, float high, uint32_t& pair, uint32_t& rest) {
  pair = T::pack(low, high);
  if constexpr (T::kIsCoarse) {
    rest = T::pack(low - __uint_as_float(pair << 16), high - __uint_as_float(pair & 0xffff0000));
  }
}

// Turns scores into weights and brings what was summed so far down to the new maximum.
template <typename T, int D>
__device__ __forceinline__ Weights weigh(
    Running<D>& running, const float (&scores)[2][4], float scale, int32_t tokens) {
  const int c = threadIdx.x % 4;
  float logits[2][2];
  float greatest = running.greatest;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool there = 8 * j + 2 * c + e < tokens;
      logits[j][e] = there ? scores[j][e] * scale : -INFINITY;
      greatest = fmaxf(greatest, logits[j][e]);
    }
  }
  greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, 1));
  greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, 2));
  const float factor = decay(running.greatest, greatest);
  running.greatest = greatest;
  running.weights *= factor;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      logits[j][e] = decay(logits[j][e], greatest);
      running.weights += logits[j][e];
    }
  }
  const float even = __shfl_sync(kAllLanes, factor, 8 * c);  // of head 2c, which lane 8c keeps
  const float odd = __shfl_sync(kAllLanes, factor, 8 * c + 4);
#pragma unroll
  for (int u = 0; u < D / 16; ++u) {
    running.out[u][0] *= even;
    running.out[u][1] *= odd;
    running.out[u][2] *= even;
    running.out[u][3] *= odd;
  }
  Weights weights = {};
  round_pair<T>(logits[0][0], logits[0][1], weights.rounded.x, weights.rest.x);
  round_pair<T>(logits[1][0], logits[1][1], weights.rounded.y, weights.rest.y);
  return weights;
}

template <typename T, int D>
__device__ __forceinline__ void add_values(
    Running<D>& running, const Tile<D>& tile, const Weights& weights) {
#pragma unroll
  for (int u = 0; u < D / 16; ++u) {
    // Pairs of dims become pairs of tokens: the low halves are row g, the high ones row g + 8.
    const uint32_t a = tile.values[0][u], b = tile.values[1][u];
    const uint32_t later_a = tile.values[2][u], later_b = tile.values[3][u];
    const Pairs4 transposed = {
        __byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632),
        __byte_perm(later_a, later_b, 0x5410), __byte_perm(later_a, later_b, 0x7632)};
    T::mma(running.out[u], transposed, weights.rounded);
    if constexpr (T::kIsCoarse) T::mma(running.out[u], transposed, weights.rest);
  }
}

template <int D>
__device__ __forceinline__ void share_running(
    Shared<D>& shared, const Running<D>& running, int groups) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (2 * c + h >= groups) break;
    float* row = shared.sums[warp][2 * c + h];
#pragma unroll
    for (int u = 0; u < D / 16; u += 2) {
      const float(&low)[4] = running.out[u], (&high)[4] = running.out[u + 1];
      *reinterpret_cast<float4*>(row + first_dim<D>(u, g)) =
          make_float4(low[h], low[h + 2], high[h], high[h + 2]);
    }
  }
  if (c == 0) shared.softs[warp][g] = make_float2(running.greatest, running.weights);
}

// Writes the new token into its slot, from the tile that holds it. Nobody reads that slot before
// the next step.
template <int D>
__device__ __forceinline__ void append(
    uint16_t* key, uint16_t* value, const Tile<D>& tile, int32_t place) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (8 * j + g != place) continue;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      *reinterpret_cast<Pairs4*>(key + 32 * i + 8 * c) = tile.keys[j][i];
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (2 * c + value_token(j) != place) continue;
#pragma unroll
    for (int u = 0; u < D / 16; u += 2) {
      *reinterpret_cast<Pairs2*>(value + first_dim<D>(u, g)) = {
          tile.values[j][u], tile.values[j][u + 1]};
    }
  }
}

// Attends to tiles [begin, end) of a sequence of `tiles` with the whole block.
template <typename T, int D>
__device__ __forceinline__ void attend_tiles(
    const Task& task, Shared<D>& shared, const Sequence& sequence, int32_t begin, int32_t end,
    int32_t tiles) {
  const int thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, c = thread % 4;
  const int groups = task.io.groups;
  const int64_t first_row = static_cast<int64_t>(sequence.index) * groups;
  const auto row_of = [](const void* base, int64_t row) {
    return static_cast<const uint16_t*>(base) + row * D;
  };
  const Rows keys = {row_of(task.io.k_cache, sequence.start),
                     row_of(task.io.k_new, sequence.index), sequence.length};
  const Rows values = {row_of(task.io.v_cache, sequence.start),
                       row_of(task.io.v_new, sequence.index), sequence.length};

  int32_t tile_index = begin + warp;
  Tile<D> tile;
  Pairs4 query[D / 32];
  Running<D> running;
  if (tile_index < end) {
#pragma unroll
    for (int i = 0; i < D / 32; ++i) query[i] = {0, 0, 0, 0};
    if (g < groups) load_key<D>(query, row_of(task.io.q, first_row + g), c);
    load_keys<D>(tile, keys, tile_index * kTile);
    load_values<D>(tile, values, tile_index * kTile);
  }
  while (tile_index < end) {
    const int32_t token = tile_index * kTile;
    tile_index += kWarps;
    float scores[2][4] = {};
    score<T, D>(scores, query, tile);
    if (tile_index < end) load_keys<D>(tile, keys, tile_index * kTile);
    const Weights weights =
        weigh<T, D>(running, scores, task.scale_log2, sequence.length + 1 - token);
    add_values<T, D>(running, tile, weights);
    if (tile_index < end) load_values<D>(tile, values, tile_index * kTile);
  }
  if (end == tiles && tile_index == end - 1 + kWarps) {  // the last tile was this warp's
    const int64_t slot = static_cast<int64_t>(sequence.start) + sequence.length;
    append<D>(static_cast<uint16_t*>(task.io.k_cache) + slot * D,
              static_cast<uint16_t*>(task.io.v_cache) + slot * D, tile, sequence.length % kTile);
  }
  running.weights += __shfl_xor_sync(kAllLanes, running.weights, 1);
  running.weights += __shfl_xor_sync(kAllLanes, running.weights, 2);

  __syncthreads();  // the sequence before this one has been read out
  share_running<D>(shared, running, groups);
  __syncthreads();
  const bool whole = begin == 0 && end == tiles;
  for (int i = thread; i < groups * (D / 4); i += kThreads) {
    const int head = i / (D / 4), dim = i % (D / 4) * 4;
    float greatest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) greatest = fmaxf(greatest, shared.softs[w][head].x);
    float weight = 0;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part = *reinterpret_cast<const float4*>(&shared.sums[w][head][dim]);
      add_part(sum, weight, part, shared.softs[w][head], greatest);
    }
    if (whole) {
      store_four<T>(task.io.out, (first_row + head) * D + dim, scaled(sum, 1 / weight));
    } else {
      const int64_t row = partial_slot(blockIdx.x, begin > 0) * groups + head;
      *reinterpret_cast<float4*>(task.workspace.sums + row * D + dim) = sum;
      if (dim == 0) task.workspace.softs[row] = make_float2(greatest, weight);
    }
  }
}

// A finished sequence gives zeros, a full one NaN, that its caller sees it.
template <int D>
__device__ __forceinline__ void write_dead(const Task& task, const Sequence& sequence) {
  const uint32_t pair = is_finished(sequence.length) ? 0 : kNaNPair;
  const int pieces = task.io.groups * (D / 8);
  uint4* out = static_cast<uint4*>(task.io.out) + static_cast<int64_t>(sequence.index) * pieces;
  for (int i = threadIdx.x; i < pieces; i += kThreads) out[i] = {pair, pair, pair, pair};
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, D == 128 ? 3 : 4)
    attend(const __grid_constant__ Task task) {
  __shared__ Shared<D> shared;
  // The merge may take its place now: it waits for all of this to be through.
  let_next_kernel_start();
  Partition partition;
  if (!find_span<D>(task, shared, &partition)) return;
  const int64_t worker = blockIdx.x;
  const int64_t span_begin = worker * partition.share, span_end = span_begin + partition.share;
  int64_t base = shared.base;
  for (int32_t s = shared.sequence; s < task.io.sequences && base < span_end; ++s) {
    const Sequence sequence = read_sequence(task, s);
    const int64_t tiles = partition.tiles(sequence.length, sequence.capacity);
    if (tiles == 0) {
      if (base >= span_begin) {
        write_dead<D>(task, sequence);
        if (threadIdx.x == 0) task.workspace.spans[s] = {static_cast<int32_t>(worker), 0};
      }
    } else {
      const int64_t begin = partition.begin(worker, base);
      const int64_t end = partition.end(worker, base, tiles);
      if (begin < end) {
        attend_tiles<T, D>(
            task, shared, sequence, static_cast<int32_t>(begin), static_cast<int32_t>(end),
            static_cast<int32_t>(tiles));
        if (begin == 0 && threadIdx.x == kThreads - 1) {  // idle already where heads are few
          const int64_t count = partition.last(base, tiles) - worker + 1;
          task.workspace.spans[s] = {static_cast<int32_t>(worker), static_cast<int32_t>(count)};
        }
      }
    }
    base += kSetup + tiles;
  }
}

// A block a (sequence, head). Partials are met in the order of their workers and split among
// `kSplits` groups of threads, always in the same way: a result does not change from run to run.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ Task task) {
  constexpr int kLanes = D / 4, kSplits = kThreads / kLanes, kBatch = 4;
  __shared__ float4 sums[kSplits][kLanes];
  __shared__ float2 softs[kSplits];
  wait_for_previous_kernel();
  const int groups = task.io.groups;
  const int32_t s = blockIdx.x / groups, head = blockIdx.x % groups;
  const int split = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (head == 0 && threadIdx.x == 0) {
    const Sequence sequence = read_sequence(task, s);
    if (is_live(sequence.length, sequence.capacity)) task.io.lengths[s] = sequence.length + 1;
  }
  const int2 span = __ldcg(reinterpret_cast<const int2*>(task.workspace.spans) + s);
  const int32_t first = span.x, count = span.y;
  if (count < 2) return;
  if (split < kSplits) {
    float greatest = -INFINITY, weight = 0;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int32_t i = split; i < count; i += kBatch * kSplits) {
      float2 soft[kBatch];
      float4 part[kBatch];
      float next = greatest;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int32_t mine = i + j * kSplits;
        soft[j] = make_float2(-INFINITY, 0);
        part[j] = make_float4(0, 0, 0, 0);
        if (mine < count) {
          const int64_t row = partial_slot(first + mine, mine > 0) * groups + head;
          soft[j] = __ldcg(task.workspace.softs + row);
          part[j] = __ldcg(reinterpret_cast<const float4*>(task.workspace.sums + row * D) + lane);
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) next = fmaxf(next, soft[j].x);
      const float factor = decay(greatest, next);
      greatest = next;
      weight *= factor;
      sum = scaled(sum, factor);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        add_part(sum, weight, part[j], soft[j], greatest);
      }
    }
    sums[split][lane] = sum;
    if (lane == 0) softs[split] = make_float2(greatest, weight);
  }
  __syncthreads();
  if (split > 0) return;
  float greatest = -INFINITY, weight = 0;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kSplits; ++i) greatest = fmaxf(greatest, softs[i].x);
#pragma unroll
  for (int i = 0; i < kSplits; ++i) add_part(sum, weight, sums[i][lane], softs[i], greatest);
  const int64_t row = static_cast<int64_t>(s) * groups + head;
  store_four<T>(task.io.out, row * D + 4 * lane, scaled(sum, 1 / weight));
}

using Kernel = void (*)(Task);

struct Kernels {
  Kernel attend;
  Kernel merge;
};

template <typename T>
Kernels kernels_of(int32_t head_dim) {
  switch (head_dim) {
    case 64: return {attend<T, 64>, merge<T, 64>};
    case 96: return {attend<T, 96>, merge<T, 96>};
    case 128: return {attend<T, 128>, merge<T, 128>};
    default: return {nullptr, nullptr};
  }
}

Kernels kernels_of(Element element, int32_t head_dim) {
  return element == Element::kHalf ? kernels_of<Half>(head_dim) : kernels_of<BFloat16>(head_dim);
}

// Whether the code that will run was compiled for compute capability 9.0 or newer. What the device
// is does not tell: PTX for 8.0 runs there too, and knows no waiting for the launch before.
cudaError_t waits_for_previous(Kernel kernel, bool* waits) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *waits = error == cudaSuccess && attributes.ptxVersion >= 90;
  return error;
}

cudaError_t launch(
    Kernel kernel, int64_t blocks, bool overlap, cudaStream_t stream, const Task& task) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, task);
}

}  // namespace

cudaError_t make_plan(Element element, int32_t head_dim, Plan* plan) {
  const Kernels kernels = kernels_of(element, head_dim);
  if (kernels.attend == nullptr) return cudaErrorInvalidValue;
  int device = 0, processors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernels.attend, kThreads, 0);
  if (error != cudaSuccess) return error;
  *plan = {element, head_dim, processors * max(resident, 1), false};
  return waits_for_previous(kernels.merge, &plan->overlap);
}

size_t workspace_bytes(const Plan& plan, int32_t sequences, int32_t groups) {
  const size_t rows = size_t{2} * plan.workers * groups;
  return rows * (plan.head_dim * sizeof(float) + sizeof(float2)) + sequences * sizeof(Span);
}

cudaError_t append_attend(const AppendAttend& task, const Plan& plan, cudaStream_t stream) {
  if (task.sequences == 0) return cudaSuccess;
  const Kernels kernels = kernels_of(plan.element, plan.head_dim);
  if (kernels.attend == nullptr) return cudaErrorInvalidValue;
  const size_t rows = size_t{2} * plan.workers * task.groups;
  Workspace workspace;
  workspace.sums = static_cast<float*>(task.workspace);
  workspace.softs = reinterpret_cast<float2*>(workspace.sums + rows * plan.head_dim);
  workspace.spans = reinterpret_cast<Span*>(workspace.softs + rows);
  const float log2_e = 1.44269504088896340736f;
  const Task whole = {task, workspace, task.scale * log2_e, plan.workers};
  const cudaError_t error = launch(kernels.attend, plan.workers, false, stream, whole);
  if (error != cudaSuccess) return error;
  const int64_t merges = static_cast<int64_t>(task.sequences) * task.groups;
  return launch(kernels.merge, merges, plan.overlap, stream, whole);
}

}  // namespace sparsemm

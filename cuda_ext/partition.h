// How ragged sequences are shared out among workers (CPU threads, CUDA blocks) of equal load.
//
// All sequences lie one behind the other on a line of units: `setup` units for what a sequence
// costs however short it is, then one unit a tile of `tile` tokens. Worker b takes the units
// [b * share, (b + 1) * share). One sequence of 20,000 tokens is thus met by many workers, and one
// worker meets many sequences of 57; nobody's load depends on where the long ones lie.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SPARSEMM_INLINE __host__ __device__ __forceinline__
#else
#define SPARSEMM_INLINE inline
#endif

namespace sparsemm {

// lengths[s] of a sequence that is finished: ~length, which is negative and keeps the length.
SPARSEMM_INLINE bool is_finished(int32_t length) { return length < 0; }

SPARSEMM_INLINE bool is_live(int32_t length, int32_t capacity) {
  return length >= 0 && length < capacity;
}

struct Partition {
  int32_t tile;   // tokens a unit
  int32_t setup;  // units every sequence costs, at least 1
  int64_t share;  // units a worker

  // Tiles of a sequence, the new token included; none if it is full or finished.
  SPARSEMM_INLINE int64_t tiles(int32_t length, int32_t capacity) const {
    return is_live(length, capacity) ? length / tile + 1 : 0;
  }

  SPARSEMM_INLINE int64_t units(int32_t length, int32_t capacity) const {
    return setup + tiles(length, capacity);
  }

  // Tiles [begin, end) of a sequence that a worker takes, where `base` is the sequence's first unit.
  SPARSEMM_INLINE int64_t begin(int64_t worker, int64_t base) const {
    const int64_t tile_index = worker * share - base - setup;
    return tile_index < 0 ? 0 : tile_index;
  }
  SPARSEMM_INLINE int64_t end(int64_t worker, int64_t base, int64_t tiles) const {
    const int64_t tile_index = (worker + 1) * share - base - setup;
    return tile_index < 0 ? 0 : (tile_index < tiles ? tile_index : tiles);
  }

  // First and last worker that take tiles of a sequence with at least one.
  SPARSEMM_INLINE int64_t first(int64_t base) const { return (base + setup) / share; }
  SPARSEMM_INLINE int64_t last(int64_t base, int64_t tiles) const {
    return (base + setup + tiles - 1) / share;
  }
};

// `least` keeps shares from becoming so small that merging costs more than attending.
SPARSEMM_INLINE Partition make_partition(
    int64_t units, int64_t workers, int64_t least, int32_t tile, int32_t setup) {
  const int64_t even = (units + workers - 1) / workers;
  return {tile, setup, even < least ? least : even};
}

}  // namespace sparsemm

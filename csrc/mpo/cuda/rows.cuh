// The geometry of a row of logits, and the even split of the labelled rows over the blocks of a grid.
#pragma once

#include <cstdint>

#include "mpo/cuda/formats.cuh"

namespace mpo {

constexpr int kUnroll = 4;       // vectors that a thread has in flight
constexpr int kListRows = 1024;  // rows that a block lists at a time
constexpr int kScanUnroll = 8;   // labels that a thread has in flight while rows are counted
constexpr int kListUnroll = 4;   // and while rows are listed, where registers are scarce

__device__ __forceinline__ bool is_scored(const Rows& in, int64_t label) {
  return label != in.ignore_index && in_vocab(label, in.total);
}

/// The column of a label, or -1 if it lies in another tile of the vocabulary.
__device__ __forceinline__ int label_column(const Rows& in, int64_t label) {
  const int64_t column = label - in.first;
  return in_vocab(column, in.vocab) ? static_cast<int>(column) : -1;
}

/// What stands in for a row that cannot be scored: 0 if it is ignored, else NaN.
__device__ __forceinline__ float filler(const Rows& in, int64_t label) {
  return label == in.ignore_index ? 0.0f : __int_as_float(0x7fffffff);
}

__device__ __forceinline__ int64_t row_offset(int64_t row, int64_t inner, int64_t outer_stride, int64_t row_stride) {
  if (row < inner) return row * row_stride;  // as in any contiguous tensor: spares the division
  return row / inner * outer_stride + row % inner * row_stride;
}

/// One row on the grid of lines: full vectors in the middle, and at both ends what fills no vector.
struct RowGrid {
  const char* base;  // the row's address rounded down to a line; never read before the row
  int skip;          // elements between the two
  int begin, end;    // the full vectors, counted from base
  int head, tail;    // elements before and after them

  template <typename Scalar>
  static __device__ __forceinline__ RowGrid of(const Scalar* x, int vocab) {
    constexpr int kVec = kPerVector<Scalar>;
    const int bytes = static_cast<int>(reinterpret_cast<uintptr_t>(x) % kLineBytes);
    RowGrid g;
    g.base = reinterpret_cast<const char*>(x) - bytes;
    g.skip = bytes / static_cast<int>(sizeof(Scalar));
    g.begin = (g.skip + kVec - 1) / kVec;
    g.end = max((g.skip + vocab) / kVec, g.begin);
    g.head = min(vocab, g.begin * kVec - g.skip);
    g.tail = max(g.skip + vocab - g.end * kVec, 0);
    if (g.head == vocab) g.tail = 0;  // all of the row lies within one vector
    return g;
  }

  /// The element outside of the full vectors that this thread handles in the piece [from, to), or -1.
  __device__ __forceinline__ int edge(int from, int to, int row_vectors, int vocab) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (from == 0 && thread < head) return thread;
    if (to == row_vectors && thread >= kWarp && thread < kWarp + tail) return vocab - tail + thread - kWarp;
    return -1;
  }
};

/// The even split of rows over blocks: all their vectors in one line, cut into parts of equal length. A cut may fall
/// into a row. Depends on nothing but its three numbers, so the result does not depend on the order of blocks.
struct Split {
  int rows;
  int row_vectors;
  int parts;

  __device__ __forceinline__ Split(int rows_, int row_vectors_, int max_parts)
      : rows(rows_), row_vectors(row_vectors_) {
    parts = static_cast<int>(min(max(vectors() / kMinVectors, int64_t{1}), static_cast<int64_t>(max_parts)));
  }

  __device__ __forceinline__ int64_t vectors() const { return static_cast<int64_t>(rows) * row_vectors; }

  /// Where a part starts. No part is empty: each has at least kMinVectors before its start is rounded down.
  __device__ __forceinline__ int64_t start(int part) const {
    const int64_t at = vectors() * part / parts;
    const int64_t row = at / row_vectors;
    const int offset = static_cast<int>(at - row * row_vectors);
    return row * row_vectors + offset / kSplitVectors * kSplitVectors;
  }

  /// The part that holds a vector.
  __device__ __forceinline__ int part_of(int64_t at) const {
    int part = static_cast<int>(min(at * parts / vectors(), static_cast<int64_t>(parts - 1)));
    while (start(part) > at) --part;
    while (part + 1 < parts && start(part + 1) <= at) ++part;
    return part;
  }
};

/// Finds rows by their rank among those that can be scored (or among the others). Every block reads all labels once:
/// 8 bytes per row against 2 * vocab bytes for a row of logits, and no block has to wait for another.
struct RowFinder {
  int begin, end;     // the rows that this warp looks at
  int scored_before;  // rows before them that can be scored
  int scored;         // rows of all that can be

  /// `counts` is [kWarps] of shared memory. Ends with all threads past a barrier.
  __device__ RowFinder(const Rows& in, int* counts) {
    const int rows = static_cast<int>(in.rows);
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t share = (in.rows + kCudaThreads - 1) / kCudaThreads * kWarp;
    begin = static_cast<int>(min(warp * share, in.rows));
    end = static_cast<int>(min((warp + 1) * share, in.rows));
    int count = 0;
    for (int64_t row = begin + lane; row < end; row += kScanUnroll * kWarp) {
      int64_t label[kScanUnroll];
#pragma unroll
      for (int u = 0; u < kScanUnroll; ++u) {
        label[u] = row + u * kWarp < end ? in.labels[row + u * kWarp] : in.ignore_index;
      }
#pragma unroll
      for (int u = 0; u < kScanUnroll; ++u) count += is_scored(in, label[u]) ? 1 : 0;
    }
    count = __reduce_add_sync(kAllLanes, count);
    if (lane == 0) counts[warp] = count;
    __syncthreads();  // counts[] is complete
    scored_before = scored = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) scored_before += counts[w];
      scored += counts[w];
    }
    unscored_ = rows - scored;
  }

  __device__ __forceinline__ int count(bool wanted) const { return wanted ? scored : unscored_; }

  /// Writes the rows of rank first .. first + size - 1 among the wanted into shared memory. To be called by all
  /// threads; the list is complete after the next barrier.
  __device__ void list(const Rows& in, bool wanted, int first, int size, int* rows) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    int rank = wanted ? scored_before : begin - scored_before;
    for (int64_t base = begin; base < end && rank < first + size; base += kListUnroll * kWarp) {
      int64_t label[kListUnroll];
#pragma unroll
      for (int u = 0; u < kListUnroll; ++u) {
        const int64_t row = base + u * kWarp + lane;
        label[u] = row < end ? in.labels[row] : 0;
      }
#pragma unroll
      for (int u = 0; u < kListUnroll; ++u) {
        const int64_t row = base + u * kWarp + lane;
        const bool is_wanted = row < end && is_scored(in, label[u]) == wanted;
        const unsigned mask = __ballot_sync(kAllLanes, is_wanted);
        const int mine = rank + __popc(mask & ((1u << lane) - 1)) - first;
        if (is_wanted && mine >= 0 && mine < size) rows[mine] = static_cast<int>(row);
        rank += __popc(mask);
      }
    }
  }

 private:
  int unscored_;
};

/// Calls body(row, from, to, rank) for each piece of a wanted row that falls to this block: vectors from .. to - 1 of
/// the row that is number `rank` of the wanted. `rows` is [kListRows] of shared memory. All threads take part.
template <typename Body>
__device__ __forceinline__ void for_each_piece(const Rows& in, const RowFinder& finder, bool wanted, const Split& split,
                                               int* rows, const Body& body) {
  const int part = static_cast<int>(blockIdx.x);
  if (finder.count(wanted) == 0 || part >= split.parts) return;  // the same for all threads of the block
  const int64_t begin = split.start(part), end = split.start(part + 1);
  const int first = static_cast<int>(begin / split.row_vectors);
  const int last = static_cast<int>((end - 1) / split.row_vectors);
  const int first_from = static_cast<int>(begin - static_cast<int64_t>(first) * split.row_vectors);
  const int last_to = static_cast<int>(end - static_cast<int64_t>(last) * split.row_vectors);
  for (int listed = first; listed <= last; listed += kListRows) {
    const int size = min(last + 1 - listed, kListRows);
    __syncthreads();  // nobody reads the list of the round before any more
    finder.list(in, wanted, listed, size, rows);
    __syncthreads();  // rows[] is complete
    for (int k = 0; k < size; ++k) {
      const int rank = listed + k;
      body(rows[k], rank == first ? first_from : 0, rank == last ? last_to : split.row_vectors, rank);
    }
  }
}

}  // namespace mpo

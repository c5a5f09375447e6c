// The geometry of a row of logits, and the even split of rows over the blocks of a grid.
#pragma once

#include <cstdint>

#include "mpo/cuda/formats.cuh"

namespace mpo {

constexpr int kUnroll = 4;             // vectors that a thread has in flight
constexpr int kListRows = 512;         // rows that a block lists at a time
constexpr unsigned kMaskRows = 65536;  // rows for which a block keeps a bit: 8 kB
constexpr int kScanUnroll = 12;        // labels that a thread has in flight while rows are counted
constexpr int kListUnroll = 4;         // masks, or labels, that a thread has in flight while rows are listed

__device__ __forceinline__ bool is_scored(const Rows& in, int64_t label) {
  return label != in.ignore_index && in_vocab(label, in.total);
}

/// Returns the column of a label, or -1 if it lies in another tile of the vocabulary.
__device__ __forceinline__ int label_column(const Rows& in, int64_t label) {
  const int64_t column = label - in.first;
  return in_vocab(column, in.vocab) ? static_cast<int>(column) : -1;
}

/// Returns the value of a row that is not scored: 0 if it is ignored, NaN if its label is out of range.
__device__ __forceinline__ float filler(const Rows& in, int64_t label) {
  return label == in.ignore_index ? 0.0f : __int_as_float(0x7fffffff);
}

__device__ __forceinline__ int64_t row_offset(int64_t row, int64_t inner, int64_t outer_stride, int64_t row_stride) {
  if (row < inner) return row * row_stride;  // as in every contiguous tensor; avoids the division
  return row / inner * outer_stride + row % inner * row_stride;
}

/// The position of a row relative to 128-byte lines: full vectors, and at both ends elements that do not fill a vector.
struct RowGrid {
  const char* base;  // the row's address rounded down to a line; nothing before the row is read
  int skip;          // elements from base to the row
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
    if (g.head == vocab) g.tail = 0;  // the whole row lies within one vector
    return g;
  }

  /// Returns the element outside of the full vectors that this thread handles in the piece [from, to), or -1.
  __device__ __forceinline__ int edge(int from, int to, int row_vectors, int vocab) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (from == 0 && thread < head) return thread;
    if (to == row_vectors && thread >= kWarp && thread < kWarp + tail) return vocab - tail + thread - kWarp;
    return -1;
  }
};

/// The even split of rows over blocks: the vectors of all rows form one sequence, which is cut into parts of equal
/// length. A cut may fall into a row. The split depends only on its three numbers, so results do not depend on the
/// order of blocks.
struct Split {
  int rows;
  int row_vectors;
  int parts;

  __device__ __forceinline__ Split(int rows_, int row_vectors_, int max_parts)
      : rows(rows_), row_vectors(row_vectors_) {
    parts = static_cast<int>(min(max(vectors() / kMinVectors, int64_t{1}), static_cast<int64_t>(max_parts)));
  }

  __device__ __forceinline__ int64_t vectors() const { return static_cast<int64_t>(rows) * row_vectors; }

  /// Returns the start of a part. No part is empty: each has at least kMinVectors before the start is rounded down.
  __device__ __forceinline__ int64_t start(int part) const {
    const int64_t at = vectors() * part / parts;
    const int64_t row = at / row_vectors;
    const int offset = static_cast<int>(at - row * row_vectors);
    return row * row_vectors + offset / kSplitVectors * kSplitVectors;
  }

  /// Returns the part that contains a vector.
  __device__ __forceinline__ int part_of(int64_t at) const {
    int part = static_cast<int>(min(at * parts / vectors(), static_cast<int64_t>(parts - 1)));
    while (start(part) > at) --part;
    while (part + 1 < parts && start(part + 1) <= at) ++part;
    return part;
  }
};

/// What a block remembers of the labels, in shared memory.
struct RowFinderShared {
  int rows[kListRows];                      // the listed rows
  int counts[kWarps];                       // scored rows of each warp
  unsigned scored_bits[kMaskRows / kWarp];  // a bit per row, for the first kMaskRows rows
};

/// Finds rows by their rank among the scored rows, or among the other rows. Every block reads all labels once, so that
/// no block waits for another: 8 bytes per row, compared with 2 * vocab bytes of logits. It keeps a bit for each row,
/// from which it lists rows; rows beyond kMaskRows are listed from their labels.
struct RowFinder {
  unsigned begin, end;  // the rows whose labels this warp reads
  int scored_before;    // scored rows before begin
  int scored;           // all scored rows

  /// All threads must call it; it contains a barrier.
  __device__ RowFinder(const Rows& in, RowFinderShared& shared) {
    const int rows = static_cast<int>(in.rows);
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t share = (in.rows + kCudaThreads - 1) / kCudaThreads * kWarp;
    begin = static_cast<unsigned>(min(warp * share, in.rows));
    end = static_cast<unsigned>(min((warp + 1) * share, in.rows));
    int count = 0;
#pragma unroll 1
    for (unsigned base = begin; base < end; base += kScanUnroll * kWarp) {
      int64_t label[kScanUnroll];
#pragma unroll
      for (int u = 0; u < kScanUnroll; ++u) {
        const unsigned row = base + u * kWarp + lane;
        label[u] = row < end ? in.labels[row] : in.ignore_index;
      }
#pragma unroll
      for (int u = 0; u < kScanUnroll; ++u) {
        const unsigned mask = __ballot_sync(kAllLanes, is_scored(in, label[u]));
        const unsigned row = base + u * kWarp;
        if (lane == 0 && row < min(end, kMaskRows)) shared.scored_bits[row / kWarp] = mask;
        count += __popc(mask);
      }
    }
    if (lane == 0) shared.counts[warp] = count;
    __syncthreads();  // counts[] and scored_bits[] are complete
    scored_before = scored = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) scored_before += shared.counts[w];
      scored += shared.counts[w];
    }
    unscored_ = rows - scored;
  }

  __device__ __forceinline__ int count(bool is_scored_rows) const { return is_scored_rows ? scored : unscored_; }

  /// Writes to shared memory the rows with ranks first .. first + size - 1 among the scored rows, or among the other
  /// rows. All threads must call it; the list is complete after the next barrier.
  __device__ void list(const Rows& in, bool is_scored_rows, int first, int size, RowFinderShared& shared) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    int rank = is_scored_rows ? scored_before : static_cast<int>(begin) - scored_before;
#pragma unroll 1
    for (unsigned base = begin; base < end && rank < first + size; base += kListUnroll * kWarp) {
      unsigned scored_rows[kListUnroll];
      masks(in, base, shared, scored_rows);
#pragma unroll
      for (int u = 0; u < kListUnroll; ++u) {
        const unsigned row = base + u * kWarp + lane;
        const bool is_listed = row < end && (scored_rows[u] >> lane & 1) == (is_scored_rows ? 1u : 0u);
        const unsigned mask = __ballot_sync(kAllLanes, is_listed);
        const int position = rank + __popc(mask & ((1u << lane) - 1)) - first;
        if (is_listed && position >= 0 && position < size) shared.rows[position] = static_cast<int>(row);
        rank += __popc(mask);
      }
    }
  }

 private:
  int unscored_;

  /// Returns, in every lane, which of kListUnroll * 32 rows from `base` on are scored. `base` is a multiple of 32.
  __device__ __forceinline__ void masks(const Rows& in, unsigned base, const RowFinderShared& shared,
                                        unsigned (&mask)[kListUnroll]) const {
    if (base + kListUnroll * kWarp <= kMaskRows) {
#pragma unroll
      for (int u = 0; u < kListUnroll; ++u) {
        mask[u] = base + u * kWarp < end ? shared.scored_bits[base / kWarp + u] : 0;
      }
      return;
    }
    int64_t label[kListUnroll];
#pragma unroll
    for (int u = 0; u < kListUnroll; ++u) {
      const unsigned row = base + u * kWarp + threadIdx.x % kWarp;
      label[u] = row < end ? in.labels[row] : in.ignore_index;
    }
#pragma unroll
    for (int u = 0; u < kListUnroll; ++u) mask[u] = __ballot_sync(kAllLanes, is_scored(in, label[u]));
  }
};

/// A piece of a row: the vectors from .. to - 1 of the row with a rank among the rows that a grid shares out.
struct Piece {
  int64_t row;
  int from, to;
  int rank;
  bool is_last;  // of this block
};

/// The pieces of rows that this block handles. `part` must be below split.parts.
struct BlockPieces {
  int first, last;  // ranks of rows
  int first_from, last_to;
  int row_vectors;

  __device__ __forceinline__ BlockPieces(const Split& split, int part) : row_vectors(split.row_vectors) {
    const int64_t begin = split.start(part), end = split.start(part + 1);
    first = static_cast<int>(begin / row_vectors);
    last = static_cast<int>((end - 1) / row_vectors);
    first_from = static_cast<int>(begin - static_cast<int64_t>(first) * row_vectors);
    last_to = static_cast<int>(end - static_cast<int64_t>(last) * row_vectors);
  }

  __device__ __forceinline__ Piece piece(int64_t row, int rank) const {
    return {row, rank == first ? first_from : 0, rank == last ? last_to : row_vectors, rank, rank == last};
  }
};

/// Calls body(piece) for each piece of a scored row (or of another row) that this block handles. All threads must call
/// it.
template <typename Body>
__device__ __forceinline__ void for_each_piece(const Rows& in, const RowFinder& finder, bool is_scored_rows,
                                               const Split& split, RowFinderShared& shared, const Body& body) {
  const int part = static_cast<int>(blockIdx.x);
  if (finder.count(is_scored_rows) == 0 || part >= split.parts) return;  // equal in all threads of the block
  const BlockPieces pieces(split, part);
  for (int listed = pieces.first; listed <= pieces.last; listed += kListRows) {
    const int size = min(pieces.last + 1 - listed, kListRows);
    __syncthreads();  // all threads have read the previous list
    finder.list(in, is_scored_rows, listed, size, shared);
    __syncthreads();  // rows[] is complete
    for (int k = 0; k < size; ++k) body(pieces.piece(shared.rows[k], listed + k));
  }
}

}  // namespace mpo

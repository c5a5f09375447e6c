// token_logp on the GPU, alone or as the whole forward, in which the last block to finish also runs the pair loss.
#include "mpo/cuda/pair_loss.cuh"
#include "mpo/cuda/reduce.cuh"
#include "mpo/cuda/rows.cuh"

namespace mpo {
namespace {

/// A piece whose sums wait for a warp that finishes its row.
struct PieceInSlot {
  int64_t row;
  int rank;
  bool is_whole;  // the whole row
};

struct TokenLogpShared {
  RowFinderShared finder;
  // Double-buffered, so that one barrier per kWarps pieces suffices. A slot has the sums of each warp over one piece.
  RowSums<float> sums[2][kWarps][kWarps];
  PieceInSlot pieces[2][kWarps];
  bool is_last;
};

/// Sums over logits that the main loop adds to: `max` holds the reference of power_of instead of a logit, `sum` and
/// `squared` are sums of powers of two, and e_d is a sum of e * power_of(z, reference).
typedef RowSums<float> PowerSums;

/// Returns the reference for logits with this maximum. Without a finite maximum, all powers are 0.
__device__ __forceinline__ float reference_of(float max) { return fmaxf(rintf(max * kLog2E), -kMaxPower); }

/// Returns the sums of a logit, relative to itself.
template <bool kStats>
__device__ __forceinline__ RowSums<float> sums_of(float z) {
  const float max = fmaxf(z, minus_infinity());  // a NaN is not in the maximum, but it is in the sum
  const float d = z - (max == minus_infinity() ? 0.0f : max);
  const float e = fast_exp(d);
  return {max, e, kStats ? e * fmaxf(d, -128.0f) : 0, kStats ? z : 0, kStats ? e * e : 0};
}

/// Returns the sums over this thread's part of a piece, for logits that are too large for power_of.
template <typename Scalar, bool kStats>
__device__ __forceinline__ RowSums<float> read_large(const Scalar* x, const RowGrid& grid, int edge, int from, int to) {
  constexpr int kVec = kPerVector<Scalar>;
  RowSums<float> s = edge >= 0 ? sums_of<kStats>(load_value(x + edge)) : empty_sums();
#pragma unroll 1
  for (int i = max(from, grid.begin) + static_cast<int>(threadIdx.x); i < min(to, grid.end); i += kCudaThreads) {
#pragma unroll 1
    for (int j = 0; j < kVec; ++j) {
      s = merged<kStats>(s, sums_of<kStats>(load_value(x + (static_cast<int64_t>(i) * kVec - grid.skip) + j)));
    }
  }
  return s;
}

/// Returns sums relative to the maximum of their logits, for sums relative to a reference.
template <bool kStats>
__device__ __forceinline__ RowSums<float> relative_to_max(const PowerSums& s, float max) {
  if (max == minus_infinity()) return {max, s.sum, s.e_d, s.z, s.squared};
  const float power = power_of(max, s.max);
  const float scale = 1.0f / fast_exp2(power);
  constexpr float kLn2 = 0.6931471805599453f;
  return {max, s.sum * scale, kStats ? (s.e_d - power * s.sum) * scale * kLn2 : 0, kStats ? s.z : 0,
          kStats ? s.squared * scale * scale : 0};
}

/// Returns the sums over this thread's part of the vectors from .. to - 1 of a row. Each kUnroll vectors are summed
/// separately, because a single running float over a row would lose digits.
template <typename Scalar, bool kStats>
__device__ __forceinline__ RowSums<float> read_piece(const Scalar* x, int vocab, int from, int to, int row_vectors) {
  typedef Format<Scalar> F;
  const RowGrid grid = RowGrid::of(x, vocab);
  const int edge = grid.edge(from, to, row_vectors, vocab);
  float max = minus_infinity();
  PowerSums s{-kMaxPower, 0, 0, 0, 0};
  if (edge >= 0) {
    const float z = load_value(x + edge);
    max = fmaxf(max, z);  // a NaN is not in the maximum, but it is in the sum
    s.max = reference_of(max);
    const float power = power_of(z, s.max);
    s.sum = fast_exp2(power);
    if (kStats) {
      s.e_d = s.sum * fmaxf(power, -128.0f);  // 2^-128 is 0 here; 0 * -inf would be NaN
      s.z = z;
      s.squared = s.sum * s.sum;
    }
  }

  const int end = min(to, grid.end);
#pragma unroll 1
  for (int i = ::max(from, grid.begin) + static_cast<int>(threadIdx.x); i < end; i += kUnroll * kCudaThreads) {
    Vector v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * kCudaThreads;
      if (at < end) {
        v[u] = load_vector(grid.base + static_cast<int64_t>(at) * kVectorBytes);
      } else {
#pragma unroll
        for (unsigned& word : v[u].word) word = F::kFill;
      }
    }

    unsigned largest = F::kFill;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (const unsigned word : v[u].word) largest = F::larger(largest, word);
    }
    float lanes[kPerWord<Scalar>];
    F::unpack(largest, lanes);
#pragma unroll
    for (const float z : lanes) max = fmaxf(max, z);
    const float reference = reference_of(max);
    if (reference != s.max) s = rescaled<kStats>(s, reference, fast_exp2(s.max - reference));

    float sum[kWords] = {}, e_d[kWords] = {}, squared[kWords] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float z_sum = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        float z[kPerWord<Scalar>];
        F::unpack(v[u].word[w], z);
#pragma unroll
        for (const float logit : z) {
          const float power = power_of(logit, reference);
          const float e = fast_exp2(power);
          sum[w] += e;
          if (kStats) {
            e_d[w] += e * fmaxf(power, -128.0f);
            squared[w] += e * e;
            z_sum += logit;
          }
        }
      }
      if (kStats && i + u * kCudaThreads < end) s.z += z_sum;
    }
    s.sum += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    if (kStats) {
      s.e_d += (e_d[0] + e_d[1]) + (e_d[2] + e_d[3]);
      s.squared += (squared[0] + squared[1]) + (squared[2] + squared[3]);
    }
  }
  if (max != minus_infinity() && !has_power(max)) return read_large<Scalar, kStats>(x, grid, edge, from, to);
  return relative_to_max<kStats>(s, max);
}

/// Writes the results of token_logp for a row. One thread computes them, in double as on the CPU.
template <typename Scalar, bool kStats>
__device__ __forceinline__ void store_row(const TokenLogpParams& p, int64_t row, const RowSums<float>& s) {
  const int column = label_column(p.in, p.in.labels[row]);
  const Scalar* x =
      static_cast<const Scalar*>(p.in.logits) + row_offset(row, p.in.inner, p.in.outer_stride, p.in.row_stride);
  RowState state{{static_cast<double>(s.max), static_cast<double>(s.sum), static_cast<double>(s.e_d),
                  static_cast<double>(s.z), static_cast<double>(s.squared)},
                 column < 0 ? 0.0 : static_cast<double>(load_value(x + column))};
  if (p.row_state != nullptr) {
    RowState* earlier = reinterpret_cast<RowState*>(p.row_state) + row;
    if (p.in.first != 0) state = continued<kStats>(*earlier, state, column >= 0);
    *earlier = state;
  }
  static_cast<float*>(p.logp)[row] = static_cast<float>(label_logp(state.z_label, state.sums.max, state.sums.sum));
  static_cast<float*>(p.row_max)[row] = static_cast<float>(state.sums.max);
  static_cast<float*>(p.row_sum)[row] = static_cast<float>(state.sums.sum);
  if (!kStats) return;
  double values[kNumRowStats];
  row_statistics(state.sums, state.z_label, p.in.total, values);
  float* out = static_cast<float*>(p.row_stats) + row;
#pragma unroll
  for (int bit = 0; bit < kNumRowStats; ++bit) {
    if ((p.stats & (1u << bit)) == 0) continue;
    *out = static_cast<float>(values[bit]);
    out += p.in.rows;
  }
}

/// Stores this block's piece of a split row. Returns true, in all lanes, if this block is the last to arrive; `s` is
/// then the merged sums of the whole row. Called by one warp; only the `s` of lane 0 is used.
///
/// The fences suffice in the PTX memory model: lane 0 writes its piece, fences, and increments the row's arrival
/// counter. The last block observes the increments of all others, each after its fence, and fences again before it
/// reads: fence, atomic, atomic, fence is a release pattern that synchronises with an acquire pattern at gpu scope.
/// __syncwarp orders the other lanes after lane 0.
template <bool kStats>
__device__ __forceinline__ bool combine_split_row(const TokenLogpArgs& a, const Split& split, int rank,
                                                  RowSums<float>& s) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row_begin = static_cast<int64_t>(rank) * split.row_vectors;
  const int first = split.part_of(row_begin), last = split.part_of(row_begin + split.row_vectors - 1);
  // A block has at most two split rows, its first and its last. All blocks of a row except the first start within it.
  const int slot_of_first = 2 * first + (split.start(first) == row_begin ? 0 : 1);
  const auto slot = [&](int part) { return part == first ? slot_of_first : 2 * part; };
  int is_last = 0;
  if (lane == 0) {
    a.pieces[slot(static_cast<int>(blockIdx.x))].sums = s;
    __threadfence();  // the piece is visible before the arrival is
    // Wraps to 0 at the last arrival, which resets the counter.
    is_last = atomicInc(a.arrivals + first, static_cast<unsigned>(last - first)) == static_cast<unsigned>(last - first);
    __threadfence();  // no piece is read before the last arrival
  }
  __syncwarp();
  if (!__shfl_sync(kAllLanes, is_last, 0)) return false;
  s = empty_sums();
  for (int part = first + lane; part <= last; part += kWarp) {
    const float* piece = &a.pieces[slot(part)].sums.max;
    RowSums<float> sums{__ldcg(piece), __ldcg(piece + 1), 0, 0, 0};
    if (kStats) {
      sums.e_d = __ldcg(piece + 2);
      sums.z = __ldcg(piece + 3);
      sums.squared = __ldcg(piece + 4);
    }
    s = merged<kStats>(s, sums);
  }
  s = warp_merged<kStats>(s);
  return true;
}

/// Computes the log-probability of the label of each row, and the loss if kPair. Reads each logit of a labelled row
/// once.
///
///   logp[i] = (z[y] - m) - log(sum_v exp(z[v] - m)),    m = max_v z[v]
///
/// Grid    cuda_forward_shape: at most as many blocks as run on the GPU at once. The labelled rows, end to end, are cut
///         into as many equal parts as there are blocks; the last block of a split row to arrive combines it
/// Block   kCudaThreads threads
/// Shared  a list of rows with a bit per row, and the sums of two times kWarps pieces
/// Reads   labels, once per block; vocab elements per labelled row
/// Writes  three numbers per row, and one per statistic; a weight per row if kPair
template <typename Scalar, bool kStats, bool kPair>
__global__ void __launch_bounds__(kCudaThreads, kCudaBlocksPerSm)
    token_logp_kernel(const __grid_constant__ TokenLogpArgs a) {
  __shared__ TokenLogpShared shared;
  const TokenLogpParams& p = a.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp, lane = thread % kWarp;
  const int vocab = static_cast<int>(p.in.vocab);

  // Rows that are not scored: each block looks at an equal part of all rows.
  const int64_t end = p.in.rows * (blockIdx.x + 1) / gridDim.x;
  for (int64_t row = p.in.rows * blockIdx.x / gridDim.x + thread; row < end; row += kCudaThreads) {
    const int64_t label = p.in.labels[row];
    if (is_scored(p.in, label)) continue;
    const float value = filler(p.in, label);
    static_cast<float*>(p.logp)[row] = value;
    static_cast<float*>(p.row_max)[row] = 0;
    static_cast<float*>(p.row_sum)[row] = 0;
    if (kStats) {
      const int stats = __popc(p.stats);
      for (int i = 0; i < stats; ++i) static_cast<float*>(p.row_stats)[i * p.in.rows + row] = value;
    }
  }

  const RowFinder finder(p.in, shared.finder);
  const Split split(finder.scored, a.row_vectors, static_cast<int>(gridDim.x));
  int buffer = 0, slots = 0;
  for_each_piece(p.in, finder, true, split, shared.finder, [&](const Piece& piece) {
    const Scalar* x =
        static_cast<const Scalar*>(p.in.logits) + row_offset(piece.row, p.in.inner, p.in.outer_stride, p.in.row_stride);
    RowSums<float> s = warp_merged<kStats>(read_piece<Scalar, kStats>(x, vocab, piece.from, piece.to, a.row_vectors));
    if (lane == 0) shared.sums[buffer][slots][warp] = s;
    if (thread == 0) {
      shared.pieces[buffer][slots] = {piece.row, piece.rank, piece.from == 0 && piece.to == a.row_vectors};
    }
    if (++slots < kWarps && !piece.is_last) return;
    // The slots are complete, and all warps have read the other buffer, which the next pieces overwrite.
    __syncthreads();
    if (warp < slots) {  // each warp finishes one row, since this takes about 2 us: a logarithm in double
      const PieceInSlot mine = shared.pieces[buffer][warp];
      s = warp_merged<kStats>(lane < kWarps ? shared.sums[buffer][warp][lane] : empty_sums());
      const bool is_done = mine.is_whole || combine_split_row<kStats>(a, split, mine.rank, s);
      if (is_done && lane == 0) store_row<Scalar, kStats>(p, mine.row, s);
    }
    buffer ^= 1;
    slots = 0;
  });

  if constexpr (kPair) {
    // The last block observes the writes of all others, as in combine_split_row: a barrier orders the writes of a block
    // before the fence of thread 0, which precedes the arrival. The last block fences again before the barrier after
    // which its other threads read.
    __syncthreads();  // this block's rows are written
    if (thread == 0) {
      __threadfence();  // this block's rows are visible before its arrival is
      shared.is_last = atomicInc(a.arrivals + gridDim.x, gridDim.x - 1) == gridDim.x - 1;
      __threadfence();  // no row is read before the last arrival
    }
    __syncthreads();  // is_last is known
    __shared__ PairLossShared pair_shared;
    if (shared.is_last) pair_loss_block(a.pair, pair_shared);
  }
}

template <typename Scalar, bool kPair>
cudaError_t launch(const TokenLogpArgs& args, const CudaShape& shape, cudaStream_t stream) {
  if (args.p.stats != 0) {
    token_logp_kernel<Scalar, true, kPair><<<shape.grid, shape.block, 0, stream>>>(args);
  } else {
    token_logp_kernel<Scalar, false, kPair><<<shape.grid, shape.block, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

template <bool kPair>
const char* launch(const TokenLogpArgs& args, DType dtype, const CudaShape& shape, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  switch (dtype) {
    case DType::kFloat32: status = launch<float, kPair>(args, shape, stream); break;
    case DType::kBFloat16: status = launch<__nv_bfloat16, kPair>(args, shape, stream); break;
    case DType::kFloat16: status = launch<__half, kPair>(args, shape, stream); break;
    case DType::kFloat64: break;
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

const char* device_error() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, token_logp_kernel<float, false, false>);
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // resets the error, which a later launch would otherwise report as its own
  return cudaGetErrorString(status);
}

const char* allocate_counters(int count, cudaStream_t stream, unsigned** counters) {
  // Another thread may be capturing a graph, which forbids allocations in all threads that do not opt out.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const size_t bytes = static_cast<size_t>(count) * sizeof(unsigned);
  cudaError_t status = cudaMalloc(reinterpret_cast<void**>(counters), bytes);
  if (status == cudaSuccess) status = cudaMemsetAsync(*counters, 0, bytes, stream);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(status);
}

const char* launch_token_logp(const TokenLogpParams& p, DType dtype, const CudaWork& work, int multiprocessors,
                              cudaStream_t stream) {
  const CudaShape shape = cuda_forward_shape(p.in.rows, p.in.vocab, dtype, 0, multiprocessors);
  return launch<false>(token_logp_args(p, dtype, work), dtype, shape, stream);
}

const char* launch_forward(const TokenLogpParams& token, const PairLossParams& pair, const CudaPairTypes& types,
                           DType dtype, const CudaWork& work, int multiprocessors, cudaStream_t stream) {
  const CudaShape shape = cuda_forward_shape(token.in.rows, token.in.vocab, dtype, pair.pairs, multiprocessors);
  return launch<true>(forward_args(token, pair, types, dtype, work, shape), dtype, shape, stream);
}

}  // namespace mpo

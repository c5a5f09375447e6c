// logits_grad on the GPU: the backward of the loss with respect to the logits. And exp_logits, which the gradient of
// hidden states with a frozen head needs.
#include "mpo/cuda/rows.cuh"

namespace mpo {
namespace {

/// Returns d loss / d logp of a row, including the scale.
__device__ __forceinline__ double row_weight(const LogitsGradArgs& a, int64_t row) {
  const double weight = static_cast<double>(static_cast<const float*>(a.p.weight)[row]);
  if (a.p.scale == nullptr) return weight;
  return weight * (a.scale_is_float ? static_cast<double>(*reinterpret_cast<const float*>(a.p.scale)) : *a.p.scale);
}

struct RowFactor {
  float max;
  float factor;  // -scale * weight / sum; NaN if the gradient of the row is NaN
};

__device__ __forceinline__ RowFactor row_factor(const LogitsGradArgs& a, int64_t row) {
  const float max = static_cast<const float*>(a.p.row_max)[row], sum = static_cast<const float*>(a.p.row_sum)[row];
  const float factor = static_cast<float>(-row_weight(a, row)) / sum;
  // The gradient is NaN if the row has a NaN or +inf or only -inf, or if the weight overflowed.
  return {max, isfinite(factor) && isfinite(max) ? factor : __int_as_float(0x7fffffff)};
}

/// Returns the gradient of the label's logit, weight * (1 - p), with 1 - p = -expm1(logp), because 1 - p cancels if p
/// is near 1. One thread per row computes it, and loads the row's numbers again, which saves registers in all threads.
__device__ __forceinline__ float label_grad(const LogitsGradArgs& a, int64_t row, float factor, float z_label) {
  if (isnan(factor)) return factor;
  const double max = static_cast<double>(static_cast<const float*>(a.p.row_max)[row]);
  const double sum = static_cast<double>(static_cast<const float*>(a.p.row_sum)[row]);
  return static_cast<float>(row_weight(a, row) * -expm1(label_logp(static_cast<double>(z_label), max, sum)));
}

/// The label's logit, held by the thread that writes the label's element and corrects it after the loop. The logit is
/// read before the loop, because the gradient may overwrite it.
struct LabelLogit {
  bool is_mine;
  float z;
};

/// The positions of a row are counted in vectors of logits, whose type is at least as large as that of the gradient.
/// Where both are of one size, the vectors of the gradient are aligned; otherwise those of the logits.
template <typename Scalar, typename Out>
__device__ __forceinline__ RowGrid row_grid(const Scalar* x, const Out* out, int vocab) {
  static_assert(sizeof(Scalar) >= sizeof(Out), "a gradient is not wider than its logits");
  if constexpr (sizeof(Scalar) == sizeof(Out)) return RowGrid::of(out, vocab);
  return RowGrid::of(x, vocab);
}

/// Returns whether the vectors of a row's grid are aligned in the logits and in the gradient.
template <typename Scalar, typename Out>
__device__ __forceinline__ bool are_aligned_alike(const Scalar* x, const Out* out, int vocab) {
  constexpr int kOutBytes = kPerVector<Scalar> * static_cast<int>(sizeof(Out));
  const uintptr_t skip = static_cast<uintptr_t>(row_grid(x, out, vocab).skip);
  return (reinterpret_cast<uintptr_t>(x) - skip * sizeof(Scalar)) % kVectorBytes == 0 &&
         (reinterpret_cast<uintptr_t>(out) - skip * sizeof(Out)) % kOutBytes == 0;
}

/// Writes factor * exp(z - max) for each logit z of a piece of a row, which has the same alignment as the output.
/// has_power(f.max) must hold.
template <typename Scalar, typename Out>
__device__ __forceinline__ LabelLogit write_piece(const Scalar* x, Out* out, int vocab, int label, int from, int to,
                                                  int row_vectors, const RowFactor& f) {
  constexpr int kOutWords = kPerVector<Scalar> / kPerWord<Out>;
  const RowGrid grid = row_grid(x, out, vocab);
  const char* source = reinterpret_cast<const char*>(x) - static_cast<int64_t>(grid.skip) * sizeof(Scalar);
  char* target = reinterpret_cast<char*>(out) - static_cast<int64_t>(grid.skip) * sizeof(Out);
  const int begin = max(from, grid.begin), end = min(to, grid.end);
  const int thread = static_cast<int>(threadIdx.x);
  const int edge = grid.edge(from, to, row_vectors, vocab);

  const int label_vector = (grid.skip + label) / kPerVector<Scalar>;
  LabelLogit at_label{label >= 0 && edge == label, 0};
  if (label >= 0 && label_vector >= begin && label_vector < end)
    at_label.is_mine = (label_vector - begin) % kCudaThreads == thread;
  if (at_label.is_mine) at_label.z = load_value(x + label);

  const float reference = rintf(f.max * kLog2E);
  const float factor = f.factor / fast_exp2(power_of(f.max, reference));
  if (edge >= 0) out[edge] = Format<Out>::rounded(factor * fast_exp2(power_of(load_value(x + edge), reference)));

#pragma unroll 1
  for (int i = begin + thread; i < end; i += kUnroll * kCudaThreads) {
    Vector v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * kCudaThreads;
      if (at < end) v[u] = load_vector(source + static_cast<int64_t>(at) * kVectorBytes);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * kCudaThreads;
      if (at >= end) break;
      unsigned packed[kOutWords];
#pragma unroll
      for (int w = 0; w < kOutWords; ++w) {
        float g[kPerWord<Out>];
        unpack_part<Scalar>(v[u], w, g);
#pragma unroll
        for (float& value : g) value = factor * fast_exp2(power_of(value, reference));
        packed[w] = Format<Out>::pack(g);
      }
      store_words(target + static_cast<int64_t>(at) * kOutWords * 4, packed);
    }
  }
  return at_label;
}

/// Does the same element by element, for logits and output that differ in alignment, for example because of a padded
/// stride, and for any maximum. Neighbouring threads write neighbouring elements.
template <typename Scalar, typename Out>
__device__ __forceinline__ LabelLogit write_piece_singly(const Scalar* x, Out* out, int vocab, int label, int from,
                                                         int to, const RowFactor& f) {
  constexpr int kSteps = 8;
  LabelLogit at_label{false, 0};
  const int begin = from * kPerVector<Scalar> + static_cast<int>(threadIdx.x);
  const int end = static_cast<int>(min(int64_t{to} * kPerVector<Scalar>, static_cast<int64_t>(vocab)));
#pragma unroll 1
  for (int i = begin; i < end; i += kSteps * kCudaThreads) {
    float z[kSteps];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      if (i + u * kCudaThreads < end) z[u] = load_value(x + i + u * kCudaThreads);
    }
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int at = i + u * kCudaThreads;
      if (at >= end) break;
      if (at == label) at_label = {true, z[u]};
      out[at] = Format<Out>::rounded(f.factor * fast_exp(z[u] - f.max));
    }
  }
  return at_label;
}

/// Writes factor * exp(z - max) for each logit z of a piece of a row.
template <typename Scalar, typename Out>
__device__ __forceinline__ LabelLogit write_exponentials(const Scalar* x, Out* out, int vocab, int label,
                                                         const Piece& piece, int row_vectors, const RowFactor& f) {
  // These conditions are equal in all threads.
  if (has_power(f.max) && are_aligned_alike(x, out, vocab)) {
    return write_piece(x, out, vocab, label, piece.from, piece.to, row_vectors, f);
  }
  return write_piece_singly(x, out, vocab, label, piece.from, piece.to, f);
}

/// Writes `value` to a piece of a row whose positions are counted in vectors of the gradient.
template <typename Out>
__device__ __forceinline__ void fill_piece(Out* out, int vocab, int from, int to, int row_vectors, float value) {
  typedef Format<Out> F;
  const RowGrid grid = RowGrid::of(out, vocab);
  const int edge = grid.edge(from, to, row_vectors, vocab);
  if (edge >= 0) out[edge] = F::rounded(value);
  float lanes[kPerWord<Out>];
#pragma unroll
  for (float& lane : lanes) lane = value;
  const unsigned word = F::pack(lanes);
  const int end = min(to, grid.end);
#pragma unroll 4
  for (int i = max(from, grid.begin) + static_cast<int>(threadIdx.x); i < end; i += kCudaThreads) {
    store_vector(const_cast<char*>(grid.base) + static_cast<int64_t>(i) * kVectorBytes, {{word, word, word, word}});
  }
}

/// Writes `value` to a piece of a row whose positions are counted in vectors of logits, which are wider than the
/// gradient.
template <typename Scalar, typename Out>
__device__ __forceinline__ void fill_piece_singly(Out* out, int vocab, int from, int to, float value) {
  const int end = static_cast<int>(min(int64_t{to} * kPerVector<Scalar>, static_cast<int64_t>(vocab)));
  for (int i = from * kPerVector<Scalar> + static_cast<int>(threadIdx.x); i < end; i += kCudaThreads)
    out[i] = Format<Out>::rounded(value);
}

/// Computes grad[i, v] = scale * weight[i] * (1[v == y_i] - exp(z[i, v] - m_i) / sum_i). grad may be the logits, if Out
/// is Scalar; grad_error lists the other pairs of types.
///
/// Grid    cuda_logits_grad_shape: at most as many blocks as run on the GPU at once. Labelled rows, which are read and
///         written, and other rows, which are only written, are each cut into one equal part per block
/// Block   kCudaThreads threads
/// Shared  a list of rows
/// Reads   labels, once per block; vocab elements per labelled row
/// Writes  vocab elements per labelled row, and vocab zeros per ignored row unless is_zeroed
template <typename Scalar, typename Out>
__global__ void __launch_bounds__(kCudaThreads, kCudaBlocksPerSm)
    logits_grad_kernel(const __grid_constant__ LogitsGradArgs a) {
  __shared__ RowFinderShared shared;
  const LogitsGradParams& p = a.p;
  const int vocab = static_cast<int>(p.in.vocab);
  const auto grad_row = [&](int64_t row) {
    return static_cast<Out*>(p.grad) + row_offset(row, p.grad_inner, p.grad_outer_stride, p.grad_row_stride);
  };
  const RowFinder finder(p.in, shared);

  const Split scored(finder.count(true), a.row_vectors, static_cast<int>(gridDim.x));
  for_each_piece(p.in, finder, true, scored, shared, [&](const Piece& piece) {
    const Scalar* x =
        static_cast<const Scalar*>(p.in.logits) + row_offset(piece.row, p.in.inner, p.in.outer_stride, p.in.row_stride);
    Out* out = grad_row(piece.row);
    const int label = label_column(p.in, p.in.labels[piece.row]);  // -1: in another tile
    const RowFactor f = row_factor(a, piece.row);
    const LabelLogit at_label = write_exponentials(x, out, vocab, label, piece, a.row_vectors, f);
    if (at_label.is_mine) out[label] = Format<Out>::rounded(label_grad(a, piece.row, f.factor, at_label.z));
  });

  const Split others(finder.count(false), a.row_vectors, static_cast<int>(gridDim.x));
  for_each_piece(p.in, finder, false, others, shared, [&](const Piece& piece) {
    const int64_t label = p.in.labels[piece.row];
    if (label == p.in.ignore_index && p.is_zeroed) return;
    if constexpr (sizeof(Scalar) == sizeof(Out)) {
      fill_piece(grad_row(piece.row), vocab, piece.from, piece.to, a.row_vectors, filler(p.in, label));
    } else {
      fill_piece_singly<Scalar>(grad_row(piece.row), vocab, piece.from, piece.to, filler(p.in, label));
    }
  });
}

/// Writes exp(z - reference) for a tile of float32 logits, and 0 for the label. If a row's reference rises, multiplies
/// the row's sums over the earlier tiles by exp(old - new reference).
///
/// Grid    cuda_exp_logits_shape: at most as many blocks as run on the GPU at once. All rows are cut into one equal
/// part
///         per block
/// Block   kCudaThreads threads
/// Reads   vocab elements per row, and the sums of a row whose reference rises
/// Writes  vocab elements per row, and these sums
template <typename Out>
__global__ void __launch_bounds__(kCudaThreads, kCudaBlocksPerSm)
    exp_logits_kernel(const __grid_constant__ ExpLogitsArgs a) {
  const ExpLogitsParams& p = a.p;
  const int vocab = static_cast<int>(p.in.vocab), part = static_cast<int>(blockIdx.x);
  const Split split(static_cast<int>(p.in.rows), a.row_vectors, static_cast<int>(gridDim.x));
  if (part >= split.parts) return;
  const BlockPieces pieces(split, part);
  for (int row = pieces.first; row <= pieces.last; ++row) {
    const Piece piece = pieces.piece(row, row);
    const float max = p.row_max[row];
    const float old = p.reference == nullptr ? minus_infinity() : p.reference[row];
    const float reference = max - old > p.slack ? max : old;  // both may be -inf
    if (piece.from == 0 && threadIdx.x == 0) p.new_reference[row] = reference;

    const float* x =
        static_cast<const float*>(p.in.logits) + row_offset(row, p.in.inner, p.in.outer_stride, p.in.row_stride);
    Out* out = static_cast<Out*>(p.exp_logits) + static_cast<int64_t>(row) * vocab;
    const RowFactor f{reference == minus_infinity() ? 0.0f : reference, 1.0f};
    const int label = label_column(p.in, p.in.labels[row]);
    if (write_exponentials(x, out, vocab, label, piece, a.row_vectors, f).is_mine) out[label] = Format<Out>::rounded(0);

    if (p.reference == nullptr || reference == old) continue;
    // The pieces of the row share out its sums.
    float* sums = p.sums + row * p.hidden_size;
    const float scale = old == minus_infinity() ? 0.0f : fast_exp(old - reference);
    const int64_t end = p.hidden_size * piece.to / a.row_vectors;
    for (int64_t i = p.hidden_size * piece.from / a.row_vectors + threadIdx.x; i < end; i += kCudaThreads) {
      sums[i] *= scale;
    }
  }
}

template <typename Scalar, typename Out>
cudaError_t launch(const LogitsGradArgs& args, const CudaShape& shape, cudaStream_t stream) {
  logits_grad_kernel<Scalar, Out><<<shape.grid, shape.block, 0, stream>>>(args);
  return cudaGetLastError();
}

template <typename Out>
cudaError_t launch(const ExpLogitsArgs& args, const CudaShape& shape, cudaStream_t stream) {
  exp_logits_kernel<Out><<<shape.grid, shape.block, 0, stream>>>(args);
  return cudaGetLastError();
}

/// A number for each pair of types.
constexpr int types(DType dtype, DType grad_dtype) {
  return 4 * static_cast<int>(dtype) + static_cast<int>(grad_dtype);
}

}  // namespace

const char* launch_logits_grad(const LogitsGradParams& p, bool scale_is_float, DType dtype, DType grad_dtype,
                               int multiprocessors, cudaStream_t stream) {
  constexpr DType kFloat = DType::kFloat32, kBFloat = DType::kBFloat16, kHalf = DType::kFloat16;
  const CudaShape shape = cuda_logits_grad_shape(p.in.rows, p.in.vocab, dtype, multiprocessors);
  const LogitsGradArgs args = logits_grad_args(p, scale_is_float, dtype);
  cudaError_t status = cudaErrorInvalidValue;
  switch (types(dtype, grad_dtype)) {
    case types(kFloat, kFloat): status = launch<float, float>(args, shape, stream); break;
    case types(kBFloat, kBFloat): status = launch<__nv_bfloat16, __nv_bfloat16>(args, shape, stream); break;
    case types(kHalf, kHalf): status = launch<__half, __half>(args, shape, stream); break;
    case types(kFloat, kBFloat): status = launch<float, __nv_bfloat16>(args, shape, stream); break;
    case types(kFloat, kHalf): status = launch<float, __half>(args, shape, stream); break;
    case types(kHalf, kBFloat): status = launch<__half, __nv_bfloat16>(args, shape, stream); break;
    default: break;
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

const char* launch_exp_logits(const ExpLogitsParams& p, DType dtype, int multiprocessors, cudaStream_t stream) {
  const CudaShape shape = cuda_exp_logits_shape(p.in.rows, p.in.vocab, multiprocessors);
  const ExpLogitsArgs args = exp_logits_args(p);
  cudaError_t status = cudaErrorInvalidValue;
  switch (dtype) {
    case DType::kFloat32: status = launch<float>(args, shape, stream); break;
    case DType::kBFloat16: status = launch<__nv_bfloat16>(args, shape, stream); break;
    case DType::kFloat16: status = launch<__half>(args, shape, stream); break;
    case DType::kFloat64: break;
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace mpo

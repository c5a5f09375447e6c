// The shapes and arguments of the CUDA launches. Host code only, built and tested without CUDA as well.
#include "mpo/cuda/launch.h"

#include <algorithm>
#include <climits>

namespace mpo {
namespace {

/// Returns the number of vectors that a row may touch, wherever it starts in its first line.
int row_vectors(int64_t vocab, DType dtype) {
  const int64_t skipped = kLineBytes / element_bytes(dtype) - 1;
  const int64_t per_vector = kVectorBytes / element_bytes(dtype);
  return static_cast<int>((skipped + vocab + per_vector - 1) / per_vector);
}

/// Returns the number of blocks: as many as run on the GPU at once, fewer if there is too little work.
int grid_of(int64_t rows, int64_t vocab, DType dtype, int multiprocessors) {
  const int64_t useful = rows * row_vectors(vocab, dtype) / kMinVectors;
  return static_cast<int>(std::clamp<int64_t>(useful, 1, int64_t{kCudaBlocksPerSm} * multiprocessors));
}

int64_t piece_bytes(int grid) { return int64_t{2} * grid * static_cast<int64_t>(sizeof(PieceSums)); }

int64_t pair_bytes(int64_t pairs) { return 4 * pairs * static_cast<int64_t>(sizeof(double)); }

}  // namespace

int element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

const char* rows_error(const Rows& in, DType dtype) {
  if (dtype == DType::kFloat64) return "logits must be float32, bfloat16 or float16, got float64";
  // Positions within a row, and row numbers in a list of rows, are 32-bit; everything else is 64-bit.
  if (in.rows > INT_MAX) return "rows must be below 2^31";
  if (in.vocab > INT_MAX - kLineBytes * kCudaThreads) return "vocab must be below 2^31 - 32768";
  return nullptr;
}

const char* grad_error(DType dtype, DType grad_dtype) {
  const bool narrows = dtype == DType::kFloat32 && element_bytes(grad_dtype) == 2;
  if (dtype == grad_dtype || narrows || (dtype == DType::kFloat16 && grad_dtype == DType::kBFloat16)) return nullptr;
  return "grad must have the dtype of the logits, be half precision for float32 logits, or bfloat16 for float16 logits";
}

CudaShape cuda_forward_shape(int64_t rows, int64_t vocab, DType dtype, int64_t pairs, int multiprocessors) {
  const int grid = grid_of(rows, vocab, dtype, multiprocessors);
  return {grid, kCudaThreads, piece_bytes(grid) + pair_bytes(pairs), grid + 1};
}

CudaShape cuda_pair_loss_shape(int64_t pairs) { return {1, kCudaThreads, pair_bytes(pairs), 0}; }

CudaShape cuda_logits_grad_shape(int64_t rows, int64_t vocab, DType dtype, int multiprocessors) {
  return {grid_of(rows, vocab, dtype, multiprocessors), kCudaThreads, 0, 0};
}

CudaShape cuda_exp_logits_shape(int64_t rows, int64_t vocab, int multiprocessors) {
  return cuda_logits_grad_shape(rows, vocab, DType::kFloat32, multiprocessors);
}

TokenLogpArgs token_logp_args(const TokenLogpParams& p, DType dtype, const CudaWork& work) {
  return {p, {}, static_cast<PieceSums*>(work.scratch), work.counters, row_vectors(p.in.vocab, dtype)};
}

PairLossArgs pair_loss_args(const PairLossParams& p, const CudaPairTypes& types, void* scratch) {
  double* sums = static_cast<double*>(scratch);
  return {p, types, sums, sums + 2 * p.pairs};
}

TokenLogpArgs forward_args(const TokenLogpParams& token, const PairLossParams& pair, const CudaPairTypes& types,
                           DType dtype, const CudaWork& work, const CudaShape& shape) {
  TokenLogpArgs args = token_logp_args(token, dtype, work);
  args.pair = pair_loss_args(pair, types, static_cast<char*>(work.scratch) + piece_bytes(shape.grid));
  return args;
}

LogitsGradArgs logits_grad_args(const LogitsGradParams& p, bool scale_is_float, DType dtype) {
  return {p, row_vectors(p.in.vocab, dtype), scale_is_float};
}

ExpLogitsArgs exp_logits_args(const ExpLogitsParams& p) { return {p, row_vectors(p.in.vocab, DType::kFloat32)}; }

}  // namespace mpo

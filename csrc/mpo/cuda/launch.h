// What the host hands to the CUDA kernels, and how it shapes their launches. Included by kernels and host alike;
// launch.cpp needs neither nvcc nor a GPU, so tests make the very launches that the operators make.
#pragma once

#include <cstdint>

#include "mpo/api.h"
#include "mpo/math.h"

namespace mpo {

// Chosen by arithmetic (docs/performance.md), not yet tuned on a GPU: each block has 16 kB of loads in flight, and the
// blocks that a multiprocessor holds at once are as many as the kernels' registers leave room for.
constexpr int kCudaThreads = 256;
constexpr int kCudaBlocksPerSm = 3;
constexpr int kWarp = 32;
constexpr int kWarps = kCudaThreads / kWarp;
constexpr unsigned kAllLanes = ~0u;  // of a warp

/// Rows are laid on a grid of 128-byte lines and counted in vectors of 16 bytes from the start of their first line.
constexpr int kLineBytes = 128;
constexpr int kVectorBytes = 16;
constexpr int kSplitVectors = 32;  // rows are split at multiples of what one warp loads at once
constexpr int kMinVectors = 512;   // fewer of them are not worth a block

/// A piece of a row that is split over blocks, as one block hands it on: 32 bytes, so one sector.
struct alignas(32) PieceSums {
  RowSums<float> sums;
};

struct PairLossArgs {
  PairLossParams p;
  CudaPairTypes types;
  double* sums;          // [2 * pairs] scratch
  double* coefficients;  // [2 * pairs] scratch
};

struct TokenLogpArgs {
  TokenLogpParams p;
  PairLossArgs pair;
  PieceSums* pieces;   // [grid, 2] scratch: the pieces of the first and of the last row of each block
  unsigned* counters;  // [grid + 1] tickets of the split rows, by the first block of each, then of the whole grid
  int row_vectors;
};

struct LogitsGradArgs {
  LogitsGradParams p;
  int row_vectors;
  bool scale_is_float;  // p.scale points to float
};

int element_bytes(DType dtype);

/// nullptr, or why the kernels do not take these rows.
const char* rows_error(const Rows& in, DType dtype);

TokenLogpArgs token_logp_args(const TokenLogpParams& p, DType dtype, const CudaWork& work);
PairLossArgs pair_loss_args(const PairLossParams& p, const CudaPairTypes& types, void* scratch);
TokenLogpArgs forward_args(const TokenLogpParams& token, const PairLossParams& pair, const CudaPairTypes& types,
                           DType dtype, const CudaWork& work, const CudaShape& shape);
LogitsGradArgs logits_grad_args(const LogitsGradParams& p, bool scale_is_float, DType dtype);

}  // namespace mpo

// The arguments of the CUDA kernels and the shapes of their launches. Both kernels and host code include this header.
// launch.cpp needs neither nvcc nor a GPU, so tests can repeat exactly the launches of the operators.
#pragma once

#include <cstdint>

#include "mpo/api.h"
#include "mpo/math.h"

namespace mpo {

// Derived in docs/performance.md, not yet tuned on a GPU: each block has 16 kB of loads in flight, and a multiprocessor
// holds as many blocks at once as the registers of the kernels allow.
constexpr int kCudaThreads = 256;
constexpr int kCudaBlocksPerSm = 4;
constexpr int kWarp = 32;
constexpr int kWarps = kCudaThreads / kWarp;
constexpr unsigned kAllLanes = ~0u;  // mask of all lanes of a warp

/// Positions in a row are counted in vectors of 16 bytes from the start of the 128-byte line in which the row starts.
constexpr int kLineBytes = 128;
constexpr int kVectorBytes = 16;
constexpr int kSplitVectors = 32;  // rows are split at multiples of the vectors that a warp loads at once
constexpr int kMinVectors = 512;   // minimum number of vectors per block

/// The sums of one block over its piece of a row that is split over blocks: 32 bytes, the size of a sector.
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
  unsigned* arrivals;  // [grid + 1] arrival counters: of each split row, at its first block, then of the whole grid
  int row_vectors;
};

struct LogitsGradArgs {
  LogitsGradParams p;
  int row_vectors;
  bool scale_is_float;  // p.scale points to float
};

struct ExpLogitsArgs {
  ExpLogitsParams p;
  int row_vectors;
};

int element_bytes(DType dtype);

/// Returns nullptr, or why the kernels cannot process these rows.
const char* rows_error(const Rows& in, DType dtype);

TokenLogpArgs token_logp_args(const TokenLogpParams& p, DType dtype, const CudaWork& work);
PairLossArgs pair_loss_args(const PairLossParams& p, const CudaPairTypes& types, void* scratch);
TokenLogpArgs forward_args(const TokenLogpParams& token, const PairLossParams& pair, const CudaPairTypes& types,
                           DType dtype, const CudaWork& work, const CudaShape& shape);
LogitsGradArgs logits_grad_args(const LogitsGradParams& p, bool scale_is_float, DType dtype);
ExpLogitsArgs exp_logits_args(const ExpLogitsParams& p);

}  // namespace mpo

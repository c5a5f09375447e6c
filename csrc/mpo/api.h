// The whole ABI of the native code: plain parameter structs and the functions that take them. Free of torch, pybind11
// and Python; csrc/bindings.cpp fills the structs in.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as cuda_runtime_api.h has it; keeps CUDA headers out of the bindings

namespace mpo {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

/// Instruction sets of the CPU kernels, the best first.
enum class Isa : int { kAvx512, kAvx2, kPortable };

/// Bits that ask token_logp for statistics of each row. The order is that of mpo_ext.ops.logits.STATS.
enum RowStats : unsigned {
  kEntropy = 1u << 0,      // of the softmax, in nats
  kMeanLogit = 1u << 1,    // mean over the vocabulary
  kTop1 = 1u << 2,         // 1 if the label has the row's largest logit
  kSumPSquared = 1u << 3,  // sum of squared probabilities
};
constexpr int kNumRowStats = 4;

/// Rows of logits and their labels. Strides are in elements; everything that meets one is 64-bit, since rows * vocab
/// passes 2^31 in practice. "Result" below is float, or double where the logits are double.
///
/// The columns may be a tile of the vocabulary: columns first .. first + vocab - 1 of `total`. Labels count from the
/// vocabulary's start, so a row's label may lie in another tile.
struct Rows {
  const void* logits;     // row i starts at (i / inner) * outer_stride + (i % inner) * row_stride
  const int64_t* labels;  // [rows]
  int64_t rows;
  int64_t vocab;  // columns of these logits
  int64_t first;
  int64_t total;
  int64_t inner;
  int64_t outer_stride;
  int64_t row_stride;
  int64_t ignore_index;
};

/// What token_logp knows of a row after some tiles of its vocabulary, in their order: kRowStateSize doubles, a
/// RowState of math.h.
constexpr int kRowStateSize = 6;

struct TokenLogpParams {
  Rows in;
  double* row_state;  // [rows, kRowStateSize]; nullptr where the logits are the whole vocabulary. Read but in the first
                      // tile, written but in the last, from which on the results below are meant
  void* logp;         // [rows] Result; 0 where the label is ignore_index, NaN where it is outside [0, total)
  void* row_max;      // [rows] Result, for the backward
  void* row_sum;      // [rows] Result, sum of exp(z - row_max), for the backward
  void* row_stats;    // [number of bits in stats, rows] Result
  unsigned stats;     // RowStats
};

struct LogitsGradParams {
  Rows in;
  const void* row_max;  // [rows] Result
  const void* row_sum;  // [rows] Result
  const void* weight;   // [rows] Result, d loss / d logp
  const double* scale;  // one factor on all of it, or nullptr for 1
  void* grad;           // like the logits, same dtype; may be the logits themselves
  int64_t grad_inner;
  int64_t grad_outer_stride;
  int64_t grad_row_stride;
  bool is_zeroed;  // grad holds zeros already, so ignored rows need not be written
};

/// How a batch of rewards moves the state of the reward shift (mpo_ext/loss/reward_shift.py).
enum class ShiftRule : int { kHold, kCumulative, kEma };

struct PairLossConfig {
  double beta;
  double dpo_weight;
  double bco_weight;
  double ntp_weight;
  double label_smoothing;
  bool average_sequences;  // NTP: mean of the responses' means instead of the mean over tokens
  ShiftRule rule;
  bool update_first;  // delta already includes this batch
  double decay;
};

/// Sequences 0 .. pairs - 1 are the chosen ones, i and pairs + i make a pair.
struct PairLossParams {
  const void* logp;        // [rows] Result
  const int64_t* labels;   // [rows]
  const int64_t* offsets;  // [2 * pairs + 1], from 0 to rows, not decreasing
  const double* ref_logp;  // [2 * pairs]
  const double* state;     // [2] delta, number of updates behind it
  void* loss;              // [1] Result
  void* terms;             // [3] Result: DPO, BCO, NTP, without their weights
  void* reward_shift;      // [1] Result: the delta used
  void* sums;              // [2 * pairs] Result
  void* reward;            // [2 * pairs] Result
  int64_t* tokens;         // [2 * pairs]
  double* new_state;       // [2]
  double* batch;           // [2] sum and count of the rewards that move the state
  void* weight;            // [rows] Result: d loss / d logp, 0 where the label is ignore_index
  int64_t pairs;
  int64_t rows;
  int64_t ignore_index;
  PairLossConfig config;
};

/// Whether this machine runs the kernels of an instruction set, and whether they were compiled.
bool can_run(Isa isa);

/// The three operators on host memory. The result does not depend on the number of threads.
///
/// Where `exp_logits` is not nullptr, which lies like the logits and may be the logits, exp(z - row_max) is written
/// there, with row_max as of this tile, and 0 for the label; not in rows that are ignored or whose label is bad.
void token_logp_cpu(const TokenLogpParams& p, void* exp_logits, DType dtype, int threads, Isa isa);
void pair_loss_cpu(const PairLossParams& p, bool is_double);
void logits_grad_cpu(const LogitsGradParams& p, DType dtype, int threads, Isa isa);

/// What a launch of a CUDA kernel consists of, and the memory that it works in.
struct CudaShape {
  int grid;
  int block;
  int64_t scratch_bytes;  // any contents, 16-byte aligned
  int counters;           // zeros before the launch, and zeros again after it; not shared with another stream
};

struct CudaWork {
  void* scratch;
  unsigned* counters;
};

/// The types in which the GPU takes some parameters as they come: to convert them would be launches of their own.
struct CudaPairTypes {
  bool ref_is_float;       // PairLossParams::ref_logp points to float
  bool offsets_are_int32;  // PairLossParams::offsets points to int32_t; nullptr means sequences of equal length
};

/// The shapes of the launches below, for a GPU of `multiprocessors`. Callable without one; `pairs` is 0 where
/// token_logp runs by itself.
CudaShape cuda_forward_shape(int64_t rows, int64_t vocab, DType dtype, int64_t pairs, int multiprocessors);
CudaShape cuda_pair_loss_shape(int64_t pairs);
CudaShape cuda_logits_grad_shape(int64_t rows, int64_t vocab, DType dtype, int multiprocessors);

/// The operators on GPU memory: float32, bfloat16 and float16, Result is float. Each enqueues one kernel on `stream`
/// and returns at once, allocating nothing; nullptr, or what went wrong. launch_forward is token_logp and pair_loss
/// in one kernel, with the same bits as the two.
const char* launch_token_logp(const TokenLogpParams& p, DType dtype, const CudaWork& work, int multiprocessors,
                              cudaStream_t stream);
const char* launch_pair_loss(const PairLossParams& p, const CudaPairTypes& types, const CudaWork& work,
                             cudaStream_t stream);
const char* launch_forward(const TokenLogpParams& token, const PairLossParams& pair, const CudaPairTypes& types,
                           DType dtype, const CudaWork& work, int multiprocessors, cudaStream_t stream);
const char* launch_logits_grad(const LogitsGradParams& p, bool scale_is_float, DType dtype, int multiprocessors,
                               cudaStream_t stream);

}  // namespace mpo

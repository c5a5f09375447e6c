// The whole interface of the native code: plain parameter structs and the functions that take them. It is independent
// of torch, pybind11 and Python; csrc/bindings.cpp fills in the structs.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as in cuda_runtime_api.h, which the bindings need not include

namespace mpo {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

/// Instruction sets of the CPU kernels, the best first.
enum class Isa : int { kAvx512, kAvx2, kPortable };

/// Bits that select the statistics that token_logp computes for each row, in the order of STATS in mpo_ext/ops.
enum RowStats : unsigned {
  kEntropy = 1u << 0,      // of the softmax, in nats
  kMeanLogit = 1u << 1,    // mean over the vocabulary
  kTop1 = 1u << 2,         // 1 if the label has the row's largest logit
  kSumPSquared = 1u << 3,  // sum of squared probabilities
};
constexpr int kNumRowStats = 4;

/// Rows of logits and their labels. Strides are in elements. Strides and their factors are 64-bit, because rows * vocab
/// exceeds 2^31 in practice. "Result" below means double if the logits are double, and float otherwise.
///
/// The columns may be a tile of the vocabulary: columns first .. first + vocab - 1 of `total`. Labels are indices into
/// the whole vocabulary, so a row's label may lie in another tile.
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

/// Number of doubles in a RowState (math.h), the sums over the tiles of a row that token_logp has read so far.
constexpr int kRowStateSize = 6;

struct TokenLogpParams {
  Rows in;
  double* row_state;  // [rows, kRowStateSize]; may be nullptr if the logits are the whole vocabulary. Every tile except
                      // the first reads it, and every tile writes it; the results below are final after the last tile
  void* logp;         // [rows] Result; 0 if the label is ignore_index, NaN if it is outside [0, total)
  void* row_max;      // [rows] Result, saved for the backward
  void* row_sum;      // [rows] Result, sum of exp(z - row_max), saved for the backward
  void* row_stats;    // [number of bits in stats, rows] Result
  unsigned stats;     // RowStats
};

struct LogitsGradParams {
  Rows in;
  const void* row_max;  // [rows] Result
  const void* row_sum;  // [rows] Result
  const void* weight;   // [rows] Result, d loss / d logp
  const double* scale;  // factor on the whole gradient, or nullptr for 1
  void* grad;           // same shape as the logits; may be the logits themselves. Same dtype, except on a GPU: there
                        // grad_error names the pairs of dtypes
  int64_t grad_inner;
  int64_t grad_outer_stride;
  int64_t grad_row_stride;
  bool is_zeroed;  // grad already holds zeros, so ignored rows need not be written
};

/// A tile of float32 logits whose exponentials are multiplied with the head, and the sums of these products over the
/// earlier tiles. Every row has a label. The reference of a row is the logit that is subtracted from its logits.
struct ExpLogitsParams {
  Rows in;
  const float* row_max;    // [rows], over this tile and all earlier ones
  const float* reference;  // [rows], of the earlier tiles; nullptr in the first tile
  float* new_reference;    // [rows], other memory than `reference`: row_max if it exceeds the reference by more than
                           // `slack`, otherwise the reference
  float slack;
  float* sums;  // [rows, hidden_size], multiplied by exp(reference - new_reference); not in the first tile
  int64_t hidden_size;
  void* exp_logits;  // [rows, vocab], contiguous: exp(z - new_reference), and 0 for the label. May be the logits
};

/// How the rewards of a batch update the state of the reward shift (mpo_ext/loss/reward_shift.py).
enum class ShiftRule : int { kHold, kCumulative, kEma };

struct PairLossConfig {
  double beta;
  double dpo_weight;
  double bco_weight;
  double ntp_weight;
  double label_smoothing;
  bool average_sequences;  // NTP: mean over the responses of their means per token, instead of the mean over all tokens
  ShiftRule rule;
  bool update_first;  // delta includes this batch
  double decay;
};

/// Sequences 0 .. pairs - 1 are the chosen responses; sequences i and pairs + i form a pair.
struct PairLossParams {
  const void* logp;        // [rows] Result
  const int64_t* labels;   // [rows]
  const int64_t* offsets;  // [2 * pairs + 1], non-decreasing, from 0 to rows
  const double* ref_logp;  // [2 * pairs]
  const double* state;     // [2] delta and the number of its updates
  void* loss;              // [1] Result
  void* terms;             // [3] Result: DPO, BCO and NTP, unweighted
  void* reward_shift;      // [1] Result: the delta that the loss uses
  void* sums;              // [2 * pairs] Result
  void* reward;            // [2 * pairs] Result
  int64_t* tokens;         // [2 * pairs]
  double* new_state;       // [2]
  double* batch;           // [2] sum and count of the rewards that update the state
  void* weight;            // [rows] Result: d loss / d logp, 0 if the label is ignore_index
  int64_t pairs;
  int64_t rows;
  int64_t ignore_index;
  PairLossConfig config;
};

/// Returns whether the kernels of an instruction set were compiled and this machine can run them.
bool can_run(Isa isa);

/// The three operators on host memory. The result does not depend on the number of threads.
///
/// Unless `exp_logits` is nullptr, token_logp also writes exp(z - row_max) to it, and 0 for the label; row_max includes
/// this tile. `exp_logits` has the layout of the logits and may be the logits. Rows that are ignored, or whose label is
/// out of range, are not written.
void token_logp_cpu(const TokenLogpParams& p, void* exp_logits, DType dtype, int threads, Isa isa);
void pair_loss_cpu(const PairLossParams& p, bool is_double);
void logits_grad_cpu(const LogitsGradParams& p, DType dtype, int threads, Isa isa);

/// The shape of a CUDA launch and the memory that it needs.
struct CudaShape {
  int grid;
  int block;
  int64_t scratch_bytes;  // may be uninitialised; 16-byte aligned
  int counters;           // 0 before and after the launch; not shared with another stream
};

struct CudaWork {
  void* scratch;
  unsigned* counters;
};

/// The types of parameters that a GPU kernel accepts in two types, because each conversion would be another launch.
struct CudaPairTypes {
  bool ref_is_float;       // PairLossParams::ref_logp points to float
  bool offsets_are_int32;  // PairLossParams::offsets points to int32_t; nullptr means sequences of equal length
};

/// Return the shapes of the launches below for a GPU with `multiprocessors` multiprocessors. They need no GPU. `pairs`
/// is 0 if token_logp runs alone.
CudaShape cuda_forward_shape(int64_t rows, int64_t vocab, DType dtype, int64_t pairs, int multiprocessors);
CudaShape cuda_pair_loss_shape(int64_t pairs);
CudaShape cuda_logits_grad_shape(int64_t rows, int64_t vocab, DType dtype, int multiprocessors);
CudaShape cuda_exp_logits_shape(int64_t rows, int64_t vocab, int multiprocessors);

/// Returns nullptr, or why launch_logits_grad cannot write a gradient in `grad_dtype` for logits in `dtype`. It can for
/// equal types, for float32 logits and a half-precision gradient, and for float16 logits and a bfloat16 gradient.
const char* grad_error(DType dtype, DType grad_dtype);

/// Returns nullptr if the kernels of this build can run on the current device, otherwise the runtime's error message.
const char* device_error();

/// Allocates `count` arrival counters, which are 0 for every later launch on `stream`. They are never freed. Returns
/// nullptr or an error message. The caller's allocator does not own them, so a captured graph cannot reuse them.
const char* allocate_counters(int count, cudaStream_t stream, unsigned** counters);

/// The operators on GPU memory, for float32, bfloat16 and float16; Result is float. Each enqueues one kernel on
/// `stream` without waiting or allocating, and returns nullptr or an error message. launch_forward runs token_logp and
/// pair_loss in one kernel and gives the same bits as two launches.
const char* launch_token_logp(const TokenLogpParams& p, DType dtype, const CudaWork& work, int multiprocessors,
                              cudaStream_t stream);
const char* launch_pair_loss(const PairLossParams& p, const CudaPairTypes& types, const CudaWork& work,
                             cudaStream_t stream);
const char* launch_forward(const TokenLogpParams& token, const PairLossParams& pair, const CudaPairTypes& types,
                           DType dtype, const CudaWork& work, int multiprocessors, cudaStream_t stream);
const char* launch_logits_grad(const LogitsGradParams& p, bool scale_is_float, DType dtype, DType grad_dtype,
                               int multiprocessors, cudaStream_t stream);
/// `dtype` is that of exp_logits.
const char* launch_exp_logits(const ExpLogitsParams& p, DType dtype, int multiprocessors, cudaStream_t stream);

}  // namespace mpo

// The pair loss on one block: the last block of token_logp, or the only block of pair_loss.
#pragma once

#include "mpo/cuda/reduce.cuh"

namespace mpo {

constexpr int kRowUnroll = 8;                  // rows whose numbers a thread has in flight
constexpr int kWarpRows = kRowUnroll * kWarp;  // rows that a warp processes at a time

/// The places of sums over the batch: the sum and count of the rewards, those of ChosenSums, and the two terms of
/// pairs.
enum BatchSum { kReward, kRewards, kLogp, kMeanLogp, kTokens, kResponses, kDpo, kBco, kBatchSums };

struct PairLossShared {
  double values[kBatchSums][kWarps];
  double sums[kBatchSums];
  int64_t tokens[kWarps];
};

/// Stores the sums of n values over the block in shared.sums[first ..], always added in the same order. All threads
/// must call it. Its barriers also separate it from other uses of `shared`.
template <int n>
__device__ __forceinline__ void block_sum(const double (&x)[n], int first, PairLossShared& shared) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  __syncthreads();  // all threads have read the shared values of an earlier use
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const double sum = warp_sum(x[i]);
    if (thread % kWarp == 0) shared.values[first + i][warp] = sum;
  }
  __syncthreads();  // values[] is complete
  if (thread < n) {
    double sum = 0;
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) sum += shared.values[first + thread][w];
    shared.sums[first + thread] = sum;
  }
  __syncthreads();  // sums[] is complete
}

/// The inputs of a pair loss in the types that the GPU accepts.
struct PairInputs {
  const PairLossArgs& a;

  __device__ __forceinline__ int64_t offset(int64_t s) const {
    if (a.p.offsets == nullptr) return a.p.rows / (2 * a.p.pairs) * s;
    return a.types.offsets_are_int32 ? reinterpret_cast<const int*>(a.p.offsets)[s] : a.p.offsets[s];
  }
  __device__ __forceinline__ double ref_logp(int64_t s) const {
    return a.types.ref_is_float ? static_cast<double>(reinterpret_cast<const float*>(a.p.ref_logp)[s])
                                : a.p.ref_logp[s];
  }
  __device__ __forceinline__ bool has_both(int64_t pair) const {
    return a.p.tokens[pair] > 0 && a.p.tokens[a.p.pairs + pair] > 0;
  }
  __device__ __forceinline__ int64_t pair_of(int64_t s) const { return s < a.p.pairs ? s : s - a.p.pairs; }
  __device__ __forceinline__ double reward(int64_t s) const {
    return has_both(pair_of(s)) ? a.p.config.beta * (a.sums[s] - ref_logp(s)) : 0.0;
  }
  /// Returns, in every thread, whether the offsets rise from 0 to rows. Invalid offsets would cause accesses out of
  /// bounds.
  __device__ __forceinline__ bool are_valid() const {
    if (a.p.offsets == nullptr) return true;
    int is_bad = threadIdx.x == 0 && (offset(0) != 0 || offset(2 * a.p.pairs) != a.p.rows);
    for (int64_t s = threadIdx.x; s < 2 * a.p.pairs; s += kCudaThreads) is_bad |= offset(s + 1) <= offset(s);
    return __syncthreads_or(is_bad) == 0;
  }
};

/// The distribution of the block's warps over the sequences: several warps per sequence if there are few sequences.
struct SequenceWarps {
  int per_sequence;  // warps per sequence
  int at_once;       // sequences at a time
  int sequence;      // index of this warp's sequence among the sequences at a time
  int part;          // the index of this warp among the warps of the sequence

  __device__ __forceinline__ explicit SequenceWarps(int64_t sequences) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    per_sequence = sequences >= kWarps ? 1 : kWarps / static_cast<int>(sequences);
    at_once = kWarps / per_sequence;
    sequence = warp / per_sequence;
    part = warp % per_sequence;
  }
};

/// Writes NaN to all results and leaves the reward shift as it is. Not inlined, because it is rarely called.
static __device__ __noinline__ void reject_offsets(const PairLossParams& p) {
  const float nan = __int_as_float(0x7fffffff);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int64_t row = thread; row < p.rows; row += kCudaThreads) static_cast<float*>(p.weight)[row] = nan;
#pragma unroll 1
  for (int64_t s = thread; s < 2 * p.pairs; s += kCudaThreads) {
    static_cast<float*>(p.sums)[s] = static_cast<float*>(p.reward)[s] = nan;
    p.tokens[s] = 0;
  }
  if (thread < 3) static_cast<float*>(p.terms)[thread] = nan;
  if (thread < 2) {
    p.new_state[thread] = p.state[thread];
    p.batch[thread] = 0;
  }
  if (thread == 0) *static_cast<float*>(p.loss) = *static_cast<float*>(p.reward_shift) = nan;
}

/// Returns end - row, at most kWarpRows.
__device__ __forceinline__ int rows_left(int64_t row, int64_t end) {
  return static_cast<int>(min(end - row, static_cast<int64_t>(kWarpRows)));
}

/// Sums the log-probs and counts the tokens of each sequence. Ends with a barrier.
__device__ __forceinline__ void sum_sequences(const PairLossArgs& a, const SequenceWarps& warps,
                                              PairLossShared& shared) {
  const PairLossParams& p = a.p;
  const PairInputs in{a};
  const float* logp = static_cast<const float*>(p.logp);
  const int64_t sequences = 2 * p.pairs;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t first = 0; first < sequences; first += warps.at_once) {
    const int64_t s = first + warps.sequence;
    const bool has_work = warps.sequence < warps.at_once && s < sequences;
    double sum = 0;
    int count = 0;
    if (has_work) {
      const int64_t end = in.offset(s + 1);
#pragma unroll 1
      for (int64_t row = in.offset(s) + warps.part * kWarpRows + lane; row < end;
           row += warps.per_sequence * kWarpRows) {
        const int left = rows_left(row, end);
        // All loads come first, because a branch between them would make each wait for the one before.
        int64_t label[kRowUnroll];
        float value[kRowUnroll];
#pragma unroll
        for (int u = 0; u < kRowUnroll; ++u) {
          const bool is_row = u * kWarp < left;
          label[u] = is_row ? p.labels[row + u * kWarp] : p.ignore_index;
          // Other blocks of the grid wrote logp: __ldcg reads it from the second-level cache, which all blocks share.
          value[u] = is_row ? __ldcg(logp + row + u * kWarp) : 0.0f;
        }
#pragma unroll
        for (int u = 0; u < kRowUnroll; ++u) {
          if (label[u] == p.ignore_index) continue;
          sum += static_cast<double>(value[u]);
          ++count;
        }
      }
    }
    sum = warp_sum(sum);
    count = __reduce_add_sync(kAllLanes, count);
    if (lane == 0) {
      shared.values[0][warp] = sum;
      shared.tokens[warp] = count;
    }
    __syncthreads();  // the sums of the warps are complete
    if (has_work && warps.part == 0 && lane == 0) {
      double total = 0;
      int64_t tokens = 0;
      for (int w = warp; w < warp + warps.per_sequence; ++w) {
        total += shared.values[0][w];
        tokens += shared.tokens[w];
      }
      a.sums[s] = total;
      static_cast<float*>(p.sums)[s] = static_cast<float>(total);
      p.tokens[s] = tokens;
    }
    __syncthreads();  // the sums of the warps have been read; after the last round, a.sums and p.tokens are complete
  }
}

/// Writes the coefficient of each sequence to its labelled rows, and 0 to the others.
__device__ __forceinline__ void write_weights(const PairLossArgs& a, const SequenceWarps& warps) {
  const PairLossParams& p = a.p;
  const PairInputs in{a};
  float* weight = static_cast<float*>(p.weight);
  const int64_t sequences = 2 * p.pairs;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t first = 0; first < sequences; first += warps.at_once) {
    const int64_t s = first + warps.sequence;
    if (warps.sequence >= warps.at_once || s >= sequences) continue;
    const float coefficient = static_cast<float>(a.coefficients[s]);
    const int64_t end = in.offset(s + 1);
#pragma unroll 1
    for (int64_t row = in.offset(s) + warps.part * kWarpRows + lane; row < end; row += warps.per_sequence * kWarpRows) {
      const int left = rows_left(row, end);
      // All loads come before the stores, which might write to the labels as far as the compiler knows.
      int64_t label[kRowUnroll];
#pragma unroll
      for (int u = 0; u < kRowUnroll; ++u) label[u] = u * kWarp < left ? p.labels[row + u * kWarp] : 0;
#pragma unroll
      for (int u = 0; u < kRowUnroll; ++u) {
        if (u * kWarp < left) weight[row + u * kWarp] = label[u] == p.ignore_index ? 0.0f : coefficient;
      }
    }
  }
}

/// Computes the loss of B pairs and the weight of each row's gradient on one block. Sums are in double, in an order
/// that depends only on the sizes. Invalid offsets give NaN and leave the reward shift as it is.
///
/// Reads   12 bytes per row, and the labels a second time
/// Writes  4 bytes per row, and a few numbers per sequence
__device__ __forceinline__ void pair_loss_block(const PairLossArgs& a, PairLossShared& shared) {
  const PairLossParams& p = a.p;
  const PairLossConfig& c = p.config;
  const PairInputs in{a};
  const int64_t sequences = 2 * p.pairs;
  const int thread = static_cast<int>(threadIdx.x);
  if (!in.are_valid()) return reject_offsets(p);
  const SequenceWarps warps(sequences);
  sum_sequences(a, warps, shared);

  // Rewards, and the sums over the batch. Each loop has few sums, since registers are scarce.
  const int pairs = static_cast<int>(p.pairs);  // below 2^30
  double rewards[2] = {0, 0};
#pragma unroll 1
  for (int s = thread; s < 2 * pairs; s += kCudaThreads) {
    const double reward = in.reward(s);
    static_cast<float*>(p.reward)[s] = static_cast<float>(reward);
    rewards[0] += reward;
    rewards[1] += in.has_both(in.pair_of(s)) ? 1 : 0;
  }
  block_sum(rewards, kReward, shared);
  double responses[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (int s = thread; s < pairs; s += kCudaThreads) {
    if (p.tokens[s] == 0) continue;
    const double tokens = static_cast<double>(p.tokens[s]);
    responses[0] += a.sums[s];
    responses[1] += a.sums[s] / tokens;
    responses[2] += tokens;
    responses[3] += 1;
  }
  block_sum(responses, kLogp, shared);
  const double* sums = shared.sums;
  const ShiftState before{p.state[0], p.state[1]};
  const ShiftState after = moved(before, sums[kReward], sums[kRewards], c.rule, c.decay);
  const double delta = c.update_first ? after.value : before.value;

  // The terms of the pairs, and the coefficient of each sequence's log-probs in the loss.
  double terms[2] = {0, 0};
  int has_nan = 0;
  const double per_pair = c.beta / static_cast<double>(p.pairs);
  for (int i = thread; i < pairs; i += kCudaThreads) {
    const PairTerms t = pair_terms(in.reward(i), in.reward(pairs + i), delta, c);
    const bool has_both = in.has_both(i);
    has_nan |= isnan(a.sums[i]) || isnan(a.sums[pairs + i]);
    terms[0] += t.dpo;
    terms[1] += t.bco;
    const ChosenSums chosen{sums[kLogp], sums[kMeanLogp], sums[kTokens], sums[kResponses]};
    a.coefficients[i] =
        (has_both ? per_pair * t.grad_chosen : 0) + ntp_grad(chosen, static_cast<double>(p.tokens[i]), c);
    a.coefficients[pairs + i] = has_both ? per_pair * t.grad_rejected : 0;
  }
  has_nan = __syncthreads_or(has_nan);
  block_sum(terms, kDpo, shared);  // its barriers also complete a.coefficients
  write_weights(a, warps);

  if (thread == 0) {
    const ChosenSums chosen{sums[kLogp], sums[kMeanLogp], sums[kTokens], sums[kResponses]};
    const double dpo = sums[kDpo] / pairs, bco = sums[kBco] / pairs, ntp = ntp_loss(chosen, c);
    *static_cast<float*>(p.loss) = static_cast<float>(total_loss(dpo, bco, ntp, has_nan != 0, c));
    static_cast<float*>(p.terms)[0] = static_cast<float>(dpo);
    static_cast<float*>(p.terms)[1] = static_cast<float>(bco);
    static_cast<float*>(p.terms)[2] = static_cast<float>(ntp);
    *static_cast<float*>(p.reward_shift) = static_cast<float>(delta);
    p.new_state[0] = after.value;
    p.new_state[1] = after.updates;
    p.batch[0] = sums[kReward];
    p.batch[1] = sums[kRewards];
  }
}

}  // namespace mpo

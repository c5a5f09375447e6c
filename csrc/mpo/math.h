// The arithmetic of the loss, for host and device: the CPU tests run the same code as the GPU kernels. Everything is
// static, because the CPU kernels are compiled once per instruction set and the linker must not merge their copies.
#pragma once

#include <cmath>
#include <cstdint>

#include "mpo/api.h"

#ifdef __CUDACC__
#define MPO_HD static __host__ __device__ __forceinline__
#else
#define MPO_HD static inline
#endif

namespace mpo {

/// Returns log sigmoid(x) without overflow or cancellation.
MPO_HD double log_sigmoid(double x) { return x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x)); }

MPO_HD double sigmoid(double x) {
  const double e = exp(x < 0 ? x : -x);
  return x < 0 ? e / (1 + e) : 1 / (1 + e);
}

/// Returns log softmax(z)[label] from the label's logit. The maximum is subtracted first, since max + log(sum) would
/// lose the low bits of logits with a large common offset.
MPO_HD double label_logp(double z_label, double row_max, double row_sum) { return (z_label - row_max) - log(row_sum); }

MPO_HD bool in_vocab(int64_t label, int64_t vocab) { return label >= 0 && label < vocab; }

/// Sums over a row or a part of it, with e = exp(z - max). There are no member initialisers, because CUDA keeps these
/// sums in shared memory.
template <typename Real>
struct RowSums {
  Real max;
  Real sum;      // of e
  Real e_d;      // of e * (z - max)
  Real z;        // of z
  Real squared;  // of e * e
};

/// Returns the sums relative to a larger maximum; `scale` is exp(s.max - max). Without statistics only max and sum are
/// defined.
template <bool kStats, typename Real>
MPO_HD RowSums<Real> rescaled(RowSums<Real> s, Real max, Real scale) {
  if (kStats && s.sum != 0) {  // if it is 0, s.max may be -inf, and 0 * inf is NaN
    s.e_d = (s.e_d + (s.max - max) * s.sum) * scale;
    s.squared *= scale * scale;
  }
  s.sum *= scale;
  s.max = max;
  return s;
}

/// The state of a row after a part of its vocabulary. z_label is 0 until the part with the label has been read.
struct RowState {
  RowSums<double> sums;
  double z_label;
};
static_assert(sizeof(RowState) == kRowStateSize * sizeof(double), "kRowStateSize in api.h must match");

/// Returns the state after one more part of the vocabulary.
template <bool kStats>
MPO_HD RowState continued(RowState s, RowState part, bool has_label) {
  const double max = part.sums.max > s.sums.max ? part.sums.max : s.sums.max;
  if (s.sums.max < max) s.sums = rescaled<kStats>(s.sums, max, exp(s.sums.max - max));
  if (part.sums.max < max) part.sums = rescaled<kStats>(part.sums, max, exp(part.sums.max - max));
  s.sums.sum += part.sums.sum;
  if (kStats) {
    s.sums.e_d += part.sums.e_d;
    s.sums.z += part.sums.z;
    s.sums.squared += part.sums.squared;
  }
  if (has_label) s.z_label = part.z_label;
  return s;
}

/// Computes the statistics of a row in the order of RowStats. A NaN in the row makes all of them NaN.
MPO_HD void row_statistics(const RowSums<double>& s, double z_label, int64_t vocab, double (&values)[kNumRowStats]) {
  const double poison = s.sum - s.sum;  // 0, or NaN if the row has a NaN
  values[0] = log(s.sum) - s.e_d / s.sum;
  values[1] = s.z / static_cast<double>(vocab);
  values[2] = (z_label == s.max ? 1.0 : 0.0) + poison;
  values[3] = s.squared / (s.sum * s.sum);
}

/// The terms of a pair and the derivatives with respect to its two rewards.
struct PairTerms {
  double dpo;
  double bco;
  double grad_chosen;    // of dpo_weight * dpo + bco_weight * bco, with respect to the chosen reward
  double grad_rejected;  // with respect to the rejected reward
};

/// Computes DPO = -logsigmoid(r_c - r_r), with label smoothing, and BCO = -logsigmoid(r_c - delta) -
/// logsigmoid(delta - r_r), the sum of its two terms and not their mean.
MPO_HD PairTerms pair_terms(double chosen, double rejected, double delta, const PairLossConfig& c) {
  const double margin = chosen - rejected;
  const double smooth = c.label_smoothing;
  PairTerms t{-(1 - smooth) * log_sigmoid(margin), -log_sigmoid(chosen - delta) - log_sigmoid(delta - rejected), 0, 0};
  if (smooth > 0) t.dpo -= smooth * log_sigmoid(-margin);  // 0 * inf would be NaN
  if (c.dpo_weight > 0) {
    const double g = c.dpo_weight * (smooth * sigmoid(margin) - (1 - smooth) * sigmoid(-margin));
    t.grad_chosen += g;
    t.grad_rejected -= g;
  }
  if (c.bco_weight > 0) {
    t.grad_chosen -= c.bco_weight * sigmoid(delta - chosen);
    t.grad_rejected += c.bco_weight * sigmoid(rejected - delta);
  }
  return t;
}

/// delta and its number of updates.
struct ShiftState {
  double value;
  double updates;
};

/// Returns the state after a batch of `count` rewards with the sum `sum`. A batch without rewards does not change it.
MPO_HD ShiftState moved(ShiftState s, double sum, double count, ShiftRule rule, double decay) {
  if (rule == ShiftRule::kHold || !(count > 0)) return s;
  const double mean = sum / count;
  const double value = rule == ShiftRule::kCumulative ? s.value + (mean - s.value) / (s.updates + 1)
                                                      : decay * s.value + (1 - decay) * mean;
  return {value, s.updates + 1};
}

/// Sums over the chosen responses that have tokens. The NTP term is an average of these sums.
struct ChosenSums {
  double logp;
  double mean_logp;  // sum of the means per token
  double tokens;
  double responses;
};

/// Returns the cross entropy of the chosen responses; 0 if they have no tokens.
MPO_HD double ntp_loss(const ChosenSums& s, const PairLossConfig& c) {
  if (!(s.responses > 0)) return 0;
  return c.average_sequences ? -s.mean_logp / s.responses : -s.logp / s.tokens;
}

/// Returns the NTP term's part of d loss / d logp for each token of a chosen response.
MPO_HD double ntp_grad(const ChosenSums& s, double tokens, const PairLossConfig& c) {
  if (!(c.ntp_weight > 0) || !(tokens > 0)) return 0;
  return -c.ntp_weight / (c.average_sequences ? tokens * s.responses : s.tokens);
}

/// Returns the weighted sum of the terms. A term with weight 0 is left out, because 0 * inf would be NaN. `has_nan`:
/// whether a sum of log-probs is NaN. The loss is then NaN, even if no term contains that sum.
MPO_HD double total_loss(double dpo, double bco, double ntp, bool has_nan, const PairLossConfig& c) {
  double loss = has_nan ? NAN : 0;
  if (c.dpo_weight > 0) loss += c.dpo_weight * dpo;
  if (c.bco_weight > 0) loss += c.bco_weight * bco;
  if (c.ntp_weight > 0) loss += c.ntp_weight * ntp;
  return loss;
}

}  // namespace mpo

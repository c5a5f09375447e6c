// The arithmetic of the loss, for host and device alike: the CPU tests run what the GPU kernels run. Everything is
// static, since the CPU kernels are compiled once per instruction set and the linker must not mix their copies.
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

/// log sigmoid(x) without overflow or cancellation.
MPO_HD double log_sigmoid(double x) { return x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x)); }

MPO_HD double sigmoid(double x) {
  const double e = exp(x < 0 ? x : -x);
  return x < 0 ? e / (1 + e) : 1 / (1 + e);
}

/// log softmax(z)[label] from the label's logit. Subtracts the maximum before the logarithm is added: max + log(sum)
/// would lose the low bits under a large common offset.
MPO_HD double label_logp(double z_label, double row_max, double row_sum) { return (z_label - row_max) - log(row_sum); }

MPO_HD bool in_vocab(int64_t label, int64_t vocab) { return label >= 0 && label < vocab; }

/// The terms of one pair and their derivatives by its two rewards.
struct PairTerms {
  double dpo;
  double bco;
  double grad_chosen;    // of dpo_weight * dpo + bco_weight * bco, by the chosen reward
  double grad_rejected;  // by the rejected reward
};

/// DPO = -logsigmoid(r_c - r_r), smoothed; BCO = -logsigmoid(r_c - delta) - logsigmoid(delta - r_r), summed, not
/// halved.
MPO_HD PairTerms pair_terms(double chosen, double rejected, double delta, const PairLossConfig& c) {
  const double margin = chosen - rejected;
  const double smooth = c.label_smoothing;
  PairTerms t{-(1 - smooth) * log_sigmoid(margin), -log_sigmoid(chosen - delta) - log_sigmoid(delta - rejected), 0, 0};
  if (smooth > 0) t.dpo -= smooth * log_sigmoid(-margin);  // not added at 0: 0 * inf would be NaN
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

/// delta and the number of updates behind it.
struct ShiftState {
  double value;
  double updates;
};

/// The state after a batch whose `count` rewards sum to `sum`; a batch without rewards leaves it.
MPO_HD ShiftState moved(ShiftState s, double sum, double count, ShiftRule rule, double decay) {
  if (rule == ShiftRule::kHold || !(count > 0)) return s;
  const double mean = sum / count;
  const double value = rule == ShiftRule::kCumulative ? s.value + (mean - s.value) / (s.updates + 1)
                                                      : decay * s.value + (1 - decay) * mean;
  return {value, s.updates + 1};
}

}  // namespace mpo

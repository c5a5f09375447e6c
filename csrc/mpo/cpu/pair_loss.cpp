// The loss of B pairs from the log-probs of their tokens, and the weight of each row's gradient. All arithmetic is in
// double: its time is negligible, and a sum of thousands of log-probs needs the digits.
#include <cmath>
#include <vector>

#include "mpo/math.h"

namespace mpo {
namespace {

template <typename Real>
void pair_loss(const PairLossParams& p) {
  const PairLossConfig& c = p.config;
  const Real* logp = static_cast<const Real*>(p.logp);
  Real* sums = static_cast<Real*>(p.sums);
  Real* reward = static_cast<Real*>(p.reward);
  Real* weight = static_cast<Real*>(p.weight);
  Real* terms = static_cast<Real*>(p.terms);
  const int64_t pairs = p.pairs;

  std::vector<double> sum(static_cast<size_t>(2 * pairs));  // p.sums may be float
  for (int64_t s = 0; s < 2 * pairs; ++s) {
    p.tokens[s] = 0;
    for (int64_t row = p.offsets[s]; row < p.offsets[s + 1]; ++row) {
      if (p.labels[row] == p.ignore_index) continue;
      sum[s] += logp[row];
      ++p.tokens[s];
    }
    sums[s] = static_cast<Real>(sum[s]);
  }

  // A pair with an empty side has nothing to compare: its rewards are 0 and do not update the reward shift.
  const auto has_both = [&](int64_t pair) { return p.tokens[pair] > 0 && p.tokens[pairs + pair] > 0; };
  const auto reward_of = [&](int64_t s) { return has_both(s % pairs) ? c.beta * (sum[s] - p.ref_logp[s]) : 0.0; };
  bool has_nan = false;
  double reward_sum = 0, reward_count = 0;
  ChosenSums chosen{0, 0, 0, 0};
  for (int64_t s = 0; s < 2 * pairs; ++s) {
    has_nan |= std::isnan(sum[s]);
    reward[s] = static_cast<Real>(reward_of(s));
    reward_sum += reward_of(s);
    reward_count += has_both(s % pairs) ? 1 : 0;
    if (s < pairs && p.tokens[s] > 0) {
      const double tokens = static_cast<double>(p.tokens[s]);
      chosen.logp += sum[s];
      chosen.mean_logp += sum[s] / tokens;
      chosen.tokens += tokens;
      ++chosen.responses;
    }
  }
  const ShiftState before{p.state[0], p.state[1]};
  const ShiftState after = moved(before, reward_sum, reward_count, c.rule, c.decay);
  const double delta = c.update_first ? after.value : before.value;

  const double ntp = ntp_loss(chosen, c);
  double dpo = 0, bco = 0;
  const double per_pair = c.beta / static_cast<double>(pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    const PairTerms t = pair_terms(reward_of(i), reward_of(pairs + i), delta, c);
    dpo += t.dpo;
    bco += t.bco;
    double coefficient[2] = {has_both(i) ? per_pair * t.grad_chosen : 0, has_both(i) ? per_pair * t.grad_rejected : 0};
    coefficient[0] += ntp_grad(chosen, static_cast<double>(p.tokens[i]), c);
    for (int side = 0; side < 2; ++side) {
      const int64_t s = i + side * pairs;
      for (int64_t row = p.offsets[s]; row < p.offsets[s + 1]; ++row) {
        weight[row] = p.labels[row] == p.ignore_index ? Real(0) : static_cast<Real>(coefficient[side]);
      }
    }
  }
  dpo /= static_cast<double>(pairs);
  bco /= static_cast<double>(pairs);

  *static_cast<Real*>(p.loss) = static_cast<Real>(total_loss(dpo, bco, ntp, has_nan, c));
  terms[0] = static_cast<Real>(dpo);
  terms[1] = static_cast<Real>(bco);
  terms[2] = static_cast<Real>(ntp);
  *static_cast<Real*>(p.reward_shift) = static_cast<Real>(delta);
  p.new_state[0] = after.value;
  p.new_state[1] = after.updates;
  p.batch[0] = reward_sum;
  p.batch[1] = reward_count;
}

}  // namespace

void pair_loss_cpu(const PairLossParams& p, bool is_double) { is_double ? pair_loss<double>(p) : pair_loss<float>(p); }

}  // namespace mpo

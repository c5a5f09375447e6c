// Tests of the CPU kernels without Python, so that `make sanitize` can run them under sanitizers. Buffers have the
// minimal size, so that every access out of bounds is detected. Results are compared with plain double arithmetic.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "mpo/api.h"

namespace {

constexpr int64_t kIgnore = -100;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
int failures = 0;
int checks = 0;

void check(bool holds, const char* what, const char* where) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s (%s)\n", what, where);
}

double to_double(uint16_t bits, mpo::DType dtype) {
  if (dtype == mpo::DType::kBFloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::nan("") : sign * kInfinity;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

/// Returns a logit that every 16-bit format represents exactly: a multiple of 1/8, or -inf for a banned token.
uint16_t random_bits(std::mt19937& random, mpo::DType dtype) {
  const double z = static_cast<double>(static_cast<int>(random() % 161) - 80) / 8;
  if (random() % 50 == 0) return dtype == mpo::DType::kBFloat16 ? 0xff80 : 0xfc00;  // -inf
  if (dtype == mpo::DType::kBFloat16) {
    const float value = static_cast<float>(z);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return static_cast<uint16_t>(bits >> 16);
  }
  if (z == 0) return 0;
  int exponent;
  const double mantissa = std::frexp(std::fabs(z), &exponent);  // in [0.5, 1)
  return static_cast<uint16_t>((z < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) |
                               static_cast<int>((mantissa * 2 - 1) * 1024));
}

/// A batch of rows. The last row is ignored, and its logits are not allocated.
struct Batch {
  std::vector<char> memory;
  std::vector<int64_t> labels;
  std::vector<std::vector<double>> logits;
  mpo::Rows rows;
};

Batch make_batch(std::mt19937& random, mpo::DType dtype, int64_t count, int64_t vocab, int64_t stride, int64_t offset) {
  const int64_t width = dtype == mpo::DType::kFloat64 ? 8 : dtype == mpo::DType::kFloat32 ? 4 : 2;
  Batch b;
  const int64_t elements = offset + (count - 2) * stride + vocab;  // up to the end of the last row that is allocated
  b.memory.resize(static_cast<size_t>(elements * width));
  for (int64_t i = 0; i < count - 1; ++i) {
    std::vector<double> row;
    for (int64_t v = 0; v < vocab; ++v) {
      char* at = b.memory.data() + (offset + i * stride + v) * width;
      const uint16_t bits = random_bits(random, dtype);
      if (width == 2) {
        std::memcpy(at, &bits, 2);
        row.push_back(to_double(bits, dtype));
      } else {
        const double z =
            to_double(bits == 0xfc00 ? 0xff80 : random_bits(random, mpo::DType::kBFloat16), mpo::DType::kBFloat16);
        const float narrow = static_cast<float>(z);
        std::memcpy(at, width == 8 ? static_cast<const void*>(&z) : &narrow, static_cast<size_t>(width));
        row.push_back(z);
      }
    }
    b.logits.push_back(row);
    b.labels.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(vocab)));
  }
  b.labels.push_back(kIgnore);
  if (count > 3) b.labels[1] = vocab;  // just out of range
  if (count > 4) b.labels[2] = -1;
  b.rows = {b.memory.data() + offset * width, b.labels.data(), count, vocab, 0, vocab, count, 0, stride, kIgnore};
  return b;
}

template <typename Real>
void test_rows(mpo::DType dtype, mpo::Isa isa, int threads, int64_t vocab, int64_t stride, int64_t offset) {
  char where[160];
  std::snprintf(where, sizeof(where), "dtype %d, isa %d, threads %d, vocab %lld, stride %lld, offset %lld",
                static_cast<int>(dtype), static_cast<int>(isa), threads, static_cast<long long>(vocab),
                static_cast<long long>(stride), static_cast<long long>(offset));
  std::mt19937 random(static_cast<unsigned>(vocab * 7 + stride + offset));
  const int64_t count = 7;
  Batch b = make_batch(random, dtype, count, vocab, stride, offset);

  std::vector<Real> logp(count), row_max(count), row_sum(count), stats(mpo::kNumRowStats * count),
      weight(count, Real(0.5));
  mpo::token_logp_cpu({b.rows, nullptr, logp.data(), row_max.data(), row_sum.data(), stats.data(), 15u}, nullptr, dtype,
                      threads, isa);
  std::vector<Real> again(count), again_max(count), again_sum(count), again_stats(mpo::kNumRowStats * count);
  mpo::token_logp_cpu({b.rows, nullptr, again.data(), again_max.data(), again_sum.data(), again_stats.data(), 15u},
                      nullptr, dtype, 1, isa);

  // The same rows tile by tile, as in the loss from hidden states.
  const int64_t width = dtype == mpo::DType::kFloat64 ? 8 : dtype == mpo::DType::kFloat32 ? 4 : 2;
  const std::vector<int64_t> edges = {0, vocab / 3, vocab - 1, vocab};
  const auto tile_of = [&](mpo::Rows rows, int64_t first, int64_t end) {
    rows.logits = static_cast<const char*>(rows.logits) + first * width;
    rows.first = first;
    rows.vocab = end - first;
    return rows;
  };
  std::vector<Real> tiled(count), tiled_max(count), tiled_sum(count), tiled_stats(mpo::kNumRowStats * count);
  std::vector<double> state(mpo::kRowStateSize * count, std::nan(""));
  for (size_t k = 1; k < edges.size(); ++k) {
    if (edges[k] == edges[k - 1]) continue;
    mpo::token_logp_cpu({tile_of(b.rows, edges[k - 1], edges[k]), state.data(), tiled.data(), tiled_max.data(),
                         tiled_sum.data(), tiled_stats.data(), 15u},
                        nullptr, dtype, threads, isa);
  }

  const double tolerance = sizeof(Real) == 8 ? 1e-12 : 2e-6;
  std::vector<std::vector<double>> expected_grad;
  for (int64_t i = 0; i < count; ++i) {
    check(std::memcmp(&logp[i], &again[i], sizeof(Real)) == 0, "logp does not depend on the number of threads", where);
    const double slack = sizeof(Real) == 8 ? 1e-12 : 2e-6;
    const auto agree = [&](Real a, Real b) {
      return a == b || (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= slack * (1 + std::fabs(b));
    };
    check(agree(tiled[i], logp[i]), "logp of tiles", where);
    check(agree(tiled_max[i], row_max[i]) && agree(tiled_sum[i], row_sum[i]), "softmax state of tiles", where);
    for (int64_t s = 0; s < mpo::kNumRowStats; ++s) {
      check(agree(tiled_stats[s * count + i], stats[s * count + i]), "statistics of tiles", where);
    }
    const int64_t label = b.labels[i];
    std::vector<double> grad(static_cast<size_t>(vocab), 0.0);
    if (label == kIgnore) {
      check(logp[i] == 0, "an ignored row gives 0", where);
    } else if (label < 0 || label >= vocab) {
      check(std::isnan(logp[i]), "a label out of range gives NaN", where);
      for (double& g : grad) g = std::nan("");
    } else {
      double max = -kInfinity, sum = 0, entropy = 0, squared = 0, mean = 0;
      for (double z : b.logits[i]) max = std::fmax(max, z);
      for (double z : b.logits[i]) mean += z / static_cast<double>(vocab);
      for (double z : b.logits[i]) sum += std::exp(z - max);
      const double exact = b.logits[i][label] - max - std::log(sum);
      for (int64_t v = 0; v < vocab; ++v) {
        const double log_p = b.logits[i][v] - max - std::log(sum), p = std::exp(log_p);
        if (p > 0) entropy -= p * log_p;
        squared += p * p;
        grad[v] = 0.5 * ((v == label) - p);
      }
      if (max == -kInfinity) {
        check(std::isnan(logp[i]), "a row of -inf gives NaN", where);
        for (double& g : grad) g = std::nan("");
      } else {
        const bool is_banned = exact == -kInfinity;
        check(is_banned ? logp[i] == -std::numeric_limits<Real>::infinity()
                        : std::fabs(logp[i] - exact) <= tolerance * (1 + std::fabs(exact)),
              "logp", where);
        check(std::fabs(stats[0 * count + i] - entropy) <= 10 * tolerance * (1 + entropy), "entropy", where);
        check(mean == -kInfinity ? stats[1 * count + i] == -std::numeric_limits<Real>::infinity()
                                 : std::fabs(stats[1 * count + i] - mean) <= 10 * tolerance * (1 + std::fabs(mean)),
              "mean logit", where);
        check(stats[2 * count + i] == (b.logits[i][label] == max), "top1", where);
        check(std::fabs(stats[3 * count + i] - squared) <= tolerance, "sum of squares", where);
      }
    }
    expected_grad.push_back(grad);
  }

  const double grad_tolerance = sizeof(Real) == 8               ? 1e-12
                                : width == 4                    ? 1e-6
                                : dtype == mpo::DType::kFloat16 ? 1e-3
                                                                : 8e-3;
  const auto value_at = [&](const char* at) {
    if (width == 8) {
      double value;
      std::memcpy(&value, at, 8);
      return value;
    }
    if (width == 4) {
      float value;
      std::memcpy(&value, at, 4);
      return static_cast<double>(value);
    }
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    return to_double(bits, dtype);
  };

  // exp(z - max) written over the logits, tile by tile, with statistics and without.
  for (const unsigned stats_mask : {0u, 15u}) {
    std::vector<char> memory = b.memory;
    mpo::Rows rows = b.rows;
    rows.logits = memory.data() + offset * width;
    for (size_t k = 1; k < edges.size(); ++k) {
      if (edges[k] == edges[k - 1]) continue;
      const mpo::Rows tile = tile_of(rows, edges[k - 1], edges[k]);
      mpo::token_logp_cpu(
          {tile, state.data(), again.data(), again_max.data(), again_sum.data(), again_stats.data(), stats_mask},
          const_cast<void*>(tile.logits), dtype, threads, isa);
    }
    for (int64_t i = 0; i + 1 < count; ++i) {
      if (b.labels[i] < 0 || b.labels[i] >= vocab) continue;
      const auto close = [&](Real x, Real y) {
        return x == y || (std::isnan(x) && std::isnan(y)) || std::fabs(x - y) <= tolerance * (1 + std::fabs(y));
      };
      check(close(again[i], logp[i]) && close(again_max[i], row_max[i]) && close(again_sum[i], row_sum[i]),
            "results of a row whose exp_logits are written", where);
      for (int64_t s = 0; stats_mask != 0 && s < mpo::kNumRowStats; ++s) {
        check(close(again_stats[s * count + i], stats[s * count + i]),
              "statistics of a row whose exp_logits are written", where);
      }
      double max = -kInfinity;
      for (size_t k = 1; k < edges.size(); ++k) {
        for (int64_t v = edges[k - 1]; v < edges[k]; ++v) max = std::fmax(max, b.logits[i][v]);
        for (int64_t v = edges[k - 1]; v < edges[k]; ++v) {
          const bool is_zero = v == b.labels[i] || max == -kInfinity;
          const double exact = is_zero ? 0 : std::exp(b.logits[i][v] - max);
          const double exp_logit = value_at(memory.data() + (offset + i * stride + v) * width);
          check(std::fabs(exp_logit - exact) <= 2 * grad_tolerance * exact + 1e-7 * (width == 2), "exp_logits", where);
        }
      }
      for (int64_t at = offset + i * stride + vocab; i + 2 < count && at < offset + (i + 1) * stride; ++at) {
        check(std::memcmp(&memory[at * width], &b.memory[at * width], static_cast<size_t>(width)) == 0,
              "memory outside of the rows is not written", where);
      }
    }
  }

  // The gradient in separate memory, and then over the logits.
  std::vector<char> grad(static_cast<size_t>(count * vocab * width), 0x7f);
  const double scale = 2;
  const mpo::LogitsGradParams out_of_place = {
      b.rows, row_max.data(), row_sum.data(), weight.data(), &scale, grad.data(), count, 0, vocab, false};
  mpo::logits_grad_cpu(out_of_place, dtype, threads, isa);
  std::vector<char> tiled_grad(grad.size(), 0x7f);
  for (size_t k = 1; k < edges.size(); ++k) {
    if (edges[k] == edges[k - 1]) continue;
    mpo::LogitsGradParams tile = out_of_place;
    tile.in = tile_of(b.rows, edges[k - 1], edges[k]);
    tile.grad = tiled_grad.data() + edges[k - 1] * width;
    mpo::logits_grad_cpu(tile, dtype, threads, isa);
  }
  check(grad == tiled_grad, "the gradient of tiles has the bits of the whole", where);
  b.rows.rows = count - 1;  // the last row has no memory
  const mpo::LogitsGradParams in_place = {
      b.rows, row_max.data(), row_sum.data(), weight.data(), &scale, const_cast<void*>(b.rows.logits), count,
      0,      stride,         false};
  mpo::logits_grad_cpu(in_place, dtype, threads, isa);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t v = 0; v < vocab; ++v) {
      const double exact = scale * expected_grad[i][v];
      const char* at = grad.data() + (i * vocab + v) * width;
      const double g = value_at(at);
      check(std::isnan(exact) ? std::isnan(g) : std::fabs(g - exact) <= grad_tolerance * (0.1 + std::fabs(exact)),
            "gradient", where);
      if (i + 1 < count) {
        const char* over = static_cast<const char*>(b.rows.logits) + (i * stride + v) * width;
        check(std::memcmp(at, over, static_cast<size_t>(width)) == 0, "in place gives the same bits", where);
      }
    }
  }
}

template <typename Real>
void test_pair_loss(bool is_double) {
  const int64_t pairs = 3, rows = 23;
  const std::vector<int64_t> offsets = {0, 3, 7, 8, 12, 19, 23};
  std::vector<int64_t> labels(rows, 1);
  std::mt19937 random(3);
  std::vector<Real> logp(rows), loss(1), terms(3), shift(1), sums(6), reward(6), weight(rows);
  for (int64_t i = 0; i < rows; ++i) {
    logp[i] = -static_cast<Real>(random() % 100) / 10;
    if (random() % 4 == 0) labels[i] = kIgnore;
  }
  for (int64_t i = 7; i < 8; ++i) labels[i] = kIgnore;  // the third chosen response is empty
  const std::vector<double> ref_logp = {-10, -20, -5, -15, -9, -8}, state = {0.25, 3};
  std::vector<int64_t> tokens(6);
  std::vector<double> new_state(2), batch(2);
  const mpo::PairLossConfig config = {0.1, 0.8, 0.2, 1.0, 0.1, false, mpo::ShiftRule::kCumulative, true, 0.99};
  const auto run = [&] {
    mpo::pair_loss_cpu({logp.data(), labels.data(), offsets.data(), ref_logp.data(), state.data(), loss.data(),
                        terms.data(), shift.data(), sums.data(), reward.data(), tokens.data(), new_state.data(),
                        batch.data(), weight.data(), pairs, rows, kIgnore, config},
                       is_double);
    return static_cast<double>(loss[0]);
  };
  run();
  check(tokens[2] == 0 && reward[2] == 0 && reward[5] == 0, "the rewards of a pair with an empty side are 0",
        "pair_loss");
  check(batch[1] == 4 && new_state[1] == 4, "an empty pair does not update the reward shift", "pair_loss");
  // The gradient treats delta as a constant, so it is held at the value after this batch.
  mpo::PairLossConfig held = config;
  held.rule = mpo::ShiftRule::kHold;
  const std::vector<double> moved = new_state;
  const auto run_held = [&] {
    mpo::pair_loss_cpu({logp.data(), labels.data(), offsets.data(), ref_logp.data(), moved.data(), loss.data(),
                        terms.data(), shift.data(), sums.data(), reward.data(), tokens.data(), new_state.data(),
                        batch.data(), weight.data(), pairs, rows, kIgnore, held},
                       is_double);
    return static_cast<double>(loss[0]);
  };
  if (!is_double) return;  // finite differences need double precision
  const std::vector<Real> analytic = weight;
  for (int64_t i = 0; i < rows; ++i) {
    if (labels[i] == kIgnore) {
      check(analytic[i] == 0, "an ignored row has no weight", "pair_loss");
      continue;
    }
    const Real before = logp[i];
    const double h = 1e-5;
    logp[i] = static_cast<Real>(before + h);
    const double up = run_held();
    logp[i] = static_cast<Real>(before - h);
    const double down = run_held();
    logp[i] = before;
    check(std::fabs((up - down) / (2 * h) - analytic[i]) < 1e-8, "weight is d loss / d logp", "pair_loss");
  }
}

}  // namespace

int main() {
  for (const mpo::Isa isa : {mpo::Isa::kAvx512, mpo::Isa::kAvx2, mpo::Isa::kPortable}) {
    if (!mpo::can_run(isa)) {
      std::printf("instruction set %d cannot run on this machine, its tests are left out\n", static_cast<int>(isa));
      continue;
    }
    for (const int64_t vocab : {1, 2, 7, 31, 64, 129, 1003, 4099}) {
      for (const int64_t extra : {0, 3}) {
        for (const int64_t offset : {0, 1}) {
          for (const int threads : {1, 4}) {
            test_rows<float>(mpo::DType::kFloat32, isa, threads, vocab, vocab + extra, offset);
            test_rows<float>(mpo::DType::kBFloat16, isa, threads, vocab, vocab + extra, offset);
            test_rows<float>(mpo::DType::kFloat16, isa, threads, vocab, vocab + extra, offset);
            test_rows<double>(mpo::DType::kFloat64, isa, threads, vocab, vocab + extra, offset);
          }
        }
      }
    }
    // Enough pieces for several threads: 7 rows of this size are 7 pieces.
    test_rows<float>(mpo::DType::kFloat32, isa, 4, 70001, 70001, 0);
  }
  test_pair_loss<float>(false);
  test_pair_loss<double>(true);
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}

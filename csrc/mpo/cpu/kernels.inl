// token_logp and logits_grad on a range of rows, for the vector width MPO_VECTOR_BYTES. Compiled once per instruction
// set by kernels_*.cpp; vec.inl explains which functions must not be called from here.
#include <cmath>
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "mpo/cpu/kernels.h"
#include "mpo/math.h"

namespace mpo {
namespace {

#include "mpo/cpu/vec.inl"

constexpr int64_t kCacheLine = 64;
constexpr int kUnroll =
    4;  // vectors in flight, each with its own partial sum, so that no addition waits for the previous one

/// Number of elements in a vector, in a group of vectors that is loaded at once, and in a step of the main loops.
template <typename Format>
constexpr int64_t kLanes = MPO_VECTOR_BYTES / static_cast<int64_t>(sizeof(typename Format::Real));
template <typename Format>
constexpr int64_t kGroupSize = kLanes<Format> * Format::kGroup;
template <typename Format>
constexpr int64_t kStep = kLanes<Format> * kUnroll;

/// Number of elements in a block. A block stays in the first-level cache between the two passes over it. Each block is
/// summed separately, because a single running float over 150,000 terms would lose four digits.
template <typename Format>
constexpr int64_t kBlock = 8192 / static_cast<int64_t>(sizeof(typename Format::Real));

int64_t row_offset(const Rows& in, int64_t row) {
  return (row / in.inner) * in.outer_stride + (row % in.inner) * in.row_stride;
}
template <typename Format>
const typename Format::Scalar* row_start(const Rows& in, int64_t row) {
  return static_cast<const typename Format::Scalar*>(in.logits) + row_offset(in, row);
}

/// Calls body(u, v) for each vector v of [x, x + size): first whole steps, with u from 0 to kUnroll - 1, then groups,
/// of which the last is padded with `fill`. Prefetches the memory `ahead` elements further on; 0 disables prefetching.
template <typename Format, typename Body>
inline void for_each_vector(const typename Format::Scalar* x, int64_t size, typename Format::Scalar fill, int64_t ahead,
                            const Body& body) {
  typename Format::Vec v[Format::kGroup];
  int64_t i = 0;
  for (; i + kStep<Format> <= size; i += kStep<Format>) {
    if (ahead != 0) {
      const char* next = reinterpret_cast<const char*>(x + i + ahead);
      for (int64_t line = 0; line < static_cast<int64_t>(kStep<Format> * sizeof(*x)); line += kCacheLine) {
        __builtin_prefetch(next + line);
      }
    }
    for (int u = 0; u < kUnroll; u += Format::kGroup) {
      Format::load(x + i + u * kLanes<Format>, v);
      for (int k = 0; k < Format::kGroup; ++k) body(u + k, v[k]);
    }
  }
  for (; i < size; i += kGroupSize<Format>) {
    if (i + kGroupSize<Format> <= size) {
      Format::load(x + i, v);
    } else {
      typename Format::Scalar padded[kGroupSize<Format>];
      for (int64_t k = 0; k < kGroupSize<Format>; ++k) padded[k] = i + k < size ? x[i + k] : fill;
      Format::load(padded, v);
    }
    for (int k = 0; k < Format::kGroup; ++k) body(k, v[k]);
  }
}

template <typename Format>
double largest_of(const typename Format::Scalar* x, int64_t size, int64_t ahead) {
  typedef typename Format::Vec Vec;
  Vec max[kUnroll];
  for (Vec& m : max) m = splat<Vec>(-__builtin_inff());
  for_each_vector<Format>(x, size, Format::kMinusInfinity, ahead, [&](int u, Vec z) { max[u] = larger(z, max[u]); });
  for (int u = 1; u < kUnroll; ++u) max[0] = larger(max[u], max[0]);
  return horizontal_max<typename Format::Real>(max[0]);
}

/// Returns the number to subtract from logits before exp: the maximum, or 0 if all logits are -inf, for which exp is 0.
template <typename Format>
typename Format::Vec exp_offset(double max) {
  typedef typename Format::Real Real;
  return splat<typename Format::Vec>(max == -__builtin_inf() ? Real(0) : static_cast<Real>(max));
}

template <typename Format, bool kStats>
RowSums<double> read_row(const typename Format::Scalar* x, int64_t vocab) {
  typedef typename Format::Vec Vec;
  typedef typename Format::Exp Exp;
  const Exp exponential(1);

  RowSums<double> row{-__builtin_inf(), 0, 0, 0, 0};
  for (int64_t begin = 0; begin < vocab; begin += kBlock<Format>) {
    const typename Format::Scalar* block = x + begin;
    const int64_t size = vocab - begin < kBlock<Format> ? vocab - begin : kBlock<Format>;

    const double block_max = largest_of<Format>(block, size, 0);
    if (block_max > row.max) {
      const double gap = row.max - block_max;  // -inf in the first block, where all sums are 0
      const double scale = exp(gap);
      if (kStats && row.sum != 0) {
        row.e_d = (row.e_d + gap * row.sum) * scale;
        row.squared *= scale * scale;
      }
      row.sum *= scale;
      row.max = block_max;
    }

    const Vec row_max = exp_offset<Format>(row.max);
    Vec sum[kUnroll] = {}, e_d[kUnroll] = {}, z_sum[kUnroll] = {}, squared[kUnroll] = {};
    // Prefetches the next block while this block is computed.
    for_each_vector<Format>(block, size, Format::kMinusInfinity, kBlock<Format>, [&](int u, Vec z) {
      const Vec d = Exp::clamp(z - row_max);
      const Vec e = exponential(d);
      sum[u] += e;
      if (kStats) {
        e_d[u] += e * d;
        squared[u] += e * e;
      }
    });
    if (kStats) {  // a separate loop, since the padding must be 0 here
      for_each_vector<Format>(block, size, 0, 0, [&](int u, Vec z) { z_sum[u] += z; });
    }
    row.sum += sum_of(sum);
    if (kStats) {
      row.e_d += sum_of(e_d);
      row.z += sum_of(z_sum);
      row.squared += sum_of(squared);
    }
  }
  return row;
}

/// Writes exp(z - max) for each z of a row and returns the sum.
template <typename Format>
double write_exp_logits(const typename Format::Scalar* x, typename Format::Scalar* out, int64_t vocab, double max) {
  typedef typename Format::Vec Vec;
  typedef typename Format::Scalar Scalar;
  typedef typename Format::Exp Exp;
  const Exp exponential(1);
  const Vec row_max = exp_offset<Format>(max);
  double total = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock<Format>) {
    const int64_t end = vocab - begin < kBlock<Format> ? vocab : begin + kBlock<Format>;
    Vec sum[kUnroll] = {};
    const auto transform = [&](const Scalar* from, Scalar* to, int u) {
      Vec v[Format::kGroup];
      Format::load(from, v);
      for (int k = 0; k < Format::kGroup; ++k) {
        v[k] = exponential(Exp::clamp(v[k] - row_max));
        sum[u + k] += v[k];
      }
      Format::store(to, v);
    };
    int64_t i = begin;
    for (; i + kStep<Format> <= end; i += kStep<Format>) {
      for (int u = 0; u < kUnroll; u += Format::kGroup) {
        transform(x + i + u * kLanes<Format>, out + i + u * kLanes<Format>, u);
      }
    }
    for (; i < end; i += kGroupSize<Format>) {
      const int64_t size = end - i < kGroupSize<Format> ? end - i : kGroupSize<Format>;
      Scalar padded[kGroupSize<Format>];
      for (int64_t k = 0; k < kGroupSize<Format>; ++k) padded[k] = k < size ? x[i + k] : Format::kMinusInfinity;
      transform(padded, padded, 0);
      for (int64_t k = 0; k < size; ++k) out[i + k] = padded[k];
    }
    total += sum_of(sum);
  }
  return total;
}

/// Computes the log-probability of the label of each row. Reads each logit of a labelled row from memory once.
///
///   logp[i] = (z[y] - m) - log(sum_v exp(z[v] - m)),    m = max_v z[v]
///
/// Reads   vocab elements per labelled row; each block twice, the second time from the cache
/// Writes  three numbers per row, and one per statistic; vocab elements per labelled row if exp_logits is not nullptr
template <typename Format>
void token_logp_rows(const TokenLogpParams& p, void* exp_logits, int64_t begin, int64_t end) {
  typedef typename Format::Real Real;
  typedef typename Format::Scalar Scalar;
  Real* logp = static_cast<Real*>(p.logp);
  Real* row_max = static_cast<Real*>(p.row_max);
  Real* row_sum = static_cast<Real*>(p.row_sum);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = p.in.labels[row];
    const bool is_ignored = label == p.in.ignore_index;
    double values[kNumRowStats];
    if (is_ignored || !in_vocab(label, p.in.total)) {
      const double filler = is_ignored ? 0.0 : __builtin_nan("");
      logp[row] = static_cast<Real>(filler);
      row_max[row] = row_sum[row] = 0;
      for (double& value : values) value = filler;
    } else {
      const typename Format::Scalar* x = row_start<Format>(p.in, row);
      const int64_t column = label - p.in.first;
      const bool has_label = in_vocab(column, p.in.vocab);
      RowState* const state = p.row_state == nullptr ? nullptr : reinterpret_cast<RowState*>(p.row_state) + row;
      const bool continues = state != nullptr && p.in.first != 0;
      RowState s{{}, has_label ? Format::value(x[column]) : 0.0};
      if (exp_logits == nullptr || p.stats != 0) {
        s.sums = p.stats != 0 ? read_row<Format, true>(x, p.in.vocab) : read_row<Format, false>(x, p.in.vocab);
      } else {
        s.sums.max = largest_of<Format>(x, p.in.vocab, kBlock<Format>);
      }
      if (exp_logits != nullptr) {
        const double max = continues && state->sums.max > s.sums.max ? state->sums.max : s.sums.max;
        Scalar* const out = static_cast<Scalar*>(exp_logits) + row_offset(p.in, row);
        const double sum = write_exp_logits<Format>(x, out, p.in.vocab, max);
        if (has_label) out[column] = Scalar{};
        if (p.stats == 0) {
          s.sums.max = max;
          s.sums.sum = sum;
        }
      }
      if (continues) s = continued<true>(*state, s, has_label);
      if (state != nullptr) *state = s;
      logp[row] = static_cast<Real>(label_logp(s.z_label, s.sums.max, s.sums.sum));
      row_max[row] = static_cast<Real>(s.sums.max);
      row_sum[row] = static_cast<Real>(s.sums.sum);
      row_statistics(s.sums, s.z_label, p.in.total, values);
    }
    Real* out = static_cast<Real*>(p.row_stats) + row;
    for (int bit = 0; bit < kNumRowStats; ++bit) {
      if ((p.stats & (1u << bit)) == 0) continue;
      *out = static_cast<Real>(values[bit]);
      out += p.in.rows;
    }
  }
}

/// Computes grad[i, v] = scale * weight[i] * (1[v == y_i] - exp(z[i, v] - m_i) / sum_i). grad may be the logits.
///
/// Reads   vocab elements per labelled row
/// Writes  vocab elements per labelled row, and vocab zeros per ignored row unless is_zeroed
template <typename Format>
void logits_grad_rows(const LogitsGradParams& p, int64_t begin, int64_t end) {
  typedef typename Format::Vec Vec;
  typedef typename Format::Real Real;
  typedef typename Format::Scalar Scalar;
  typedef typename Format::Exp Exp;
  const int64_t vocab = p.in.vocab;
  const double scale = p.scale == nullptr ? 1.0 : *p.scale;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = p.in.labels[row];
    Scalar* out = static_cast<Scalar*>(p.grad) + (row / p.grad_inner) * p.grad_outer_stride +
                  (row % p.grad_inner) * p.grad_row_stride;
    if (label == p.in.ignore_index) {
      if (!p.is_zeroed) write_zeros(out, static_cast<size_t>(vocab) * sizeof(Scalar));
      continue;
    }
    const Scalar* x = row_start<Format>(p.in, row);
    const double max = static_cast<const Real*>(p.row_max)[row];
    const double sum = static_cast<const Real*>(p.row_sum)[row];
    const double weight = static_cast<const Real*>(p.weight)[row] * scale;
    const Real factor = static_cast<Real>(-weight / sum);
    // The gradient is NaN if the label is out of range, the row has a NaN or +inf or only -inf, or the weight
    // overflowed.
    if (!in_vocab(label, p.in.total) || !__builtin_isfinite(factor) || !__builtin_isfinite(max)) {
      for (int64_t v = 0; v < vocab; ++v) out[v] = Format::kNan;
      continue;
    }
    const int64_t column = label - p.in.first;
    const bool has_label = in_vocab(column, vocab);
    // The gradient of the label's logit is weight * (1 - p), with 1 - p = -expm1(logp): 1 - p cancels if p is near 1.
    Scalar label_grad = {};
    if (has_label) {
      const double logp = label_logp(Format::value(x[column]), max, sum);
      label_grad = Format::rounded(static_cast<Real>(weight * -expm1(logp)));
    }

    const Vec row_max = splat<Vec>(static_cast<Real>(max));
    const Exp scaled_exponential(factor);
    const auto transform = [&](const Scalar* from, Scalar* to) {
      Vec v[Format::kGroup];
      Format::load(from, v);
      for (Vec& g : v) g = scaled_exponential(Exp::clamp(g - row_max));
      Format::store(to, v);
    };
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kGroupSize<Format> <= vocab; i += kGroupSize<Format>) transform(x + i, out + i);
    if (i < vocab) {
      Scalar padded[kGroupSize<Format>] = {};
      for (int64_t k = 0; i + k < vocab; ++k) padded[k] = x[i + k];
      transform(padded, padded);
      for (int64_t k = 0; i + k < vocab; ++k) out[i + k] = padded[k];
    }
    if (has_label) out[column] = label_grad;
  }
}

void token_logp_range(const TokenLogpParams& p, void* exp_logits, DType dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat32: return token_logp_rows<Float32>(p, exp_logits, begin, end);
    case DType::kBFloat16: return token_logp_rows<BFloat16>(p, exp_logits, begin, end);
    case DType::kFloat16: return token_logp_rows<Float16>(p, exp_logits, begin, end);
    case DType::kFloat64: return token_logp_rows<Float64>(p, exp_logits, begin, end);
  }
}

void logits_grad_range(const LogitsGradParams& p, DType dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat32: return logits_grad_rows<Float32>(p, begin, end);
    case DType::kBFloat16: return logits_grad_rows<BFloat16>(p, begin, end);
    case DType::kFloat16: return logits_grad_rows<Float16>(p, begin, end);
    case DType::kFloat64: return logits_grad_rows<Float64>(p, begin, end);
  }
}

}  // namespace

const CpuKernels MPO_KERNEL_TABLE = {&token_logp_range, &logits_grad_range};

}  // namespace mpo

// Python bindings. Addresses come in as integers, so this module knows nothing of torch and one build serves every
// torch version. mpo_ext/ops.py is the only caller; it checks shapes, dtypes and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mpo/api.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

template <typename T>
T* as_ptr(uintptr_t address, const char* name) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " must be an address, got 0");
  return reinterpret_cast<T*>(address);
}

template <typename Enum>
Enum by_name(const std::vector<std::pair<const char*, Enum>>& names, const std::string& name, const char* argument) {
  for (const auto& known : names) {
    if (name == known.first) return known.second;
  }
  throw std::invalid_argument(std::string(argument) + " is not known: " + name);
}

const std::vector<std::pair<const char*, mpo::DType>> kDTypes = {{"float32", mpo::DType::kFloat32},
                                                                 {"bfloat16", mpo::DType::kBFloat16},
                                                                 {"float16", mpo::DType::kFloat16},
                                                                 {"float64", mpo::DType::kFloat64}};
const std::vector<std::pair<const char*, mpo::Isa>> kIsas = {
    {"avx512", mpo::Isa::kAvx512}, {"avx2", mpo::Isa::kAvx2}, {"portable", mpo::Isa::kPortable}};

mpo::Isa runnable_isa(const std::string& name) {
  const mpo::Isa isa = by_name(kIsas, name, "isa");
  if (!mpo::can_run(isa)) throw std::invalid_argument("isa cannot run on this machine: " + name);
  return isa;
}

mpo::Rows rows_of(uintptr_t logits, uintptr_t labels, int64_t rows, int64_t vocab, int64_t inner, int64_t outer_stride,
                  int64_t row_stride, int64_t ignore_index) {
  if (rows < 1 || vocab < 1 || inner < 1) {
    throw std::invalid_argument("rows, vocab and inner must be at least 1, got " + std::to_string(rows) + ", " +
                                std::to_string(vocab) + " and " + std::to_string(inner));
  }
  return {as_ptr<const void>(logits, "logits"),
          as_ptr<const int64_t>(labels, "labels"),
          rows,
          vocab,
          inner,
          outer_stride,
          row_stride,
          ignore_index};
}

void token_logp_cpu(uintptr_t logits, uintptr_t labels, int64_t rows, int64_t vocab, int64_t inner,
                    int64_t outer_stride, int64_t row_stride, int64_t ignore_index, const std::string& dtype,
                    uintptr_t logp, uintptr_t row_max, uintptr_t row_sum, uintptr_t row_stats, unsigned stats,
                    int threads, const std::string& isa) {
  const mpo::TokenLogpParams p = {rows_of(logits, labels, rows, vocab, inner, outer_stride, row_stride, ignore_index),
                                  as_ptr<void>(logp, "logp"),
                                  as_ptr<void>(row_max, "row_max"),
                                  as_ptr<void>(row_sum, "row_sum"),
                                  stats == 0 ? nullptr : as_ptr<void>(row_stats, "row_stats"),
                                  stats};
  const mpo::DType type = by_name(kDTypes, dtype, "dtype");
  const mpo::Isa set = runnable_isa(isa);
  py::gil_scoped_release no_gil;
  mpo::token_logp_cpu(p, type, threads, set);
}

void logits_grad_cpu(uintptr_t logits, uintptr_t labels, int64_t rows, int64_t vocab, int64_t inner,
                     int64_t outer_stride, int64_t row_stride, int64_t ignore_index, const std::string& dtype,
                     uintptr_t row_max, uintptr_t row_sum, uintptr_t weight, uintptr_t scale, uintptr_t grad,
                     int64_t grad_inner, int64_t grad_outer_stride, int64_t grad_row_stride, bool is_zeroed,
                     int threads, const std::string& isa) {
  const mpo::LogitsGradParams p = {rows_of(logits, labels, rows, vocab, inner, outer_stride, row_stride, ignore_index),
                                   as_ptr<const void>(row_max, "row_max"),
                                   as_ptr<const void>(row_sum, "row_sum"),
                                   as_ptr<const void>(weight, "weight"),
                                   scale == 0 ? nullptr : as_ptr<const double>(scale, "scale"),
                                   as_ptr<void>(grad, "grad"),
                                   grad_inner,
                                   grad_outer_stride,
                                   grad_row_stride,
                                   is_zeroed};
  const mpo::DType type = by_name(kDTypes, dtype, "dtype");
  const mpo::Isa set = runnable_isa(isa);
  py::gil_scoped_release no_gil;
  mpo::logits_grad_cpu(p, type, threads, set);
}

void pair_loss_cpu(uintptr_t logp, uintptr_t labels, uintptr_t offsets, uintptr_t ref_logp, uintptr_t state,
                   uintptr_t loss, uintptr_t terms, uintptr_t reward_shift, uintptr_t sums, uintptr_t reward,
                   uintptr_t tokens, uintptr_t new_state, uintptr_t batch, uintptr_t weight, int64_t pairs,
                   int64_t rows, int64_t ignore_index, int rule, bool update_first, double decay, double beta,
                   double dpo_weight, double bco_weight, double ntp_weight, double label_smoothing,
                   bool average_sequences, bool is_double) {
  if (rule < 0 || rule > 2) throw std::invalid_argument("rule must be 0, 1 or 2, got " + std::to_string(rule));
  // Batches may have no rows at all (T = 0): then there are no addresses of rows either.
  const auto of_rows = [&](uintptr_t address, const char* name) {
    return rows == 0 ? nullptr : as_ptr<void>(address, name);
  };
  const mpo::PairLossParams p = {of_rows(logp, "logp"),
                                 static_cast<const int64_t*>(of_rows(labels, "labels")),
                                 as_ptr<const int64_t>(offsets, "offsets"),
                                 as_ptr<const double>(ref_logp, "ref_logp"),
                                 as_ptr<const double>(state, "state"),
                                 as_ptr<void>(loss, "loss"),
                                 as_ptr<void>(terms, "terms"),
                                 as_ptr<void>(reward_shift, "reward_shift"),
                                 as_ptr<void>(sums, "sums"),
                                 as_ptr<void>(reward, "reward"),
                                 as_ptr<int64_t>(tokens, "tokens"),
                                 as_ptr<double>(new_state, "new_state"),
                                 as_ptr<double>(batch, "batch"),
                                 of_rows(weight, "weight"),
                                 pairs,
                                 rows,
                                 ignore_index,
                                 {beta, dpo_weight, bco_weight, ntp_weight, label_smoothing, average_sequences,
                                  static_cast<mpo::ShiftRule>(rule), update_first, decay}};
  py::gil_scoped_release no_gil;
  mpo::pair_loss_cpu(p, is_double);
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> runnable;
  for (const auto& known : kIsas) {
    if (mpo::can_run(known.second)) runnable.emplace_back(known.first);
  }
  return runnable;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of mpo_ext. Private: call mpo_ext.ops instead.";
  m.attr("has_cuda") = false;
  m.attr("compiler") = MPO_COMPILER;
  m.def("cpu_isas", &cpu_isas, "Instruction sets of the CPU kernels that run here, the best first.");
  m.def("token_logp_cpu", &token_logp_cpu, py::kw_only(), "logits"_a, "labels"_a, "rows"_a, "vocab"_a, "inner"_a,
        "outer_stride"_a, "row_stride"_a, "ignore_index"_a, "dtype"_a, "logp"_a, "row_max"_a, "row_sum"_a,
        "row_stats"_a, "stats"_a, "threads"_a, "isa"_a);
  m.def("logits_grad_cpu", &logits_grad_cpu, py::kw_only(), "logits"_a, "labels"_a, "rows"_a, "vocab"_a, "inner"_a,
        "outer_stride"_a, "row_stride"_a, "ignore_index"_a, "dtype"_a, "row_max"_a, "row_sum"_a, "weight"_a, "scale"_a,
        "grad"_a, "grad_inner"_a, "grad_outer_stride"_a, "grad_row_stride"_a, "is_zeroed"_a, "threads"_a, "isa"_a);
  m.def("pair_loss_cpu", &pair_loss_cpu, py::kw_only(), "logp"_a, "labels"_a, "offsets"_a, "ref_logp"_a, "state"_a,
        "loss"_a, "terms"_a, "reward_shift"_a, "sums"_a, "reward"_a, "tokens"_a, "new_state"_a, "batch"_a, "weight"_a,
        "pairs"_a, "rows"_a, "ignore_index"_a, "rule"_a, "update_first"_a, "decay"_a, "beta"_a, "dpo_weight"_a,
        "bco_weight"_a, "ntp_weight"_a, "label_smoothing"_a, "average_sequences"_a, "is_double"_a);
}

// Python bindings. Addresses come in as integers, so this module knows nothing of torch and one build serves every
// torch version. mpo_ext/ops/logits.py is the only caller; it checks shapes, dtypes and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mpo/api.h"
#include "mpo/cuda/launch.h"

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

mpo::Rows rows_of(uintptr_t logits, uintptr_t labels, int64_t rows, int64_t vocab, int64_t first, int64_t total,
                  int64_t inner, int64_t outer_stride, int64_t row_stride, int64_t ignore_index) {
  if (rows < 1 || vocab < 1 || inner < 1) {
    throw std::invalid_argument("rows, vocab and inner must be at least 1, got " + std::to_string(rows) + ", " +
                                std::to_string(vocab) + " and " + std::to_string(inner));
  }
  if (first < 0 || first > total - vocab) {
    throw std::invalid_argument("first must be at least 0 and at most total - vocab, got " + std::to_string(first));
  }
  return {as_ptr<const void>(logits, "logits"),
          as_ptr<const int64_t>(labels, "labels"),
          rows,
          vocab,
          first,
          total,
          inner,
          outer_stride,
          row_stride,
          ignore_index};
}

/// The state that tiles of a vocabulary hand on; the whole vocabulary needs none.
double* row_state_of(uintptr_t row_state, int64_t vocab, int64_t total) {
  return vocab == total ? reinterpret_cast<double*>(row_state) : as_ptr<double>(row_state, "row_state");
}

void token_logp_cpu(uintptr_t logits, uintptr_t labels, int64_t rows, int64_t vocab, int64_t first, int64_t total,
                    int64_t inner, int64_t outer_stride, int64_t row_stride, int64_t ignore_index,
                    const std::string& dtype, uintptr_t row_state, uintptr_t logp, uintptr_t row_max, uintptr_t row_sum,
                    uintptr_t row_stats, unsigned stats, uintptr_t numerators, int threads, const std::string& isa) {
  const mpo::TokenLogpParams p = {
      rows_of(logits, labels, rows, vocab, first, total, inner, outer_stride, row_stride, ignore_index),
      row_state_of(row_state, vocab, total),
      as_ptr<void>(logp, "logp"),
      as_ptr<void>(row_max, "row_max"),
      as_ptr<void>(row_sum, "row_sum"),
      stats == 0 ? nullptr : as_ptr<void>(row_stats, "row_stats"),
      stats};
  const mpo::DType type = by_name(kDTypes, dtype, "dtype");
  const mpo::Isa set = runnable_isa(isa);
  py::gil_scoped_release no_gil;
  mpo::token_logp_cpu(p, reinterpret_cast<void*>(numerators), type, threads, set);
}

void logits_grad_cpu(uintptr_t logits, uintptr_t labels, int64_t rows, int64_t vocab, int64_t first, int64_t total,
                     int64_t inner, int64_t outer_stride, int64_t row_stride, int64_t ignore_index,
                     const std::string& dtype, uintptr_t row_max, uintptr_t row_sum, uintptr_t weight, uintptr_t scale,
                     uintptr_t grad, int64_t grad_inner, int64_t grad_outer_stride, int64_t grad_row_stride,
                     bool is_zeroed, int threads, const std::string& isa) {
  const mpo::LogitsGradParams p = {
      rows_of(logits, labels, rows, vocab, first, total, inner, outer_stride, row_stride, ignore_index),
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

/// Keyword arguments by name, each taken once and none left over. The CUDA functions have dozens, and come in pairs:
/// one launches, the other describes the launch for the tests.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& given) : given_(given) {}

  template <typename T>
  T get(const char* name) {
    if (!given_.contains(name)) throw std::invalid_argument(std::string(name) + " is missing");
    ++taken_;
    return given_[name].cast<T>();
  }

  template <typename T>
  T* address(const char* name) {
    return as_ptr<T>(get<uintptr_t>(name), name);
  }

  template <typename T>
  T* address_or_null(const char* name) {
    return reinterpret_cast<T*>(get<uintptr_t>(name));
  }

  void end() const {
    if (taken_ != given_.size()) throw std::invalid_argument("there are arguments that nothing takes");
  }

 private:
  const py::kwargs& given_;
  size_t taken_ = 0;
};

mpo::Rows rows_of(Arguments& a) {
  // One by one, since the order in which a call's arguments are evaluated is open.
  const uintptr_t logits = a.get<uintptr_t>("logits"), labels = a.get<uintptr_t>("labels");
  const int64_t rows = a.get<int64_t>("rows"), vocab = a.get<int64_t>("vocab"), inner = a.get<int64_t>("inner");
  const int64_t first = a.get<int64_t>("first"), total = a.get<int64_t>("total");
  const int64_t outer_stride = a.get<int64_t>("outer_stride"), row_stride = a.get<int64_t>("row_stride");
  return rows_of(logits, labels, rows, vocab, first, total, inner, outer_stride, row_stride,
                 a.get<int64_t>("ignore_index"));
}

mpo::TokenLogpParams token_logp_params(Arguments& a) {
  mpo::TokenLogpParams p;
  p.in = rows_of(a);
  p.row_state = row_state_of(a.get<uintptr_t>("row_state"), p.in.vocab, p.in.total);
  p.logp = a.address<void>("logp");
  p.row_max = a.address<void>("row_max");
  p.row_sum = a.address<void>("row_sum");
  p.stats = a.get<unsigned>("stats");
  p.row_stats = p.stats == 0 ? a.address_or_null<void>("row_stats") : a.address<void>("row_stats");
  return p;
}

/// Of the pair loss, all but its rows: logp, labels, rows and ignore_index.
mpo::PairLossParams pair_params(Arguments& a) {
  mpo::PairLossParams p;
  p.offsets = a.address_or_null<const int64_t>("offsets");
  p.ref_logp = a.address<const double>("ref_logp");
  p.state = a.address<const double>("state");
  p.loss = a.address<void>("loss");
  p.terms = a.address<void>("terms");
  p.reward_shift = a.address<void>("reward_shift");
  p.sums = a.address<void>("sums");
  p.reward = a.address<void>("reward");
  p.tokens = a.address<int64_t>("tokens");
  p.new_state = a.address<double>("new_state");
  p.batch = a.address<double>("batch");
  p.weight = a.address_or_null<void>("weight");  // as there may be no rows
  p.pairs = a.get<int64_t>("pairs");
  if (p.pairs < 1) throw std::invalid_argument("pairs must be at least 1, got " + std::to_string(p.pairs));
  const int rule = a.get<int>("rule");
  if (rule < 0 || rule > 2) throw std::invalid_argument("rule must be 0, 1 or 2, got " + std::to_string(rule));
  mpo::PairLossConfig& c = p.config;
  c.beta = a.get<double>("beta");
  c.dpo_weight = a.get<double>("dpo_weight");
  c.bco_weight = a.get<double>("bco_weight");
  c.ntp_weight = a.get<double>("ntp_weight");
  c.label_smoothing = a.get<double>("label_smoothing");
  c.average_sequences = a.get<bool>("average_sequences");
  c.rule = static_cast<mpo::ShiftRule>(rule);
  c.update_first = a.get<bool>("update_first");
  c.decay = a.get<double>("decay");
  return p;
}

mpo::CudaPairTypes pair_types(Arguments& a) {
  const bool ref_is_float = a.get<bool>("ref_is_float");
  return {ref_is_float, a.get<bool>("offsets_are_int32")};
}

mpo::DType dtype_of(Arguments& a) { return by_name(kDTypes, a.get<std::string>("dtype"), "dtype"); }

/// What the CUDA launches take, read from their keyword arguments.
struct ForwardCall {
  mpo::TokenLogpParams token;
  mpo::PairLossParams pair = {};
  mpo::CudaPairTypes types = {};
  mpo::DType dtype;
  mpo::CudaWork work;
  int multiprocessors;

  ForwardCall(Arguments& a, bool with_pair) : token(token_logp_params(a)), dtype(dtype_of(a)) {
    if (with_pair) {
      pair = pair_params(a);
      types = pair_types(a);
      pair.logp = token.logp;
      pair.labels = token.in.labels;
      pair.rows = token.in.rows;
      pair.ignore_index = token.in.ignore_index;
    }
    work = {a.address<void>("scratch"), a.address<unsigned>("counters")};
    multiprocessors = a.get<int>("multiprocessors");
  }
};

struct PairLossCall {
  mpo::PairLossParams p;
  mpo::CudaPairTypes types;
  mpo::CudaWork work;

  explicit PairLossCall(Arguments& a) : p(pair_params(a)), types(pair_types(a)) {
    p.logp = a.address_or_null<const void>("logp");
    p.labels = a.address_or_null<const int64_t>("labels");
    p.rows = a.get<int64_t>("rows");
    p.ignore_index = a.get<int64_t>("ignore_index");
    work = {a.address<void>("scratch"), nullptr};
  }
};

struct LogitsGradCall {
  mpo::LogitsGradParams p;
  bool scale_is_float;
  mpo::DType dtype;
  int multiprocessors;

  explicit LogitsGradCall(Arguments& a) {
    p.in = rows_of(a);
    p.row_max = a.address<const void>("row_max");
    p.row_sum = a.address<const void>("row_sum");
    p.weight = a.address<const void>("weight");
    p.scale = a.address_or_null<const double>("scale");
    p.grad = a.address<void>("grad");
    p.grad_inner = a.get<int64_t>("grad_inner");
    p.grad_outer_stride = a.get<int64_t>("grad_outer_stride");
    p.grad_row_stride = a.get<int64_t>("grad_row_stride");
    p.is_zeroed = a.get<bool>("is_zeroed");
    scale_is_float = a.get<bool>("scale_is_float");
    dtype = dtype_of(a);
    multiprocessors = a.get<int>("multiprocessors");
  }
};

py::dict shape_dict(const mpo::CudaShape& shape) {
  return py::dict("grid"_a = shape.grid, "block"_a = shape.block, "scratch_bytes"_a = shape.scratch_bytes,
                  "counters"_a = shape.counters);
}

/// A launch as the tests repeat it: its shape, and the bytes of the kernel's one argument.
template <typename Args>
py::dict launch_dict(const char* kernel, const mpo::CudaShape& shape, const Args& args) {
  py::dict launch = shape_dict(shape);
  launch["kernel"] = kernel;
  launch["args"] = py::bytes(reinterpret_cast<const char*>(&args), sizeof(args));
  return launch;
}

void check_rows(const mpo::Rows& in, mpo::DType dtype) {
  if (const char* error = mpo::rows_error(in, dtype)) throw std::invalid_argument(error);
}

py::dict describe_forward(const py::kwargs& given, bool with_pair) {
  Arguments a(given);
  const ForwardCall call(a, with_pair);
  a.end();
  check_rows(call.token.in, call.dtype);
  const mpo::CudaShape shape = mpo::cuda_forward_shape(call.token.in.rows, call.token.in.vocab, call.dtype,
                                                       call.pair.pairs, call.multiprocessors);
  return launch_dict("token_logp_kernel", shape,
                     with_pair ? mpo::forward_args(call.token, call.pair, call.types, call.dtype, call.work, shape)
                               : mpo::token_logp_args(call.token, call.dtype, call.work));
}

py::dict describe_pair_loss(const py::kwargs& given) {
  Arguments a(given);
  const PairLossCall call(a);
  a.end();
  return launch_dict("pair_loss_kernel", mpo::cuda_pair_loss_shape(call.p.pairs),
                     mpo::pair_loss_args(call.p, call.types, call.work.scratch));
}

py::dict describe_logits_grad(const py::kwargs& given) {
  Arguments a(given);
  const LogitsGradCall call(a);
  a.end();
  check_rows(call.p.in, call.dtype);
  const mpo::CudaShape shape =
      mpo::cuda_logits_grad_shape(call.p.in.rows, call.p.in.vocab, call.dtype, call.multiprocessors);
  return launch_dict("logits_grad_kernel", shape, mpo::logits_grad_args(call.p, call.scale_is_float, call.dtype));
}

#ifdef MPO_WITH_CUDA
void check_launch(const char* name, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string(name) + ": " + error);
}

cudaStream_t stream_of(Arguments& a) { return a.address_or_null<CUstream_st>("stream"); }  // 0: the default stream

void token_logp_cuda(const py::kwargs& given) {
  Arguments a(given);
  const ForwardCall call(a, false);
  const cudaStream_t stream = stream_of(a);
  a.end();
  check_launch("token_logp", mpo::launch_token_logp(call.token, call.dtype, call.work, call.multiprocessors, stream));
}

void forward_cuda(const py::kwargs& given) {
  Arguments a(given);
  const ForwardCall call(a, true);
  const cudaStream_t stream = stream_of(a);
  a.end();
  check_launch("forward", mpo::launch_forward(call.token, call.pair, call.types, call.dtype, call.work,
                                              call.multiprocessors, stream));
}

void pair_loss_cuda(const py::kwargs& given) {
  Arguments a(given);
  const PairLossCall call(a);
  const cudaStream_t stream = stream_of(a);
  a.end();
  check_launch("pair_loss", mpo::launch_pair_loss(call.p, call.types, call.work, stream));
}

void logits_grad_cuda(const py::kwargs& given) {
  Arguments a(given);
  const LogitsGradCall call(a);
  const cudaStream_t stream = stream_of(a);
  a.end();
  check_launch("logits_grad",
               mpo::launch_logits_grad(call.p, call.scale_is_float, call.dtype, call.multiprocessors, stream));
}
#endif

std::vector<std::string> cpu_isas() {
  std::vector<std::string> runnable;
  for (const auto& known : kIsas) {
    if (mpo::can_run(known.second)) runnable.emplace_back(known.first);
  }
  return runnable;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of mpo_ext. Private: call mpo_ext.ops.logits instead.";
#ifdef MPO_WITH_CUDA
  m.attr("has_cuda") = true;
  m.attr("cuda_archs") = MPO_CUDA_ARCHS;
  m.attr("cuda_compiler") = MPO_CUDA_COMPILER;
  m.def("token_logp_cuda", &token_logp_cuda);
  m.def("forward_cuda", &forward_cuda, "token_logp_cuda and pair_loss_cuda in one launch.");
  m.def("pair_loss_cuda", &pair_loss_cuda);
  m.def("logits_grad_cuda", &logits_grad_cuda);
#else
  m.attr("has_cuda") = false;
  m.attr("cuda_archs") = "";
  m.attr("cuda_compiler") = "";
#endif
  // These need neither a GPU nor CUDA: how much memory a launch works in, and the launch itself, from the arguments of
  // the functions above without the stream.
  m.def(
      "cuda_forward_shape",
      [](int64_t rows, int64_t vocab, const std::string& dtype, int64_t pairs, int multiprocessors) {
        return shape_dict(
            mpo::cuda_forward_shape(rows, vocab, by_name(kDTypes, dtype, "dtype"), pairs, multiprocessors));
      },
      py::kw_only(), "rows"_a, "vocab"_a, "dtype"_a, "pairs"_a, "multiprocessors"_a);
  m.def(
      "cuda_pair_loss_shape", [](int64_t pairs) { return shape_dict(mpo::cuda_pair_loss_shape(pairs)); }, py::kw_only(),
      "pairs"_a);
  m.def("describe_token_logp_cuda", [](const py::kwargs& given) { return describe_forward(given, false); });
  m.def("describe_forward_cuda", [](const py::kwargs& given) { return describe_forward(given, true); });
  m.def("describe_pair_loss_cuda", &describe_pair_loss);
  m.def("describe_logits_grad_cuda", &describe_logits_grad);
  m.attr("compiler") = MPO_COMPILER;
  m.def("cpu_isas", &cpu_isas, "Instruction sets of the CPU kernels that run here, the best first.");
  m.def("token_logp_cpu", &token_logp_cpu, py::kw_only(), "logits"_a, "labels"_a, "rows"_a, "vocab"_a, "first"_a,
        "total"_a, "inner"_a, "outer_stride"_a, "row_stride"_a, "ignore_index"_a, "dtype"_a, "row_state"_a, "logp"_a,
        "row_max"_a, "row_sum"_a, "row_stats"_a, "stats"_a, "numerators"_a, "threads"_a, "isa"_a);
  m.def("logits_grad_cpu", &logits_grad_cpu, py::kw_only(), "logits"_a, "labels"_a, "rows"_a, "vocab"_a, "first"_a,
        "total"_a, "inner"_a, "outer_stride"_a, "row_stride"_a, "ignore_index"_a, "dtype"_a, "row_max"_a, "row_sum"_a,
        "weight"_a, "scale"_a, "grad"_a, "grad_inner"_a, "grad_outer_stride"_a, "grad_row_stride"_a, "is_zeroed"_a,
        "threads"_a, "isa"_a);
  m.def("pair_loss_cpu", &pair_loss_cpu, py::kw_only(), "logp"_a, "labels"_a, "offsets"_a, "ref_logp"_a, "state"_a,
        "loss"_a, "terms"_a, "reward_shift"_a, "sums"_a, "reward"_a, "tokens"_a, "new_state"_a, "batch"_a, "weight"_a,
        "pairs"_a, "rows"_a, "ignore_index"_a, "rule"_a, "update_first"_a, "decay"_a, "beta"_a, "dpo_weight"_a,
        "bco_weight"_a, "ntp_weight"_a, "label_smoothing"_a, "average_sequences"_a, "is_double"_a);
}

// Python bindings. Addresses are passed as integers, which makes this module independent of torch: one build serves
// every torch version. mpo_ext/ops is the only caller; it checks shapes, dtypes and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mpo/api.h"
#include "mpo/cuda/launch.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

/// Reads keyword arguments by name. Every function of this module reads its arguments through an Arguments, so the CPU
/// and the CUDA version of an operator, and the description of a CUDA launch, use the same names.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& kwargs) : kwargs_(kwargs) {}

  template <typename T>
  T get(const char* name) {
    if (!kwargs_.contains(name)) throw std::invalid_argument(std::string(name) + " is missing");
    read_.emplace_back(name);
    return kwargs_[name].cast<T>();
  }

  template <typename T>
  T* address(const char* name) {
    T* const pointer = address_or_null<T>(name);
    if (pointer == nullptr) throw std::invalid_argument(std::string(name) + " must be an address, got 0");
    return pointer;
  }

  template <typename T>
  T* address_or_null(const char* name) {
    return reinterpret_cast<T*>(get<uintptr_t>(name));
  }

  /// Reads a string argument and returns its value in a table.
  template <typename Enum>
  Enum choice(const char* name, const std::vector<std::pair<const char*, Enum>>& table) {
    const std::string value = get<std::string>(name);
    std::string names;
    for (const auto& entry : table) {
      if (value == entry.first) return entry.second;
      names += (names.empty() ? "" : ", ") + std::string(entry.first);
    }
    throw std::invalid_argument(std::string(name) + " must be one of " + names + ", got " + value);
  }

  /// Throws if an argument was passed but not read.
  void end() const {
    std::string names;
    for (const auto& item : kwargs_) {
      const std::string name = item.first.cast<std::string>();
      if (std::find(read_.begin(), read_.end(), name) == read_.end()) names += (names.empty() ? "" : ", ") + name;
    }
    if (!names.empty()) throw std::invalid_argument("unexpected keyword arguments: " + names);
  }

 private:
  const py::kwargs& kwargs_;
  std::vector<std::string> read_;
};

// ------------------------------------------------------------------------------------------------- arguments to params

const std::vector<std::pair<const char*, mpo::DType>> kDTypes = {{"float32", mpo::DType::kFloat32},
                                                                 {"bfloat16", mpo::DType::kBFloat16},
                                                                 {"float16", mpo::DType::kFloat16},
                                                                 {"float64", mpo::DType::kFloat64}};
const std::vector<std::pair<const char*, mpo::Isa>> kIsas = {
    {"avx512", mpo::Isa::kAvx512}, {"avx2", mpo::Isa::kAvx2}, {"portable", mpo::Isa::kPortable}};

mpo::DType read_dtype(Arguments& a) { return a.choice("dtype", kDTypes); }

mpo::Rows read_rows(Arguments& a) {
  mpo::Rows in;
  in.logits = a.address<const void>("logits");
  in.labels = a.address<const int64_t>("labels");
  in.rows = a.get<int64_t>("rows");
  in.vocab = a.get<int64_t>("vocab");
  in.first = a.get<int64_t>("first");
  in.total = a.get<int64_t>("total");
  in.inner = a.get<int64_t>("inner");
  in.outer_stride = a.get<int64_t>("outer_stride");
  in.row_stride = a.get<int64_t>("row_stride");
  in.ignore_index = a.get<int64_t>("ignore_index");
  if (in.rows < 1 || in.vocab < 1 || in.inner < 1) {
    throw std::invalid_argument("rows, vocab and inner must be at least 1, got " + std::to_string(in.rows) + ", " +
                                std::to_string(in.vocab) + " and " + std::to_string(in.inner));
  }
  if (in.first < 0 || in.first > in.total - in.vocab) {
    throw std::invalid_argument("first must be at least 0 and at most total - vocab, got " + std::to_string(in.first));
  }
  return in;
}

mpo::TokenLogpParams read_token_logp(Arguments& a) {
  mpo::TokenLogpParams p;
  p.in = read_rows(a);
  const bool is_tile = p.in.vocab != p.in.total;  // only tiles of a vocabulary pass on a state
  p.row_state = is_tile ? a.address<double>("row_state") : a.address_or_null<double>("row_state");
  p.logp = a.address<void>("logp");
  p.row_max = a.address<void>("row_max");
  p.row_sum = a.address<void>("row_sum");
  p.stats = a.get<unsigned>("stats");
  p.row_stats = p.stats == 0 ? a.address_or_null<void>("row_stats") : a.address<void>("row_stats");
  return p;
}

mpo::LogitsGradParams read_logits_grad(Arguments& a) {
  mpo::LogitsGradParams p;
  p.in = read_rows(a);
  p.row_max = a.address<const void>("row_max");
  p.row_sum = a.address<const void>("row_sum");
  p.weight = a.address<const void>("weight");
  p.scale = a.address_or_null<const double>("scale");
  p.grad = a.address<void>("grad");
  p.grad_inner = a.get<int64_t>("grad_inner");
  p.grad_outer_stride = a.get<int64_t>("grad_outer_stride");
  p.grad_row_stride = a.get<int64_t>("grad_row_stride");
  p.is_zeroed = a.get<bool>("is_zeroed");
  return p;
}

mpo::ExpLogitsParams read_exp_logits(Arguments& a) {
  mpo::ExpLogitsParams p;
  p.in = read_rows(a);
  p.row_max = a.address<const float>("row_max");
  p.reference = a.address_or_null<const float>("reference");
  p.new_reference = a.address<float>("new_reference");
  p.slack = a.get<float>("slack");
  p.sums = a.address<float>("sums");
  p.hidden_size = a.get<int64_t>("hidden_size");
  p.exp_logits = a.address<void>("exp_logits");
  return p;
}

mpo::PairLossConfig read_pair_loss_config(Arguments& a) {
  const int rule = a.get<int>("rule");
  if (rule < 0 || rule > 2) throw std::invalid_argument("rule must be 0, 1 or 2, got " + std::to_string(rule));
  mpo::PairLossConfig c;
  c.beta = a.get<double>("beta");
  c.dpo_weight = a.get<double>("dpo_weight");
  c.bco_weight = a.get<double>("bco_weight");
  c.ntp_weight = a.get<double>("ntp_weight");
  c.label_smoothing = a.get<double>("label_smoothing");
  c.average_sequences = a.get<bool>("average_sequences");
  c.rule = static_cast<mpo::ShiftRule>(rule);
  c.update_first = a.get<bool>("update_first");
  c.decay = a.get<double>("decay");
  return c;
}

/// Reads a pair loss over the rows of token_logp; logp, labels, rows and ignore_index are those of token_logp.
mpo::PairLossParams read_pair_loss(Arguments& a, const void* logp, const int64_t* labels, int64_t rows,
                                   int64_t ignore_index) {
  mpo::PairLossParams p;
  p.logp = logp;
  p.labels = labels;
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
  p.weight = rows == 0 ? a.address_or_null<void>("weight") : a.address<void>("weight");
  p.pairs = a.get<int64_t>("pairs");
  if (p.pairs < 1 || p.pairs >= int64_t{1} << 30) {
    throw std::invalid_argument("pairs must be at least 1 and below 2^30, got " + std::to_string(p.pairs));
  }
  p.rows = rows;
  p.ignore_index = ignore_index;
  p.config = read_pair_loss_config(a);
  return p;
}

/// Reads a pair loss that runs alone. In a batch without rows (T = 0), the addresses of rows may be 0.
mpo::PairLossParams read_pair_loss(Arguments& a) {
  const int64_t rows = a.get<int64_t>("rows");
  const void* logp = rows == 0 ? a.address_or_null<const void>("logp") : a.address<const void>("logp");
  const auto* labels = rows == 0 ? a.address_or_null<const int64_t>("labels") : a.address<const int64_t>("labels");
  return read_pair_loss(a, logp, labels, rows, a.get<int64_t>("ignore_index"));
}

// ------------------------------------------------------------------------------------------------------ CPU operators

struct CpuOptions {
  int threads;
  mpo::Isa isa;

  explicit CpuOptions(Arguments& a) : threads(a.get<int>("threads")), isa(a.choice("isa", kIsas)) {
    if (!mpo::can_run(isa)) {
      throw std::invalid_argument("isa must be supported by this machine, got " + a.get<std::string>("isa"));
    }
  }
};

void token_logp_cpu(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const mpo::TokenLogpParams p = read_token_logp(a);
  void* const exp_logits = a.address_or_null<void>("exp_logits");
  const mpo::DType dtype = read_dtype(a);
  const CpuOptions options(a);
  a.end();
  py::gil_scoped_release no_gil;
  mpo::token_logp_cpu(p, exp_logits, dtype, options.threads, options.isa);
}

void logits_grad_cpu(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const mpo::LogitsGradParams p = read_logits_grad(a);
  const mpo::DType dtype = read_dtype(a);
  const CpuOptions options(a);
  a.end();
  py::gil_scoped_release no_gil;
  mpo::logits_grad_cpu(p, dtype, options.threads, options.isa);
}

void pair_loss_cpu(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const mpo::PairLossParams p = read_pair_loss(a);
  if (p.offsets == nullptr) throw std::invalid_argument("offsets must be an address, got 0");
  const bool is_double = a.get<bool>("is_double");
  a.end();
  py::gil_scoped_release no_gil;
  mpo::pair_loss_cpu(p, is_double);
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> runnable;
  for (const auto& entry : kIsas) {
    if (mpo::can_run(entry.second)) runnable.emplace_back(entry.first);
  }
  return runnable;
}

// ------------------------------------------------------------------------------------------------------ CUDA launches

mpo::CudaPairTypes read_pair_types(Arguments& a) {
  mpo::CudaPairTypes types;
  types.ref_is_float = a.get<bool>("ref_is_float");
  types.offsets_are_int32 = a.get<bool>("offsets_are_int32");
  return types;
}

void check_rows(const mpo::Rows& in, mpo::DType dtype) {
  if (const char* error = mpo::rows_error(in, dtype)) throw std::invalid_argument(error);
}

/// A launch of token_logp, or of the whole forward if with_pair is true.
struct ForwardLaunch {
  mpo::TokenLogpParams token;
  mpo::PairLossParams pair = {};
  mpo::CudaPairTypes types = {};
  mpo::DType dtype;
  mpo::CudaWork work;
  int multiprocessors;

  ForwardLaunch(Arguments& a, bool with_pair) : token(read_token_logp(a)), dtype(read_dtype(a)) {
    if (with_pair) {
      pair = read_pair_loss(a, token.logp, token.in.labels, token.in.rows, token.in.ignore_index);
      types = read_pair_types(a);
    }
    work.scratch = a.address<void>("scratch");
    work.counters = a.address<unsigned>("counters");
    multiprocessors = a.get<int>("multiprocessors");
    check_rows(token.in, dtype);
  }
};

struct PairLossLaunch {
  mpo::PairLossParams p;
  mpo::CudaPairTypes types;
  mpo::CudaWork work;

  explicit PairLossLaunch(Arguments& a)
      : p(read_pair_loss(a)), types(read_pair_types(a)), work{a.address<void>("scratch"), nullptr} {}
};

struct LogitsGradLaunch {
  mpo::LogitsGradParams p;
  bool scale_is_float;
  mpo::DType dtype, grad_dtype;
  int multiprocessors;

  explicit LogitsGradLaunch(Arguments& a)
      : p(read_logits_grad(a)),
        scale_is_float(a.get<bool>("scale_is_float")),
        dtype(read_dtype(a)),
        grad_dtype(a.choice("grad_dtype", kDTypes)),
        multiprocessors(a.get<int>("multiprocessors")) {
    check_rows(p.in, dtype);
    if (const char* error = mpo::grad_error(dtype, grad_dtype)) throw std::invalid_argument(error);
  }
};

struct ExpLogitsLaunch {
  mpo::ExpLogitsParams p;
  mpo::DType dtype;
  int multiprocessors;

  explicit ExpLogitsLaunch(Arguments& a)
      : p(read_exp_logits(a)), dtype(read_dtype(a)), multiprocessors(a.get<int>("multiprocessors")) {
    check_rows(p.in, mpo::DType::kFloat32);
    if (dtype == mpo::DType::kFloat64) throw std::invalid_argument("dtype must not be float64");
  }
};

#ifdef MPO_WITH_CUDA
void check_launch(const char* name, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string(name) + ": " + error);
}

cudaStream_t read_stream(Arguments& a) { return a.address_or_null<CUstream_st>("stream"); }  // 0: the default stream

void token_logp_cuda(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const ForwardLaunch launch(a, false);
  const cudaStream_t stream = read_stream(a);
  a.end();
  check_launch("token_logp",
               mpo::launch_token_logp(launch.token, launch.dtype, launch.work, launch.multiprocessors, stream));
}

void forward_cuda(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const ForwardLaunch launch(a, true);
  const cudaStream_t stream = read_stream(a);
  a.end();
  check_launch("forward", mpo::launch_forward(launch.token, launch.pair, launch.types, launch.dtype, launch.work,
                                              launch.multiprocessors, stream));
}

void pair_loss_cuda(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const PairLossLaunch launch(a);
  const cudaStream_t stream = read_stream(a);
  a.end();
  check_launch("pair_loss", mpo::launch_pair_loss(launch.p, launch.types, launch.work, stream));
}

void logits_grad_cuda(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const LogitsGradLaunch launch(a);
  const cudaStream_t stream = read_stream(a);
  a.end();
  check_launch("logits_grad", mpo::launch_logits_grad(launch.p, launch.scale_is_float, launch.dtype, launch.grad_dtype,
                                                      launch.multiprocessors, stream));
}

void exp_logits_cuda(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const ExpLogitsLaunch launch(a);
  const cudaStream_t stream = read_stream(a);
  a.end();
  check_launch("exp_logits", mpo::launch_exp_logits(launch.p, launch.dtype, launch.multiprocessors, stream));
}

/// Returns "", or why the kernels cannot run on the current device.
std::string cuda_device_error() {
  const char* error = mpo::device_error();
  return error == nullptr ? "" : error;
}

uintptr_t cuda_counters(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const int count = a.get<int>("count");
  const cudaStream_t stream = read_stream(a);
  a.end();
  if (count < 1) throw std::invalid_argument("count must be at least 1, got " + std::to_string(count));
  unsigned* counters = nullptr;
  check_launch("counters", mpo::allocate_counters(count, stream, &counters));
  return reinterpret_cast<uintptr_t>(counters);
}
#endif

// ----------------------------------------------------------------------------------- CUDA launches described, not made

py::dict shape_dict(const mpo::CudaShape& shape) {
  return py::dict("grid"_a = shape.grid, "block"_a = shape.block, "scratch_bytes"_a = shape.scratch_bytes,
                  "counters"_a = shape.counters);
}

/// Returns the shape of a launch and the bytes of the kernel's only argument. Tests repeat the launch from them.
template <typename Args>
py::dict launch_dict(const char* kernel, const mpo::CudaShape& shape, const Args& args) {
  py::dict launch = shape_dict(shape);
  launch["kernel"] = kernel;
  launch["args"] = py::bytes(reinterpret_cast<const char*>(&args), sizeof(args));
  return launch;
}

py::dict describe_forward(const py::kwargs& kwargs, bool with_pair) {
  Arguments a(kwargs);
  const ForwardLaunch launch(a, with_pair);
  a.end();
  const mpo::Rows& in = launch.token.in;
  const mpo::CudaShape shape =
      mpo::cuda_forward_shape(in.rows, in.vocab, launch.dtype, launch.pair.pairs, launch.multiprocessors);
  return launch_dict("token_logp_kernel", shape,
                     with_pair
                         ? mpo::forward_args(launch.token, launch.pair, launch.types, launch.dtype, launch.work, shape)
                         : mpo::token_logp_args(launch.token, launch.dtype, launch.work));
}

py::dict describe_pair_loss(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const PairLossLaunch launch(a);
  a.end();
  return launch_dict("pair_loss_kernel", mpo::cuda_pair_loss_shape(launch.p.pairs),
                     mpo::pair_loss_args(launch.p, launch.types, launch.work.scratch));
}

py::dict describe_logits_grad(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const LogitsGradLaunch launch(a);
  a.end();
  const mpo::Rows& in = launch.p.in;
  return launch_dict("logits_grad_kernel",
                     mpo::cuda_logits_grad_shape(in.rows, in.vocab, launch.dtype, launch.multiprocessors),
                     mpo::logits_grad_args(launch.p, launch.scale_is_float, launch.dtype));
}

py::dict describe_exp_logits(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const ExpLogitsLaunch launch(a);
  a.end();
  const mpo::Rows& in = launch.p.in;
  return launch_dict("exp_logits_kernel", mpo::cuda_exp_logits_shape(in.rows, in.vocab, launch.multiprocessors),
                     mpo::exp_logits_args(launch.p));
}

py::dict cuda_forward_shape(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const int64_t rows = a.get<int64_t>("rows"), vocab = a.get<int64_t>("vocab"), pairs = a.get<int64_t>("pairs");
  const mpo::DType dtype = read_dtype(a);
  const int multiprocessors = a.get<int>("multiprocessors");
  a.end();
  return shape_dict(mpo::cuda_forward_shape(rows, vocab, dtype, pairs, multiprocessors));
}

py::dict cuda_pair_loss_shape(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const int64_t pairs = a.get<int64_t>("pairs");
  a.end();
  return shape_dict(mpo::cuda_pair_loss_shape(pairs));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of mpo_ext. Private: call mpo_ext.ops instead. All functions take keyword arguments only.";
  m.attr("compiler") = MPO_COMPILER;
  m.def("cpu_isas", &cpu_isas, "Returns the instruction sets of the CPU kernels that run here, the best first.");
  m.def("token_logp_cpu", &token_logp_cpu);
  m.def("logits_grad_cpu", &logits_grad_cpu);
  m.def("pair_loss_cpu", &pair_loss_cpu);
#ifdef MPO_WITH_CUDA
  m.attr("has_cuda") = true;
  m.attr("cuda_archs") = MPO_CUDA_ARCHS;
  m.attr("cuda_compiler") = MPO_CUDA_COMPILER;
  m.def("token_logp_cuda", &token_logp_cuda);
  m.def("forward_cuda", &forward_cuda, "token_logp_cuda and pair_loss_cuda in one launch.");
  m.def("pair_loss_cuda", &pair_loss_cuda);
  m.def("logits_grad_cuda", &logits_grad_cuda);
  m.def("exp_logits_cuda", &exp_logits_cuda);
  m.def("cuda_device_error", &cuda_device_error,
        "Returns '', or why the CUDA kernels cannot run on the current device.");
  m.def("cuda_counters", &cuda_counters, "Returns the address of new counters for launches on a stream, all 0.");
#else
  m.attr("has_cuda") = false;
  m.attr("cuda_archs") = "";
  m.attr("cuda_compiler") = "";
#endif
  // The functions below need neither a GPU nor CUDA. Each description takes the arguments of its launch except the
  // stream.
  m.def("cuda_forward_shape", &cuda_forward_shape,
        "Returns grid, block and memory of token_logp_cuda or forward_cuda.");
  m.def("cuda_pair_loss_shape", &cuda_pair_loss_shape, "Returns grid, block and memory of pair_loss_cuda.");
  m.def("describe_token_logp_cuda", [](const py::kwargs& kwargs) { return describe_forward(kwargs, false); });
  m.def("describe_forward_cuda", [](const py::kwargs& kwargs) { return describe_forward(kwargs, true); });
  m.def("describe_pair_loss_cuda", &describe_pair_loss);
  m.def("describe_logits_grad_cuda", &describe_logits_grad);
  m.def("describe_exp_logits_cuda", &describe_exp_logits);
}

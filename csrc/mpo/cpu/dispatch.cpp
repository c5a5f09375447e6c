// Chooses the kernels for an instruction set and shares the rows out over threads.
#include <atomic>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

#include "mpo/cpu/kernels.h"

namespace mpo {
namespace {

const CpuKernels& kernels_of(Isa isa) {
#ifdef MPO_WITH_X86_KERNELS
  if (isa == Isa::kAvx512) return kAvx512Kernels;
  if (isa == Isa::kAvx2) return kAvx2Kernels;
#else
  (void)isa;
#endif
  return kPortableKernels;
}

/// The OpenMP runtime's call that lets each thread of a team do work(data). The runtime is torch's, looked up and not
/// linked: its threads spin for a while after each operator of torch, and others of ours would have to wait for them.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

#ifdef _WIN32
Parallel openmp_parallel() { return nullptr; }
#else
std::atomic<bool> is_forked{false};
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

/// GOMP_parallel, which the runtimes of GCC, LLVM and Intel have; null where there is none, and in a forked process,
/// which has inherited a pool without its threads.
Parallel openmp_parallel() {
  static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return is_forked ? nullptr : found;
}
#endif

/// Calls run() on up to `threads` threads at once, of which `most` have something to do; run() does what is left.
template <typename Run>
void on_threads(int64_t threads, int64_t most, Run& run) {
  if (threads <= 1 || most <= 1) return run();
  if (const Parallel parallel = openmp_parallel()) {
    // All of them: a team of another size than torch's would have to be put together anew.
    return parallel([](void* data) { (*static_cast<Run*>(data))(); }, &run, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < threads && i < most; ++i) helpers.emplace_back(std::ref(run));
  } catch (const std::system_error&) {
    // Those that started, and this one, do the work.
  }
  run();
  for (std::thread& helper : helpers) helper.join();
}

/// Calls work(begin, end) on pieces of [0, rows) that cost about the same, on up to `threads` threads. A piece is a few
/// rows, taken when a thread is free, since ignored rows cost nothing and lie together.
template <typename Work>
void for_each_piece(int64_t rows, int64_t vocab, int threads, const Work& work) {
  constexpr int64_t kPieceElements = 1 << 16;  // some 20 microseconds of work, as much as waking a thread costs
  const int64_t piece = vocab >= kPieceElements ? 1 : kPieceElements / vocab;
  const int64_t pieces = (rows + piece - 1) / piece;
  std::atomic<int64_t> next{0};
  auto run = [&] {
    for (int64_t i = next.fetch_add(1); i < pieces; i = next.fetch_add(1)) {
      const int64_t begin = i * piece;
      work(begin, begin + piece < rows ? begin + piece : rows);
    }
  };
  on_threads(threads, pieces, run);
}

}  // namespace

bool can_run(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return true;
#ifdef MPO_WITH_X86_KERNELS
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && can_run(Isa::kAvx2);
    case Isa::kAvx2:  // every processor with AVX2 has F16C, which compilers cannot all ask for
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    default: return false;
#endif
  }
  return false;
}

void token_logp_cpu(const TokenLogpParams& p, void* exp_logits, DType dtype, int threads, Isa isa) {
  const CpuKernels& kernels = kernels_of(isa);
  for_each_piece(p.in.rows, p.in.vocab, threads,
                 [&](int64_t begin, int64_t end) { kernels.token_logp(p, exp_logits, dtype, begin, end); });
}

void logits_grad_cpu(const LogitsGradParams& p, DType dtype, int threads, Isa isa) {
  const CpuKernels& kernels = kernels_of(isa);
  for_each_piece(p.in.rows, p.in.vocab, threads,
                 [&](int64_t begin, int64_t end) { kernels.logits_grad(p, dtype, begin, end); });
}

}  // namespace mpo

// Chooses the kernels of an instruction set and distributes the rows over threads.
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

/// The function of the OpenMP runtime that runs work(data) on each thread of a team. It is looked up in torch's runtime
/// and not linked, because torch's threads spin for a while after each operator, and the threads of a second pool would
/// wait for them.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

#ifdef _WIN32
Parallel openmp_parallel() { return nullptr; }
#else
std::atomic<bool> is_forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

/// Returns GOMP_parallel, which the runtimes of GCC, LLVM and Intel provide. Returns nullptr without such a runtime,
/// and in a forked process, which inherits the pool without its threads.
Parallel openmp_parallel() {
  static const auto gomp_parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return is_forked ? nullptr : gomp_parallel;
}
#endif

/// Calls run() on up to `threads` threads at once; at most `max_busy` of them find work. Each call of run() works until
/// no work is left.
template <typename Run>
void run_on_threads(int64_t threads, int64_t max_busy, Run& run) {
  if (threads <= 1 || max_busy <= 1) return run();
  if (const Parallel parallel = openmp_parallel()) {
    // All threads take part, because a team of another size than torch's would have to be assembled first.
    return parallel([](void* data) { (*static_cast<Run*>(data))(); }, &run, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < threads && i < max_busy; ++i) helpers.emplace_back(std::ref(run));
  } catch (const std::system_error&) {
    // The threads that have started do the work together with this thread.
  }
  run();
  for (std::thread& helper : helpers) helper.join();
}

/// Calls work(begin, end) for pieces of a few rows of [0, rows), on up to `threads` threads. A thread takes the next
/// piece when it is free, because ignored rows are adjacent and cost nothing.
template <typename Work>
void for_each_piece(int64_t rows, int64_t vocab, int threads, const Work& work) {
  constexpr int64_t kPieceElements = 1 << 16;  // about 20 microseconds of work, the cost of waking a thread
  const int64_t piece = vocab >= kPieceElements ? 1 : kPieceElements / vocab;
  const int64_t pieces = (rows + piece - 1) / piece;
  std::atomic<int64_t> next{0};
  auto run = [&] {
    for (int64_t i = next.fetch_add(1); i < pieces; i = next.fetch_add(1)) {
      const int64_t begin = i * piece;
      work(begin, begin + piece < rows ? begin + piece : rows);
    }
  };
  run_on_threads(threads, pieces, run);
}

}  // namespace

bool can_run(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return true;
#ifdef MPO_WITH_X86_KERNELS
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && can_run(Isa::kAvx2);
    case Isa::kAvx2:  // and F16C, which every processor with AVX2 has; not all compilers can query it
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

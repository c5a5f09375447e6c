// Chooses the kernels for an instruction set and shares the rows out over threads.
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

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

/// Calls work(begin, end) on pieces of [0, rows) that cost about the same, on up to `threads` threads of its own: they
/// live for this call only, so a fork of the process finds no pool half copied. A piece is a few rows, taken when a
/// thread is free, since ignored rows cost nothing and lie together.
template <typename Work>
void for_each_piece(int64_t rows, int64_t vocab, int threads, const Work& work) {
  constexpr int64_t kPieceElements = 1 << 16;  // some 20 microseconds of work, as much as starting a thread costs
  const int64_t piece = vocab >= kPieceElements ? 1 : kPieceElements / vocab;
  const int64_t pieces = (rows + piece - 1) / piece;
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t i = next.fetch_add(1); i < pieces; i = next.fetch_add(1)) {
      const int64_t begin = i * piece;
      work(begin, begin + piece < rows ? begin + piece : rows);
    }
  };
  std::vector<std::thread> helpers;
  const int64_t wanted = (pieces < threads ? pieces : threads) - 1;
  try {
    for (int64_t i = 0; i < wanted; ++i) helpers.emplace_back(run);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  run();
  for (std::thread& helper : helpers) helper.join();
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

void token_logp_cpu(const TokenLogpParams& p, DType dtype, int threads, Isa isa) {
  const CpuKernels& kernels = kernels_of(isa);
  for_each_piece(p.in.rows, p.in.vocab, threads,
                 [&](int64_t begin, int64_t end) { kernels.token_logp(p, dtype, begin, end); });
}

void logits_grad_cpu(const LogitsGradParams& p, DType dtype, int threads, Isa isa) {
  const CpuKernels& kernels = kernels_of(isa);
  for_each_piece(p.in.rows, p.in.vocab, threads,
                 [&](int64_t begin, int64_t end) { kernels.logits_grad(p, dtype, begin, end); });
}

}  // namespace mpo

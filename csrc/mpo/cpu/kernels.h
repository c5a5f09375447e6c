// The table of the CPU kernels of one instruction set. Each kernels_*.cpp defines one table; dispatch.cpp selects it.
#pragma once

#include "mpo/api.h"

namespace mpo {

struct CpuKernels {
  /// Both kernels process the rows begin .. end - 1 on the calling thread.
  void (*token_logp)(const TokenLogpParams& p, void* exp_logits, DType dtype, int64_t begin, int64_t end);
  void (*logits_grad)(const LogitsGradParams& p, DType dtype, int64_t begin, int64_t end);
};

extern const CpuKernels kPortableKernels;
#ifdef MPO_WITH_X86_KERNELS
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

}  // namespace mpo

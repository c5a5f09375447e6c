// pair_loss alone on the GPU, for when ranks or tensor-parallel shards are combined between token_logp and pair_loss.
#include "mpo/cuda/pair_loss.cuh"

namespace mpo {
namespace {

/// Computes the loss of B pairs and the weight of each row.
///
/// Grid    one block, since the work is small and depends on sums over the batch
/// Block   kCudaThreads threads, as in token_logp, so that one launch and two launches give the same bits
__global__ void __launch_bounds__(kCudaThreads, 1) pair_loss_kernel(const __grid_constant__ PairLossArgs a) {
  __shared__ PairLossShared shared;
  pair_loss_block(a, shared);
}

}  // namespace

const char* launch_pair_loss(const PairLossParams& p, const CudaPairTypes& types, const CudaWork& work,
                             cudaStream_t stream) {
  const CudaShape shape = cuda_pair_loss_shape(p.pairs);
  pair_loss_kernel<<<shape.grid, shape.block, 0, stream>>>(pair_loss_args(p, types, work.scratch));
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace mpo

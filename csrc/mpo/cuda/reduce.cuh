// Reductions over the lanes of a warp, and merging of the sums over parts of a row.
#pragma once

#include "mpo/cuda/formats.cuh"

namespace mpo {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

__device__ __forceinline__ RowSums<float> empty_sums() { return {minus_infinity(), 0, 0, 0, 0}; }

/// Returns s relative to `max`, which must be at least s.max.
template <bool kStats>
__device__ __forceinline__ RowSums<float> raised_to(const RowSums<float>& s, float max) {
  return s.max == max ? s : rescaled<kStats>(s, max, fast_exp(s.max - max));
}

template <bool kStats>
__device__ __forceinline__ RowSums<float> merged(const RowSums<float>& a, const RowSums<float>& b) {
  const float max = fmaxf(a.max, b.max);
  RowSums<float> s = raised_to<kStats>(a, max);
  const RowSums<float> t = raised_to<kStats>(b, max);
  s.sum += t.sum;
  if (kStats) {
    s.e_d += t.e_d;
    s.z += t.z;
    s.squared += t.squared;
  }
  return s;
}

/// Returns the merged sums of all lanes, in every lane.
template <bool kStats>
__device__ __forceinline__ RowSums<float> warp_merged(RowSums<float> s) {
  s = raised_to<kStats>(s, warp_max(s.max));
  s.sum = warp_sum(s.sum);
  if (kStats) {
    s.e_d = warp_sum(s.e_d);
    s.z = warp_sum(s.z);
    s.squared = warp_sum(s.squared);
  }
  return s;
}

}  // namespace mpo

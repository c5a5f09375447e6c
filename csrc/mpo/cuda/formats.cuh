// Storage formats of logits: 16-byte vectors, their conversion to and from float, and the exponential of a float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "mpo/cuda/launch.h"

namespace mpo {

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

/// Returns 2^x. ex2.approx has an error of at most 2 ulp and flushes results below 2^-126 to 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * kLog2E); }

/// The main loops compute exp(z - max) as 2^power_of(z, r) over 2^power_of(max, r), where r is a whole number near
/// max * log2(e): one fused multiply-add per logit, and the divisor is a factor of the whole row. Dividing by the
/// computed power of the maximum makes the term of the maximum exactly 1, so a sum near 1 keeps its digits.
/// Beyond kMaxPower, floats are so far apart that 2^power_of(max, r) may overflow.
constexpr float kMaxPower = 268435456.0f;  // 2^28

__device__ __forceinline__ float power_of(float z, float reference) { return fmaf(z, kLog2E, -reference); }

/// Returns whether the main loops may compute the exponentials of a row with this maximum.
__device__ __forceinline__ bool has_power(float max) { return fabsf(max * kLog2E) <= kMaxPower; }

/// Format<Scalar> converts between a 32-bit word of logits and floats.
template <typename Scalar>
struct Format;

template <>
struct Format<float> {
  static constexpr unsigned kFill = 0xff800000u;  // -inf
  static __device__ float value(float z) { return z; }
  static __device__ float rounded(float g) { return g; }
  static __device__ void unpack(unsigned word, float (&z)[1]) { z[0] = __uint_as_float(word); }
  static __device__ unsigned pack(const float (&g)[1]) { return __float_as_uint(g[0]); }
  static __device__ unsigned larger(unsigned a, unsigned b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
};

template <>
struct Format<__nv_bfloat16> {
  static constexpr unsigned kFill = 0xff80ff80u;
  static __device__ float value(__nv_bfloat16 z) { return __bfloat162float(z); }
  static __device__ __nv_bfloat16 rounded(float g) { return __float2bfloat16_rn(g); }
  static __device__ void unpack(unsigned word, float (&z)[2]) {
    z[0] = __uint_as_float(word << 16);
    z[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ unsigned pack(const float (&g)[2]) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(g[0], g[1]);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
  static __device__ unsigned larger(unsigned a, unsigned b) {
    const __nv_bfloat162 m =
        __hmax2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const unsigned*>(&m);
  }
};

template <>
struct Format<__half> {
  static constexpr unsigned kFill = 0xfc00fc00u;
  static __device__ float value(__half z) { return __half2float(z); }
  static __device__ __half rounded(float g) { return __float2half_rn(g); }
  static __device__ void unpack(unsigned word, float (&z)[2]) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    z[0] = pair.x;
    z[1] = pair.y;
  }
  static __device__ unsigned pack(const float (&g)[2]) {
    const __half2 pair = __floats2half2_rn(g[0], g[1]);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
  static __device__ unsigned larger(unsigned a, unsigned b) {
    const __half2 m = __hmax2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const unsigned*>(&m);
  }
};

constexpr int kWords = 4;  // 32-bit words in a vector
template <typename Scalar>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(Scalar));
template <typename Scalar>
constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(Scalar));

struct Vector {
  unsigned word[kWords];
};

/// Loads and stores with the streaming cache policy, since each logit and gradient is used once.
__device__ __forceinline__ Vector load_vector(const void* at) {
  const uint4 v = __ldcs(static_cast<const uint4*>(at));
  return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ void store_vector(void* at, const Vector& v) {
  __stcs(static_cast<uint4*>(at), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}

__device__ __forceinline__ void store_words(void* at, const unsigned (&word)[kWords]) {
  __stcs(static_cast<uint4*>(at), make_uint4(word[0], word[1], word[2], word[3]));
}

__device__ __forceinline__ void store_words(void* at, const unsigned (&word)[2]) {
  __stcs(static_cast<uint2*>(at), make_uint2(word[0], word[1]));
}

/// Converts part `index` of a vector to float; each part has N elements.
template <typename Scalar, int N>
__device__ __forceinline__ void unpack_part(const Vector& v, int index, float (&z)[N]) {
  constexpr int kPer = kPerWord<Scalar>;
#pragma unroll
  for (int w = 0; w < N / kPer; ++w) {
    float part[kPer];
    Format<Scalar>::unpack(v.word[index * N / kPer + w], part);
#pragma unroll
    for (int i = 0; i < kPer; ++i) z[w * kPer + i] = part[i];
  }
}

__device__ __forceinline__ float load_value(const float* at) { return __ldcs(at); }
__device__ __forceinline__ float load_value(const __nv_bfloat16* at) { return __bfloat162float(__ldcs(at)); }
__device__ __forceinline__ float load_value(const __half* at) { return __half2float(__ldcs(at)); }

}  // namespace mpo

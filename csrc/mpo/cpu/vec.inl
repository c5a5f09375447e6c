// Vectors for the CPU kernels, as vector types of the compiler, so that one source serves every instruction set.
// Intrinsics are used only for instructions that these types cannot express. kernels.inl includes this file inside an
// anonymous namespace, so each instruction set has a separate copy. Code here must not call inline functions of the
// standard library, because the linker would merge copies of different instruction sets.

template <typename Real>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float Vec __attribute__((vector_size(MPO_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(MPO_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double Vec __attribute__((vector_size(MPO_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(MPO_VECTOR_BYTES)));
};

typedef VecOf<float>::Vec FloatVec;
typedef VecOf<double>::Vec DoubleVec;
typedef uint32_t UintVec __attribute__((vector_size(MPO_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(MPO_VECTOR_BYTES / 2)));

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

/// A vector in memory at any address. It replaces memcpy, which compilers turn into small copies through the stack.
template <typename Vec>
struct Unaligned {
  typedef Vec Type __attribute__((aligned(1), may_alias));
};
template <typename Vec>
inline Vec load_vector(const void* address) {
  return *static_cast<const typename Unaligned<Vec>::Type*>(address);
}
template <typename Vec>
inline void store_vector(void* address, Vec v) {
  *static_cast<typename Unaligned<Vec>::Type*>(address) = v;
}

/// Writes zeros, bypassing the caches if the processor can: there are many zeros, they are not read soon, and a store
/// through the caches would read each line first. The fence makes them visible to other threads.
inline void write_zeros(void* address, size_t bytes) {
#if defined(__AVX2__)
  constexpr size_t kLine = 64;
  char* begin = static_cast<char*>(address);
  const size_t head = (kLine - reinterpret_cast<uintptr_t>(begin) % kLine) % kLine;
  if (bytes >= head + kLine) {
    char* const end = begin + bytes;
    __builtin_memset(begin, 0, head);
    for (begin += head; begin + kLine <= end; begin += kLine) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(begin), _mm256_setzero_si256());
      _mm256_stream_si256(reinterpret_cast<__m256i*>(begin + kLine / 2), _mm256_setzero_si256());
    }
    _mm_sfence();
    address = begin;
    bytes = static_cast<size_t>(end - begin);
  }
#endif
  __builtin_memset(address, 0, bytes);
}

template <typename Vec, typename Real>
inline Vec splat(Real x) {
  return x - Vec{};  // x - 0 in each lane; 0 + x would turn -0 into 0
}

/// Returns a > b ? a : b, and b if either is NaN, like the x86 instruction. Callers therefore pass the value that must
/// survive a NaN as b.
inline FloatVec larger(FloatVec a, FloatVec b) {
#if defined(__AVX512F__)
  return bit_cast<FloatVec>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<FloatVec>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
inline DoubleVec larger(DoubleVec a, DoubleVec b) { return a > b ? a : b; }

/// Returns the sum of all lanes in double. A confident row's sum of exponentials is near 1, where the rounding of a
/// float addition is as large as the label's log-probability.
inline double horizontal_sum(DoubleVec v) {
  double sum = 0;
  for (unsigned k = 0; k < sizeof(v) / sizeof(double); ++k) sum += v[k];
  return sum;
}
inline DoubleVec widened_sum(FloatVec v) {
  typedef float HalfVec __attribute__((vector_size(MPO_VECTOR_BYTES / 2)));
  HalfVec halves[2];
  __builtin_memcpy(&halves, &v, sizeof(v));
  return __builtin_convertvector(halves[0], DoubleVec) + __builtin_convertvector(halves[1], DoubleVec);
}
inline DoubleVec widened_sum(DoubleVec v) { return v; }
template <typename Vec, int N>
inline double sum_of(const Vec (&v)[N]) {
  DoubleVec sum = widened_sum(v[0]);
  for (int u = 1; u < N; ++u) sum += widened_sum(v[u]);
  return horizontal_sum(sum);
}

template <typename Real, typename Vec>
inline Real horizontal_max(Vec v) {
  Real max = v[0];
  for (unsigned k = 1; k < sizeof(Vec) / sizeof(Real); ++k) max = v[k] > max ? v[k] : max;
  return max;
}

// ------------------------------------------------------------------------------------------------------- exponentials

/// Computes factor * exp(d) for d <= 0 with a relative error below 2e-7; d = 0 gives the factor exactly. Below kLowest,
/// including -inf, the result is exactly 0 for any factor up to 2^16. NaN gives NaN.
///
/// d = k * log(2) / kSteps + r;  exp(d) = 2^(k / kSteps) * p(r). The power is assembled in the bits of a float,
/// 2^kHeadroom times too large. The polynomial's coefficients contain the factor, 2^kHeadroom times too small. So
/// results below the normal floats underflow in the last multiplication, without a comparison.
struct FloatExp {
  typedef FloatVec Vec;
  static constexpr int kHeadroom = 40;
  static constexpr float kLowest = -114.0f;
  static inline Vec clamp(Vec d) { return larger(splat<Vec>(kLowest), d); }

#if defined(__AVX512F__)
  // A table of 16 steps of a power of two, in one register, shortens the polynomial: |r| <= log(2) / 32, error 2e-9.
  static constexpr int kSteps = 16;
  static constexpr int kDegree = 3;
  static constexpr float kPolynomial[kDegree + 1] = {1.0f, 1.0f, 0.50001619f, 0.16666721f};
#else
  static constexpr int kSteps =
      1;  // |r| <= log(2) / 2; minimax polynomial for the relative error (3e-9), with the terms 1 and r exact
  static constexpr int kDegree = 6;
  static constexpr float kPolynomial[kDegree + 1] = {
      1.0f, 1.0f, 4.99999934321e-1f, 1.6666520399e-1f, 4.16683907835e-2f, 8.36874510894e-3f, 1.38145401768e-3f};
#endif

  explicit inline FloatExp(float factor) {
    for (int k = 0; k <= kDegree; ++k) {
      coefficients[k] = splat<Vec>(factor * kPolynomial[k] * (1.0f / (int64_t{1} << kHeadroom)));
    }
  }

  /// d must be a result of clamp().
  inline Vec operator()(Vec d) const {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
    const Vec shifted = d * (1.44269504088896341f * kSteps) + magic;
    const Vec n = shifted - magic;
#if defined(__FMA__)
    const Vec r = d - n * (0.693147180559945309f / kSteps);
#else
    // log(2) is split into two parts, because there is no fused operation: the first part is so short that its multiple
    // is exact.
    const Vec r = (d - n * (0.693359375f / kSteps)) - n * (-2.12194440e-4f / kSteps);
#endif
    Vec p = coefficients[kDegree];
    for (int k = kDegree - 1; k >= 0; --k) p = p * r + coefficients[k];
    return p * power(bit_cast<UintVec>(shifted));
  }

 private:
  /// Returns 2^(k / kSteps + kHeadroom) from the bits of a float that end in k.
  static inline Vec power(UintVec bits) {
#if defined(__AVX512F__)
    // Entry j: the bits of 2^(j / 16 + kHeadroom), minus j << 19, which the addition of k << 19 adds again.
#define MPO_POWER(j, mantissa) ((127u + kHeadroom) << 23) + mantissa##u - (j##u << 19)
    const UintVec table = {
        MPO_POWER(0, 0x000000),  MPO_POWER(1, 0x05aac3),  MPO_POWER(2, 0x0b95c2),  MPO_POWER(3, 0x11c3d3),
        MPO_POWER(4, 0x1837f0),  MPO_POWER(5, 0x1ef532),  MPO_POWER(6, 0x25fed7),  MPO_POWER(7, 0x2d583f),
        MPO_POWER(8, 0x3504f3),  MPO_POWER(9, 0x3d08a4),  MPO_POWER(10, 0x45672a), MPO_POWER(11, 0x4e248c),
        MPO_POWER(12, 0x5744fd), MPO_POWER(13, 0x60ccdf), MPO_POWER(14, 0x6ac0c7), MPO_POWER(15, 0x75257d)};
#undef MPO_POWER
    const __m512i entry = _mm512_permutexvar_epi32(bit_cast<__m512i>(bits), bit_cast<__m512i>(table));
    return bit_cast<Vec>(bit_cast<UintVec>(entry) + (bits << 19));
#else
    return bit_cast<Vec>((bits << 23) + ((127u + kHeadroom) << 23));
#endif
  }

  Vec coefficients[kDegree + 1];
};

/// Computes factor * exp(d) in double, within 3 ulp.
struct DoubleExp {
  typedef DoubleVec Vec;
  typedef uint64_t Bits __attribute__((vector_size(MPO_VECTOR_BYTES)));
  static constexpr int kHeadroom = 100;
  static constexpr double kLowest = -777.0;
  static inline Vec clamp(Vec d) { return larger(splat<Vec>(kLowest), d); }

  explicit inline DoubleExp(double factor) : scaled_factor(splat<Vec>(factor * 0x1p-100)) {}

  inline Vec operator()(Vec d) const {
    const double magic = 6755399441055744.0;  // 1.5 * 2^52
    const Vec shifted = d * 1.44269504088896340736 + magic;
    const Vec n = shifted - magic;
    const Vec r = (d - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    Vec p = splat<Vec>(1.0 / 6227020800.0);  // Taylor series: the first omitted term is r^14 / 14! < 5e-18
    const double inverse_factorial[] = {1.0 / 479001600.0,
                                        1.0 / 39916800.0,
                                        1.0 / 3628800.0,
                                        1.0 / 362880.0,
                                        1.0 / 40320.0,
                                        1.0 / 5040.0,
                                        1.0 / 720.0,
                                        1.0 / 120.0,
                                        1.0 / 24.0,
                                        1.0 / 6.0,
                                        0.5,
                                        1.0,
                                        1.0};
    for (const double c : inverse_factorial) p = p * r + c;
    const Bits power = (bit_cast<Bits>(shifted) << 52) + (uint64_t{1023 + kHeadroom} << 52);
    return (p * scaled_factor) * bit_cast<Vec>(power);
  }

 private:
  Vec scaled_factor;
};

// ------------------------------------------------------------------------------------------------ loading and storing

// A format defines the type of a logit in memory (Scalar), the type of the arithmetic (Real), and how a group of kGroup
// vectors is loaded and stored. If a load permutes the elements, the store reverses this. Stored values are never NaN.

template <typename RealType, typename VecType, typename ExpType>
struct Native {
  typedef RealType Scalar;
  typedef RealType Real;
  typedef VecType Vec;
  typedef ExpType Exp;
  static constexpr int kGroup = 1;
  static constexpr Scalar kMinusInfinity = -__builtin_inff();
  static constexpr Scalar kNan = __builtin_nanf("");
  static inline Real value(Scalar x) { return x; }
  static inline Scalar rounded(Real x) { return x; }
  static inline void load(const Scalar* x, Vec (&v)[kGroup]) { v[0] = load_vector<Vec>(x); }
  static inline void store(Scalar* x, const Vec (&v)[kGroup]) { store_vector(x, v[0]); }
};
typedef Native<float, FloatVec, FloatExp> Float32;
typedef Native<double, DoubleVec, DoubleExp> Float64;

/// Each 32-bit lane holds two 16-bit numbers. The even numbers form one vector and the odd numbers the other, which
/// needs no shuffle.
struct BFloat16 {
  typedef uint16_t Scalar;
  typedef float Real;
  typedef FloatVec Vec;
  typedef FloatExp Exp;
  static constexpr int kGroup = 2;
  static constexpr Scalar kMinusInfinity = 0xff80;
  static constexpr Scalar kNan = 0x7fc0;
  static inline Real value(Scalar x) { return bit_cast<float>(uint32_t{x} << 16); }
  static inline Scalar rounded(Real x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    return static_cast<Scalar>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
  }
  static inline void load(const Scalar* x, Vec (&v)[kGroup]) {
    const UintVec bits = load_vector<UintVec>(x);
    v[0] = bit_cast<Vec>(bits << 16);
    v[1] = bit_cast<Vec>(bits & 0xffff0000u);
  }
  static inline void store(Scalar* x, const Vec (&v)[kGroup]) {
    UintVec even = bit_cast<UintVec>(v[0]), odd = bit_cast<UintVec>(v[1]);
    even = (even + (0x7fffu + ((even >> 16) & 1u))) >> 16;
    odd = (odd + (0x7fffu + ((odd >> 16) & 1u))) & 0xffff0000u;
    store_vector(x, even | odd);
  }
};

struct Float16 {
  typedef uint16_t Scalar;
  typedef float Real;
  typedef FloatVec Vec;
  typedef FloatExp Exp;
  static constexpr int kGroup = 1;
  static constexpr Scalar kMinusInfinity = 0xfc00;
  static constexpr Scalar kNan = 0x7e00;
  static inline Real value(Scalar x) {
    const Scalar padded[MPO_VECTOR_BYTES / sizeof(Real)] = {x};
    Vec v[1];
    load(padded, v);
    return v[0][0];
  }
  static inline Scalar rounded(Real x) {
    Scalar padded[MPO_VECTOR_BYTES / sizeof(Real)];
    const Vec v[1] = {splat<Vec>(x)};
    store(padded, v);
    return padded[0];
  }
  static inline void load(const Scalar* x, Vec (&v)[kGroup]) {
    const HalfBits half = load_vector<HalfBits>(x);
#if defined(__AVX512F__)
    v[0] = bit_cast<Vec>(_mm512_cvtph_ps(bit_cast<__m256i>(half)));
#elif defined(__F16C__)
    v[0] = bit_cast<Vec>(_mm256_cvtph_ps(bit_cast<__m128i>(half)));
#else
    const UintVec bits = __builtin_convertvector(half, UintVec);
    const UintVec magnitude = (bits & 0x7fffu) << 13;
    const UintVec finite =
        bit_cast<UintVec>(bit_cast<Vec>(magnitude) * 0x1p112f);  // the biases of the exponents differ by 112
    const UintVec any = (bits & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : finite;
    v[0] = bit_cast<Vec>(any | ((bits & 0x8000u) << 16));
#endif
  }
  static inline void store(Scalar* x, const Vec (&v)[kGroup]) {
#if defined(__AVX512F__)
    const __m256i half = _mm512_cvtps_ph(bit_cast<__m512>(v[0]), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_vector(x, half);
#elif defined(__F16C__)
    const __m128i half = _mm256_cvtps_ph(bit_cast<__m256>(v[0]), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_vector(x, half);
#else
    const UintVec bits = bit_cast<UintVec>(v[0]);
    const UintVec magnitude = bits & 0x7fffffffu;
    // Below the smallest normal half: adding 0.5 leaves the rounded subnormal in the low bits.
    const UintVec subnormal = bit_cast<UintVec>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;
    const UintVec normal = (magnitude - 0x38000000u + (0xfffu + ((magnitude >> 13) & 1u))) >> 13;
    const UintVec finite = magnitude < 0x38800000u ? subnormal : normal;
    const UintVec any = magnitude >= 0x477ff000u ? UintVec{} + 0x7c00u : finite;  // rounds to infinity
    const HalfBits half = __builtin_convertvector(any | ((bits >> 16) & 0x8000u), HalfBits);
    store_vector(x, half);
#endif
  }
};

// Vectors of the width that the target has, loads and stores of both dtypes.
//
// A vector type wider than the target's registers is lowered to scalar code by g++ 12 (measured: 10
// to 15 times slower), so the width is set per target.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace steppe {
namespace STEPPE_TARGET {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

constexpr int64_t kPanel = 64;               // columns of a panel
constexpr int kVectors = kPanel / kWidth;    // vectors of a panel's row
constexpr int64_t kMaxTile = 32704;          // columns: the largest multiple of 64 below 2^15

// One element's alignment, as the tensors have it; may_alias, since they are read through it.
typedef float vec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(float value, float *to) { *to = value; }
inline void store(float value, bf16 *to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to->bits = value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline vec load(const float *from) { return *reinterpret_cast<const vec *>(from); }
inline vec load(const bf16 *from) {
  const half_vec halves = *reinterpret_cast<const half_vec *>(from);
  return (vec)(__builtin_convertvector(halves, ivec) << 16);
}

inline void store(vec value, float *to) { *reinterpret_cast<vec *>(to) = value; }
inline void store(vec value, bf16 *to) {
  for (int i = 0; i < kWidth; ++i) store(value[i], to + i);
}

inline vec broadcast(float value) { return vec{} + value; }

inline float sum(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
#endif
}

constexpr int64_t kTasksPerThread = 4;  // so that threads end at about the same time

// Into how many parts to cut the rows, where there are tasks besides.
inline int64_t chunks_of(int64_t rows, int64_t tasks, int threads) {
  const int64_t wanted = threads == 1 ? 1 : kTasksPerThread * threads;
  return std::max<int64_t>(std::min(rows, (wanted + tasks - 1) / std::max<int64_t>(tasks, 1)), 1);
}

// Four columns of a CSR row, read at once.
struct FourPlaces {
  uint64_t four;
  explicit FourPlaces(const int16_t *index) { std::memcpy(&four, index, sizeof(four)); }
  int16_t operator[](int k) const {
    return int16_t(four >> 16 * (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? k : 3 - k));
  }
};

// Below this density the gathered rows of a panel are too few for the hardware to fetch ahead:
// reading the panel once from end to end brings it into the second-level cache.
constexpr double kStreamDensity = 0.04;

template <typename E>
inline void stream(const E *panel, int64_t rows) {
  const char *from = reinterpret_cast<const char *>(panel);
  const int64_t bytes = rows * kPanel * int64_t(sizeof(E));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

#if defined(__AVX512F__)
// The sums of four vectors within each 128 bits.
inline __m512 sum4_parts(vec a, vec b, vec c, vec d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}
#elif defined(__AVX2__)
// The same. A blend takes no shuffle, which `hadd` takes two of for each sum.
inline __m256 sum4_parts(vec a, vec b, vec c, vec d) {
  const __m256 ab = _mm256_add_ps(_mm256_blend_ps(a, b, 0xcc), _mm256_shuffle_ps(a, b, 0x4e));
  const __m256 cd = _mm256_add_ps(_mm256_blend_ps(c, d, 0xcc), _mm256_shuffle_ps(c, d, 0x4e));
  return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x88), _mm256_shuffle_ps(ab, cd, 0xdd));
}
#endif

// The four sums of four vectors.
inline void sum4(vec a, vec b, vec c, vec d, float *out) {
#if defined(__AVX512F__)
  const __m512 abcd = sum4_parts(a, b, c, d);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const __m256 abcd = sum4_parts(a, b, c, d);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

// sums [count] += the sums of the first `count` of eight vectors, the same bits as of four.
inline void add_sums8(const vec *v, int64_t count, float *sums) {
#if defined(__AVX512F__)
  const __m512 first = sum4_parts(v[0], v[1], v[2], v[3]);
  const __m512 second = sum4_parts(v[4], v[5], v[6], v[7]);
  const __m512 halves = _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x44),
                                      _mm512_shuffle_f32x4(first, second, 0xee));
  const __m512 whole = _mm512_add_ps(_mm512_shuffle_f32x4(halves, halves, 0x88),
                                     _mm512_shuffle_f32x4(halves, halves, 0xdd));
  const __mmask8 kept = __mmask8((1u << count) - 1);
  const __m256 old = _mm256_maskz_loadu_ps(kept, sums);
  _mm256_mask_storeu_ps(sums, kept, _mm256_add_ps(old, _mm512_castps512_ps256(whole)));
#else
#if defined(__AVX2__)
  if (count == 8) {
    const __m256 first = sum4_parts(v[0], v[1], v[2], v[3]);
    const __m256 second = sum4_parts(v[4], v[5], v[6], v[7]);
    const __m256 whole = _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20),
                                       _mm256_permute2f128_ps(first, second, 0x31));
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), whole));
    return;
  }
#endif
  float eight[8];
  sum4(v[0], v[1], v[2], v[3], eight);
  sum4(v[4], v[5], v[6], v[7], eight + 4);
  for (int64_t k = 0; k < count; ++k) sums[k] += eight[k];
#endif
}

// The same of four.
inline void add_sums4(const vec *v, int64_t count, float *sums) {
  float four[4];
  sum4(v[0], v[1], v[2], v[3], four);
#if defined(__AVX512F__)
  const __mmask8 kept = __mmask8((1u << count) - 1);
  const __m128 old = _mm_maskz_loadu_ps(kept, sums);
  _mm_mask_storeu_ps(sums, kept, _mm_add_ps(old, _mm_loadu_ps(four)));
#else
  for (int64_t k = 0; k < count; ++k) sums[k] += four[k];
#endif
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

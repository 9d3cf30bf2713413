// Compaction: count the active entries of p, then write them in CSR form.
#pragma once

#include <algorithm>

#include "vector.h"

namespace steppe {
namespace STEPPE_TARGET {

// Not `> 0`: NaN stays, as ReLU keeps it.
inline bool is_active(float p) { return !(p <= 0); }

#if defined(__AVX512F__)

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : __mmask16((1u << count) - 1);
}
inline vec load_part(const float *from, __mmask16 lanes) {
  return (vec)_mm512_maskz_loadu_ps(lanes, from);
}
inline vec load_part(const bf16 *from, __mmask16 lanes) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16);
}
inline __mmask16 active_mask(vec p) {
  return _mm512_cmp_ps_mask((__m512)p, _mm512_setzero_ps(), _CMP_NLE_UQ);
}

// Compressed in a register, then stored under a mask of as many lanes: compressing straight to
// memory is slow on Zen 4, and a full store would overwrite the next row.
inline void store_compressed(vec p, __mmask16 active, int count, float *values) {
  _mm512_mask_storeu_ps(values, first_lanes(count), _mm512_maskz_compress_ps(active, (__m512)p));
}
inline void store_compressed(vec p, __mmask16 active, int count, bf16 *values) {
  const __m512i bits = _mm512_srli_epi32((__m512i)p, 16);
  _mm256_mask_storeu_epi16(values, first_lanes(count),
                           _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(active, bits)));
}

template <typename T>
int32_t count_active(const T *p, int64_t width) {
  int32_t total = 0;
  for (int64_t i = 0; i < width; i += 16) {
    total += __builtin_popcount(active_mask(load_part(p + i, first_lanes(width - i))));
  }
  return total;
}

template <typename T>
int64_t compact_block(const T *p, int64_t width, int64_t first, int16_t *index, T *values) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t written = 0;
  // No branch on whether a part has any: at the densities that matter it would be a coin's toss.
  for (int64_t i = 0; i < width; i += 16) {
    const vec part = load_part(p + i, first_lanes(width - i));
    const __mmask16 active = active_mask(part);
    const int count = __builtin_popcount(active);
    const __m512i column = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(first + i)));
    store_compressed(part, active, count, values + written);
    _mm256_mask_storeu_epi16(index + written, first_lanes(count),
                             _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(active, column)));
    written += count;
  }
  return written;
}

#if defined(__AVX512VBMI2__)

// bfloat16 32 at a time, by its bits.

inline __mmask32 first_halves(int64_t count) {
  return count >= 32 ? 0xffffffff : (__mmask32(1) << count) - 1;
}
// Above zero as an integer, or NaN of either sign.
inline __mmask32 active_halves(__m512i bits) {
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
  return _mm512_cmpgt_epi16_mask(bits, _mm512_setzero_si512()) |
         _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(0x7f80));
}

template <>
inline int32_t count_active(const bf16 *p, int64_t width) {
  int32_t total = 0;
  for (int64_t i = 0; i < width; i += 32) {
    const __m512i bits = _mm512_maskz_loadu_epi16(first_halves(width - i), p + i);
    total += __builtin_popcount(active_halves(bits));
  }
  return total;
}

template <>
inline int64_t compact_block(const bf16 *p, int64_t width, int64_t first, int16_t *index,
                           bf16 *values) {
  static const int16_t kLanes[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                     11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                     22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  const __m512i lanes = _mm512_loadu_si512(kLanes);
  int64_t written = 0;
  for (int64_t i = 0; i < width; i += 32) {
    const __m512i bits = _mm512_maskz_loadu_epi16(first_halves(width - i), p + i);
    const __mmask32 active = active_halves(bits);
    const int count = __builtin_popcount(active);
    const __m512i column = _mm512_add_epi16(lanes, _mm512_set1_epi16(int16_t(first + i)));
    const __mmask32 kept = first_halves(count);
    _mm512_mask_storeu_epi16(values + written, kept, _mm512_maskz_compress_epi16(active, bits));
    _mm512_mask_storeu_epi16(index + written, kept, _mm512_maskz_compress_epi16(active, column));
    written += count;
  }
  return written;
}

#endif

#else

template <typename T>
int32_t count_active(const T *p, int64_t width) {
  int32_t total = 0;
  for (int64_t i = 0; i < width; ++i) total += is_active(to_float(p[i]));
  return total;
}

template <typename T>
int64_t compact_block(const T *p, int64_t width, int64_t first, int16_t *index, T *values) {
  // Without a branch, into a buffer with room for the one write past the end.
  int16_t columns[kPanel + 1];
  T kept[kPanel + 1];
  int64_t written = 0;
  for (int64_t i = 0; i < width; ++i) {
    columns[written] = int16_t(first + i);
    kept[written] = p[i];
    written += is_active(to_float(p[i]));
  }
  std::copy(columns, columns + written, index);
  std::copy(kept, kept + written, values);
  return written;
}

#endif

// The lines of one block, 4 KB ahead: the product has just written p, and most of it has left the
// caches (measured: counting takes a third of the time).
template <typename E>
inline void prefetch_ahead(const E *p) {
  const char *from = reinterpret_cast<const char *>(p) + 4096;
  for (int64_t i = 0; i < kPanel * int64_t(sizeof(E)); i += 64) __builtin_prefetch(from + i);
}

template <typename E>
void count(const E *p, int64_t T, int64_t F, int64_t stride, int32_t *counts, int threads) {
  const int64_t blocks = (F + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t f = 0; f < F; f += kPanel) {
      prefetch_ahead(p + t * stride + f);
      counts[t * blocks + f / kPanel] = count_active(p + t * stride + f, std::min(kPanel, F - f));
    }
  }
}

template <typename E>
void fill(const E *p, int64_t T, int64_t F, int64_t stride, int64_t tile, const int64_t *offsets,
          int16_t *index, E *values, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t start = 0; start < F; start += tile) {
      int64_t entry = offsets[start / tile * T + t];
      const int64_t width = std::min(tile, F - start);
      for (int64_t f = 0; f < width; f += kPanel) {
        entry += compact_block(p + t * stride + start + f, std::min(kPanel, width - f), f,
                             index + entry, values + entry);
      }
    }
  }
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

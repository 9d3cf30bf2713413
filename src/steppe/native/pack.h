// Packing: the panels of a matrix.
#pragma once

#include <algorithm>

#include "vector.h"

namespace steppe {
namespace STEPPE_TARGET {

// Rows that are packed together: the 64 columns of a panel, read along the rows of a transposed
// matrix, then fill whole cache lines, and what is written stays in the first-level cache.
constexpr int64_t kRowBlock = 16;

// Rows of a transposed matrix that are fetched ahead: its columns lie on a page each, which hardware
// does not fetch ahead (measured: up to half the time).
constexpr int64_t kAheadRows = 8 * kRowBlock;

// A block of 16 × 16, its rows `stride` apart, to the columns of 16 rows of a panel.
template <typename E>
inline void turn_block(const E *from, int64_t stride, E *to) {
  for (int64_t d = 0; d < kRowBlock; ++d) {
    for (int64_t n = 0; n < kRowBlock; ++n) to[n * kPanel + d] = from[d * stride + n];
  }
}

#if defined(__AVX512F__)
template <>
inline void turn_block(const float *from, int64_t stride, float *to) {
  __m512 row[16], part[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    part[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
    part[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
  }
  // row[4 i + j]: in each 128 bits column j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_shuffle_ps(part[i], part[i + 2], 0x44);
    row[i + 1] = _mm512_shuffle_ps(part[i], part[i + 2], 0xee);
    row[i + 2] = _mm512_shuffle_ps(part[i + 1], part[i + 3], 0x44);
    row[i + 3] = _mm512_shuffle_ps(part[i + 1], part[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_shuffle_f32x4(row[j], row[4 + j], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(row[j], row[4 + j], 0xdd);
    const __m512 even_below = _mm512_shuffle_f32x4(row[8 + j], row[12 + j], 0x88);
    const __m512 odd_below = _mm512_shuffle_f32x4(row[8 + j], row[12 + j], 0xdd);
    _mm512_storeu_ps(to + j * kPanel, _mm512_shuffle_f32x4(even, even_below, 0x88));
    _mm512_storeu_ps(to + (4 + j) * kPanel, _mm512_shuffle_f32x4(odd, odd_below, 0x88));
    _mm512_storeu_ps(to + (8 + j) * kPanel, _mm512_shuffle_f32x4(even, even_below, 0xdd));
    _mm512_storeu_ps(to + (12 + j) * kPanel, _mm512_shuffle_f32x4(odd, odd_below, 0xdd));
  }
}
#endif

template <typename E>
void pack(const E *m, int64_t N, int64_t D, int64_t row_stride, int64_t col_stride, E *panels,
          int threads) {
  const int64_t count = (D + kPanel - 1) / kPanel, blocks = (N + kRowBlock - 1) / kRowBlock;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t panel = 0; panel < count; ++panel) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t width = std::min(kPanel, D - panel * kPanel);
      const int64_t first = block * kRowBlock, rows = std::min(kRowBlock, N - first);
      const E *from = m + first * row_stride + panel * kPanel * col_stride;
      E *to = panels + (panel * N + first) * kPanel;
      if (width < kPanel) std::fill(to, to + rows * kPanel, E{});
      if (col_stride == 1) {
        for (int64_t n = 0; n < rows; ++n) {
          std::copy(from + n * row_stride, from + n * row_stride + width, to + n * kPanel);
        }
      } else {
        for (int64_t d = 0; d < width; ++d) {
          __builtin_prefetch(from + d * col_stride + kAheadRows * row_stride);
        }
        int64_t d = 0;
        if (rows == kRowBlock && row_stride == 1) {
          for (; d + kRowBlock <= width; d += kRowBlock) {
            turn_block(from + d * col_stride, col_stride, to + d);
          }
        }
        for (; d < width; ++d) {
          for (int64_t n = 0; n < rows; ++n) {
            to[n * kPanel + d] = from[n * row_stride + d * col_stride];
          }
        }
      }
    }
  }
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

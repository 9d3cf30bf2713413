// Packing: the panels of a matrix.
#pragma once

#include <omp.h>

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
struct Matrix {
  const E *data;  // NULL: its panels are there already
  int64_t rows, columns, row_stride, column_stride;
  int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
  const E *at(int64_t row, int64_t column) const {
    return data + row * row_stride + column * column_stride;
  }
};

// At most kRowBlock rows of a panel, from `first` on.
template <typename E>
inline void pack_block(const Matrix<E> &m, int64_t panel, int64_t first, int64_t rows, E *to) {
  const int64_t width = std::min(kPanel, m.columns - panel * kPanel);
  const E *from = m.at(first, panel * kPanel);
  if (width < kPanel) std::fill(to, to + rows * kPanel, E{});
  if (m.column_stride == 1) {
    for (int64_t n = 0; n < rows; ++n) {
      const E *row = from + n * m.row_stride;
      for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(E))) {
        __builtin_prefetch(row + d + kRowBlock * m.row_stride);
      }
      std::copy(row, row + width, to + n * kPanel);
    }
    return;
  }
  for (int64_t d = 0; d < width; ++d) {
    __builtin_prefetch(from + d * m.column_stride + kAheadRows * m.row_stride);
  }
  int64_t d = 0;
  if (rows == kRowBlock && m.row_stride == 1) {
    for (; d + kRowBlock <= width; d += kRowBlock) {
      turn_block(from + d * m.column_stride, m.column_stride, to + d);
    }
  }
  for (; d < width; ++d) {
    for (int64_t n = 0; n < rows; ++n) {
      to[n * kPanel + d] = from[n * m.row_stride + d * m.column_stride];
    }
  }
}

// Rows [first, first + rows) of some panels, which come to lie `rows` rows apart. They are read row
// by row where these are contiguous.
template <typename E>
inline void pack_part(const Matrix<E> &m, int64_t first_panel, int64_t last_panel, int64_t first,
                      int64_t rows, E *to) {
  const auto block = [&](int64_t panel, int64_t row) {
    pack_block(m, panel, first + row, std::min(kRowBlock, rows - row),
               to + ((panel - first_panel) * rows + row) * kPanel);
  };
  if (m.column_stride == 1) {
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      for (int64_t panel = first_panel; panel < last_panel; ++panel) block(panel, row);
    }
  } else {
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      for (int64_t row = 0; row < rows; row += kRowBlock) block(panel, row);
    }
  }
}

// The place in memory with `places` of them for what a task packs for itself. Used again by the same
// thread, it is still in that thread's second-level cache; but there are places for the tasks only, so
// where there may be more threads than places each task has its own.
inline int64_t place_of(int64_t task, int64_t places, int threads) {
  return threads <= places ? omp_get_thread_num() : task;
}

template <typename E>
void pack(const Matrix<E> &m, E *panels, int threads) {
  const int64_t blocks = (m.rows + kRowBlock - 1) / kRowBlock;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t panel = 0; panel < m.panels(); ++panel) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kRowBlock;
      pack_block(m, panel, first, std::min(kRowBlock, m.rows - first),
                 panels + (panel * m.rows + first) * kPanel);
    }
  }
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

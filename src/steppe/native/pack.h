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

// The transposed CSR matrix, by a counting sort over blocks that do not share a counter.
#pragma once

#include <algorithm>
#include <utility>

#include "vector.h"

namespace steppe {
namespace STEPPE_TARGET {

template <typename E>
void transpose(const E *values_a, const E *values_b, const int16_t *index, const int64_t *offsets,
               int64_t T, int64_t N, int64_t tile, int64_t tile_t, E *values_a_t, E *values_b_t,
               int16_t *index_t, int64_t *offsets_t, int threads) {
  const int64_t tiles = (N + tile - 1) / tile, tiles_t = (T + tile_t - 1) / tile_t;
  std::fill(offsets_t, offsets_t + std::max<int64_t>(tiles_t, 1) * N + 1, 0);
  // First the number of entries of each (tile of rows, column), one place to the right.
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t r = 0; r < tiles_t; ++r) {
    for (int64_t j = 0; j < tiles; ++j) {
      int64_t *counts = offsets_t + r * N + j * tile + 1;
      const int64_t *list = offsets + j * T;
      const int64_t first = list[r * tile_t], last = list[std::min((r + 1) * tile_t, T)];
      for (int64_t i = first; i < last; ++i) ++counts[index[i]];
    }
  }
  // Then where the entries begin, still one place to the right: it is the place of the next entry, and
  // when all entries have theirs it has become where the next column begins.
  int64_t entries = 0;
  for (int64_t i = 1; i <= tiles_t * N; ++i) entries += std::exchange(offsets_t[i], entries);
  // Each entry to its place, rows in order.
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t r = 0; r < tiles_t; ++r) {
    for (int64_t j = 0; j < tiles; ++j) {
      int64_t *next = offsets_t + r * N + j * tile + 1;
      const int64_t *list = offsets + j * T;
      for (int64_t t = r * tile_t; t < std::min((r + 1) * tile_t, T); ++t) {
        for (int64_t i = list[t]; i < list[t + 1]; ++i) {
          const int64_t to = next[index[i]]++;
          index_t[to] = int16_t(t - r * tile_t);
          values_a_t[to] = values_a[i];
          if (values_b != nullptr) values_b_t[to] = values_b[i];
        }
      }
    }
  }
}

template <typename E>
void row_sums(const E *values, const int64_t *offsets, int64_t T, int64_t tiles, E *out,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    float total = 0;
    for (int64_t j = 0; j < tiles; ++j) {
      for (int64_t i = offsets[j * T + t]; i < offsets[j * T + t + 1]; ++i) {
        total += to_float(values[i]);
      }
    }
    store(total, out + t);
  }
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

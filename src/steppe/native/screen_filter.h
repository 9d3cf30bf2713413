// From candidates to the CSR matrix of a screened product: the index of the candidates, then, when their
// values are computed, the entries that turned out active.
#pragma once

#include <algorithm>
#include <cstdint>

#include "compact.h"
#include "screen.h"

namespace steppe {
namespace STEPPE_TARGET {

// Write the positions of a mask's bits, counted from `first`; returns their number.
inline int64_t index_mask(uint64_t mask, int64_t first, int16_t *index) {
  int64_t listed = 0;
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int j = 0; j < kPanel; j += 16) {
    const __mmask16 part = __mmask16(mask >> j);
    const __m512i place = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(first + j)));
    const int count = __builtin_popcount(part);
    _mm256_mask_storeu_epi16(index + listed, first_lanes(count),
                             _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(part, place)));
    listed += count;
  }
#else
  for (; mask != 0; mask &= mask - 1) index[listed++] = int16_t(first + __builtin_ctzll(mask));
#endif
  return listed;
}

// index of a CSR matrix [T, F], from the bits that are set.
inline void index_masks(const uint64_t *masks, int64_t T, int64_t F, int64_t tile,
                       const int64_t *offsets, int16_t *index, int threads) {
  const int64_t blocks = blocks_of(F), per_tile = tile / kPanel;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t first = 0, j = 0; first < blocks; first += per_tile, ++j) {
      int16_t *to = index + offsets[j * T + t];
      for (int64_t b = first; b < std::min(first + per_tile, blocks); ++b) {
        to += index_mask(masks[t * blocks + b], (b - first) * kPanel, to);
      }
    }
  }
}

// Copy the entries that are not <= 0, their columns moved by `shift`; returns their number.
template <typename E>
inline int64_t keep_active(const E *values, const int16_t *index, int64_t count, int64_t shift,
                           E *values_to, int16_t *index_to) {
  int64_t kept = 0;
#if defined(__AVX512F__)
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    const vec part = load_part(values + i, lanes);
    const __mmask16 active = active_mask(part);
    const int here = __builtin_popcount(active);
    const __m512i places = _mm512_add_epi32(
        _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(lanes, index + i)), _mm512_set1_epi32(int(shift)));
    store_compressed(part, active, here, values_to + kept);
    _mm256_mask_storeu_epi16(index_to + kept, first_lanes(here),
                             _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(active, places)));
    kept += here;
  }
#else
  // No branch on whether an entry stays, which nothing predicts: each is written, to memory with room
  // for one that does not.
  constexpr int64_t kPart = 64;
  for (int64_t start = 0; start < count; start += kPart) {
    E some[kPart + 1];
    int16_t places[kPart + 1];
    int64_t here = 0;
    for (int64_t i = start; i < std::min(start + kPart, count); ++i) {
      some[here] = values[i];
      places[here] = int16_t(index[i] + shift);
      here += is_active(to_float(values[i]));
    }
    std::copy_n(some, here, values_to + kept);
    std::copy_n(places, here, index_to + kept);
    kept += here;
  }
#endif
  return kept;
}

// counts [rows] of those entries, for each row and tile; returns their sum.
template <typename E>
int64_t filter_counts(const E *values, const int64_t *offsets, int64_t rows, int32_t *counts,
                      int threads) {
  int64_t active = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : active)
  for (int64_t row = 0; row < rows; ++row) {
    counts[row] = count_active(values + offsets[row], offsets[row + 1] - offsets[row]);
    active += counts[row];
  }
  return active;
}

// Keep those entries only, `merged` tiles made one. Merging lets the next product gather from tiles of
// the width that suits the lower density.
template <typename E>
void filter(const E *values, const int16_t *index, const int64_t *offsets, const int32_t *counts,
            int64_t T, int64_t tile, int64_t tiles, int64_t merged, int64_t *offsets_to, E *values_to,
            int16_t *index_to, int threads) {
  const int64_t groups = (tiles + merged - 1) / merged;
  int64_t entries = 0;
  for (int64_t row = 0; row < groups * T; ++row) {
    const int64_t t = row % T, first = row / T * merged;
    offsets_to[row] = entries;
    for (int64_t j = first; j < std::min(first + merged, tiles); ++j) entries += counts[j * T + t];
  }
  offsets_to[groups * T] = entries;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < groups * T; ++row) {
    const int64_t t = row % T, first = row / T * merged;
    int64_t to = offsets_to[row];
    for (int64_t j = first; j < std::min(first + merged, tiles); ++j) {
      const int64_t from = offsets[j * T + t], count = offsets[j * T + t + 1] - from;
      to += keep_active(values + from, index + from, count, (j - first) * tile, values_to + to,
                        index_to + to);
    }
  }
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

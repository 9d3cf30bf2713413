// SDDMM, the sampled product: the entries of G Mᵀ + bias on a support, G and M as panels.
//
// Loops, outside in: tile, chunk of rows, panel, row, eight entries. The sums of a tile stay in the
// second-level cache for all panels, and G is read from end to end. A row's 64 columns of G stay in
// registers, with AVX-512; each entry's sum grows by one panel at a time, in the order of the panels. If a matrix M
// is used once, the thread that works on a tile packs the tile's rows.
#pragma once

#include <memory>
#include <new>

#include "pack.h"

namespace steppe {
namespace STEPPE_TARGET {

// products[i] = G row · M row i, to be summed over the lanes, for kCount rows.
#if defined(__AVX512F__)
template <typename E>
struct Row {  // of G, in registers
  vec part[kVectors];
  explicit Row(const E *from) {
    for (int k = 0; k < kVectors; ++k) part[k] = load(from + k * kWidth);
  }
  vec times(const E *other) const {
    vec sum = part[0] * load(other);
#pragma GCC unroll 16
    for (int k = 1; k < kVectors; ++k) sum += part[k] * load(other + k * kWidth);
    return sum;
  }
  template <int kCount>
  void multiply(const E *const *rows, vec *products) const {
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) products[k] = times(rows[k]);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Row<bf16> {
  __m512bh part[2];
  explicit Row(const bf16 *from)
      : part{(__m512bh)_mm512_loadu_si512(from), (__m512bh)_mm512_loadu_si512(from + 32)} {}
  vec times(const bf16 *other) const {
    const Row right(other);
    const __m512 sum = _mm512_dpbf16_ps(_mm512_setzero_ps(), part[0], right.part[0]);
    return (vec)_mm512_dpbf16_ps(sum, part[1], right.part[1]);
  }
  template <int kCount>
  void multiply(const bf16 *const *rows, vec *products) const {
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) products[k] = times(rows[k]);
  }
};
#endif
#else
// 16 registers do not hold a row of G and eight sums: the row is read again for each eight.
template <typename E>
struct Row {
  const E *from;
  explicit Row(const E *from) : from(from) {}
  template <int kCount>
  void multiply(const E *const *rows, vec *products) const {
    vec sums[kCount] = {};
#pragma GCC unroll 16
    for (int64_t d = 0; d < kPanel; d += kWidth) {
      const vec part = load(from + d);
#pragma GCC unroll 8
      for (int k = 0; k < kCount; ++k) sums[k] += part * load(rows[k] + d);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) products[k] = sums[k];
  }
};
#endif

// sums[i] += G row · M row of entry i.
template <typename E>
inline void dot_row(const int16_t *index, int64_t count, const E *g, const E *panel, float *sums) {
  const Row<E> row(g);
  const E *rows[8];
  vec products[8];
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const FourPlaces places[2] = {FourPlaces(index + i), FourPlaces(index + i + 4)};
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) rows[k] = panel + places[k / 4][k % 4] * kPanel;
    row.template multiply<8>(rows, products);
    add_sums8(products, 8, sums + i);
  }
  // The last ones summed as those are, so that the bits do not depend on the place in the row. The
  // last entry stands in for those that are missing: no branch on how many they are.
  const int64_t left = count - i, last = count - 1;
  if (left > 4) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) rows[k] = panel + index[std::min(i + k, last)] * kPanel;
    row.template multiply<8>(rows, products);
    add_sums8(products, left, sums + i);
  } else if (left > 0) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) rows[k] = panel + index[std::min(i + k, last)] * kPanel;
    row.template multiply<4>(rows, products);
    add_sums4(products, left, sums + i);
  }
}

template <typename E>
int sampled(const int16_t *index, const int64_t *offsets, int64_t T, int64_t tile,
            const E *panels_g, const Matrix<E> &m, E *panels, const E *bias, E *values,
            int threads) {
  const int64_t N = m.rows, panel_count = m.panels();
  const int64_t tiles = std::max<int64_t>((N + tile - 1) / tile, 1), nnz = offsets[tiles * T];
  // float32 sums of all entries: the output itself, or a copy to be rounded once.
  std::unique_ptr<float[]> copy;
  float *sums = reinterpret_cast<float *>(values);
  if (sizeof(E) != sizeof(float)) {
    copy.reset(new (std::nothrow) float[std::max<int64_t>(nnz, 1)]);
    if (!copy) return 1;
    sums = copy.get();
  }
  const bool sparse = double(nnz) < kStreamDensity * double(T) * double(N);
  const int64_t chunks = chunks_of(T, tiles, threads), chunk = (T + chunks - 1) / chunks;
  const bool packs_each = m.data != nullptr && chunks == 1;
  if (m.data != nullptr && !packs_each) pack(m, panels, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t j = 0; j < tiles; ++j) {
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t first = std::min(c * chunk, T), last = std::min(first + chunk, T);
      const int64_t *list = offsets + j * T;
      if (list[first] == list[last]) continue;
      const int64_t units = std::min(tile, N - j * tile);
      // Where the tile's part of the first panel is, and how far it is to the next panel's.
      E *part = panels + j * tile * kPanel;
      int64_t step = N * kPanel;
      if (packs_each) {
        step = units * kPanel;
        // The last tile may be narrower than a place that any tile fits into.
        part = panels + place_of(j, N / tile, threads) * panel_count * tile * kPanel;
        pack_part(m, 0, panel_count, j * tile, units, part);
      }
      for (int64_t i = list[first]; i < list[last]; ++i) {
        sums[i] = bias == nullptr ? 0.0f : to_float(bias[j * tile + index[i]]);
      }
      for (int64_t k = 0; k < panel_count; ++k) {
        const E *panel = part + k * step;
        if (sparse) stream(panel, units);
        for (int64_t t = first; t < last; ++t) {
          if (list[t] == list[t + 1]) continue;
          dot_row(index + list[t], list[t + 1] - list[t], panels_g + (k * T + t) * kPanel, panel,
                  sums + list[t]);
        }
      }
      for (int64_t i = list[first]; copy && i < list[last]; ++i) store(sums[i], values + i);
    }
  }
  return 0;
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

// Sparse × dense: out = A M, with A in column-tiled CSR form and M as panels.
//
// Loops, outside in: panel, tile, row, entry. A panel's part of a tile (64 columns of `tile` rows of
// M) stays in the first-level cache while all rows of A gather from it, and 64 columns of one row of
// the output stay in registers. Eight sums hide the latency of the multiply-add: with AVX-512 they are
// two sets, for even and odd entries. A matrix that is used once is packed panel by panel, by the thread that then gathers
// from it: its output stays in its second-level cache.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "pack.h"

namespace steppe {
namespace STEPPE_TARGET {

constexpr int64_t kSumRows = 64;  // rows of sums, 16 KB

struct Entries {
  const int16_t *index;
  int64_t first, last;
};

// Some values of a CSR row, one of them at a time in all lanes.
template <typename E>
struct Values {
  const E *from;
  explicit Values(const E *from) : from(from) {}
  vec all(int k) const { return broadcast(to_float(from[k])); }
};
#if defined(__AVX512F__)
template <>
struct Values<float> {  // of four: a load less each
  __m512 lanes;
  explicit Values(const float *from) : lanes(_mm512_castps128_ps512(_mm_loadu_ps(from))) {}
  vec all(int k) const { return (vec)_mm512_permutexvar_ps(_mm512_set1_epi32(k), lanes); }
};
#endif

// sums [64] += Σ value · row of the panel, the tile's own sum first: adding few numbers to a small
// sum, and few sums to each other, loses less than adding all numbers to one.
template <typename E>
inline void gather_row(const Entries &entries, const E *values, const E *panel, float *sums) {
  constexpr int kSets = kVectors < 8 ? 2 : 1;
  vec sets[kSets][kVectors] = {};
  const auto add = [&](int k, int16_t place, vec value) {
    const E *row = panel + place * kPanel;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sets[k % kSets][v] += value * load(row + v * kWidth);
  };
  int64_t entry = entries.first;
  for (; entry + 4 <= entries.last; entry += 4) {
    const FourPlaces places(entries.index + entry);
    const Values<E> four(values + entry);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) add(k, places[k], four.all(k));
  }
  const auto one = [&](int k) {
    add(k, entries.index[entry + k], broadcast(to_float(values[entry + k])));
  };
  if (entry + 2 <= entries.last) {
    one(0), one(1);
    entry += 2;
  }
  if (entry < entries.last) one(0);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    vec all = sets[0][v];
    if constexpr (kSets == 2) all += sets[1][v];
    store(load(sums + v * kWidth) + all, sums + v * kWidth);
  }
}

#if defined(__AVX512BF16__)

// Two neighbouring values in each 32 bits.
inline __m512bh pair_of(const bf16 *values) {
  int32_t bits;
  std::memcpy(&bits, values, 4);
  return (__m512bh)_mm512_set1_epi32(bits);
}

// Two rows at a time: their columns interleaved are what one dot-product instruction takes. Within
// each group of 8 columns the sums of the first four end up in one register and of the others in
// the next; they are put in order at the end.
template <>
inline void gather_row(const Entries &entries, const bf16 *values, const bf16 *panel, float *sums) {
  __m512 low[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, high[2] = {low[0], low[0]};
  __m512 more_low[2] = {low[0], low[0]}, more_high[2] = {low[0], low[0]};
  const auto add = [&](const bf16 *a, const bf16 *b, __m512bh pair, __m512 *lows, __m512 *highs) {
    for (int k = 0; k < 2; ++k) {
      const __m512i from_a = _mm512_loadu_si512(a + 32 * k), from_b = _mm512_loadu_si512(b + 32 * k);
      lows[k] = _mm512_dpbf16_ps(lows[k], (__m512bh)_mm512_unpacklo_epi16(from_a, from_b), pair);
      highs[k] = _mm512_dpbf16_ps(highs[k], (__m512bh)_mm512_unpackhi_epi16(from_a, from_b), pair);
    }
  };
  int64_t entry = entries.first;
  for (; entry + 3 < entries.last; entry += 4) {
    const int16_t *at = entries.index + entry;
    const bf16 *value = values + entry;
    add(panel + at[0] * kPanel, panel + at[1] * kPanel, pair_of(value), low, high);
    add(panel + at[2] * kPanel, panel + at[3] * kPanel, pair_of(value + 2), more_low, more_high);
  }
  for (; entry < entries.last; entry += 2) {
    const bf16 *a = panel + entries.index[entry] * kPanel;
    const bool two = entry + 1 < entries.last;
    // Its own row again, times zero, would make NaN of an infinite weight.
    static const bf16 zeros[kPanel] = {};
    const bf16 *b = two ? panel + entries.index[entry + 1] * kPanel : zeros;
    const bf16 last[2] = {values[entry], two ? values[entry + 1] : bf16{}};
    add(a, b, pair_of(last), low, high);
  }
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int k = 0; k < 2; ++k) {
    const __m512 lows = _mm512_add_ps(low[k], more_low[k]);
    const __m512 highs = _mm512_add_ps(high[k], more_high[k]);
    float *to = sums + 32 * k;
    const __m512 left = _mm512_permutex2var_ps(lows, first, highs);
    const __m512 right = _mm512_permutex2var_ps(lows, second, highs);
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), left));
    _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), right));
  }
}

#endif

// An output of so many bytes, a weight's gradient, leaves the second-level cache before it is read.
constexpr int64_t kLargeOutput = 4 * 1024 * 1024;

// Write sums [rows][64] by non-temporal stores, past the caches: an ordinary store would first read the
// line that it overwrites. False, with nothing written, where the output does not consist of whole lines.
template <typename E>
inline bool write_past_caches(const float *, int64_t, E *, int64_t, int64_t) {
  return false;
}
#if defined(__AVX512F__)
template <>
inline bool write_past_caches(const float *sums, int64_t rows, float *to, int64_t row_stride,
                              int64_t col_stride) {
  constexpr int64_t kLine = 16;
  const bool by_rows = col_stride == 1;
  const int64_t stride = by_rows ? row_stride : col_stride;
  if (reinterpret_cast<uintptr_t>(to) % 64 != 0 || stride % kLine != 0) return false;
  if (!by_rows && (row_stride != 1 || rows % kLine != 0)) return false;
  for (int64_t t = 0; t < rows; t += by_rows ? 1 : kLine) {
    for (int64_t d = 0; d < kPanel; d += kLine) {
      const float *from = sums + t * kPanel + d;
      if (by_rows) {
        _mm512_stream_ps(to + t * stride + d, _mm512_loadu_ps(from));
        continue;
      }
      float turned[kLine * kPanel];
      turn_block(from, kPanel, turned);
      for (int64_t i = 0; i < kLine; ++i) {
        _mm512_stream_ps(to + t + (d + i) * stride, _mm512_loadu_ps(turned + i * kPanel));
      }
    }
  }
  _mm_sfence();
  return true;
}
#endif

// Writes sums [rows][64] to the output, rows from `first` on and columns from `column` on.
template <typename E>
void write_sums(const float *sums, int64_t first, int64_t rows, int64_t column, int64_t width,
                E *out, int64_t row_stride, int64_t col_stride, bool accumulate, bool large) {
  E *to = out + first * row_stride + column * col_stride;
  if (large && !accumulate && width == kPanel &&
      write_past_caches(sums, rows, to, row_stride, col_stride)) {
    return;
  }
  if (col_stride == 1) {
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t d = 0; d < width; ++d) {
        const float old = accumulate ? to_float(to[t * row_stride + d]) : 0;
        store(sums[t * kPanel + d] + old, to + t * row_stride + d);
      }
    }
    return;
  }
  constexpr int64_t kBlock = 16;  // rows: a cache line of the transposed output
  for (int64_t start = 0; start < rows; start += kBlock) {
    const int64_t end = std::min(start + kBlock, rows);
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t t = start; t < end; ++t) {
        E *at = to + t * row_stride + d * col_stride;
        store(sums[t * kPanel + d] + (accumulate ? to_float(*at) : 0), at);
      }
    }
  }
}

template <typename E>
int spmm(const E *values, const int16_t *index, const int64_t *offsets, int64_t T, int64_t tile,
         const Matrix<E> &m, E *panels, const E *bias, E *out, int64_t row_stride,
         int64_t col_stride, bool accumulate, int threads) {
  const int64_t N = m.rows, panel_count = m.panels();
  const int64_t tiles = std::max<int64_t>((N + tile - 1) / tile, 1);
  if (T == 0 || panel_count == 0) return 0;
  const bool sparse = double(offsets[tiles * T] - offsets[0]) < kStreamDensity * double(T) * double(N);
  const int64_t chunks = chunks_of(T, panel_count, threads), chunk = (T + chunks - 1) / chunks;
  // With one tile, only the sums themselves have to stay in the first-level cache.
  const int64_t block = tiles == 1 ? std::min(kSumRows, chunk) : chunk;
  const bool large = T * m.columns * int64_t(sizeof(E)) >= kLargeOutput;
  const bool packs_each = m.data != nullptr && chunks == 1;
  if (m.data != nullptr && !packs_each) pack(m, panels, threads);
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<float[]> sums(new (std::nothrow) float[block * kPanel]);
    if (!sums) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t k = 0; k < panel_count; ++k) {
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t first = c * chunk, last = std::min(first + chunk, T);
        if (!sums || first >= last) continue;
        E *panel = panels + (packs_each ? place_of(k, panel_count, threads) : k) * N * kPanel;
        const int64_t width = std::min(kPanel, m.columns - k * kPanel);
        if (packs_each) {
          pack_part(m, k, k + 1, 0, N, panel);
        } else if (sparse) {
          stream(panel, N);
        }
        float start[kPanel];
        for (int64_t d = 0; d < kPanel; ++d) {
          start[d] = bias != nullptr && d < width ? to_float(bias[k * kPanel + d]) : 0;
        }
        for (int64_t from = first; from < last; from += block) {
          const int64_t to = std::min(from + block, last);
          for (int64_t t = 0; t < to - from; ++t) std::copy_n(start, kPanel, &sums[t * kPanel]);
          for (int64_t j = 0; j < tiles; ++j) {
            const int64_t *list = offsets + j * T;
            for (int64_t t = from; t < to; ++t) {
              if (list[t] == list[t + 1]) continue;
              gather_row(Entries{index, list[t], list[t + 1]}, values, panel + j * tile * kPanel,
                         &sums[(t - from) * kPanel]);
            }
          }
          write_sums(sums.get(), from, to - from, k * kPanel, width, out, row_stride, col_stride,
                     accumulate, large);
        }
      }
    }
  }
  return failed;
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

// Decoding, T <= 8 rows: the time goes into reading the weights, once, from memory.
#pragma once

#include <algorithm>
#include <new>
#include <type_traits>
#include <vector>

#include "compact.h"
#include "vector.h"

namespace steppe {
namespace STEPPE_TARGET {

constexpr int kSecondLevel = 2;  // of the caches, as __builtin_prefetch counts them

template <int kCount>
using Rows = std::integral_constant<int, kCount>;

// call(Rows<T>()) for a number of rows, 1 to 8, that is known when the call is made.
template <typename Call>
inline void with_rows(int64_t T, Call call) {
  switch (T) {
    case 1: return call(Rows<1>());
    case 2: return call(Rows<2>());
    case 3: return call(Rows<3>());
    case 4: return call(Rows<4>());
    case 5: return call(Rows<5>());
    case 6: return call(Rows<6>());
    case 7: return call(Rows<7>());
    case 8: return call(Rows<8>());
  }
}

// out [T] = x Wᵀ for one row of W.
template <int T, typename E>
inline void dot_rows(const E *x, int64_t D, const E *w, float *out) {
  constexpr int kSets = T >= 4 ? 1 : 4 / T;  // enough sums at once to hide the latency of adding
  constexpr int64_t kStep = int64_t(kSets) * kWidth;
  vec sums[kSets][T] = {};
  int64_t d = 0;
  for (; d + kStep <= D; d += kStep) {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) {
      const vec weights = load(w + d + s * kWidth);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[s][t] += weights * load(x + t * D + d + s * kWidth);
    }
  }
  for (int t = 0; t < T; ++t) {
    vec all = sums[0][t];
    for (int s = 1; s < kSets; ++s) all += sums[s][t];
    float total = sum(all);
    for (int64_t i = d; i < D; ++i) total += to_float(w[i]) * to_float(x[t * D + i]);
    out[t] = total;
  }
}

template <int T, typename E>
void matvec_of(const E *x, int64_t D, const E *w, int64_t stride, const E *bias, int64_t F, E *out,
               int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t f = 0; f < F; ++f) {
    float sums[T];
    dot_rows<T>(x, D, w + f * stride, sums);
    for (int t = 0; t < T; ++t) {
      store(sums[t] + (bias == nullptr ? 0 : to_float(bias[f])), out + t * F + f);
    }
  }
}

template <typename E>
void matvec(const E *x, int64_t T, int64_t D, const E *w, int64_t stride, const E *bias, int64_t F,
            E *out, int threads) {
  with_rows(T, [&](auto rows) { matvec_of<rows>(x, D, w, stride, bias, F, out, threads); });
}

// sums [width] += Σ value · row over a CSR row, `kRows` rows read side by side; the `next` ones of the
// row after them are fetched ahead.
template <int kRows, typename E>
inline void add_rows(const E *values, const int16_t *index, int64_t next, const E *v,
                     int64_t stride, int64_t width, float *sums) {
  const E *rows[kRows];
  vec factors[kRows];
  for (int k = 0; k < kRows; ++k) {
    rows[k] = v + index[k] * stride;
    factors[k] = broadcast(to_float(values[k]));
  }
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) {
    vec total = load(sums + d);
    for (int64_t k = 0; k < next; ++k) {
      __builtin_prefetch(v + index[kRows + k] * stride + d, 0, kSecondLevel);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) total += factors[k] * load(rows[k] + d);
    store(total, sums + d);
  }
  for (; d < width; ++d) {
    for (int k = 0; k < kRows; ++k) sums[d] += factors[k][0] * to_float(rows[k][d]);
  }
}

// Threads share the columns: each element of the output is summed by one of them.
constexpr int64_t kShare = 128;  // columns

template <typename E>
void decode(const E *values, const int16_t *index, const int64_t *offsets, int64_t T, int64_t F,
            int64_t tile, const E *v, int64_t stride, int64_t D, const E *bias, E *out,
            int threads) {
  const int64_t tiles = std::max<int64_t>((F + tile - 1) / tile, 1);
  const int64_t strips = (D + kShare - 1) / kShare;
  const int64_t share = std::max<int64_t>((strips + threads - 1) / threads, 1) * kShare;
  constexpr int64_t kMost = 512;  // columns whose sums stay in the first-level cache
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < D; start += share) {
    for (int64_t from = start; from < std::min(start + share, D); from += kMost) {
      const int64_t width = std::min({kMost, start + share - from, D - from});
      float sums[8][kMost];
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t d = 0; d < width; ++d) {
          sums[t][d] = bias == nullptr ? 0 : to_float(bias[from + d]);
        }
      }
      for (int64_t j = 0; j < tiles; ++j) {
        const E *rows = v + j * tile * stride + from;
        for (int64_t t = 0; t < T; ++t) {
          int64_t i = offsets[j * T + t];
          const int64_t last = offsets[j * T + t + 1];
          const auto add = [&](auto count, int64_t next) {
            add_rows<count>(values + i, index + i, next, rows, stride, width, sums[t]);
            i += count;
          };
          while (i + 8 <= last) add(Rows<8>(), std::min<int64_t>(8, last - i - 8));
          while (i + 4 <= last) add(Rows<4>(), 0);
          while (i < last) add(Rows<1>(), 0);
        }
      }
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t d = 0; d < width; ++d) store(sums[t][d], out + t * D + from + d);
      }
    }
  }
}

// The dot products of rows of x with kRows rows of W, read side by side while the next ones are
// fetched; the bits of each are those of dot_rows<1>. (Of kRows 4 and 8 with and without fetching,
// into either cache, this was the fastest: a third faster than one row after the other.)
template <int kRows, typename E>
inline void dot_side_by_side(const E *const *x, const E *const *w, const E *const *next, int64_t D,
                             float *out) {
  constexpr int kSets = 4;
  constexpr int64_t kStep = int64_t(kSets) * kWidth;
  vec sums[kRows][kSets] = {};
  int64_t d = 0;
  for (; d + kStep <= D; d += kStep) {
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 4
      for (int s = 0; s < kSets; ++s) {
        __builtin_prefetch(next[k] + d + s * kWidth, 0, kSecondLevel);
        sums[k][s] += load(w[k] + d + s * kWidth) * load(x[k] + d + s * kWidth);
      }
    }
  }
  for (int k = 0; k < kRows; ++k) {
    vec all = sums[k][0];
    for (int s = 1; s < kSets; ++s) all += sums[k][s];
    float total = sum(all);
    for (int64_t i = d; i < D; ++i) total += to_float(w[k][i]) * to_float(x[k][i]);
    out[k] = total;
  }
}

template <typename E>
void decode_sampled(const int16_t *index, const int64_t *offsets, int64_t T, int64_t F,
                    int64_t tile, const E *x, const E *w, int64_t stride, int64_t D, const E *bias,
                    E *values, int threads) {
  const int64_t tiles = std::max<int64_t>((F + tile - 1) / tile, 1), lists = tiles * T;
  const int64_t entries = offsets[lists];
  constexpr int kRows = 4;
#pragma omp parallel num_threads(threads)
  {
    int64_t list = 0;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < entries; first += kRows) {
      const int count = int(std::min<int64_t>(kRows, entries - first));
      const E *tokens[kRows], *rows[kRows], *next[kRows];
      int64_t columns[kRows];
      for (int k = 0; k < count; ++k) {
        while (offsets[list + 1] <= first + k) ++list;
        columns[k] = list / T * tile + index[first + k];
        tokens[k] = x + list % T * D;
        rows[k] = w + columns[k] * stride;
      }
      int64_t ahead = list;
      for (int k = 0; k < count; ++k) {
        const int64_t entry = std::min(first + kRows + k, entries - 1);
        while (offsets[ahead + 1] <= entry) ++ahead;
        next[k] = w + (ahead / T * tile + index[entry]) * stride;
      }
      float totals[kRows];
      if (count == kRows) {
        dot_side_by_side<kRows>(tokens, rows, next, D, totals);
      } else {
        for (int k = 0; k < count; ++k) {
          dot_side_by_side<1>(tokens + k, rows + k, next + k, D, totals + k);
        }
      }
      for (int k = 0; k < count; ++k) {
        store(totals[k] + (bias == nullptr ? 0 : to_float(bias[columns[k]])), values + first + k);
      }
    }
  }
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

// Few rows, T <= 8: what is read is the weights, once, from memory.
#pragma once

#include <algorithm>
#include <new>
#include <vector>

#include "compact.h"
#include "vector.h"

namespace steppe {
namespace STEPPE_TARGET {

// The best distance of those tried (2, 4 and 8 KB); four rows read at once lose a third of the
// bandwidth.
constexpr int64_t kAhead = 4096;

// out [T] = x Wᵀ for one row of W.
template <int T, typename E>
inline void dot_rows(const E *x, int64_t D, const E *w, float *out) {
  constexpr int kSets = T >= 4 ? 1 : 4 / T;  // enough sums at once to hide the latency of adding
  constexpr int64_t kStep = int64_t(kSets) * kWidth;
  vec sums[kSets][T] = {};
  int64_t d = 0;
  for (; d + kStep <= D; d += kStep) {
    __builtin_prefetch(reinterpret_cast<const char *>(w + d) + kAhead);
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
  switch (T) {
    case 1: return matvec_of<1>(x, D, w, stride, bias, F, out, threads);
    case 2: return matvec_of<2>(x, D, w, stride, bias, F, out, threads);
    case 3: return matvec_of<3>(x, D, w, stride, bias, F, out, threads);
    case 4: return matvec_of<4>(x, D, w, stride, bias, F, out, threads);
    case 5: return matvec_of<5>(x, D, w, stride, bias, F, out, threads);
    case 6: return matvec_of<6>(x, D, w, stride, bias, F, out, threads);
    case 7: return matvec_of<7>(x, D, w, stride, bias, F, out, threads);
    case 8: return matvec_of<8>(x, D, w, stride, bias, F, out, threads);
  }
}

// sums [width] += Σ value · row over a list, `kRows` rows read side by side.
template <int kRows, typename E>
inline void add_rows(const E *values, const int16_t *index, const E *v, int64_t stride,
                     int64_t width, float *sums) {
  const E *rows[kRows];
  vec factors[kRows];
  for (int k = 0; k < kRows; ++k) {
    rows[k] = v + index[k] * stride;
    factors[k] = broadcast(to_float(values[k]));
  }
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) {
    vec total = load(sums + d);
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
          for (; i + 8 <= last; i += 8) add_rows<8>(values + i, index + i, rows, stride, width, sums[t]);
          for (; i + 4 <= last; i += 4) add_rows<4>(values + i, index + i, rows, stride, width, sums[t]);
          for (; i < last; ++i) add_rows<1>(values + i, index + i, rows, stride, width, sums[t]);
        }
      }
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t d = 0; d < width; ++d) store(sums[t][d], out + t * D + from + d);
      }
    }
  }
}

template <typename E>
void decode_sampled(const int16_t *index, const int64_t *offsets, int64_t T, int64_t F,
                    int64_t tile, const E *x, const E *w, int64_t stride, int64_t D, const E *bias,
                    E *values, int threads) {
  const int64_t tiles = std::max<int64_t>((F + tile - 1) / tile, 1);
  for (int64_t list = 0; list < tiles * T; ++list) {
    const int64_t t = list % T, first_column = list / T * tile;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = offsets[list]; i < offsets[list + 1]; ++i) {
      const int64_t column = first_column + index[i];
      float total;
      dot_rows<1>(x + t * D, D, w + column * stride, &total);
      store(total + (bias == nullptr ? 0 : to_float(bias[column])), values + i);
    }
  }
}

constexpr int64_t kFewTile = 256;  // so many rows of V stay in the second-level cache for all tokens

// A list of few rows, in tiles of kFewTile columns.
template <typename E>
struct FewList {
  FewList(int64_t T, int64_t F)
      : tiles(std::max<int64_t>((F + kFewTile - 1) / kFewTile, 1)), offsets(tiles * T + 1) {}
  int64_t tiles;
  std::vector<int64_t> offsets;
  std::vector<int16_t> index;
  std::vector<E> values;
};

// The weights and the rule of a block as steppe_decode_mlp has them.
template <typename E>
struct FewBlock {
  const E *x;
  int64_t T, D, F;
  const E *w;
  int64_t w_stride;
  const E *w_bias, *up;
  int64_t up_stride;
  const E *up_bias, *v;
  int64_t v_stride;
  const E *v_bias;
  float alpha, beta;
  int threads;
};

// What comes after the first product: from the list of r to the output.
template <typename E>
void finish_few(const FewBlock<E> &block, FewList<E> &list, E *up_values, E *out) {
  const int64_t T = block.T, F = block.F;
  std::vector<E> multipliers;
  if (block.up != nullptr) {
    multipliers.resize(list.values.size());
    decode_sampled(list.index.data(), list.offsets.data(), T, F, kFewTile, block.x, block.up,
                   block.up_stride, block.D, block.up_bias, multipliers.data(), block.threads);
    std::fill(up_values, up_values + T * F, E{});
  }
  for (int64_t at = 0; at < list.tiles * T; ++at) {
    for (int64_t i = list.offsets[at]; i < list.offsets[at + 1]; ++i) {
      const float p = to_float(list.values[i]);
      float a = block.alpha == 1 && block.beta == 0 ? p : p * (block.alpha + block.beta * p);
      if (block.up != nullptr) {
        up_values[at % T * F + at / T * kFewTile + list.index[i]] = multipliers[i];
        a *= to_float(multipliers[i]);
      }
      store(a, &list.values[i]);
    }
  }
  decode(list.values.data(), list.index.data(), list.offsets.data(), T, F, kFewTile, block.v,
         block.v_stride, block.D, block.v_bias, out, block.threads);
}

// A whole block at once: of so little work, calling each kernel for itself would be a third.
template <typename E>
int64_t decode_mlp(const FewBlock<E> &block, int64_t most, E *r, E *up_values, E *out) {
  const int64_t T = block.T, F = block.F;
  matvec(block.x, T, block.D, block.w, block.w_stride, block.w_bias, F, r, block.threads);
  FewList<E> list(T, F);
  list.index.resize(T * F), list.values.resize(T * F);
  int64_t active = 0;
  for (int64_t j = 0; j < list.tiles; ++j) {
    for (int64_t t = 0; t < T; ++t) {
      list.offsets[j * T + t] = active;
      const int64_t width = std::min(kFewTile, F - j * kFewTile);
      for (int64_t f = 0; f < width; f += kPanel) {
        active += list_active(r + t * F + j * kFewTile + f, std::min(kPanel, width - f), f,
                              list.index.data() + active, list.values.data() + active);
      }
    }
  }
  list.offsets[list.tiles * T] = active;
  list.index.resize(active), list.values.resize(active);
  for (int64_t i = 0; i < T * F; ++i) {
    if (!is_active(to_float(r[i]))) r[i] = E{};
  }
  if (active > most) return -1;
  finish_few(block, list, up_values, out);
  return active;
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

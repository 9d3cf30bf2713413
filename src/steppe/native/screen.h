// Screening: which entries of x Wᵀ + b can be above zero, by a product of small integers and a bound on
// its error.
// docs/screening.md has the proof; steppe/ops/screening.py is the definition.
//
// Each row of x and of W is rotated and put on a grid of its own, scale × integers. In units of the
// scale of a row of W the bound on an entry is
//
//   I · scale_x + bias + ‖x‖ · of_norm + ‖x − x̃‖ · of_residual
//
// with I the integer product, and the entry is a candidate unless that is <= 0. All of it is float64,
// where no square of a float32 under- or overflows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "compact.h"
#include "screen_product.h"
#include "vector.h"

namespace steppe {
namespace STEPPE_TARGET {

constexpr int kFold = 16;         // features that one step of the rotation mixes
constexpr int64_t kGrain = 128;   // columns are padded with zeros to a multiple of it
constexpr double kUnit = 0x1p-24;     // half the distance from 1 to the next float32
constexpr double kTiny = 0x1p-126;    // the least normal float32, the most that flushing to zero loses
constexpr double kOurs = 0x1p-36;     // of the float64 arithmetic here, many times over
// Norms from which on a sum of products could overflow on its way.
constexpr double kLargeInput = 0x1p62, kLargeRow = 0x1p63;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

constexpr int kDoubles = kWidth / 2;
typedef double dvec __attribute__((vector_size(kWidth * 4), aligned(8), may_alias));
typedef int64_t lvec __attribute__((vector_size(kWidth * 4), aligned(8), may_alias));
typedef float narrow_vec __attribute__((vector_size(kDoubles * 4), aligned(4), may_alias));
typedef int32_t narrow_ivec __attribute__((vector_size(kDoubles * 4), aligned(4), may_alias));
typedef uint32_t narrow_uvec __attribute__((vector_size(kDoubles * 4), aligned(4), may_alias));
typedef int8_t byte_vec __attribute__((vector_size(kDoubles), aligned(1), may_alias));
typedef Integer integer_vec
    __attribute__((vector_size(kDoubles * sizeof(Integer)), aligned(sizeof(Integer)), may_alias));

inline int64_t padded_width(int64_t D) { return (D + kGrain - 1) / kGrain * kGrain; }
inline int64_t blocks_of(int64_t F) { return (F + kPanel - 1) / kPanel; }

inline double sum(dvec v) {
  double total = 0;
  for (int i = 0; i < kDoubles; ++i) total += v[i];
  return total;
}
inline dvec larger(dvec a, dvec b) {
#if defined(__AVX512F__)
  return (dvec)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
  return a > b ? a : b;
#endif
}
inline double largest(dvec v) {
  double most = 0;
  for (int i = 0; i < kDoubles; ++i) most = std::max(most, v[i]);
  return most;
}

// Row [D], in pieces of 64 columns `panel_stride` apart, as float32 padded with zeros: in the buffer,
// or where it is if it lies so.
template <typename E>
inline const float *read_row(const E *from, int64_t D, int64_t panel_stride, float *row) {
  const int64_t width = padded_width(D);
  if (sizeof(E) == sizeof(float) && panel_stride == kPanel && width == D) {
    return reinterpret_cast<const float *>(from);
  }
  for (int64_t start = 0; start < D; start += kPanel, from += panel_stride) {
    int64_t d = 0;
    const int64_t count = std::min(kPanel, D - start);
    for (; d + kWidth <= count; d += kWidth) store(load(from + d), row + start + d);
    for (; d < count; ++d) row[start + d] = to_float(from[d]);
  }
  std::fill(row + D, row + width, 0.0f);
  return row;
}

// A row on its grid: the norm is not below ‖row‖, the residual not below ‖row − scale · integers‖.
// The norm is not finite if the row is not.
struct Grid {
  double scale, norm, residual;
};

// Memory to work on a row.
struct RowBuffer {
  explicit RowBuffer(int64_t D)
      : width(padded_width(D)), row(new(std::nothrow) float[width]),
        rotated(new(std::nothrow) double[width]) {}
  bool is_there() const { return row && rotated; }
  int64_t width;
  std::unique_ptr<float[]> row;
  std::unique_ptr<double[]> rotated;
};

// body(i, buffer) for each of some rows, with memory of the thread's own. Returns 0, or 1 without.
template <typename Body>
inline int for_each_row(int64_t rows, int64_t D, int threads, Body body) {
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    const RowBuffer buffer(D);
    if (!buffer.is_there()) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      if (buffer.is_there()) body(i, buffer);
    }
  }
  return failed;
}

// A step of the transform: the sum and the difference of each two that lie so far apart.
template <int kApart>
inline void mix(dvec *part) {
#pragma GCC unroll 16
  for (int k = 0; k < kFold; ++k) {
    if (k & kApart) continue;
    const dvec one = part[k], other = part[k + kApart];
    part[k] = one + other;
    part[k + kApart] = one - other;
  }
}

// A Hadamard transform over features that lie a sixteenth of the width apart: no single feature stays
// large. Then the nearest integers up to ±most: `put(i, integers)` gets kDoubles of them, from feature
// i on. The transform's factor of 1/4, a power of two, is left to the end.
template <typename Put>
inline Grid to_grid(const float *row, const RowBuffer &buffer, double most, Put put) {
  double *rotated = buffer.rotated.get();
  const int64_t step = buffer.width / kFold;
  dvec squares{}, magnitude{};
  for (int64_t i = 0; i < step; i += kDoubles) {
    dvec part[kFold];
#pragma GCC unroll 16
    for (int k = 0; k < kFold; ++k) {
      part[k] = __builtin_convertvector(
          *reinterpret_cast<const narrow_vec *>(row + k * step + i), dvec);
    }
    mix<1>(part), mix<2>(part), mix<4>(part), mix<8>(part);
#pragma GCC unroll 16
    for (int k = 0; k < kFold; ++k) {
      squares += part[k] * part[k];
      magnitude = larger((dvec)((lvec)part[k] & 0x7fffffffffffffff), magnitude);
      *reinterpret_cast<dvec *>(rotated + k * step + i) = part[k];
    }
  }
  const double most_of_row = largest(magnitude);
  const double norm = std::sqrt(sum(squares)) * 0.25 * (1 + kOurs);
  const bool usable = std::isfinite(norm) && most_of_row > 0;
  const double scale = usable ? most_of_row / most : 4, inverse = usable ? 1 / scale : 0;
  // Adding and taking away 1.5 · 2⁵² rounds to an integer.
  constexpr double kRounder = 6755399441055744.0;
  dvec off{};
  for (int64_t i = 0; i < buffer.width; i += kDoubles) {
    __builtin_prefetch(row + buffer.width + i);  // the next row, which is then not read in order
    const dvec value = *reinterpret_cast<const dvec *>(rotated + i);
    const dvec integers = usable ? (value * inverse + kRounder) - kRounder : dvec{};
    const dvec difference = value - integers * scale;
    off += difference * difference;
    put(i, __builtin_convertvector(integers, narrow_ivec));
  }
  return {scale * 0.25, norm, std::sqrt(sum(off)) * 0.25 * (1 + kOurs)};
}

// What the bound needs of the units, `padded` of them a row: 1 / scale, of_norm, of_residual, and
// what is added whatever x is.
template <typename Number>
struct BoundsOf {
  BoundsOf(Number *from, int64_t padded)
      : inverse(from), of_norm(from + padded), of_residual(from + 2 * padded),
        constant(from + 3 * padded) {}
  Number *inverse, *of_norm, *of_residual, *constant;
};
using Bounds = BoundsOf<const double>;

// W [F, D] on its grids: bytes [strips of 16 units][width / kTogether][16][kTogether], integers + 128, and
// the bounds.
template <typename E>
int screen_weight(const E *w, int64_t F, int64_t D, int64_t row_stride, int64_t panel_stride,
                  uint8_t *bytes, double *bounds, int threads) {
  const int64_t width = padded_width(D), padded = blocks_of(F) * kPanel;
  const BoundsOf<double> to(bounds, padded);
  const double root = std::sqrt(double(D)), rounding = (2.0 * double(D) + 64) * kUnit;
  return for_each_row(padded, D, threads, [&](int64_t f, const RowBuffer &buffer) {
    uint8_t *column = bytes + f / kStrip * kStrip * width + place_in_strip(0, f % kStrip);
    if (f >= F) {  // no unit at all: its integers are 0
      for (int64_t d = 0; d < width; d += kTogether) {
        std::fill_n(column + place_in_strip(d, 0), kTogether, uint8_t(128));
      }
      to.inverse[f] = to.of_norm[f] = to.of_residual[f] = 0;
      to.constant[f] = -1;
      return;
    }
    const float *row = read_row(w + f * row_stride, D, panel_stride, buffer.row.get());
    const Grid grid = to_grid(row, buffer, kMost, [&](int64_t i, narrow_ivec integers) {
      const byte_vec shifted = __builtin_convertvector(integers + 128, byte_vec);
      constexpr int kPiece = std::min<int>(kDoubles, kTogether);
      for (int j = 0; j < kDoubles; j += kPiece) {
        std::memcpy(column + place_in_strip(i + j, 0), reinterpret_cast<const char *>(&shifted) + j, kPiece);
      }
    });
    // ‖k̃‖ ≤ ‖k‖ + ‖k − k̃‖.
    const double inverse = 1 / grid.scale, size = (grid.norm + grid.residual) * (1 + kOurs);
    to.inverse[f] = inverse;
    to.of_norm[f] = grid.norm < kLargeRow
                        ? (grid.residual + (rounding + kOurs) * size + kTiny * root) *
                              (1 + kOurs) * inverse
                        : kNaN;
    to.of_residual[f] = size * (1 + kOurs) * inverse;
    to.constant[f] = kTiny * (root * grid.norm + 2.0 * double(D) + 64) * (1 + kOurs) * inverse;
  });
}

// A token as the bound needs it; `norm` is NaN where all units are to be candidates. The sums are of
// the integers; 128 times a sum is taken from a product with bytes that are 128 too large.
struct Token {
  double scale, norm, residual;
  int32_t sum, sum_low;
};

inline Token token_of(const Grid &grid, int64_t sum, int64_t sum_low) {
  return {grid.scale, grid.norm < kLargeInput ? grid.norm : kNaN, grid.residual, int32_t(sum),
          int32_t(sum_low)};
}

// The largest integer on the grid of a token of D features.
inline int64_t token_most(int64_t D, bool few) { return int64_t(most_of_token(padded_width(D), few)); }

// A row of x on its grid, of kCount digits, and what the bound needs. `to(digit, i)` is where those from
// feature i on are.
template <int kCount, typename To>
inline Token put_on_grid(const float *row, const RowBuffer &buffer, double most, To to) {
  narrow_ivec sums{}, sums_low{};
  const Grid grid = to_grid(row, buffer, most, [&](int64_t i, narrow_ivec part) {
    if constexpr (kCount == 2) {
      const narrow_ivec high = (part + 128) >> 8, low = part - (high << 8);
      *reinterpret_cast<integer_vec *>(to(1, i)) = __builtin_convertvector(low, integer_vec);
      sums_low += low, part = high;
    }
    sums += part;
    *reinterpret_cast<integer_vec *>(to(0, i)) = __builtin_convertvector(part, integer_vec);
  });
  int64_t sum = 0, sum_low = 0;
  for (int i = 0; i < kDoubles; ++i) sum += sums[i], sum_low += sums_low[i];
  return token_of(grid, sum, sum_low);
}

// x [T, D], rows `stride` apart, on its grids: integers [T, kDigits] rows of `width`, in the order of
// place_in_rows, and what the bound needs.
template <typename E>
int screen_tokens(const E *x, int64_t T, int64_t D, int64_t stride, Integer *integers,
                  Token *tokens, int threads) {
  const double most = most_of_token(padded_width(D), false);
  return for_each_row(T, D, threads, [&](int64_t t, const RowBuffer &buffer) {
    const float *row = read_row(x + t * stride, D, kPanel, buffer.row.get());
    tokens[t] = put_on_grid<kDigits>(row, buffer, most, [&](int64_t digit, int64_t i) {
      return integers + place_in_rows(t * kDigits + digit, i, buffer.width);
    });
  });
}

// The differences of int32 sums and an offset, which wrap, as doubles.
inline dvec unshifted(const int32_t *sums, int32_t offset) {
  const narrow_uvec raw = *reinterpret_cast<const narrow_uvec *>(sums);
  const narrow_ivec product = (narrow_ivec)(raw - uint32_t(offset));
#if defined(__AVX512F__)
  return (dvec)_mm512_cvtepi32_pd((__m256i)product);  // g++ 12 converts by halves
#elif defined(__AVX2__)
  return (dvec)_mm256_cvtepi32_pd((__m128i)product);
#else
  return __builtin_convertvector(product, dvec);
#endif
}

// I of kDoubles units, from the sums of each digit, which are `apart`.
template <int kCount>
inline dvec product_of(const Token &token, const int32_t *sums, int64_t apart) {
  const dvec first = unshifted(sums, int32_t(128 * uint32_t(token.sum)));
  if constexpr (kCount == 1) return first;
  return first * 256.0 + unshifted(sums + apart, int32_t(128 * uint32_t(token.sum_low)));
}

// Which of kUnits units, or of the `units` that there are, are candidates for a token: bit j for unit j.
// `product(j)` is I of kDoubles of them, `bias` [kUnits] has the bias in units of the scale and the
// constant.
template <int64_t kUnits = kPanel, typename Product>
inline uint64_t candidate_mask(const Token &token, const double *bias, const Bounds &bounds,
                               int64_t first, int64_t units, Product product) {
  uint64_t mask = 0;
#pragma GCC unroll 16
  for (int64_t j = 0; j < kUnits; j += kDoubles) {
    const auto at = [&](const double *from) { return *reinterpret_cast<const dvec *>(from + j); };
    const dvec bound = product(j) * token.scale + at(bias) +
                       (at(bounds.of_norm + first) * token.norm +
                        at(bounds.of_residual + first) * token.residual);
#if defined(__AVX512F__)
    mask |= uint64_t(_mm512_cmp_pd_mask((__m512d)bound, _mm512_setzero_pd(), _CMP_NLE_UQ)) << j;
#elif defined(__AVX2__)
    const __m256d kept = _mm256_cmp_pd((__m256d)bound, _mm256_setzero_pd(), _CMP_NLE_UQ);
    mask |= uint64_t(_mm256_movemask_pd(kept)) << j;
#else
    double bounds_of[kDoubles];  // g++ 12 with -fsanitize=undefined reads vector elements wrongly here
    std::memcpy(bounds_of, &bound, sizeof(bounds_of));
    for (int i = 0; i < kDoubles; ++i) mask |= uint64_t(!(bounds_of[i] <= 0)) << (j + i);
#endif
  }
  return units >= kUnits ? mask : mask & ((uint64_t(1) << std::max<int64_t>(units, 0)) - 1);
}

// to [64]: the bias of the units from `first` on, in units of their scales, and the constant.
template <typename E>
inline void bias_bound(const E *bias, int64_t D, int64_t F, const Bounds &bounds, int64_t first,
                       double *to) {
  const double rounding = (2.0 * double(D) + 64) * kUnit + kOurs;
  for (int64_t j = 0; j < kPanel; ++j) {
    const int64_t f = first + j;
    const double b = bias == nullptr || f >= F ? 0 : to_float(bias[f]);
    to[j] = (b + rounding * std::fabs(b)) * bounds.inverse[f] + bounds.constant[f];
  }
}

// masks [T, blocks]: the candidates, bit j of a block for its unit j; counts [T, blocks] of them.
// Returns how many there are; -1, with nothing to be used, if more than `most`.
template <typename E>
int64_t screen(const Integer *integers, const Token *tokens, int64_t T, int64_t D,
               const uint8_t *bytes, const double *bounds, const E *bias, int64_t F, int64_t most,
               uint64_t *masks, int32_t *counts, int threads) {
  constexpr int kTokensAtOnce = kScreenRows / kDigits;
  constexpr int64_t kTokens = 96;     // of a task
  constexpr int64_t kChunkBytes = 384 * 1024;  // of the weight, to stay in the second-level cache
  const int64_t width = padded_width(D), blocks = blocks_of(F);
  const int64_t per_chunk = std::max<int64_t>(kChunkBytes / std::max(width * kPanel, kPanel), 1);
  const int64_t chunks = (blocks + per_chunk - 1) / per_chunk, groups = (T + kTokens - 1) / kTokens;
  const Bounds units(bounds, blocks * kPanel);
  int64_t found = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t group = 0; group < groups; ++group) {
      int64_t so_far;
#pragma omp atomic read
      so_far = found;
      if (so_far > most) continue;
      const Tiles tiles;
      const int64_t first_block = chunk * per_chunk;
      const int64_t last_block = std::min(first_block + per_chunk, blocks);
      const int64_t last = std::min((group + 1) * kTokens, T);
      int64_t here = 0;
      for (int64_t block = first_block; block < last_block; ++block) {
        double shifted[kPanel];
        bias_bound(bias, D, F, units, block * kPanel, shifted);
        for (int64_t part = 0; part < kPanel; part += kScreenUnits) {
          const int64_t unit = block * kPanel + part;
          const uint8_t *at = bytes + unit * width;
          int32_t sums[kScreenRows * kScreenUnits];
          const auto take = [&](int64_t t, int64_t m) {
            const int32_t *of_token = sums + m * kDigits * kScreenUnits;
            const uint64_t mask = candidate_mask<kScreenUnits>(
                tokens[t], shifted + part, units, unit, F - unit,
                [&](int64_t j) { return product_of<kDigits>(tokens[t], of_token + j, kScreenUnits); });
            const int32_t count = __builtin_popcountll(mask);
            uint64_t &whole = masks[t * blocks + block];
            whole = part == 0 ? mask : whole | mask << part;
            counts[t * blocks + block] = part == 0 ? count : counts[t * blocks + block] + count;
            here += count;
          };
          int64_t t = group * kTokens;
          // By tiles the rows behind the last ones are multiplied too, and not used.
          for (; t + (kHasTiles ? 1 : kTokensAtOnce) <= last; t += kTokensAtOnce) {
            tiles.multiply(integers + t * kDigits * width, at, width, sums);
            for (int64_t m = 0; m < std::min<int64_t>(kTokensAtOnce, last - t); ++m) take(t + m, m);
          }
          for (; t < last; ++t) {
            multiply_block<1>(integers + t * width, width, at, width, sums);
            take(t, 0);
          }
        }
      }
#pragma omp atomic
      found += here;
    }
  }
  return found > most ? -1 : found;
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

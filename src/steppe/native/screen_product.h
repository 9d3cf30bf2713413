// The integer product of the screen: integers of x times those of W, which are stored as bytes, larger by
// 128. It is exact: no instruction here saturates, and sums that wrap are those of the bytes alone, which
// 128 Σ x takes away again (`unshifted`).
//
// With VNNI the integers of x are bytes, and one instruction adds four products. With AMX one adds the
// products of 16 rows of x and 16 units, 64 features at once: eight times as many in a second. There x has
// two digits, each a row of bytes, with many tokens too. Without VNNI the one
// instruction for bytes, `vpmaddubsw`, saturates from |x| = 65 on and is no faster than the one for int16,
// since its sums have to be widened at once. So the integers of x are int16 there: the grid of x is then
// so fine that fewer units are candidates, and x needs no second digit in decoding.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace steppe {
namespace STEPPE_TARGET {

constexpr int64_t kStrip = 16;  // units whose bytes lie together
constexpr double kMost = 127;   // of the integers of W

// Digits of an integer of x, 256 · the first + the second; kFewDigits in decoding.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using Integer = int8_t;  // of x
constexpr int kFewDigits = 2;
#if defined(__AMX_INT8__)
constexpr int kDigits = 2;
#else
constexpr int kDigits = 1;
#endif
constexpr double kMostOfTwo = 32639;  // 127 · 256 + 127, so that both digits are bytes
#else
using Integer = int16_t;
constexpr int kFewDigits = 1, kDigits = 1;
#endif

// The largest integer of x, of a row of `width` features, with which a product fits into int32; of `few`
// tokens, T <= 8, too.
inline double most_of_token(int64_t width, [[maybe_unused]] bool few) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  (void)width;
  return (few ? kFewDigits : kDigits) == 2 ? kMostOfTwo : kMost;
#else
  return double(std::min<int64_t>(INT16_MAX, INT32_MAX / (int64_t(kMost) * std::max<int64_t>(width, 1))));
#endif
}

constexpr int64_t kTogether = 4 / sizeof(Integer);  // features that one instruction multiplies and adds

// Where the byte of a feature of a unit is within a strip.
inline int64_t place_in_strip(int64_t feature, int64_t unit) {
  return feature / kTogether * (kTogether * kStrip) + unit * kTogether + feature % kTogether;
}

#if defined(__AVX512F__) || defined(__AVX2__)

// 32-bit sums of kWidth units.
#if defined(__AVX512F__)
typedef __m512i Sums;
inline Sums no_sums() { return _mm512_setzero_si512(); }
inline Sums of_all(int32_t together) { return _mm512_set1_epi32(together); }
inline Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline void store_sums(Sums sums, int32_t *to) { _mm512_storeu_si512(to, sums); }
#if defined(__AVX512VNNI__)
inline Sums bytes_of(const uint8_t *from) { return _mm512_loadu_si512(from); }
inline Sums add_products(Sums sums, Sums bytes, Sums x) { return _mm512_dpbusd_epi32(sums, bytes, x); }
#else
inline Sums bytes_of(const uint8_t *from) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}
inline Sums add_products(Sums sums, Sums bytes, Sums x) {
  return _mm512_add_epi32(sums, _mm512_madd_epi16(bytes, x));
}
#endif
constexpr int kSide = 4;       // vectors of sums side by side, and rows of them: 24 sums, 4 parts of W
constexpr int kBlockRows = 6;  // and a part of x are 29 of 32 registers
#else
typedef __m256i Sums;
inline Sums no_sums() { return _mm256_setzero_si256(); }
inline Sums of_all(int32_t together) { return _mm256_set1_epi32(together); }
inline Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
inline void store_sums(Sums sums, int32_t *to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), sums);
}
#if defined(__AVXVNNI__)
inline Sums bytes_of(const uint8_t *from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
}
inline Sums add_products(Sums sums, Sums bytes, Sums x) {
  return _mm256_dpbusd_avx_epi32(sums, bytes, x);
}
#else
inline Sums bytes_of(const uint8_t *from) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}
inline Sums add_products(Sums sums, Sums bytes, Sums x) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(bytes, x));
}
#endif
constexpr int kSide = 2;       // 8 to 12 sums of 16 registers
constexpr int kBlockRows = 5;
#endif

inline Sums together_at(const Integer *x) {
  int32_t together;
  std::memcpy(&together, x, sizeof(together));
  return of_all(together);
}

// sums [M][64] of M rows of integers, `stride` apart, with a block of bytes: Σ x · (k + 128).
template <int M>
inline void multiply_block(const Integer *x, int64_t stride, const uint8_t *block, int64_t width,
                           int32_t *sums) {
  constexpr int64_t kAtOnce = kSide * kWidth;  // units
  for (int64_t first = 0; first < kPanel; first += kAtOnce) {
    const uint8_t *at[kSide];
    Sums total[M][kSide];
#pragma GCC unroll 4
    for (int k = 0; k < kSide; ++k) {
      const int64_t unit = first + k * kWidth;
      at[k] = block + unit / kStrip * kStrip * width + place_in_strip(0, unit % kStrip);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[m][k] = no_sums();
    }
    int64_t place = 0;
    for (int64_t d = 0; d < width; d += kTogether, place += kTogether * kStrip) {
      Sums bytes[kSide];
#pragma GCC unroll 4
      for (int k = 0; k < kSide; ++k) bytes[k] = bytes_of(at[k] + place);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Sums of_x = together_at(x + m * stride + d);
#pragma GCC unroll 4
        for (int k = 0; k < kSide; ++k) total[m][k] = add_products(total[m][k], bytes[k], of_x);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int k = 0; k < kSide; ++k) store_sums(total[m][k], sums + m * kPanel + first + k * kWidth);
    }
  }
}

constexpr int64_t kLine = 64;
// Bytes of a weight to prefetch: the hardware prefetcher stops at the end of a page.
constexpr int64_t kFetchAhead = 1024;

// sums [T][kFewDigits][16] of the digits of T rows of integers, [T][kFewDigits][width], with a strip of
// bytes.
template <int T>
inline void multiply_strip(const Integer *x, int64_t width, const uint8_t *strip,
                           int32_t (*sums)[kFewDigits][kStrip]) {
  constexpr int kRows = T * kFewDigits, kVectorsOfStrip = kStrip / kWidth;
  // Enough sums at once to hide the latency of adding; kGrain features have as many.
  constexpr int kSets = kRows * kVectorsOfStrip >= 8 ? 1 : 8 / (kRows * kVectorsOfStrip);
  Sums total[kSets][kRows][kVectorsOfStrip];
  for (int s = 0; s < kSets; ++s) {
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kVectorsOfStrip; ++k) total[s][r][k] = no_sums();
    }
  }
  constexpr int64_t kStep = kTogether * kStrip;  // bytes: a cache line, or half of one
  for (int64_t d = 0; d < width; d += kTogether * kSets) {
#pragma GCC unroll 8
    for (int s = 0; s < kSets; ++s, strip += kStep) {
      if (kStep == kLine || s % 2 == 0) __builtin_prefetch(strip + kFetchAhead);
      Sums bytes[kVectorsOfStrip];
#pragma GCC unroll 2
      for (int k = 0; k < kVectorsOfStrip; ++k) {
        bytes[k] = bytes_of(strip + place_in_strip(0, k * kWidth));
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Sums of_x = together_at(x + r * width + d + s * kTogether);
#pragma GCC unroll 2
        for (int k = 0; k < kVectorsOfStrip; ++k) {
          total[s][r][k] = add_products(total[s][r][k], bytes[k], of_x);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kVectorsOfStrip; ++k) {
      for (int s = 1; s < kSets; ++s) total[0][r][k] = add(total[0][r][k], total[s][r][k]);
      store_sums(total[0][r][k], sums[r / kFewDigits][r % kFewDigits] + k * kWidth);
    }
  }
}

#else

constexpr int kBlockRows = 4;

// sums of `rows` rows of integers, rows `stride` apart, with a strip of bytes; sums `stride_to` apart.
inline void multiply_rows(const Integer *x, int rows, int64_t stride, const uint8_t *strip,
                          int64_t width, int32_t *sums, int64_t stride_to) {
  for (int r = 0; r < rows; ++r) {
    uint32_t total[kStrip] = {};
    for (int64_t d = 0; d < width; d += kTogether) {
      const Integer *of_x = x + r * stride + d;
      const uint8_t *bytes = strip + place_in_strip(d, 0);
      for (int64_t j = 0; j < kStrip; ++j) {
        for (int64_t k = 0; k < kTogether; ++k) {
          total[j] += uint32_t(int32_t(of_x[k]) * int32_t(bytes[j * kTogether + k]));
        }
      }
    }
    std::memcpy(sums + r * stride_to, total, sizeof(total));
  }
}

template <int M>
inline void multiply_block(const Integer *x, int64_t stride, const uint8_t *block, int64_t width,
                           int32_t *sums) {
  for (int64_t unit = 0; unit < kPanel; unit += kStrip) {
    multiply_rows(x, M, stride, block + unit * width, width, sums + unit, kPanel);
  }
}

template <int T>
inline void multiply_strip(const Integer *x, int64_t width, const uint8_t *strip,
                           int32_t (*sums)[kFewDigits][kStrip]) {
  multiply_rows(x, T * kFewDigits, width, strip, width, sums[0][0], kStrip);
}

#endif

#if defined(__AMX_INT8__)

constexpr int kTile = 16;               // rows of a tile
constexpr int64_t kTileRow = 64;        // bytes of one: features of x, or four of each unit of a strip
constexpr int64_t kTileBytes = kTile * kTileRow;
constexpr int kScreenRows = 2 * kTile;  // of x at once: of 16 tokens, of two digits each
constexpr int64_t kScreenUnits = 2 * kStrip;
constexpr bool kHasTiles = true;

// Where the integer of a row of x is: in tiles, since rows far apart would contend for the cache.
inline int64_t place_in_rows(int64_t row, int64_t feature, int64_t width) {
  return row / kTile * kTile * width + feature / kTileRow * kTileBytes + row % kTile * kTileRow +
         feature % kTileRow;
}

// The shapes of eight tiles, as the processor reads them. A constant, since g++ 12 does not know that
// more than the first bytes are read.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kTileRow, kTileRow, kTileRow, kTileRow, kTileRow, kTileRow, kTileRow, kTileRow};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
constexpr Shapes kShapes;
static_assert(sizeof(Shapes) == 64, "as the processor reads it");

// The tiles of a thread, while it lives: 0 to 3 for sums, 4 and 5 for x, 6 and 7 for W.
struct Tiles {
  Tiles() { _tile_loadconfig(&kShapes); }
  Tiles(const Tiles &) = delete;
  ~Tiles() { _tile_release(); }

  // sums [kScreenRows][kScreenUnits] of rows of x from one on with two strips, which are as tiles of W
  // have to be.
  void multiply(const Integer *x, const uint8_t *strip, int64_t width, int32_t *sums) const {
    constexpr int64_t kSumsRow = kScreenUnits * sizeof(int32_t);
    const Integer *lower = x + kTile * width;
    const uint8_t *other = strip + kStrip * width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t place = 0; place < kTile * width; place += kTileBytes) {
      _tile_loadd(4, x + place, kTileRow);
      _tile_loadd(6, strip + place, kTileRow);
      _tile_loadd(7, other + place, kTileRow);
      _tile_loadd(5, lower + place, kTileRow);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, sums, kSumsRow);
    _tile_stored(1, sums + kStrip, kSumsRow);
    _tile_stored(2, sums + kTile * kScreenUnits, kSumsRow);
    _tile_stored(3, sums + kTile * kScreenUnits + kStrip, kSumsRow);
  }
};

#else

constexpr int kScreenRows = kBlockRows;
constexpr int64_t kScreenUnits = kPanel;
constexpr bool kHasTiles = false;

inline int64_t place_in_rows(int64_t row, int64_t feature, int64_t width) {
  return row * width + feature;
}

struct Tiles {
  Tiles() {}  // not trivial, so that none is called unused
  void multiply(const Integer *x, const uint8_t *block, int64_t width, int32_t *sums) const {
    multiply_block<kScreenRows>(x, width, block, width, sums);
  }
};

#endif

}  // namespace STEPPE_TARGET
}  // namespace steppe

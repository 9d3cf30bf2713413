// Candidates in decoding, T <= 8. x is on grids of 16 bits, as two bytes: twice the products cost nothing,
// since the time goes into reading the bytes of W from memory, and the tighter bound leaves fewer rows of
// W and V to read.
#pragma once

#include <vector>

#include "decode.h"
#include "screen.h"

namespace steppe {
namespace STEPPE_TARGET {

// Tokens on grids of 16 bits: integers = 256 · high + low, both int8 [T][width].
struct WideTokens {
  WideTokens(int64_t T, int64_t D)
      : width(padded_width(D)), high(T * width), low(T * width), tokens(T) {}
  int64_t width;
  std::vector<int8_t> high, low;
  std::vector<Token> tokens;
};

template <typename E>
WideTokens wide_tokens(const E *x, int64_t T, int64_t D) {
  WideTokens wide(T, D);
  const RowBuffer buffer(D);
  if (!buffer.is_there()) throw std::bad_alloc();
  for (int64_t t = 0; t < T; ++t) {
    const float *row = read_row(x + t * D, D, kPanel, buffer.row.get());
    int8_t *high = wide.high.data() + t * wide.width, *low = wide.low.data() + t * wide.width;
    narrow_ivec sum_high{}, sum_low{};
    const Grid grid = to_grid(row, buffer, kMostWide, [&](int64_t i, narrow_ivec part) {
      const narrow_ivec upper = (part + 128) >> 8, lower = part - (upper << 8);
      sum_high += upper, sum_low += lower;
      *reinterpret_cast<byte_vec *>(high + i) = __builtin_convertvector(upper, byte_vec);
      *reinterpret_cast<byte_vec *>(low + i) = __builtin_convertvector(lower, byte_vec);
    });
    int64_t of_high = 0, of_low = 0;
    for (int i = 0; i < kDoubles; ++i) of_high += sum_high[i], of_low += sum_low[i];
    wide.tokens[t] = token_of(grid, of_high, of_low);
  }
  return wide;
}

// sums [T][2][16] of the high and the low bytes with a strip of W's: Σ x · (k + 128), which wrap.
template <int T>
inline void multiply_strip(const WideTokens &wide, const uint8_t *strip, int32_t (*sums)[2][kStrip]) {
#if defined(__AVX512VNNI__)
  constexpr int kSets = T >= 4 ? 1 : 4 / T;  // enough sums at once to hide the latency of adding
  __m512i high[T][kSets], low[T][kSets];
  for (int t = 0; t < T; ++t) {
    for (int s = 0; s < kSets; ++s) high[t][s] = low[t][s] = _mm512_setzero_si512();
  }
  for (int64_t d = 0; d < wide.width; d += 4 * kSets) {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s, strip += 4 * kStrip) {
      const __m512i bytes = _mm512_loadu_si512(strip);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        int32_t four[2];
        std::memcpy(&four[0], wide.high.data() + t * wide.width + d + 4 * s, 4);
        std::memcpy(&four[1], wide.low.data() + t * wide.width + d + 4 * s, 4);
        high[t][s] = _mm512_dpbusd_epi32(high[t][s], bytes, _mm512_set1_epi32(four[0]));
        low[t][s] = _mm512_dpbusd_epi32(low[t][s], bytes, _mm512_set1_epi32(four[1]));
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int s = 1; s < kSets; ++s) {
      high[t][0] = _mm512_add_epi32(high[t][0], high[t][s]);
      low[t][0] = _mm512_add_epi32(low[t][0], low[t][s]);
    }
    _mm512_storeu_si512(sums[t][0], high[t][0]);
    _mm512_storeu_si512(sums[t][1], low[t][0]);
  }
#else
  uint32_t total[T][2][kStrip] = {};
  for (int64_t d = 0; d < wide.width; ++d) {
    for (int64_t j = 0; j < kStrip; ++j) {
      const int32_t byte = strip[(d / 4 * kStrip + j) * 4 + d % 4];
      for (int t = 0; t < T; ++t) {
        total[t][0][j] += uint32_t(wide.high[t * wide.width + d] * byte);
        total[t][1][j] += uint32_t(wide.low[t * wide.width + d] * byte);
      }
    }
  }
  std::memcpy(sums, total, sizeof(total));
#endif
}

// masks [T, blocks] of the candidates.
template <int T, typename E>
void screen_decode_of(const WideTokens &wide, const uint8_t *bytes, const Bounds &bounds, const E *bias,
                   int64_t D, int64_t F, uint64_t *masks, int threads) {
  const int64_t blocks = blocks_of(F);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    constexpr int64_t kStrips = kPanel / kStrip;
    int32_t sums[kStrips][T][2][kStrip];
    for (int64_t s = 0; s < kStrips; ++s) {
      multiply_strip<T>(wide, bytes + (b * kStrips + s) * kStrip * wide.width, sums[s]);
    }
    double shifted[kPanel];
    bias_bound(bias, D, F, bounds, b * kPanel, shifted);
    for (int t = 0; t < T; ++t) {
      const Token &token = wide.tokens[t];
      const int32_t offset = int32_t(128 * uint32_t(token.sum));
      const int32_t offset_low = int32_t(128 * uint32_t(token.sum_low));
      const auto product = [&](int64_t j) {
        const int32_t(*of_strip)[kStrip] = sums[j / kStrip][t];
        return unshifted(of_strip[0] + j % kStrip, offset) * 256.0 +
               unshifted(of_strip[1] + j % kStrip, offset_low);
      };
      masks[t * blocks + b] =
          candidate_mask(token, shifted, bounds, b * kPanel, F - b * kPanel, product);
    }
  }
}

template <typename E>
void screen_decode(const WideTokens &wide, const uint8_t *bytes, const Bounds &bounds, const E *bias,
                int64_t D, int64_t F, uint64_t *masks, int threads) {
  with_rows(int64_t(wide.tokens.size()), [&](auto rows) {
    screen_decode_of<rows>(wide, bytes, bounds, bias, D, F, masks, threads);
  });
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

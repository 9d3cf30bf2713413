// Candidates in decoding, T <= 8. x is on grids of 16 bits, with VNNI as two bytes: the products cost nothing,
// since the time goes into reading the bytes of W from memory, and the tighter bound leaves fewer rows of
// W and V to read.
#pragma once

#include <vector>

#include "decode.h"
#include "screen.h"

namespace steppe {
namespace STEPPE_TARGET {

// Few tokens on their grids: integers of kFewDigits digits, [T][kFewDigits][width].
struct FewTokens {
  FewTokens(int64_t T, int64_t D) : width(padded_width(D)), digits(T * kFewDigits * width), tokens(T) {}
  int64_t width;
  std::vector<Integer> digits;
  std::vector<Token> tokens;
};

template <typename E>
FewTokens few_tokens(const E *x, int64_t T, int64_t D) {
  FewTokens few(T, D);
  const RowBuffer buffer(D);
  if (!buffer.is_there()) throw std::bad_alloc();
  const double most = most_of_token(few.width, true);
  for (int64_t t = 0; t < T; ++t) {
    const float *row = read_row(x + t * D, D, kPanel, buffer.row.get());
    Integer *first = few.digits.data() + t * kFewDigits * few.width;
    few.tokens[t] = put_on_grid<kFewDigits>(
        row, buffer, most, [&](int64_t digit, int64_t i) { return first + digit * few.width + i; });
  }
  return few;
}

// masks [T, blocks] of the candidates.
template <int T, typename E>
void screen_decode_of(const FewTokens &few, const uint8_t *bytes, const Bounds &bounds, const E *bias,
                   int64_t D, int64_t F, uint64_t *masks, int threads) {
  const int64_t blocks = blocks_of(F);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    constexpr int64_t kStrips = kPanel / kStrip;
    int32_t sums[kStrips][T][kFewDigits][kStrip];
    for (int64_t s = 0; s < kStrips; ++s) {
      multiply_strip<T>(few.digits.data(), few.width,
                        bytes + (b * kStrips + s) * kStrip * few.width, sums[s]);
    }
    double shifted[kPanel];
    bias_bound(bias, D, F, bounds, b * kPanel, shifted);
    for (int t = 0; t < T; ++t) {
      const Token &token = few.tokens[t];
      const auto product = [&](int64_t j) {
        return product_of<kFewDigits>(token, sums[j / kStrip][t][0] + j % kStrip, kStrip);
      };
      masks[t * blocks + b] =
          candidate_mask(token, shifted, bounds, b * kPanel, F - b * kPanel, product);
    }
  }
}

template <typename E>
void screen_decode(const FewTokens &few, const uint8_t *bytes, const Bounds &bounds, const E *bias,
                int64_t D, int64_t F, uint64_t *masks, int threads) {
  with_rows(int64_t(few.tokens.size()), [&](auto rows) {
    screen_decode_of<rows>(few, bytes, bounds, bias, D, F, masks, threads);
  });
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

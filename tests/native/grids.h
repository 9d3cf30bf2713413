// Rows on grids of integers, and which entries of a product may be above zero: the definition of
// docs/screening.md, by the plainest loops.
#pragma once

#include <memory>

#include "csr.h"
#include "steppe_native.h"

namespace checks {

inline constexpr double kUnit = 0x1p-24, kTiny = 0x1p-126;

inline int64_t width_of(int64_t D) { return ceil_div(D, 128) * 128; }

// The largest integer of a token of D features; `few` tokens are those of decode_mlp.
inline double most_of(int64_t D, bool few) { return double(kernels().token_most(D, few)); }

// The largest integer of two bytes, which stand side by side in a row each.
inline constexpr int64_t kMostOfTwo = 127 * 256 + 127;

// Whether the integers of x are int16.
inline bool are_words() { return most_of(128, true) > double(kMostOfTwo); }

// Bytes of a row of integers of x.
inline int64_t digits() { return most_of(128, false) == double(kMostOfTwo) ? 2 : 1; }

// Where the integer of a digit of a token is; rows of two digits are in tiles.
inline int64_t place_of(int64_t token, int64_t digit, int64_t d, int64_t D) {
  const int64_t row = token * digits() + digit;
  if (digits() == 1) return row * width_of(D) + d;
  return row / 16 * 16 * width_of(D) + d / 64 * 16 * 64 + row % 16 * 64 + d % 64;
}

// Integers of x, as many as there have to be: with two digits for a multiple of 16 tokens.
inline int64_t room_for(int64_t T, int64_t D) {
  return (digits() == 2 ? ceil_div(T, 16) * 16 : T) * digits() * width_of(D);
}

// A row on its grid, by the definition: integers nearest to the rotated values over the scale.
struct Grid {
  std::vector<double> rotated;
  std::vector<int64_t> integers;
  double scale = 1, norm = 0, residual = 0;
  bool has_midpoint = false;  // where rounding of the last bit decides
};

// Entry (a, b) of a Hadamard matrix is -1 to the number of bits that a and b have in common.
inline std::vector<double> rotate(const std::vector<double> &row) {
  const int64_t step = width_of(int64_t(row.size())) / 16;
  std::vector<double> padded(row), rotated(16 * step);
  padded.resize(16 * step);
  for (int64_t part = 0; part < 16; ++part) {
    for (int64_t other = 0; other < 16; ++other) {
      const double sign = __builtin_popcountll(part & other) % 2 ? -0.25 : 0.25;
      for (int64_t i = 0; i < step; ++i) rotated[part * step + i] += sign * padded[other * step + i];
    }
  }
  return rotated;
}

template <typename E>
Grid grid_of(const Matrix<E> &m, int64_t r, double most) {
  std::vector<double> row(m.columns);
  for (int64_t d = 0; d < m.columns; ++d) row[d] = to_double(m(r, d));
  Grid grid;
  grid.rotated = rotate(row);
  double largest = 0, squares = 0, off = 0;
  for (double value : grid.rotated) {
    largest = std::max(largest, std::fabs(value));
    squares += value * value;
  }
  grid.norm = std::sqrt(squares);
  const bool usable = std::isfinite(grid.norm) && largest > 0;
  if (usable) grid.scale = largest / most;
  for (double value : grid.rotated) {
    const double steps = usable ? value / grid.scale : 0;
    grid.has_midpoint |= std::fabs(std::fabs(steps - std::trunc(steps)) - 0.5) < 1e-9;
    grid.integers.push_back(std::llrint(steps));
    const double difference = value - double(grid.integers.back()) * grid.scale;
    off += difference * difference;
  }
  grid.residual = std::sqrt(off);
  return grid;
}

template <typename E>
std::vector<Grid> grids_of(const Matrix<E> &m, double most) {
  std::vector<Grid> grids;
  for (int64_t r = 0; r < m.rows; ++r) grids.push_back(grid_of(m, r, most));
  return grids;
}

// A weight on its grids, as the library has it.
struct Screen {
  std::unique_ptr<Output<uint8_t>> bytes;
  std::unique_ptr<Output<double>> bounds;
};

template <typename E>
Screen screen_of(const E *w, int64_t F, int64_t D, int64_t row_stride, int64_t panel_stride,
                 const std::string &what) {
  const int64_t units = ceil_div(F, 64) * 64;
  Screen first;
  for (int threads : kTeams) {
    Screen screen{std::make_unique<Output<uint8_t>>(units * width_of(D)),
                  std::make_unique<Output<double>>(4 * units)};
    check(kernels().screen_weight(w, kDtype<E>, F, D, row_stride, panel_stride, screen.bytes->data(),
                               screen.bounds->data(), threads) == 0,
          what + ": status");
    check(screen.bytes->guards_hold() && screen.bounds->guards_hold(), what + ": writes outside");
    if (!first.bytes) {
      first = std::move(screen);
    } else {
      check(*screen.bytes == *first.bytes && *screen.bounds == *first.bounds,
            what + ": other bits with " + std::to_string(threads) + " threads");
    }
  }
  return first;
}

// Which entries may be above zero: 1 surely a candidate, 0 surely not, -1 where rounding decides.
template <typename E>
std::vector<int> candidates_of(const std::vector<Grid> &x, const std::vector<Grid> &w,
                               const E *bias, int64_t D) {
  std::vector<int> candidates;
  const double rounding = (2.0 * double(D) + 64) * kUnit + 0x1p-36, root = std::sqrt(double(D));
  for (const Grid &token : x) {
    for (size_t f = 0; f < w.size(); ++f) {
      const Grid &unit = w[f];
      int64_t product = 0;
      for (size_t d = 0; d < unit.integers.size(); ++d) {
        product += token.integers[d] * unit.integers[d];
      }
      const double b = bias == nullptr ? 0 : to_double(bias[f]);
      const double size = unit.norm + unit.residual;
      const double slack = token.norm * (unit.residual + rounding * size + kTiny * root) +
                           token.residual * size +
                           kTiny * (root * unit.norm + 2.0 * double(D) + 64) +
                           rounding * std::fabs(b);
      const double estimate = double(product) * token.scale * unit.scale;
      const double bound = estimate + slack + b, all = std::fabs(estimate) + slack + std::fabs(b);
      if (!(token.norm < 0x1p62) || !(unit.norm < 0x1p63) || !(std::fabs(b) < 0x1p125)) {
        candidates.push_back(1);
      } else if (token.has_midpoint || unit.has_midpoint || std::fabs(bound) <= 1e-9 * all) {
        candidates.push_back(-1);
      } else {
        candidates.push_back(bound > 0);
      }
    }
  }
  return candidates;
}

// Spoilt places of x, W and the bias: all of a row, of a column or of a token are candidates then.
template <typename E>
void spoil(Matrix<E> *x, Matrix<E> *w, Input<E> *bias) {
  const float inf = std::numeric_limits<float>::infinity();
  if (x->rows > 5) {
    (*x)(1, 0) = near<E>(std::numeric_limits<float>::quiet_NaN());
    (*x)(3, x->columns - 1) = near<E>(-inf);
    (*x)(4, 0) = near<E>(1e25f);
  }
  if (w->rows > 5) {
    (*w)(0, w->columns - 1) = near<E>(inf);
    (*w)(5, 0) = near<E>(std::numeric_limits<float>::quiet_NaN());
    (*w)(2, 0) = near<E>(1e25f);
    if (bias->size() > 0) (*bias)[3] = near<E>(-inf), (*bias)[4] = near<E>(1e38f);
  }
}

}  // namespace checks

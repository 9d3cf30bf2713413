// Matrices, column-tiled CSR and panels as steppe_native.h defines them, made and read by the plainest loops.
#pragma once

#include <algorithm>

#include "checks.h"
#include "steppe_native.h"

namespace checks {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A matrix [rows, columns] of any strides, its memory no longer than they need.
template <typename E>
struct Matrix {
  int64_t rows, columns, row_stride, column_stride;
  Input<E> memory;

  Matrix(int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride)
      : rows(rows), columns(columns), row_stride(row_stride), column_stride(column_stride),
        memory(rows > 0 && columns > 0
                   ? (rows - 1) * row_stride + (columns - 1) * column_stride + 1
                   : 0) {
    for (int64_t i = 0; i < memory.size(); ++i) memory[i] = near<E>(uniform());
  }
  Matrix(int64_t rows, int64_t columns) : Matrix(rows, columns, columns, 1) {}

  E &operator()(int64_t r, int64_t c) { return memory[r * row_stride + c * column_stride]; }
  const E &operator()(int64_t r, int64_t c) const {
    return memory[r * row_stride + c * column_stride];
  }
  const E *data() const { return memory.data(); }
};

template <typename E>
Input<E> panels_of(const Matrix<E> &m) {
  Input<E> panels(ceil_div(m.columns, 64) * m.rows * 64);
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t c = 0; c < m.columns; ++c) {
      panels[(c / 64 * m.rows + r) * 64 + c % 64] = m(r, c);
    }
  }
  return panels;
}

// A matrix as it is given to the kernels that gather from it: with memory for panels, or as panels.
template <typename E>
struct Gathered {
  Output<E> panels;
  steppe_matrix given;

  Gathered(const Matrix<E> &m, bool packed)
      : panels(ceil_div(m.columns, 64) * m.rows * 64),
        given{packed ? nullptr : m.data(), m.rows, m.columns, m.row_stride, m.column_stride,
              panels.data()} {
    const Input<E> filled = panels_of(m);
    if (packed) std::copy_n(filled.data(), filled.size(), panels.data());
  }
};

// In one of the ways that a matrix can lie in memory.
template <typename E>
Matrix<E> random_matrix(int64_t rows, int64_t columns) {
  switch (generator()() % 4) {
    case 0: return {rows, columns};
    case 1: return {rows, columns, columns + 3, 1};
    case 2: return {rows, columns, 1, rows + 2};
    default: return {rows, columns, 3, 3 * rows + 1};
  }
}

// A matrix [rows, columns] in column-tiled CSR form. Without columns it has one tile, which is empty.
template <typename E>
struct Csr {
  int64_t rows, columns, tile;
  Input<int64_t> offsets;
  Input<int16_t> index;
  Input<E> values;

  // `at(row, column, value)` tells whether there is an entry, and sets its value.
  template <typename At>
  Csr(int64_t rows, int64_t columns, int64_t tile, At at)
      : rows(rows), columns(columns), tile(tile), offsets(tiles() * rows + 1) {
    std::vector<int16_t> index_so_far;
    std::vector<E> values_so_far;
    for (int64_t j = 0; j < tiles(); ++j) {
      for (int64_t r = 0; r < rows; ++r) {
        offsets[j * rows + r] = int64_t(values_so_far.size());
        for (int64_t c = j * tile; c < std::min((j + 1) * tile, columns); ++c) {
          E value;
          if (!at(r, c, &value)) continue;
          index_so_far.push_back(int16_t(c - j * tile));
          values_so_far.push_back(value);
        }
      }
    }
    offsets[tiles() * rows] = int64_t(values_so_far.size());
    index = Input<int16_t>(index_so_far);
    values = Input<E>(values_so_far);
  }

  int64_t tiles() const { return std::max<int64_t>(ceil_div(columns, tile), 1); }
  int64_t entries() const { return values.size(); }

  // Calls `f(entry, row, column)` for each entry, in order.
  template <typename F>
  void each(F f) const {
    for (int64_t j = 0; j < tiles(); ++j) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = offsets[j * rows + r]; i < offsets[j * rows + r + 1]; ++i) {
          f(i, r, j * tile + index[i]);
        }
      }
    }
  }
};

// Entries at random places, with values of either sign, as gradients have.
template <typename E>
Csr<E> random_csr(int64_t rows, int64_t columns, int64_t tile, double density) {
  return Csr<E>(rows, columns, tile, [&](int64_t, int64_t, E *value) {
    *value = near<E>(uniform());
    return (uniform() + 1) / 2 < density;
  });
}

// A [rows, columns] in CSR form times M [columns, D], plus a bias [D] if it has any.
template <typename E>
std::vector<Sum> product(const Csr<E> &a, const Matrix<E> &m, const Input<E> &bias) {
  std::vector<Sum> sums(a.rows * m.columns);
  for (int64_t i = 0; bias.size() > 0 && i < int64_t(sums.size()); ++i) {
    sums[i].add(to_double(bias[i % m.columns]));
  }
  a.each([&](int64_t i, int64_t r, int64_t c) {
    for (int64_t d = 0; d < m.columns; ++d) {
      sums[r * m.columns + d].add(to_double(a.values[i]) * to_double(m(c, d)));
    }
  });
  return sums;
}

}  // namespace checks

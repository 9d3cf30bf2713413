// The kernels against float64 loops, at the level of instructions that STEPPE_ISA names:
//
//   make test-native
//   STEPPE_ISA=avx2 build/native-tests/kernels_test
//
// Prints "N passed, M failed"; its exit status is 1 if any failed.
#include <cstdlib>

#include "csr.h"
#include "steppe_native.h"

using namespace checks;

void test_screening();        // in screen_test.cpp
void test_decode_blocks();  // in decode_mlp_test.cpp

namespace {

// p with a given share of positive entries, and the values that a comparison gets wrong.
template <typename E>
Matrix<E> activations(int64_t T, int64_t F, int64_t stride, double density) {
  Matrix<E> p(T, F, stride, 1);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const float special[] = {nan, -nan, inf, -inf, 0.0f, -0.0f, 1e-40f, -1e-40f};
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t f = 0; f < F; ++f) {
      const float magnitude = (uniform() + 1.01f) / 2;
      p(t, f) = near<E>((uniform() + 1) / 2 < density ? magnitude : -magnitude);
      if (density > 0 && density < 1 && generator()() % 8 == 0) {
        p(t, f) = near<E>(special[generator()() % 8]);
      }
    }
  }
  return p;
}

template <typename E>
void test_compaction(int64_t T, int64_t F, int64_t stride, int64_t tile, double density) {
  const std::string what = std::string("compaction ") + kName<E> + shape({T, F, stride, tile});
  const Matrix<E> p = activations<E>(T, F, stride, density);
  const Csr<E> list(T, F, tile, [&](int64_t t, int64_t f, E *value) {
    *value = p(t, f);
    return !(to_double(*value) <= 0);
  });
  const int64_t blocks = ceil_div(F, 64), tiles = ceil_div(F, tile);
  const auto counts = same_for_all_teams<int32_t>(
      T * blocks, what + " counts", [&](int32_t *out, int threads) {
        kernels().count(p.data(), kDtype<E>, T, F, stride, out, threads);
      });
  check(counts.guards_hold(), what + " counts: writes outside");
  std::vector<int32_t> expected(T * blocks);
  list.each([&](int64_t, int64_t t, int64_t f) { ++expected[t * blocks + f / 64]; });
  check(same_bits(expected.data(), counts.data(), T * blocks), what + " counts");

  Output<int64_t> offsets(tiles * T + 1);
  const int64_t entries = steppe_offsets(counts.data(), T, F, tile, offsets.data());
  check(entries == list.entries(), what + " number of entries");
  check(same_bits(list.offsets.data(), offsets.data(), offsets.size()), what + " offsets");
  check(offsets.guards_hold(), what + " offsets: writes outside");

  for (int threads : kTeams) {
    Output<int16_t> index(entries);
    Output<E> values(entries);
    kernels().fill(p.data(), kDtype<E>, T, F, stride, tile, offsets.data(), index.data(),
                values.data(), threads);
    check(same_bits(list.index.data(), index.data(), entries), what + " index");
    check(same_bits(list.values.data(), values.data(), entries), what + " values");
    check(index.guards_hold() && values.guards_hold(), what + ": writes outside");
  }
}

template <typename E>
void test_pack(int64_t N, int64_t D, int64_t row_stride, int64_t column_stride) {
  const std::string what =
      std::string("pack ") + kName<E> + shape({N, D, row_stride, column_stride});
  const Matrix<E> m(N, D, row_stride, column_stride);
  const Input<E> expected = panels_of(m);
  const auto got = same_for_all_teams<E>(expected.size(), what, [&](E *out, int threads) {
    kernels().pack(m.data(), kDtype<E>, N, D, row_stride, column_stride, out, threads);
  });
  check(same_bits(expected.data(), got.data(), expected.size()), what);
  check(got.guards_hold(), what + ": writes outside");
}

// Where an output [T, D] of spmm lies.
enum class Layout { kRows, kSpacedRows, kColumns, kBothSpaced };

template <typename E>
void test_spmm(int64_t T, int64_t N, int64_t D, int64_t tile, double density, Layout layout,
               bool with_bias, bool accumulate) {
  const std::string what = std::string("spmm ") + kName<E> + shape({T, N, D, tile}) + " layout " +
                           std::to_string(int(layout)) + (with_bias ? " bias" : "") +
                           (accumulate ? " accumulate" : "");
  const Csr<E> a = random_csr<E>(T, N, tile, density);
  const Matrix<E> m = random_matrix<E>(N, D);
  Input<E> bias(with_bias ? D : 0);
  for (int64_t d = 0; d < bias.size(); ++d) bias[d] = near<E>(uniform());

  const bool by_columns = layout == Layout::kColumns || layout == Layout::kBothSpaced;
  const int64_t gap = layout == Layout::kSpacedRows ? 5 : 0;
  const int64_t row_stride = layout == Layout::kBothSpaced ? 3 : by_columns ? 1 : D + gap;
  const int64_t col_stride = by_columns ? row_stride * T + 2 : 1;
  const int64_t size = T > 0 && D > 0 ? (T - 1) * row_stride + (D - 1) * col_stride + 1 : 0;
  const auto at = [&](int64_t i) { return i / D * row_stride + i % D * col_stride; };

  std::vector<Sum> sums = product(a, m, bias);
  std::vector<E> before(T * D);
  for (int64_t i = 0; accumulate && i < T * D; ++i) {
    before[i] = near<E>(uniform());
    sums[i].add(to_double(before[i]));
  }
  const auto run = [&](bool packed) {
    return same_for_all_teams<E>(size, what, [&](E *out, int threads) {
      for (int64_t i = 0; accumulate && i < T * D; ++i) out[at(i)] = before[i];
      const Gathered<E> from(m, packed);
      const int status =
          kernels().spmm(a.values.data(), a.index.data(), a.offsets.data(), kDtype<E>, T, tile,
                      &from.given, with_bias ? bias.data() : nullptr, out, row_stride, col_stride,
                      accumulate, threads);
      check(status == 0, what + ": status");
      check(from.panels.guards_hold(), what + ": writes outside the panels");
    });
  };
  const auto got = run(true);
  check(got == run(false), what + ": other bits of a matrix without panels");
  check_sums(sums, got, at, what);
  int64_t touched = 0;
  for (int64_t i = 0; i < size; ++i) touched += !got.is_untouched(i);
  check(touched <= T * D, what + ": writes between its rows");
}

// An output of more than 4 MB on whole cache lines may be written past the caches: the same bits as
// where it lies askew, and nothing outside.
template <typename E>
void test_large_output(int64_t T, int64_t D, bool by_columns) {
  const std::string what = std::string("large output ") + kName<E> + shape({T, D, by_columns});
  constexpr int64_t kRows = 40, kGuard = 64;
  const Csr<E> a = random_csr<E>(T, kRows, 64, 0.1);
  const Matrix<E> m(kRows, D);
  const int64_t row_stride = by_columns ? 1 : D, column_stride = by_columns ? T : 1;
  const auto run = [&](E *out, int threads) {
    const Gathered<E> from(m, true);
    const int status = kernels().spmm(a.values.data(), a.index.data(), a.offsets.data(), kDtype<E>, T,
                                   64, &from.given, nullptr, out, row_stride, column_stride, 0,
                                   threads);
    check(status == 0, what + ": status");
  };
  Output<E> askew(T * D + 1);
  const bool is_whole = reinterpret_cast<uintptr_t>(askew.data()) % 64 == 0;
  E *const expected = askew.data() + is_whole;
  run(expected, 1);
  for (int threads : kTeams) {
    std::vector<E> memory(T * D + 2 * kGuard);
    std::memset(static_cast<void *>(memory.data()), 0x5a, memory.size() * sizeof(E));
    E *const start = memory.data() + kGuard;
    const int64_t gap = (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64 / sizeof(E);
    E *const out = start + gap;
    const std::vector<E> before = memory;
    run(out, threads);
    check(same_bits(expected, out, T * D), what + ": other bits on whole lines");
    check(same_bits(before.data(), memory.data(), kGuard + gap) &&
              same_bits(before.data() + kGuard + gap + T * D, out + T * D, kGuard - gap),
          what + ": writes outside");
  }
}

template <typename E>
void test_sampled(int64_t T, int64_t N, int64_t D, int64_t tile, double density, bool with_bias) {
  const std::string what = std::string("sampled ") + kName<E> + shape({T, N, D, tile}) +
                           (with_bias ? " bias" : "");
  const Csr<E> list = random_csr<E>(T, N, tile, density);
  const Matrix<E> g(T, D), m = random_matrix<E>(N, D);
  const Input<E> panels_g = panels_of(g);
  Input<E> bias(with_bias ? N : 0);
  for (int64_t n = 0; n < bias.size(); ++n) bias[n] = near<E>(uniform());
  std::vector<Sum> sums(list.entries());
  list.each([&](int64_t i, int64_t t, int64_t n) {
    if (with_bias) sums[i].add(to_double(bias[n]));
    for (int64_t d = 0; d < D; ++d) sums[i].add(to_double(g(t, d)) * to_double(m(n, d)));
  });
  const auto run = [&](bool packed) {
    return same_for_all_teams<E>(list.entries(), what, [&](E *out, int threads) {
      const Gathered<E> from(m, packed);
      const int status = kernels().sampled(list.index.data(), list.offsets.data(), kDtype<E>, T, tile,
                                        panels_g.data(), &from.given,
                                        with_bias ? bias.data() : nullptr, out, threads);
      check(status == 0, what + ": status");
      check(from.panels.guards_hold(), what + ": writes outside the panels");
    });
  };
  const auto got = run(true);
  check(got == run(false), what + ": other bits of a matrix without panels");
  check_sums(sums, got, what);
}

template <typename E>
void test_transpose(int64_t T, int64_t N, int64_t tile, int64_t tile_t, double density, bool two) {
  const std::string what = std::string("transpose ") + kName<E> + shape({T, N, tile, tile_t});
  const Csr<E> a = random_csr<E>(T, N, tile, density);
  Input<E> values_b(a.entries());
  for (int64_t i = 0; i < a.entries(); ++i) values_b[i] = near<E>(uniform());
  std::vector<int64_t> entry_at(T * N, -1);
  a.each([&](int64_t i, int64_t t, int64_t n) { entry_at[t * N + n] = i; });
  const auto turned = [&](const Input<E> &values) {
    return Csr<E>(N, T, tile_t, [&](int64_t n, int64_t t, E *value) {
      const int64_t i = entry_at[t * N + n];
      if (i >= 0) *value = values[i];
      return i >= 0;
    });
  };
  const Csr<E> expected_a = turned(a.values), expected_b = turned(values_b);
  for (int threads : kTeams) {
    Output<E> got_a(a.entries()), got_b(two ? a.entries() : 0);
    Output<int16_t> index(a.entries());
    Output<int64_t> offsets(expected_a.offsets.size());
    kernels().transpose(a.values.data(), two ? values_b.data() : nullptr, a.index.data(),
                     a.offsets.data(), kDtype<E>, T, N, tile, tile_t, got_a.data(),
                     two ? got_b.data() : nullptr, index.data(), offsets.data(), threads);
    check(same_bits(expected_a.offsets.data(), offsets.data(), offsets.size()), what + " offsets");
    check(same_bits(expected_a.index.data(), index.data(), index.size()), what + " index");
    check(same_bits(expected_a.values.data(), got_a.data(), got_a.size()), what + " values");
    check(same_bits(expected_b.values.data(), got_b.data(), got_b.size()), what + " second values");
    check(got_a.guards_hold() && got_b.guards_hold() && index.guards_hold() &&
              offsets.guards_hold(),
          what + ": writes outside");
  }
}

template <typename E>
void test_row_sums(int64_t T, int64_t N, int64_t tile, double density) {
  const std::string what = std::string("row_sums ") + kName<E> + shape({T, N, tile});
  const Csr<E> list = random_csr<E>(T, N, tile, density);
  std::vector<Sum> sums(T);
  list.each([&](int64_t i, int64_t t, int64_t) { sums[t].add(to_double(list.values[i])); });
  const auto got = same_for_all_teams<E>(T, what, [&](E *out, int threads) {
    kernels().row_sums(list.values.data(), list.offsets.data(), kDtype<E>, T, list.tiles(), out,
                    threads);
  });
  check_sums(sums, got, what);
}

template <typename E>
void test_decode(int64_t T, int64_t F, int64_t D, int64_t stride, double density,
                   bool with_bias) {
  const std::string what = std::string(kName<E>) + shape({T, F, D, stride});
  const Matrix<E> x(T, D), w(F, D, stride, 1);
  const auto random_bias = [&](int64_t size) {
    Input<E> bias(with_bias ? size : 0);
    for (int64_t i = 0; i < bias.size(); ++i) bias[i] = near<E>(uniform());
    return bias;
  };
  const Input<E> bias_f = random_bias(F), bias_d = random_bias(D);
  const E *to_f = with_bias ? bias_f.data() : nullptr, *to_d = with_bias ? bias_d.data() : nullptr;
  const auto dot = [&](int64_t t, int64_t f) {
    Sum sum;
    if (with_bias) sum.add(to_double(bias_f[f]));
    for (int64_t d = 0; d < D; ++d) sum.add(to_double(x(t, d)) * to_double(w(f, d)));
    return sum;
  };

  std::vector<Sum> sums;
  for (int64_t i = 0; i < T * F; ++i) sums.push_back(dot(i / F, i % F));
  const auto dense = same_for_all_teams<E>(T * F, "matvec " + what, [&](E *out, int threads) {
    kernels().matvec(x.data(), kDtype<E>, T, D, w.data(), stride, to_f, F, out, threads);
  });
  check_sums(sums, dense, "matvec " + what);

  for (int64_t tile : {64, 256}) {
    const Csr<E> list = random_csr<E>(T, F, tile, density);
    const auto z = same_for_all_teams<E>(T * D, "decode " + what, [&](E *out, int threads) {
      kernels().decode(list.values.data(), list.index.data(), list.offsets.data(), kDtype<E>, T, F,
                    tile, w.data(), stride, D, to_d, out, threads);
    });
    check_sums(product(list, w, bias_d), z, "decode " + what);

    std::vector<Sum> sampled_sums(list.entries());
    list.each([&](int64_t i, int64_t t, int64_t f) { sampled_sums[i] = dot(t, f); });
    const auto sampled = same_for_all_teams<E>(
        list.entries(), "decode_sampled " + what, [&](E *out, int threads) {
          kernels().decode_sampled(list.index.data(), list.offsets.data(), kDtype<E>, T, F, tile,
                                x.data(), w.data(), stride, D, to_f, out, threads);
        });
    check_sums(sampled_sums, sampled, "decode_sampled " + what);
  }
}

// A value of one entry reaches its row and no other; a weight that is not finite, only the rows
// that use it, for every number of entries, since kernels take them in twos, fours and eights.
template <typename E>
void test_not_finite(float bad) {
  constexpr int64_t kRows = 12, kColumns = 64, kWidth = 70;
  const std::string what = std::string("not finite ") + kName<E> + " " + std::to_string(bad);
  const auto positive = [] { return near<E>((uniform() + 1.1f) / 2); };
  for (bool in_weight : {false, true}) {
    // Row r has r entries; column 11 is used by the last row only.
    const Csr<E> a(kRows, kColumns, 64, [&](int64_t r, int64_t c, E *value) {
      *value = !in_weight && r == 5 && c == 2 ? near<E>(bad) : positive();
      return r == kRows - 1 ? c > 0 && c <= r : c < r;
    });
    Matrix<E> m(kColumns, kWidth);
    for (int64_t i = 0; i < m.memory.size(); ++i) m.memory[i] = positive();
    if (in_weight) m(11, 69) = near<E>(bad);
    const Gathered<E> from(m, true);
    Output<E> z(kRows * kWidth), few(8 * kWidth);
    kernels().spmm(a.values.data(), a.index.data(), a.offsets.data(), kDtype<E>, kRows, 64,
                &from.given, nullptr, z.data(), kWidth, 1, 0, 2);
    check_sums(product(a, m, Input<E>()), z, what + " spmm");
    const Csr<E> first(8, kColumns, 64, [&](int64_t r, int64_t c, E *value) {
      *value = !in_weight && r == 5 && c == 2 ? near<E>(bad) : positive();
      return c < r || (r == 7 && c == 11);
    });
    kernels().decode(first.values.data(), first.index.data(), first.offsets.data(), kDtype<E>, 8,
                  kColumns, 64, m.data(), kWidth, kWidth, nullptr, few.data(), 2);
    check_sums(product(first, m, Input<E>()), few, what + " decode");
  }
}

// A half is rounded to nearest, ties to even: 1 + k/256 lies half-way between two halves for odd k.
void test_rounding() {
  const float sums[] = {1 + 1 / 256.0f, 1 + 3 / 256.0f, -1 - 1 / 256.0f, -1 - 3 / 256.0f};
  const float rounded[] = {1, 1 + 4 / 256.0f, -1, -1 - 4 / 256.0f};
  const Half one = near<Half>(1);
  const int16_t index = 0;
  const int64_t offsets[] = {0, 1};
  for (int i = 0; i < 4; ++i) {
    const Half m = near<Half>(sums[i] - (sums[i] > 0 ? 1.0f : -1.0f));
    Output<Half> panel(64);
    const steppe_matrix from{&m, 1, 1, 1, 1, panel.data()};
    const Half bias = near<Half>(sums[i] > 0 ? 1.0f : -1.0f);
    Output<Half> out(1);
    kernels().spmm(&one, &index, offsets, 1, 1, 64, &from, &bias, out.data(), 1, 1, 0, 1);
    check(to_double(out[0]) == rounded[i], "rounding of " + std::to_string(sums[i]));
  }
}

template <typename E>
void test_all() {
  for (double density : {0.0, 0.02, 0.3, 1.0}) {
    for (int64_t tile : {64, 192, 512}) {
      for (int64_t F : {0, 1, 63, 64, 65, 200, 700}) {
        for (int64_t T : {0, 1, 7}) test_compaction<E>(T, F, F + (T == 7 ? 3 : 0), tile, density);
      }
    }
    test_compaction<E>(2, 33000, 33000, 32704, density);
  }
  for (int64_t N : {0, 1, 15, 16, 33}) {
    for (int64_t D : {0, 1, 17, 63, 64, 65, 130}) {
      test_pack<E>(N, D, D, 1);
      test_pack<E>(N, D, D + 3, 1);
      test_pack<E>(N, D, 1, N);
      test_pack<E>(N, D, 1, N + 3);
      test_pack<E>(N, D, 3, 3 * N + 1);
    }
  }
  for (double density : {0.0, 0.02, 0.3, 1.0}) {
    for (int64_t tile : {64, 192, 512}) {
      for (int64_t D : {1, 63, 64, 65, 200}) {
        const Layout layout = Layout(generator()() % 4);
        test_spmm<E>(37, 300, D, tile, density, layout, tile == 64, D % 2 == 1);
        test_spmm<E>(16, 65, D, tile, density, Layout::kColumns, tile != 64, false);
        test_sampled<E>(19, 300, D, tile, density, D % 2 == 0);
        test_sampled<E>(19, 300, D, tile, density, D % 2 == 1);
      }
      for (int64_t tile_t : {64, 128, 512}) {
        test_transpose<E>(150, 210, tile, tile_t, density, true);
      }
      test_transpose<E>(70, 65, tile, 64, density, false);
      test_row_sums<E>(50, 400, tile, density);
    }
  }
  test_spmm<E>(40, 700, 768, 192, 0.1, Layout::kRows, true, false);
  test_spmm<E>(700, 40, 768, 64, 0.1, Layout::kColumns, false, true);
  for (bool by_columns : {false, true}) {
    test_large_output<E>(4112, 512, by_columns);
    test_large_output<E>(4112, 528, by_columns);  // the last panel is no whole one
    test_large_output<E>(4105, 512, by_columns);  // nor the last rows, nor a column's first line
  }
  test_sampled<E>(40, 700, 768, 192, 0.1, true);
  test_sampled<E>(40, 900, 200, 64, 0.1, true);  // more tiles than tasks are wanted: each packs its own
  for (int64_t T : {0, 3}) {
    for (int64_t N : {0, 80}) {
      for (int64_t D : {0, 5}) {
        test_spmm<E>(T, N, D, 64, 0.5, Layout::kRows, true, false);
        test_sampled<E>(T, N, D, 64, 0.5, true);
      }
      test_transpose<E>(T, N, 64, 64, 0.5, true);
      test_row_sums<E>(T, N, 64, 0.5);
    }
  }
  for (int64_t T = 0; T <= 8; ++T) {
    for (int64_t D : {1, 63, 64, 65, 200, 600, 768}) {
      test_decode<E>(T, 70, D, D + T % 3, 0.4, T % 2 == 0);
    }
  }
  test_decode<E>(1, 600, 768, 768, 0.1, true);
  test_decode<E>(8, 300, 100, 100, 1.0, true);
  test_decode<E>(3, 0, 20, 20, 0.5, true);
  test_decode<E>(3, 20, 0, 0, 0.5, true);
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                    -std::numeric_limits<float>::infinity()}) {
    test_not_finite<E>(bad);
  }
}

}  // namespace

int main() {
  test_all<float>();
  test_all<Half>();
  test_rounding();
  test_screening();
  test_decode_blocks();
  std::printf("%s: %d passed, %d failed\n", steppe_isa(), passed, failed);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

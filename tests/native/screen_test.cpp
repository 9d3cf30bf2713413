// Screening and the CSR matrix of its candidates, against float64 loops. Part of kernels_test.
#include "grids.h"

using namespace checks;

namespace {

// What stands in the 32 bytes of a token.
struct Token {
  double scale, norm, residual;
  int32_t sum, sum_low;
};
static_assert(sizeof(Token) == 32, "as in steppe_native.h");

// Rounding up is allowed, by very little.
bool covers(double got, double exact) {
  return got >= exact * (1 - 1e-13) && got <= exact * (1 + 1e-9) + 1e-300;
}

int64_t byte_at(const Screen &screen, int64_t f, int64_t d, int64_t D) {
  const int64_t n = are_words() ? 2 : 4;  // features of a unit side by side
  return (*screen.bytes)[f / 16 * 16 * width_of(D) + d / n * n * 16 + f % 16 * n + d % n];
}

template <typename E>
void test_screen_weight(int64_t F, int64_t D, int64_t gap) {
  const std::string what = std::string("screen_weight ") + kName<E> + shape({F, D, gap});
  Matrix<E> w(F, D, D + gap, 1);
  for (int64_t f = 0; f < F; ++f) {  // rows of many sizes, and one of zeros
    for (int64_t d = 0; d < D; ++d) {
      w(f, d) = near<E>(f == 2 ? 0 : float(to_double(w(f, d)) * std::pow(10.0, f % 7 * 4 - 12)));
    }
  }
  const Screen screen = screen_of(w.data(), F, D, D + gap, 64, what);
  const Input<E> panels = panels_of(w);
  const Screen of_panels = screen_of(panels.data(), F, D, 64, 64 * F, what + " panels");
  check(*of_panels.bytes == *screen.bytes && *of_panels.bounds == *screen.bounds,
        what + ": other bits of panels");

  const int64_t units = ceil_div(F, 64) * 64, width = width_of(D);
  const Output<double> &bounds = *screen.bounds;
  const double rounding = (2.0 * double(D) + 64) * kUnit, root = std::sqrt(double(D));
  int64_t wrong = 0, off = 0;
  for (int64_t f = 0; f < units; ++f) {
    if (f >= F) {
      for (int64_t d = 0; d < width; ++d) wrong += byte_at(screen, f, d, D) != 128;
      off += !(bounds[f] == 0 && bounds[units + f] == 0 && bounds[2 * units + f] == 0 &&
               bounds[3 * units + f] < 0);
      continue;
    }
    const Grid grid = grid_of(w, f, 127);
    for (int64_t d = 0; d < width; ++d) {
      wrong += !grid.has_midpoint && byte_at(screen, f, d, D) - 128 != grid.integers[d];
      wrong += std::abs(byte_at(screen, f, d, D) - 128 - grid.integers[d]) > 1;
    }
    if (grid.has_midpoint) continue;
    const double inverse = 1 / grid.scale, size = grid.norm + grid.residual;
    off += !(std::fabs(bounds[f] / inverse - 1) < 1e-13);
    off += !covers(bounds[units + f],
                   (grid.residual + (rounding + 0x1p-36) * size + kTiny * root) * inverse);
    off += !covers(bounds[2 * units + f], size * inverse);
    off += !covers(bounds[3 * units + f],
                   kTiny * (root * grid.norm + 2.0 * double(D) + 64) * inverse);
  }
  check(wrong == 0, what + ": " + std::to_string(wrong) + " bytes");
  check(off == 0, what + ": " + std::to_string(off) + " parts of the bound");
}

template <typename E, typename Integer>
void test_screen_tokens(int64_t T, int64_t D, int64_t gap) {
  const std::string what = std::string("screen_tokens ") + kName<E> + shape({T, D, gap});
  Matrix<E> x(T, D, D + gap, 1);
  const auto run = [&](Integer *integers, Token *tokens, int threads) {
    check(kernels().screen_tokens(x.data(), kDtype<E>, T, D, D + gap, integers, tokens, threads) == 0,
          what + ": status");
  };
  Output<Token> tokens(T);
  const int64_t width = width_of(D), size = room_for(T, D);
  const auto integers = same_for_all_teams<Integer>(
      size, what, [&](Integer *out, int threads) { run(out, tokens.data(), threads); });
  const auto same = same_for_all_teams<Token>(T, what + " tokens", [&](Token *out, int threads) {
    Output<Integer> unused(size);
    run(unused.data(), out, threads);
  });
  check(same == tokens, what + ": other tokens");
  check(integers.guards_hold() && tokens.guards_hold(), what + ": writes outside");
  int64_t wrong = 0, off = 0;
  for (int64_t t = 0; t < T; ++t) {
    const Grid grid = grid_of(x, t, most_of(D, false));
    int64_t sum = 0, sum_low = 0;
    for (int64_t d = 0; d < width; ++d) {
      const int64_t first = integers[place_of(t, 0, d, D)];
      const int64_t low = digits() == 2 ? integers[place_of(t, 1, d, D)] : 0;
      const int64_t got = digits() == 2 ? 256 * first + low : first;
      sum += first, sum_low += low;
      wrong += std::abs(got - grid.integers[d]) > (grid.has_midpoint ? 1 : 0);
    }
    wrong += sum != tokens[t].sum || tokens[t].sum_low != sum_low;
    off += !(std::fabs(tokens[t].scale / grid.scale - 1) < 1e-13);
    off += !covers(tokens[t].norm, grid.norm);
    // Of a row that is on its grid both are rounding in float64.
    const bool is_close = std::fabs(tokens[t].residual - grid.residual) <= 1e-15 * grid.norm;
    off += !(grid.has_midpoint || is_close || covers(tokens[t].residual, grid.residual));
  }
  check(wrong == 0, what + ": " + std::to_string(wrong) + " integers");
  check(off == 0, what + ": " + std::to_string(off) + " parts of the bound");
}

template <typename E>
void test_screen(int64_t T, int64_t F, int64_t D, bool with_bias, bool spoilt) {
  const std::string what = std::string("screen ") + kName<E> + shape({T, F, D}) +
                           (with_bias ? " bias" : "") + (spoilt ? " spoilt" : "");
  Matrix<E> x(T, D), w(F, D);
  Input<E> bias(with_bias ? F : 0);
  const float slope = 0.4f * std::sqrt(float(D));  // of p, whose standard deviation is √D / 3
  for (int64_t f = 0; f < bias.size(); ++f) bias[f] = near<E>(slope * (uniform() - 0.7f));
  if (spoilt) spoil(&x, &w, &bias);
  const E *b = with_bias ? bias.data() : nullptr;
  const Screen screen = screen_of(w.data(), F, D, D, 64, what);
  Output<int16_t> integers(room_for(T, D));  // or twice as many as there are
  Output<Token> tokens(T);
  kernels().screen_tokens(x.data(), kDtype<E>, T, D, D, integers.data(), tokens.data(), 1);
  const int64_t blocks = ceil_div(F, 64);
  Output<int32_t> counts(T * blocks);
  int64_t found = -2;
  const auto run = [&](int64_t most, uint64_t *masks, int32_t *to, int threads) {
    return kernels().screen(integers.data(), tokens.data(), kDtype<E>, T, D, screen.bytes->data(),
                         screen.bounds->data(), b, F, most, masks, to, threads);
  };
  const auto masks =
      same_for_all_teams<uint64_t>(T * blocks, what, [&](uint64_t *out, int threads) {
        found = run(T * F, out, counts.data(), threads);
      });
  check(masks.guards_hold() && counts.guards_hold(), what + ": writes outside");
  const auto expected = candidates_of(grids_of(x, most_of(D, false)), grids_of(w, 127), b, D);
  int64_t wrong = 0, listed = 0, sure = 0, out = 0, miscounted = 0;
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t block = 0; block < blocks; ++block) {
      const uint64_t mask = masks[t * blocks + block];
      miscounted += counts[t * blocks + block] != __builtin_popcountll(mask);
      listed += __builtin_popcountll(mask);
      for (int64_t j = 0; j < 64; ++j) {
        const int64_t f = block * 64 + j;
        const int is = int(mask >> j & 1), should = f < F ? expected[t * F + f] : 0;
        wrong += should >= 0 && is != should;
        sure += should >= 0 && f < F, out += should == 0 && f < F;
      }
    }
  }
  check(wrong == 0, what + ": " + std::to_string(wrong) + " entries");
  check(miscounted == 0, what + ": counts");
  check(found == listed, what + ": number of candidates");
  check(4 * sure >= T * F, what + ": rounding decides too many");
  check(T * F < 1000 || D < 10 || (10 * out > T * F && 20 * listed > T * F),
        what + ": all or none would pass");
  for (int threads : kTeams) {
    Output<uint64_t> again(T * blocks), most(T * blocks);
    Output<int32_t> counted(T * blocks);
    check(run(listed, again.data(), counted.data(), threads) == listed && again == masks,
          what + ": exactly as many as the most");
    if (listed == 0) continue;
    check(run(listed - 1, most.data(), counted.data(), threads) == -1, what + ": more");
    check(most.guards_hold() && counted.guards_hold(), what + " more: writes outside");
  }
}

void test_list_masks(int64_t T, int64_t F, int64_t tile, double density) {
  const std::string what = "list_masks" + shape({T, F, tile});
  const int64_t blocks = ceil_div(F, 64);
  Input<uint64_t> masks(T * blocks);
  Input<int32_t> counts(T * blocks);
  const Csr<float> list(T, F, tile, [&](int64_t t, int64_t f, float *value) {
    *value = 0;
    const bool is = (uniform() + 1) / 2 < density;
    masks[t * blocks + f / 64] |= uint64_t(is) << f % 64;
    counts[t * blocks + f / 64] += is;
    return is;
  });
  Output<int64_t> offsets(ceil_div(F, tile) * T + 1);
  check(steppe_offsets(counts.data(), T, F, tile, offsets.data()) == list.entries(),
        what + ": number of entries");
  const auto index =
      same_for_all_teams<int16_t>(list.entries(), what, [&](int16_t *out, int threads) {
        kernels().index_masks(masks.data(), T, F, tile, offsets.data(), out, threads);
      });
  check(same_bits(list.index.data(), index.data(), index.size()), what);
  check(index.guards_hold(), what + ": writes outside");
}

// Entries with values that a comparison gets wrong: those that are not <= 0 stay, closed up, in tiles
// that are `merged` of the old ones.
template <typename E>
void test_filter(int64_t T, int64_t F, int64_t tile, int64_t merged, double density) {
  const std::string what = std::string("filter ") + kName<E> + shape({T, F, tile, merged});
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const float special[] = {nan, -nan, inf, -inf, 0.0f, -0.0f, 1e-40f, -1e-40f};
  std::vector<E> value_at(T * F);
  std::vector<bool> is_there(T * F);
  const Csr<E> all(T, F, tile, [&](int64_t t, int64_t f, E *value) {
    *value = near<E>(generator()() % 6 == 0 ? special[generator()() % 8] : uniform());
    value_at[t * F + f] = *value;
    return is_there[t * F + f] = (uniform() + 1) / 2 < density;
  });
  const Csr<E> kept(T, F, tile * merged, [&](int64_t t, int64_t f, E *value) {
    *value = value_at[t * F + f];
    return is_there[t * F + f] && !(to_double(*value) <= 0);
  });
  for (int threads : kTeams) {
    Output<E> values(kept.entries());
    Output<int16_t> index(kept.entries());
    Output<int32_t> counts(all.tiles() * T);
    Output<int64_t> offsets(kept.offsets.size());
    const int64_t entries = kernels().filter_counts(all.values.data(), all.offsets.data(), kDtype<E>,
                                                all.tiles() * T, counts.data(), threads);
    check(entries == kept.entries(), what + ": number of entries");
    kernels().filter(all.values.data(), all.index.data(), all.offsets.data(), counts.data(), kDtype<E>,
                T, tile, all.tiles(), merged, offsets.data(), values.data(), index.data(), threads);
    check(same_bits(kept.offsets.data(), offsets.data(), offsets.size()), what + ": offsets");
    check(same_bits(kept.values.data(), values.data(), values.size()), what + ": values");
    check(same_bits(kept.index.data(), index.data(), index.size()), what + ": index");
    check(values.guards_hold() && index.guards_hold() && counts.guards_hold() &&
              offsets.guards_hold(),
          what + ": writes outside");
  }
}

template <typename E>
void test_all() {
  for (int64_t F : {0, 1, 16, 63, 65, 200}) {
    for (int64_t D : {0, 1, 63, 64, 127, 128, 129, 300, 768}) {
      test_screen_weight<E>(F, D, F % 3);
      if (D > 0) test_screen<E>(F % 7 + 1, F, D, F % 2 == 1, false);
    }
  }
  for (int64_t T : {0, 1, 3, 20}) {
    for (int64_t D : {0, 1, 63, 64, 127, 128, 129, 300, 768}) {
      are_words() ? test_screen_tokens<E, int16_t>(T, D, T) : test_screen_tokens<E, int8_t>(T, D, T);
    }
  }
  for (int64_t T : {0, 1, 5, 6, 7, 12, 97, 200}) test_screen<E>(T, 130, 200, true, false);
  test_screen<E>(6, 20, 0, true, false);
  for (int64_t T : {7, 100}) {
    test_screen<E>(T, 70, 129, T == 7, true);
    test_screen<E>(T, 64, 128, true, true);
  }
  test_screen<E>(9, 1100, 768, true, false);  // more than a chunk of the weight
  for (double density : {0.0, 0.02, 0.3, 1.0}) {
    for (int64_t tile : {64, 192, 512}) {
      for (int64_t F : {1, 63, 64, 65, 200, 700}) {
        for (int64_t T : {0, 1, 7}) {
          if (kDtype<E> == 0) test_list_masks(T, F, tile, density);
          for (int64_t merged : {1, 2, 3}) test_filter<E>(T, F, tile, merged, density);
        }
      }
    }
    if (kDtype<E> == 0) test_list_masks(2, 33000, 32704, density);
  }
}

}  // namespace

void test_screening() {
  test_all<float>();
  test_all<Half>();
}

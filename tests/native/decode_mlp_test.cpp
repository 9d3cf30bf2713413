// The block in decoding, screened and not, against float64 loops. Part of kernels_test.
#include "grids.h"

using namespace checks;

namespace {

// A block and a call of it; W, U and V with rows of different distances.
template <typename E>
struct Block {
  int64_t T, F, D;
  Matrix<E> x, w, up, v, biases, v_bias;
  Screen screen;
  std::vector<char> edges;
  steppe_watch watch;
  int64_t generation = 7;
  steppe_copied copied;
  steppe_block block;
  float alpha, beta;

  Block(int64_t T, int64_t F, int64_t D, bool gated, float alpha, float beta, float shift,
        const std::string &what)
      : T(T), F(F), D(D), x(T, D), w(F, D, D + 1, 1), up(F, D, D + 2, 1), v(F, D, D + 3, 1),
        biases(2, F), v_bias(1, D), alpha(alpha), beta(beta) {
    for (int64_t f = 0; f < F; ++f) biases(0, f) = near<E>(float(to_double(biases(0, f))) - shift);
    screen = screen_of(w.data(), F, D, D + 1, 64, what);
    // W's first row, which is less than a page: its bytes are compared.
    const int64_t bytes = F > 0 ? D * int64_t(sizeof(E)) : 0;
    edges.resize(steppe_edges(w.data(), bytes));
    watch = {w.data(), bytes, edges.data()};
    check(steppe_watch_writes(&watch, 0) == 0, what + ": watching");
    copied = {&watch, &generation, generation};
    block = {w.data(), biases.data(), gated ? up.data() : nullptr,
             gated ? biases.data() + F : nullptr, v.data(), v_bias.data(), D + 1, D + 2, D + 3, D,
             F, nullptr, nullptr, &copied, 1, kDtype<E>};
  }
  void use_screen() {
    block.bytes = screen.bytes->data();
    block.bounds = screen.bounds->data();
  }
  bool is_gated() const { return block.up != nullptr; }
  int64_t run(int64_t most_candidates, int64_t most, int64_t *candidates, E *r, E *up_values,
              E *out, int threads) const {
    const steppe_decode_call call{&block, T, most_candidates, most, alpha, beta, threads};
    const int64_t told =
        kernels().decode_mlp(&call, x.data(), r, is_gated() ? up_values : nullptr, out);
    if (told == STEPPE_CHANGED) return told;
    *candidates = told >= 0 ? (told >> 32) - 1 : STEPPE_TOO_MANY - told - 1;
    return told >= 0 ? told & 0xffffffff : STEPPE_TOO_MANY;
  }
};

// What a call has written, against the parts of a block: `p` is the first product, bit for bit.
template <typename E>
void check_block(const Block<E> &of, const Output<E> &p, const Output<E> &r,
                 const Output<E> &up_values, const Output<E> &out, const std::string &what) {
  const int64_t T = of.T, F = of.F, D = of.D;
  std::vector<Sum> ups(up_values.size()), sums(T * D);
  for (int64_t i = 0; i < T * D; ++i) sums[i].add(to_double(of.v_bias(0, i % D)));
  bool same_r = true;
  for (int64_t i = 0; i < T * F; ++i) {
    const int64_t t = i / F, f = i % F;
    const bool is_active = !(to_double(p[i]) <= 0);
    const E rectified = is_active ? p[i] : E{};
    same_r = same_r && same_bits(&r[i], &rectified, 1);
    if (!is_active) continue;
    double a = of.alpha * to_double(p[i]) + of.beta * to_double(p[i]) * to_double(p[i]);
    if (of.is_gated()) {
      ups[i].add(to_double(of.biases(1, f)));
      for (int64_t d = 0; d < D; ++d) ups[i].add(to_double(of.x(t, d)) * to_double(of.up(f, d)));
      a *= to_double(up_values[i]);
    }
    for (int64_t d = 0; d < D; ++d) {
      sums[t * D + d].add(a * to_double(of.v(f, d)));
      sums[t * D + d].of_rounded = true;
    }
  }
  check(same_r, what + " r");
  check(r.guards_hold(), what + " r: writes outside");
  check_sums(ups, up_values, what + " up");
  check_sums(sums, out, what + " out");
}

template <typename E>
void test_decode_mlp(int64_t T, int64_t F, int64_t D, bool gated, float alpha, float beta,
                     float shift) {
  const std::string what = std::string("decode_mlp ") + kName<E> + shape({T, F, D}) +
                           (gated ? " gated" : "") + (shift != 0 ? " shifted" : "");
  Block<E> block(T, F, D, gated, alpha, beta, shift, what);
  const int64_t ups = gated ? T * F : 0;
  // The first product in full, and that of all entries listed, which may differ in the last bit.
  Output<E> full(T * F), listed(T * F);
  kernels().matvec(block.x.data(), kDtype<E>, T, D, block.w.data(), D + 1, block.biases.data(), F,
                full.data(), 1);
  const Csr<E> every(T, F, 64, [](int64_t, int64_t, E *value) { return *value = E{}, true; });
  Output<E> entries(T * F);
  kernels().decode_sampled(every.index.data(), every.offsets.data(), kDtype<E>, T, F, 64,
                        block.x.data(), block.w.data(), D + 1, D, block.biases.data(),
                        entries.data(), 1);
  every.each([&](int64_t i, int64_t t, int64_t f) { listed.data()[t * F + f] = entries[i]; });
  const auto active_of = [&](const Output<E> &p) {
    int64_t active = 0;
    for (int64_t i = 0; i < T * F; ++i) active += !(to_double(p[i]) <= 0);
    return active;
  };
  const auto possible =
      candidates_of(grids_of(block.x, most_of(D, true)), grids_of(block.w, 127), block.biases.data(), D);
  const int64_t sure = std::count(possible.begin(), possible.end(), 1);
  const int64_t unsure = std::count(possible.begin(), possible.end(), -1);

  const auto run = [&](const std::string &kind, int64_t most_candidates, const Output<E> &p) {
    const int64_t active = active_of(p);
    Output<E> r(T * F), up_values(ups);
    int64_t candidates = -2;
    const auto out = same_for_all_teams<E>(T * D, what + kind, [&](E *to, int threads) {
      check(block.run(most_candidates, active, &candidates, r.data(), up_values.data(), to,
                      threads) == active,
            what + kind + ": active entries");
    });
    check_block(block, p, r, up_values, out, what + kind);
    Output<E> alone(T * D);
    check(block.run(most_candidates, active, &candidates, nullptr, nullptr, alone.data(), 2) == active,
          what + kind + ": active entries, r not wanted");
    check(alone == out, what + kind + ": the same where r is not wanted");
    if (active == 0) return candidates;
    Output<E> untouched(T * D), blank(T * D), same_r(T * F), some_up(ups), no_up(ups);
    check(block.run(most_candidates, active - 1, &candidates, same_r.data(), some_up.data(),
                    untouched.data(), 2) == STEPPE_TOO_MANY,
          what + kind + ": more than the most");
    check(untouched == blank && some_up == no_up && same_r == r,
          what + kind + ": r alone is written");
    return candidates;
  };
  check(run(" unscreened", T * F, full) == -1, what + ": there is no screen");
  block.use_screen();
  check(run(" not asked for", 0, full) == -1, what + ": no candidates are counted");
  const int64_t most = std::max<int64_t>(T * F, 1);
  const int64_t candidates = run(" screened", most, listed);
  check(candidates >= sure && candidates <= sure + unsure, what + ": number of candidates");
  check(shift == 0 || T * F < 100 || D < 10 || 4 * candidates < 3 * T * F,
        what + ": too few are left out");
  check(candidates >= active_of(listed) && candidates >= active_of(full), what + ": misses");
  if (candidates > 1) {
    check(run(" just as many", candidates, listed) == candidates, what + ": just as many");
    check(run(" too many", candidates - 1, full) == candidates, what + ": too many are counted");
  }

  const auto check_refused = [&](const std::string &why) {
    Output<E> r(T * F), up_values(ups), out(T * D), blank_r(T * F), blank(T * D), blank_up(ups);
    int64_t count = -2;
    check(block.run(most, most, &count, r.data(), up_values.data(), out.data(), 2) == STEPPE_CHANGED,
          what + why);
    check(r == blank_r && out == blank && up_values == blank_up && count == -2,
          what + why + ": nothing is written");
  };
  block.generation += 1;
  check_refused(": a copy of an earlier generation");
  block.generation -= 1;
  for (char &edge : block.edges) {
    edge ^= 1;
    check_refused(": a copy of other values");
    edge ^= 1;
  }
}

// The candidates of few rows, where what is multiplied is NaN, so that all of them stay.
template <typename E>
void test_screen_few(int64_t T, int64_t F, int64_t D, bool spoilt) {
  const std::string what = std::string("screen_few ") + kName<E> + shape({T, F, D}) +
                           (spoilt ? " spoilt" : "");
  Block<E> block(T, F, D, false, 1, 0, 0.3f * std::sqrt(float(D)), what);
  Input<E> bias(F);
  std::copy_n(block.biases.data(), F, bias.data());
  if (spoilt) {
    spoil(&block.x, &block.w, &bias);
    block.screen = screen_of(block.w.data(), F, D, D + 1, 64, what);
  }
  block.block.w_bias = bias.data();
  block.block.copy_count = 0;
  block.use_screen();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Matrix<E> nowhere(F, D);
  for (int64_t i = 0; i < nowhere.memory.size(); ++i) nowhere.memory[i] = near<E>(nan);
  block.block.w = nowhere.data(), block.block.w_stride = D;
  int64_t candidates = -2;
  const auto r = same_for_all_teams<E>(T * F, what, [&](E *to, int threads) {
    Output<E> out(T * D);
    block.run(T * F, T * F, &candidates, to, nullptr, out.data(), threads);
  });
  const auto expected =
      candidates_of(grids_of(block.x, most_of(D, true)), grids_of(block.w, 127), bias.data(), D);
  int64_t wrong = 0, listed = 0, sure = 0, out = 0;
  for (int64_t i = 0; i < T * F; ++i) {
    const int is = std::isnan(to_double(r[i]));
    listed += is;
    wrong += expected[i] >= 0 && is != expected[i];
    sure += expected[i] >= 0, out += expected[i] == 0;
  }
  check(wrong == 0, what + ": " + std::to_string(wrong) + " entries");
  check(candidates == listed, what + ": number of candidates");
  check(4 * sure >= T * F, what + ": rounding decides too many");
  check(spoilt || T * F < 200 || D < 10 || (10 * out > T * F && 20 * listed > T * F),
        what + ": all or none would pass");
}

template <typename E>
void test_all() {
  for (int64_t T = 1; T <= 8; ++T) {
    for (int64_t D : {1, 64, 129, 384}) {
      test_screen_few<E>(T, 70 + T % 3 * 61, D, false);
      test_screen_few<E>(T, 70, D, true);
    }
  }
  test_decode_mlp<E>(1, 33000, 5, true, 1, 0, 1);  // more columns than a tile can have
  for (int64_t T : {0, 1, 3, 8}) {
    for (bool gated : {false, true}) {
      test_decode_mlp<E>(T, 70, 65, gated, 1, 0, 0);
      test_decode_mlp<E>(T, 600, 130, gated, 1, 0.5f, 0);
      test_decode_mlp<E>(T, 600, 130, gated, 1, 0.5f, 5);
      test_decode_mlp<E>(T, 300, 768, gated, 1, 0, 12);
      test_decode_mlp<E>(T, 0, 10, gated, 1, 0, 0);
      test_decode_mlp<E>(T, 10, 0, gated, 0, 1, 0);
    }
  }
}

}  // namespace

void test_decode_blocks() {
  test_all<float>();
  test_all<Half>();
}

// Every kernel with more threads than tasks, rows and columns, and with fewer: the same bits as one
// thread computes, in fresh memory of just the size that is needed, and nothing written behind it. That
// these bits are right is shown by kernels_test.
//
//   make test-native
//   STEPPE_ISA=avx2 build/native-tests/threads_test
#include <cstdlib>
#include <memory>

#include "grids.h"

using namespace checks;

namespace {

#if defined(__SANITIZE_THREAD__)  // a thread that it watches takes 0.1 ms to start
constexpr int kThreads[] = {1, 3, 17};
constexpr int64_t kTokens[] = {1, 8, 70};
#else
constexpr int kThreads[] = {1, 2, 3, 8, 16, 33, 64};
constexpr int64_t kTokens[] = {0, 1, 2, 3, 8, 9, 64};
#endif
constexpr int kMost = kThreads[sizeof(kThreads) / sizeof(kThreads[0]) - 1];

// Fresh memory, all NaN (or -1). AddressSanitizer sees each byte that is written behind it; elsewhere
// guards do, as large as what each of the threads could mistake for its own.
class Memory {
 public:
  explicit Memory(int64_t bytes)
      : bytes_(bytes), guard_(guard_of(bytes)), from_(new unsigned char[bytes + guard_]) {
    std::memset(from_.get(), 0xff, size_t(bytes));
    std::memset(from_.get() + bytes, kGuarded, size_t(guard_));
  }
  template <typename E>
  E *as() const { return reinterpret_cast<E *>(from_.get()); }
  bool guard_holds() const {
    const unsigned char *from = from_.get() + bytes_;
    return guard_ == 0 || (*from == kGuarded && std::memcmp(from, from + 1, size_t(guard_ - 1)) == 0);
  }
  bool operator==(const Memory &other) const {
    return bytes_ == other.bytes_ && std::memcmp(from_.get(), other.from_.get(), size_t(bytes_)) == 0;
  }

 private:
  static constexpr unsigned char kGuarded = 0xa5;
  static int64_t guard_of(int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    return (void)bytes, 0;
#else
    return std::min<int64_t>(kMost * bytes, 1 << 18) + 4096;
#endif
  }
  int64_t bytes_, guard_;
  std::unique_ptr<unsigned char[]> from_;
};
using Memories = std::vector<Memory>;

template <typename E>
int64_t bytes_of(int64_t elements) { return elements * int64_t(sizeof(E)); }

// What `run(memories, threads)` writes to fresh memories of some sizes, the same for all teams.
template <typename Run>
Memories same_for_threads(const std::string &what, const std::vector<int64_t> &sizes, Run run) {
  const auto fresh = [&] {
    Memories memories;
    for (int64_t bytes : sizes) memories.emplace_back(bytes);
    return memories;
  };
  Memories first = fresh();
  run(first, 1);
  for (int threads : kThreads) {
    const std::string with = what + " with " + std::to_string(threads) + " threads";
    const Memories again = fresh();
    run(again, threads);
    for (size_t i = 0; i < sizes.size(); ++i) {
      check(again[i] == first[i], with + ": other bits of output " + std::to_string(i));
      check(again[i].guard_holds(), with + ": writes behind output " + std::to_string(i));
    }
  }
  return first;
}

// A block and the CSR matrices of its calls: x [T, D], W [F, D], p [T, F].
template <typename E>
struct Case {
  int64_t T, D, F, tile;
  std::string what;
  Matrix<E> x, w, rows, p;  // `rows` is W with its rows contiguous
  Input<E> bias_d, bias_f;
  Csr<E> list;

  Case(int64_t T, int64_t D, int64_t F, int64_t tile)
      : T(T), D(D), F(F), tile(tile), what(std::string(" ") + kName<E> + shape({T, D, F, tile})),
        x(T, D), w(random_matrix<E>(F, D)), rows(F, D), p(T, F), bias_d(D), bias_f(F),
        list(random_csr<E>(T, F, tile, 0.3)) {
    for (int64_t d = 0; d < D; ++d) bias_d[d] = near<E>(uniform());
    for (int64_t f = 0; f < F; ++f) bias_f[f] = near<E>(uniform() - 0.5f);
  }
  int64_t blocks() const { return ceil_div(F, 64); }
  int64_t panels_of_w() const { return ceil_div(D, 64) * F * 64; }
};

// Whether a matrix is gathered from as panels, or packed on the way into memory for its panels.
template <typename E, typename Run>
void test_gathered(const std::string &what, const Matrix<E> &m, int64_t bytes, Run run) {
  const Input<E> panels = panels_of(m);
  const Memories packed = same_for_threads(what, {bytes}, [&](const Memories &to, int threads) {
    const steppe_matrix given{nullptr, m.rows, m.columns, 0, 0, const_cast<E *>(panels.data())};
    check(run(given, to[0], threads) == 0, what + ": status");
  });
  const Memories alone = same_for_threads(
      what + " of a matrix without panels", {bytes}, [&](const Memories &to, int threads) {
        const Memory space(bytes_of<E>(panels.size()));
        const steppe_matrix given{m.data(),     m.rows,           m.columns,
                                  m.row_stride, m.column_stride, space.as<void>()};
        check(run(given, to[0], threads) == 0, what + ": status");
        check(space.guard_holds(),
              what + ": writes behind the panels with " + std::to_string(threads) + " threads");
      });
  check(packed[0] == alone[0], what + ": other bits of a matrix without panels");
}

template <typename E>
void test_products(const Case<E> &of) {
  const Csr<E> &list = of.list;
  const int64_t T = of.T, D = of.D, tile = of.tile;
  test_gathered<E>("spmm" + of.what, of.w, bytes_of<E>(T * D),
                   [&](const steppe_matrix &m, const Memory &to, int threads) {
                     return kernels().spmm(list.values.data(), list.index.data(), list.offsets.data(),
                                        kDtype<E>, T, tile, &m, of.bias_d.data(), to.as<E>(), D, 1,
                                        0, threads);
                   });
  test_gathered<E>("spmm by columns" + of.what, of.w, bytes_of<E>(T * D),
                   [&](const steppe_matrix &m, const Memory &to, int threads) {
                     std::fill_n(to.as<E>(), T * D, near<E>(0.5f));
                     return kernels().spmm(list.values.data(), list.index.data(), list.offsets.data(),
                                        kDtype<E>, T, tile, &m, nullptr, to.as<E>(), 1,
                                        std::max<int64_t>(T, 1), 1, threads);
                   });
  const Input<E> panels_x = panels_of(of.x);
  test_gathered<E>("sampled" + of.what, of.w, bytes_of<E>(list.entries()),
                   [&](const steppe_matrix &m, const Memory &to, int threads) {
                     return kernels().sampled(list.index.data(), list.offsets.data(), kDtype<E>, T,
                                           tile, panels_x.data(), &m, of.bias_f.data(), to.as<E>(),
                                           threads);
                   });
}

template <typename E>
void test_csr(const Case<E> &of) {
  const Csr<E> &list = of.list;
  const int64_t T = of.T, F = of.F, tile = of.tile, nnz = list.entries();
  const auto counts = same_for_threads(
      "count" + of.what, {bytes_of<int32_t>(T * of.blocks())}, [&](const Memories &to, int threads) {
        kernels().count(of.p.data(), kDtype<E>, T, F, F, to[0].as<int32_t>(), threads);
      });
  Input<int64_t> offsets(ceil_div(F, tile) * T + 1);
  const int64_t active = steppe_offsets(counts[0].template as<int32_t>(), T, F, tile, offsets.data());
  same_for_threads("fill" + of.what, {bytes_of<int16_t>(active), bytes_of<E>(active)},
                   [&](const Memories &to, int threads) {
                     kernels().fill(of.p.data(), kDtype<E>, T, F, F, tile, offsets.data(),
                                 to[0].as<int16_t>(), to[1].as<E>(), threads);
                   });
  same_for_threads("pack" + of.what, {bytes_of<E>(of.panels_of_w())},
                   [&](const Memories &to, int threads) {
                     kernels().pack(of.w.data(), kDtype<E>, F, of.D, of.w.row_stride,
                                 of.w.column_stride, to[0].as<E>(), threads);
                   });
  for (int64_t tile_t : {64, 192}) {
    const int64_t places = std::max<int64_t>(ceil_div(T, tile_t), 1) * F + 1;
    same_for_threads("transpose" + of.what,
                     {bytes_of<E>(nnz), bytes_of<E>(nnz), bytes_of<int16_t>(nnz),
                      bytes_of<int64_t>(places)},
                     [&](const Memories &to, int threads) {
                       kernels().transpose(list.values.data(), list.values.data(), list.index.data(),
                                        list.offsets.data(), kDtype<E>, T, F, tile, tile_t,
                                        to[0].as<E>(), to[1].as<E>(), to[2].as<int16_t>(),
                                        to[3].as<int64_t>(), threads);
                     });
  }
  same_for_threads("row_sums" + of.what, {bytes_of<E>(T)}, [&](const Memories &to, int threads) {
    kernels().row_sums(list.values.data(), list.offsets.data(), kDtype<E>, T, list.tiles(),
                    to[0].as<E>(), threads);
  });
  const int64_t lists = list.tiles() * T;
  const auto listed = same_for_threads(
      "filter_counts" + of.what, {bytes_of<int32_t>(lists)}, [&](const Memories &to, int threads) {
        kernels().filter_counts(list.values.data(), list.offsets.data(), kDtype<E>, lists,
                            to[0].as<int32_t>(), threads);
      });
  const int32_t *kept_counts = listed[0].template as<int32_t>();
  int64_t kept = 0;
  for (int64_t i = 0; i < lists; ++i) kept += kept_counts[i];
  for (int64_t merged : {1, 2}) {
    const int64_t places = ceil_div(list.tiles(), merged) * T + 1;
    same_for_threads("filter" + of.what,
                     {bytes_of<int64_t>(places), bytes_of<E>(kept), bytes_of<int16_t>(kept)},
                     [&](const Memories &to, int threads) {
                       kernels().filter(list.values.data(), list.index.data(), list.offsets.data(),
                                   kept_counts, kDtype<E>, T, tile, list.tiles(), merged,
                                   to[0].as<int64_t>(), to[1].as<E>(), to[2].as<int16_t>(), threads);
                     });
  }
}

template <typename E>
void test_screening(const Case<E> &of) {
  const int64_t T = of.T, D = of.D, F = of.F, tile = of.tile, blocks = of.blocks();
  constexpr int64_t kToken = 32;  // bytes
  const auto weight = same_for_threads(
      "screen_weight" + of.what, {blocks * 64 * width_of(D), bytes_of<double>(4 * blocks * 64)},
      [&](const Memories &to, int threads) {
        kernels().screen_weight(of.rows.data(), kDtype<E>, F, D, D, 64, to[0].as<uint8_t>(),
                             to[1].as<double>(), threads);
      });
  const auto tokens = same_for_threads(
      "screen_tokens" + of.what, {bytes_of<int16_t>(room_for(T, D)), T * kToken},
      [&](const Memories &to, int threads) {
        kernels().screen_tokens(of.x.data(), kDtype<E>, T, D, D, to[0].as<void>(), to[1].as<void>(),
                             threads);
      });
  int64_t found = 0;
  const auto screen = [&](int64_t most, const Memories &to, int threads) {
    return kernels().screen(tokens[0].template as<void>(), tokens[1].template as<void>(), kDtype<E>, T,
                         D, weight[0].template as<uint8_t>(), weight[1].template as<double>(),
                         of.bias_f.data(), F, most, to[0].as<uint64_t>(), to[1].as<int32_t>(),
                         threads);
  };
  const std::vector<int64_t> sizes = {bytes_of<uint64_t>(T * blocks), bytes_of<int32_t>(T * blocks)};
  const auto masks = same_for_threads("screen" + of.what, sizes, [&](const Memories &to, int threads) {
    found = screen(T * F, to, threads);
  });
  for (int threads : kThreads) {
    Memories most;
    for (int64_t bytes : sizes) most.emplace_back(bytes);
    check(found == 0 || screen(found - 1, most, threads) == -1, "screen" + of.what + ": too many");
    check(most[0].guard_holds() && most[1].guard_holds(), "screen" + of.what + ": writes behind");
  }
  Input<int64_t> offsets(ceil_div(F, tile) * T + 1);
  check(steppe_offsets(masks[1].template as<int32_t>(), T, F, tile, offsets.data()) == found,
        "screen" + of.what + ": counts");
  same_for_threads("list_masks" + of.what, {bytes_of<int16_t>(found)},
                   [&](const Memories &to, int threads) {
                     kernels().index_masks(masks[0].template as<uint64_t>(), T, F, tile, offsets.data(),
                                       to[0].as<int16_t>(), threads);
                   });
}

template <typename E>
void test_decode(const Case<E> &of) {
  const Csr<E> &list = of.list;
  const int64_t T = of.T, D = of.D, F = of.F, tile = of.tile;
  same_for_threads("matvec" + of.what, {bytes_of<E>(T * F)}, [&](const Memories &to, int threads) {
    kernels().matvec(of.x.data(), kDtype<E>, T, D, of.rows.data(), D, of.bias_f.data(), F,
                  to[0].as<E>(), threads);
  });
  same_for_threads("decode" + of.what, {bytes_of<E>(T * D)}, [&](const Memories &to, int threads) {
    kernels().decode(list.values.data(), list.index.data(), list.offsets.data(), kDtype<E>, T, F, tile,
                  of.rows.data(), D, D, of.bias_d.data(), to[0].as<E>(), threads);
  });
  same_for_threads("decode_sampled" + of.what, {bytes_of<E>(list.entries())},
                   [&](const Memories &to, int threads) {
                     kernels().decode_sampled(list.index.data(), list.offsets.data(), kDtype<E>, T, F,
                                           tile, of.x.data(), of.rows.data(), D, D,
                                           of.bias_f.data(), to[0].as<E>(), threads);
                   });
  const Screen screen = screen_of(of.rows.data(), F, D, D, 64, "screen_weight" + of.what);
  for (bool screened : {false, true}) {
    for (bool gated : {false, true}) {
      steppe_block block{};
      block.w = block.v = of.rows.data(), block.w_bias = of.bias_f.data();
      if (gated) block.up = of.rows.data();
      block.w_stride = block.up_stride = block.v_stride = D;
      block.D = D, block.F = F, block.dtype = kDtype<E>;
      block.bytes = screened ? screen.bytes->data() : nullptr;
      block.bounds = screened ? screen.bounds->data() : nullptr;
      same_for_threads("decode_mlp" + of.what + (gated ? " gated" : "") + (screened ? " screened" : ""),
                       {bytes_of<E>(T * F), bytes_of<E>(gated ? T * F : 0), bytes_of<E>(T * D),
                        bytes_of<int64_t>(1)},
                       [&](const Memories &to, int threads) {
                         int64_t *told = to[3].as<int64_t>();
                         const steppe_decode_call call{&block, T, screened ? T * F : 0, T * F, 1, 0.5f,
                                                    threads};
                         told[0] = kernels().decode_mlp(&call, of.x.data(), to[0].as<E>(),
                                                     gated ? to[1].as<E>() : nullptr, to[2].as<E>());
                         check(told[0] >= 0, "decode_mlp" + of.what + ": status");
                       });
    }
  }
}

template <typename E>
void test_case(int64_t T, int64_t D, int64_t F, int64_t tile) {
  const Case<E> of(T, D, F, tile);
  test_products(of);
  test_csr(of);
  test_screening(of);
  if (T <= 8) test_decode(of);
}

template <typename E>
void test_all() {
  // Tiles of 192 columns leave a remainder of each of these widths: more tiles than whole ones.
  constexpr int64_t kWidths[][2] = {{1, 1},    {17, 320}, {64, 64},  {65, 65},
                                    {320, 17}, {1, 1100}, {1100, 1}, {320, 65}};
  for (int64_t T : kTokens) {
    for (const auto &[D, F] : kWidths) {
      test_case<E>(T, D, F, 64);
      if (F > 64 && T % 3 == 1) test_case<E>(T, D, F, 192);
    }
  }
  test_case<E>(1, 1100, 1100, 192);
}

}  // namespace

int main() {
  test_all<float>();
  test_all<Half>();
  std::printf("%s, up to %d threads: %d passed, %d failed\n", steppe_isa(), kMost, passed, failed);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

// What the tests of the kernels share: elements of both dtypes, arrays that betray a wrong read or
// write, sums in float64 with the error that they may have, and a count of what held.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "steppe_native.h"

namespace checks {

inline const steppe_kernels &kernels() { return *steppe_chosen_kernels(); }

inline int passed = 0, failed = 0;

inline void check(bool holds, const std::string &what) {
  ++(holds ? passed : failed);
  if (!holds) std::printf("FAILED %s\n", what.c_str());
}

struct Half {
  uint16_t bits;
};

template <typename E>
constexpr int kDtype = sizeof(E) == sizeof(float) ? 0 : 1;
template <typename E>
constexpr const char *kName = sizeof(E) == sizeof(float) ? "float" : "half";

inline double to_double(float value) { return value; }
inline double to_double(Half value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// A value near the given one that the dtype has: a half keeps the upper bits, so inf and NaN too.
template <typename E>
E near(float value);
template <>
inline float near<float>(float value) { return value; }
template <>
inline Half near<Half>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return Half{uint16_t(bits >> 16)};
}

inline std::mt19937 &generator() {
  static std::mt19937 state(20);
  return state;
}
inline float uniform() { return float(generator()()) / 2147483648.0f - 1; }  // in [-1, 1)

// An input: ends where its memory ends, so that AddressSanitizer and valgrind see a read past it,
// and is aligned to no more than its element.
template <typename E>
class Input {
 public:
  explicit Input(int64_t size = 0) : memory_(size + 1) {}
  explicit Input(const std::vector<E> &values) : memory_(values.size() + 1) {
    std::copy(values.begin(), values.end(), memory_.begin() + 1);
  }
  E *data() { return memory_.data() + 1; }
  const E *data() const { return memory_.data() + 1; }
  int64_t size() const { return int64_t(memory_.size()) - 1; }
  E &operator[](int64_t i) { return data()[i]; }
  const E &operator[](int64_t i) const { return data()[i]; }

 private:
  std::vector<E> memory_;
};

// An output: full of NaN (or -1) at first, with guards on both sides, aligned to its element only.
template <typename E>
class Output {
 public:
  explicit Output(int64_t size) : size_(size), memory_(2 * kGuard + size * sizeof(E), kGuarded) {
    std::fill_n(memory_.begin() + kGuard, size * sizeof(E), 0xff);
  }
  E *data() { return reinterpret_cast<E *>(memory_.data() + kGuard); }
  const E *data() const { return reinterpret_cast<const E *>(memory_.data() + kGuard); }
  const E &operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return size_; }
  bool is_untouched(int64_t i) const {
    E blank;
    std::memset(&blank, 0xff, sizeof(E));
    return std::memcmp(data() + i, &blank, sizeof(E)) == 0;
  }
  bool guards_hold() const {
    for (size_t i = 0; i < kGuard; ++i) {
      if (memory_[i] != kGuarded || memory_[memory_.size() - 1 - i] != kGuarded) return false;
    }
    return true;
  }
  bool operator==(const Output &other) const { return memory_ == other.memory_; }

 private:
  static constexpr size_t kGuard = 128 + sizeof(E);
  static constexpr unsigned char kGuarded = 0xa5;
  int64_t size_;
  std::vector<unsigned char> memory_;
};

inline constexpr int kTeams[] = {1, 2, 3};  // sizes of the team: none may change a bit

inline std::string shape(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? " [" : ", ") + std::to_string(size);
  return text + "]";
}

// What `run(output, threads)` writes, the same bits for every team.
template <typename E, typename Run>
Output<E> same_for_all_teams(int64_t size, const std::string &what, Run run) {
  Output<E> first(size);
  run(first.data(), kTeams[0]);
  for (int threads : kTeams) {
    Output<E> again(size);
    run(again.data(), threads);
    check(again == first, what + ": other bits with " + std::to_string(threads) + " threads");
  }
  return first;
}

template <typename E>
bool same_bits(const E *a, const E *b, int64_t size) {
  return size == 0 || std::memcmp(a, b, size * sizeof(E)) == 0;
}

// A sum of products in float64.
struct Sum {
  double exact = 0, magnitude = 0;
  int64_t terms = 0;
  bool of_rounded = false;  // each product has factors that were rounded to the dtype on the way
  void add(double product) {
    exact += product;
    magnitude += std::fabs(product);
    ++terms;
  }
};

// Errors of float32 sums grow like a random walk; a half is rounded once, at the end.
template <typename E>
double tolerance(const Sum &sum) {
  const double rounding = kDtype<E> == 0 ? 0x1p-24 : 0x1p-8;
  return (2 + std::sqrt(double(sum.terms))) * 0x1p-24 * sum.magnitude +
         rounding * (sum.of_rounded ? sum.magnitude : std::fabs(sum.exact));
}

template <typename E>
bool is_close(const Sum &sum, E element) {
  const double got = to_double(element);
  if (std::isnan(sum.exact)) return std::isnan(got);
  if (std::isinf(sum.exact)) return got == sum.exact;
  return std::fabs(got - sum.exact) <= tolerance<E>(sum);
}

// Each element against its sum; `at` tells where an element stands. Zeros in place of the sums must
// not pass: at most a tenth of them may be so small that they would.
template <typename E, typename At>
void check_sums(const std::vector<Sum> &sums, const Output<E> &got, At at,
                const std::string &what) {
  int64_t wrong = 0, counted = 0, blind = 0;
  for (int64_t i = 0; i < int64_t(sums.size()); ++i) {
    wrong += !is_close(sums[i], got[at(i)]);
    counted += sums[i].terms > 0;
    blind += sums[i].terms > 0 && is_close(sums[i], near<E>(0));
  }
  check(wrong == 0, what + ": " + std::to_string(wrong) + " of " + std::to_string(sums.size()) +
                        " elements off");
  check(got.guards_hold(), what + ": writes outside its output");
  check(10 * blind <= counted || counted < 10, what + ": zeros would pass");
}

template <typename E>
void check_sums(const std::vector<Sum> &sums, const Output<E> &got, const std::string &what) {
  check_sums(sums, got, [](int64_t i) { return i; }, what);
}

}  // namespace checks

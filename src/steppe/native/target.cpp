// All kernels for one target: compiled once for each, with its flags and STEPPE_TARGET its name.
#include "compact.h"
#include "decode.h"
#include "decode_mlp.h"
#include "kernels.h"
#include "pack.h"
#include "sampled.h"
#include "screen.h"
#include "screen_decode.h"
#include "screen_filter.h"
#include "spmm.h"
#include "transpose.h"

namespace steppe {
namespace STEPPE_TARGET {
namespace {

// Turns the C interface's pointers into pointers to elements.
template <typename E>
struct As {
  static const E *in(const void *p) { return static_cast<const E *>(p); }
  static E *out(void *p) { return static_cast<E *>(p); }
  static Matrix<E> matrix(const steppe_matrix &of) {
    return {in(of.m), of.N, of.D, of.row_stride, of.col_stride};
  }
};

// call(As<E>()) for the type of element that a dtype stands for.
template <typename Call>
inline auto with_elements(int dtype, Call call) {
  return dtype == 0 ? call(As<float>()) : call(As<bf16>());
}

struct Entry {
#define KERNEL(result, name, dtype, parameters, arguments)          \
  static result name parameters {                                   \
    return with_elements(dtype, [&]([[maybe_unused]] auto as) {     \
      return STEPPE_TARGET::name arguments;                         \
    });                                                             \
  }
#include "functions.def"
};

}  // namespace

extern const steppe_kernels kernels = {
#define KERNEL(result, name, dtype, parameters, arguments) Entry::name,
#include "functions.def"
};

}  // namespace STEPPE_TARGET
}  // namespace steppe

// One table of kernels per target and dtype.
#pragma once

#include <cstdint>

#include "steppe_native.h"

namespace steppe {

// The functions of steppe_native.h for one dtype; E is the type of an element.
struct Kernels {
  const char *isa;
  void (*count)(const void *, int64_t, int64_t, int64_t, int32_t *, int);
  void (*fill)(const void *, int64_t, int64_t, int64_t, int64_t, const int64_t *, int16_t *, void *,
               int);
  void (*pack)(const void *, int64_t, int64_t, int64_t, int64_t, void *, int);
  int (*spmm)(const void *, const int16_t *, const int64_t *, int64_t, int64_t,
              const steppe_matrix &, const void *, void *, int64_t, int64_t, bool, int);
  int (*sampled)(const int16_t *, const int64_t *, int64_t, int64_t, const void *,
                 const steppe_matrix &, const void *, void *, int);
  void (*transpose)(const void *, const void *, const int16_t *, const int64_t *, int64_t, int64_t,
                    int64_t, int64_t, void *, void *, int16_t *, int64_t *, int);
  void (*row_sums)(const void *, const int64_t *, int64_t, int64_t, void *, int);
  void (*matvec)(const void *, int64_t, int64_t, const void *, int64_t, const void *, int64_t,
                 void *, int);
  void (*decode)(const void *, const int16_t *, const int64_t *, int64_t, int64_t, int64_t,
                 const void *, int64_t, int64_t, const void *, void *, int);
  void (*decode_sampled)(const int16_t *, const int64_t *, int64_t, int64_t, int64_t, const void *,
                         const void *, int64_t, int64_t, const void *, void *, int);
  int64_t (*decode_mlp)(const steppe_few_call &, const void *, void *, void *, void *);
  int (*screen_weight)(const void *, int64_t, int64_t, int64_t, int64_t, uint8_t *, double *, int);
  int (*screen_tokens)(const void *, int64_t, int64_t, int64_t, int8_t *, void *, int);
  int64_t (*screen)(const int8_t *, const void *, int64_t, int64_t, const uint8_t *,
                    const double *, const void *, int64_t, int64_t, uint64_t *, int32_t *, int);
  void (*list_masks)(const uint64_t *, int64_t, int64_t, int64_t, const int64_t *, int16_t *, int);
  void (*count_listed)(const void *, const int64_t *, int64_t, int32_t *, int);
  void (*sift)(const void *, const int16_t *, const int64_t *, int64_t, int64_t, int64_t, int64_t,
               const int64_t *, void *, int16_t *, int);
};

#if defined(STEPPE_X86)
namespace avx512_bf16 {
extern const Kernels float_kernels, half_kernels;
}
namespace avx512_vnni {
extern const Kernels float_kernels, half_kernels;
}
namespace avx512 {
extern const Kernels float_kernels, half_kernels;
}
namespace avx2 {
extern const Kernels float_kernels, half_kernels;
}
#endif
namespace portable {
extern const Kernels float_kernels, half_kernels;
}

}  // namespace steppe

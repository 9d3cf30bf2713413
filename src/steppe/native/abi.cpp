// The C interface: chooses the target once, then hands on.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "steppe_native.h"
#include "writes.h"

namespace steppe {
namespace {

struct Target {
  const char *name;
  bool runs_here;
  const Kernels *float_kernels, *half_kernels;
};

// The best target that this processor runs and STEPPE_ISA allows.
Target choose() {
  const Target targets[] = {
#if defined(STEPPE_X86)
      {"avx512+bf16",
       __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"),
       &avx512_bf16::float_kernels, &avx512_bf16::half_kernels},
      {"avx512+vnni",
       __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
       &avx512_vnni::float_kernels, &avx512_vnni::half_kernels},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
       &avx512::float_kernels, &avx512::half_kernels},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
       &avx2::float_kernels, &avx2::half_kernels},
#endif
      {"portable", true, &portable::float_kernels, &portable::half_kernels},
  };
  const char *cap = std::getenv("STEPPE_ISA");
  bool allowed = cap == nullptr || *cap == '\0';
  for (const Target &target : targets) {
    allowed = allowed || std::strcmp(cap, target.name) == 0;
    if (allowed && target.runs_here) return target;
  }
  return targets[sizeof(targets) / sizeof(targets[0]) - 1];
}

const Target &target() {
  static const Target chosen = choose();
  return chosen;
}

const Kernels &kernels(int dtype) {
  return dtype == 0 ? *target().float_kernels : *target().half_kernels;
}

}  // namespace
}  // namespace steppe

using steppe::kernels;

extern "C" {

int steppe_abi_version(void) { return 5; }

const char *steppe_isa(void) { return steppe::target().name; }

void steppe_prefer_large_pages(void *start, int64_t bytes, int in_use) {
#if defined(__linux__)
  const uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / page * page;
  // An advice that is not taken changes nothing but the speed.
  constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, which older headers lack
  if (first >= last) return;
  if (!in_use) (void)madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
  // Also of new memory: what malloc gives again has its small pages already.
  (void)madvise(reinterpret_cast<void *>(first), last - first, kCollapse);
#else
  (void)start, (void)bytes, (void)in_use;
#endif
}

int steppe_open_writes(void) { return steppe::writes::open_files(); }

void steppe_close_writes(void) { steppe::writes::close_files(); }

int64_t steppe_edges(const void *start, int64_t bytes) {
  const steppe::writes::Pages pages(steppe_watch{start, bytes, nullptr});
  return pages.head() + pages.tail();
}

int steppe_watch_writes(const steppe_watch *watch, int anew) {
  return steppe::writes::watch(*watch, anew != 0);
}

void steppe_stop_watching(const steppe_watch *watch) {
  steppe::writes::stop(steppe::writes::Pages(*watch));
}

int steppe_copies_hold(const steppe_copied *copies, int64_t count) {
  return steppe::writes::copies_hold(copies, count);
}

void steppe_count(const void *p, int dtype, int64_t T, int64_t F, int64_t stride, int32_t *counts,
                  int threads) {
  kernels(dtype).count(p, T, F, stride, counts, threads);
}

int64_t steppe_offsets(const int32_t *counts, int64_t T, int64_t F, int64_t tile,
                       int64_t *offsets) {
  const int64_t blocks = (F + 63) / 64, per_tile = tile / 64;
  int64_t nnz = 0;
  for (int64_t first = 0; first < blocks; first += per_tile) {
    for (int64_t t = 0; t < T; ++t) {
      *offsets++ = nnz;
      for (int64_t b = first; b < std::min(first + per_tile, blocks); ++b) nnz += counts[t * blocks + b];
    }
  }
  *offsets = nnz;
  return nnz;
}

void steppe_fill(const void *p, int dtype, int64_t T, int64_t F, int64_t stride, int64_t tile,
                 const int64_t *offsets, int16_t *index, void *values, int threads) {
  kernels(dtype).fill(p, T, F, stride, tile, offsets, index, values, threads);
}

void steppe_pack(const void *m, int dtype, int64_t N, int64_t D, int64_t row_stride,
                 int64_t col_stride, void *panels, int threads) {
  kernels(dtype).pack(m, N, D, row_stride, col_stride, panels, threads);
}

int steppe_spmm(const void *values, const int16_t *index, const int64_t *offsets, int dtype,
                int64_t T, int64_t tile, const steppe_matrix *m, const void *bias, void *out,
                int64_t row_stride, int64_t col_stride, int accumulate, int threads) {
  return kernels(dtype).spmm(values, index, offsets, T, tile, *m, bias, out, row_stride, col_stride,
                             accumulate != 0, threads);
}

int steppe_sampled(const int16_t *index, const int64_t *offsets, int dtype, int64_t T,
                   int64_t tile, const void *panels_g, const steppe_matrix *m, const void *bias,
                   void *values, int threads) {
  return kernels(dtype).sampled(index, offsets, T, tile, panels_g, *m, bias, values, threads);
}

void steppe_transpose(const void *values_a, const void *values_b, const int16_t *index,
                      const int64_t *offsets, int dtype, int64_t T, int64_t N, int64_t tile,
                      int64_t tile_t, void *values_a_t, void *values_b_t, int16_t *index_t,
                      int64_t *offsets_t, int threads) {
  kernels(dtype).transpose(values_a, values_b, index, offsets, T, N, tile, tile_t, values_a_t,
                           values_b_t, index_t, offsets_t, threads);
}

void steppe_row_sums(const void *values, const int64_t *offsets, int dtype, int64_t T,
                     int64_t tiles, void *out, int threads) {
  kernels(dtype).row_sums(values, offsets, T, tiles, out, threads);
}

void steppe_matvec(const void *x, int dtype, int64_t T, int64_t D, const void *w, int64_t stride,
                   const void *bias, int64_t F, void *out, int threads) {
  kernels(dtype).matvec(x, T, D, w, stride, bias, F, out, threads);
}

void steppe_decode(const void *values, const int16_t *index, const int64_t *offsets, int dtype,
                   int64_t T, int64_t F, int64_t tile, const void *v, int64_t stride, int64_t D,
                   const void *bias, void *out, int threads) {
  kernels(dtype).decode(values, index, offsets, T, F, tile, v, stride, D, bias, out, threads);
}

void steppe_decode_sampled(const int16_t *index, const int64_t *offsets, int dtype, int64_t T,
                           int64_t F, int64_t tile, const void *x, const void *w, int64_t stride,
                           int64_t D, const void *bias, void *values, int threads) {
  kernels(dtype).decode_sampled(index, offsets, T, F, tile, x, w, stride, D, bias, values, threads);
}

int steppe_screen_weight(const void *w, int dtype, int64_t F, int64_t D, int64_t row_stride,
                         int64_t panel_stride, uint8_t *bytes, double *bounds, int threads) {
  return kernels(dtype).screen_weight(w, F, D, row_stride, panel_stride, bytes, bounds, threads);
}

int steppe_screen_tokens(const void *x, int dtype, int64_t T, int64_t D, int64_t stride,
                         int8_t *integers, void *tokens, int threads) {
  return kernels(dtype).screen_tokens(x, T, D, stride, integers, tokens, threads);
}

int64_t steppe_screen(const int8_t *integers, const void *tokens, int dtype, int64_t T, int64_t D,
                      const uint8_t *bytes, const double *bounds, const void *bias, int64_t F,
                      int64_t most, uint64_t *masks, int32_t *counts, int threads) {
  return kernels(dtype).screen(integers, tokens, T, D, bytes, bounds, bias, F, most, masks, counts,
                               threads);
}

void steppe_list_masks(const uint64_t *masks, int64_t T, int64_t F, int64_t tile,
                       const int64_t *offsets, int16_t *index, int threads) {
  kernels(0).list_masks(masks, T, F, tile, offsets, index, threads);
}

int64_t steppe_count_listed(const void *values, const int64_t *offsets, int dtype, int64_t lists,
                            int32_t *counts, int threads) {
  kernels(dtype).count_listed(values, offsets, lists, counts, threads);
  int64_t active = 0;
  for (int64_t list = 0; list < lists; ++list) active += counts[list];
  return active;
}

void steppe_sift(const void *values, const int16_t *index, const int64_t *offsets,
                 const int32_t *counts, int dtype, int64_t T, int64_t tile, int64_t tiles,
                 int64_t merged, int64_t *kept, void *values_to, int16_t *index_to, int threads) {
  int64_t entry = 0, *next = kept;
  for (int64_t first = 0; first < tiles; first += merged) {
    for (int64_t t = 0; t < T; ++t) {
      *next++ = entry;
      for (int64_t j = first; j < std::min(first + merged, tiles); ++j) entry += counts[j * T + t];
    }
  }
  *next = entry;
  kernels(dtype).sift(values, index, offsets, T, tile, tiles, merged, kept, values_to, index_to,
                      threads);
}

int64_t steppe_decode_mlp(const steppe_few_call *call, const void *x, void *r, void *up_values,
                          void *out) {
  try {
    return kernels(call->block->dtype).decode_mlp(*call, x, r, up_values, out);
  } catch (const std::bad_alloc &) {
    return STEPPE_NO_MEMORY;
  }
}

}  // extern "C"

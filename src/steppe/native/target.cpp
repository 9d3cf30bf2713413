// All kernels for one target: compiled once for each, with its flags and STEPPE_TARGET its name.
#include "compact.h"
#include "decode.h"
#include "decode_mlp.h"
#include "kernels.h"
#include "pack.h"
#include "sampled.h"
#include "screen.h"
#include "screen_few.h"
#include "spmm.h"
#include "transpose.h"

namespace steppe {
namespace STEPPE_TARGET {
namespace {

// The signatures of the table for one type of element.
template <typename E>
struct Typed {
  static const E *in(const void *p) { return static_cast<const E *>(p); }
  static E *out(void *p) { return static_cast<E *>(p); }

  static void count(const void *p, int64_t T, int64_t F, int64_t stride, int32_t *counts,
                    int threads) {
    STEPPE_TARGET::count(in(p), T, F, stride, counts, threads);
  }
  static void fill(const void *p, int64_t T, int64_t F, int64_t stride, int64_t tile,
                   const int64_t *offsets, int16_t *index, void *values, int threads) {
    STEPPE_TARGET::fill(in(p), T, F, stride, tile, offsets, index, out(values), threads);
  }
  static void pack(const void *m, int64_t N, int64_t D, int64_t row_stride, int64_t col_stride,
                   void *panels, int threads) {
    STEPPE_TARGET::pack(Matrix<E>{in(m), N, D, row_stride, col_stride}, out(panels), threads);
  }
  static Matrix<E> matrix(const steppe_matrix &of) {
    return {in(of.m), of.N, of.D, of.row_stride, of.col_stride};
  }
  static int spmm(const void *values, const int16_t *index, const int64_t *offsets, int64_t T,
                  int64_t tile, const steppe_matrix &m, const void *bias, void *to,
                  int64_t row_stride, int64_t col_stride, bool accumulate, int threads) {
    return STEPPE_TARGET::spmm(in(values), index, offsets, T, tile, matrix(m), out(m.panels),
                               in(bias), out(to), row_stride, col_stride, accumulate, threads);
  }
  static int sampled(const int16_t *index, const int64_t *offsets, int64_t T, int64_t tile,
                     const void *panels_g, const steppe_matrix &m, const void *bias, void *values,
                     int threads) {
    return STEPPE_TARGET::sampled(index, offsets, T, tile, in(panels_g), matrix(m), out(m.panels),
                                  in(bias), out(values), threads);
  }
  static void transpose(const void *values_a, const void *values_b, const int16_t *index,
                        const int64_t *offsets, int64_t T, int64_t N, int64_t tile, int64_t tile_t,
                        void *values_a_t, void *values_b_t, int16_t *index_t, int64_t *offsets_t,
                        int threads) {
    STEPPE_TARGET::transpose(in(values_a), in(values_b), index, offsets, T, N, tile, tile_t,
                             out(values_a_t), out(values_b_t), index_t, offsets_t, threads);
  }
  static void row_sums(const void *values, const int64_t *offsets, int64_t T, int64_t tiles,
                       void *to, int threads) {
    STEPPE_TARGET::row_sums(in(values), offsets, T, tiles, out(to), threads);
  }
  static void matvec(const void *x, int64_t T, int64_t D, const void *w, int64_t stride,
                     const void *bias, int64_t F, void *to, int threads) {
    STEPPE_TARGET::matvec(in(x), T, D, in(w), stride, in(bias), F, out(to), threads);
  }
  static void decode(const void *values, const int16_t *index, const int64_t *offsets, int64_t T,
                     int64_t F, int64_t tile, const void *v, int64_t stride, int64_t D,
                     const void *bias, void *to, int threads) {
    STEPPE_TARGET::decode(in(values), index, offsets, T, F, tile, in(v), stride, D, in(bias),
                          out(to), threads);
  }
  static void decode_sampled(const int16_t *index, const int64_t *offsets, int64_t T, int64_t F,
                             int64_t tile, const void *x, const void *w, int64_t stride, int64_t D,
                             const void *bias, void *values, int threads) {
    STEPPE_TARGET::decode_sampled(index, offsets, T, F, tile, in(x), in(w), stride, D, in(bias),
                                  out(values), threads);
  }

  static int64_t decode_mlp(const steppe_few_call &call, const void *x, void *r, void *up_values,
                            void *to) {
    return STEPPE_TARGET::decode_mlp(FewBlock<E>(call, in(x)), call.most_candidates, call.most,
                                     out(r), out(up_values), out(to));
  }
  static int screen_weight(const void *w, int64_t F, int64_t D, int64_t row_stride,
                           int64_t panel_stride, uint8_t *bytes, double *bounds, int threads) {
    return STEPPE_TARGET::screen_weight(in(w), F, D, row_stride, panel_stride, bytes, bounds,
                                        threads);
  }
  static int screen_tokens(const void *x, int64_t T, int64_t D, int64_t stride, int8_t *integers,
                           void *tokens, int threads) {
    return STEPPE_TARGET::screen_tokens(in(x), T, D, stride, integers,
                                        static_cast<Token *>(tokens), threads);
  }
  static int64_t screen(const int8_t *integers, const void *tokens, int64_t T, int64_t D,
                        const uint8_t *bytes, const double *bounds, const void *bias, int64_t F,
                        int64_t most, uint64_t *masks, int32_t *counts, int threads) {
    return STEPPE_TARGET::screen(integers, static_cast<const Token *>(tokens), T, D, bytes, bounds,
                                 in(bias), F, most, masks, counts, threads);
  }
  static void count_listed(const void *values, const int64_t *offsets, int64_t lists,
                           int32_t *counts, int threads) {
    STEPPE_TARGET::count_listed(in(values), offsets, lists, counts, threads);
  }
  static void sift(const void *values, const int16_t *index, const int64_t *offsets, int64_t T,
                   int64_t tile, int64_t tiles, int64_t merged, const int64_t *kept,
                   void *values_to, int16_t *index_to, int threads) {
    STEPPE_TARGET::sift(in(values), index, offsets, T, tile, tiles, merged, kept, out(values_to),
                        index_to, threads);
  }

  static constexpr Kernels table() {
    return {STEPPE_ISA, count,  fill,           pack,       spmm,           sampled,
            transpose,  row_sums, matvec,       decode,     decode_sampled, decode_mlp,
            screen_weight, screen_tokens, screen, list_masks, count_listed, sift};
  }
};

}  // namespace

extern const Kernels float_kernels = Typed<float>::table();
extern const Kernels half_kernels = Typed<bf16>::table();

}  // namespace STEPPE_TARGET
}  // namespace steppe

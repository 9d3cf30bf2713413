/* Sparse products of MLP blocks on the CPU: the C interface.
 *
 * A matrix [T, F] that is mostly zero stands as a list of its entries. The columns are cut into
 * tiles of `tile` columns, a multiple of 64 and at most 32704; entries are sorted by tile, then row,
 * then column:
 *   offsets  int64 [tiles * T + 1]  entries of (tile j, row t): offsets[j*T + t] up to the next
 *   index    int16 [nnz]            column within its tile
 *   values   dtype [nnz]
 *
 * A dense matrix M [N, D] that rows are gathered from stands as panels: [ceil(D / 64)][N][64], the
 * last one padded with zeros, so that the part of a row that is used at once lies together.
 *
 * dtype is 0 for float32 and 1 for bfloat16; sums are float32. `threads` is the size of the OpenMP
 * team. Every element of an output is summed by one thread in an order that does not depend on
 * `threads`: results are the same bits for any. Pointers need no alignment beyond their element's.
 * Lengths are the caller's business: nothing is checked here.
 */
#ifndef STEPPE_NATIVE_H
#define STEPPE_NATIVE_H

#include <stdint.h>

#if defined(__GNUC__)
#define STEPPE_API __attribute__((visibility("default")))
#else
#define STEPPE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

STEPPE_API int steppe_abi_version(void);

/* "avx512+bf16", "avx512+vnni", "avx512", "avx2" or "portable"; the environment variable STEPPE_ISA caps it. */
STEPPE_API const char *steppe_isa(void);

/* Ask the system for large pages, where it has them: what is gathered from then needs fewer of its page
 * table's entries. Memory that is `in_use` keeps what is in it. */
STEPPE_API void steppe_prefer_large_pages(void *start, int64_t bytes, int in_use);

/* Memory that is watched for writes: `edges` has room for steppe_edges(start, bytes) bytes. */
typedef struct {
  const void *start;
  int64_t bytes;
  void *edges;
} steppe_watch;

/* A copy of watched memory: true as long as nothing was written, and `generation`, which is raised before
 * the memory is watched anew, is what it was when the copy was made. */
typedef struct {
  const steppe_watch *watch;
  const int64_t *generation;
  int64_t made_in;
} steppe_copied;

/* Open what writes are seen by. 0, or why they cannot be seen here, an errno. */
STEPPE_API int steppe_open_writes(void);

/* Close it, for a forked process, whose own writes it would not see. */
STEPPE_API void steppe_close_writes(void);

/* Bytes of a range that lie on pages which it may share with other data. */
STEPPE_API int64_t steppe_edges(const void *start, int64_t bytes);

/* Begin to watch memory for writes, or begin `anew`. 0, or an errno: EINVAL of memory that others may
 * write to, which is shared or a file's. */
STEPPE_API int steppe_watch_writes(const steppe_watch *watch, int anew);

STEPPE_API void steppe_stop_watching(const steppe_watch *watch);

/* Whether `count` copies are still true. */
STEPPE_API int steppe_copies_hold(const steppe_copied *copies, int64_t count);

/* Entries of p [T, F] (rows `stride` apart) that are not <= 0, so that NaN counts, by blocks of 64
 * columns: int32 [T, ceil(F / 64)]. */
STEPPE_API void steppe_count(const void *p, int dtype, int64_t T, int64_t F, int64_t stride,
                             int32_t *counts, int threads);

/* offsets of a list with `tile` columns a tile, from counts. Returns nnz. */
STEPPE_API int64_t steppe_offsets(const int32_t *counts, int64_t T, int64_t F, int64_t tile,
                                  int64_t *offsets);

/* index and values of the list of those entries. */
STEPPE_API void steppe_fill(const void *p, int dtype, int64_t T, int64_t F, int64_t stride,
                            int64_t tile, const int64_t *offsets, int16_t *index, void *values,
                            int threads);

/* Panels of M [N, D], whose element (n, d) is m[n * row_stride + d * col_stride]. */
STEPPE_API void steppe_pack(const void *m, int dtype, int64_t N, int64_t D, int64_t row_stride,
                            int64_t col_stride, void *panels, int threads);

/* A matrix M [N, D] that is gathered from. Its panels are in `panels` if `m` is NULL; else its element
 * (n, d) is m[n * row_stride + d * col_stride], and `panels` is memory for the panels, of which
 * nothing can be told afterwards. */
typedef struct steppe_matrix {
  const void *m;
  int64_t N, D, row_stride, col_stride;
  void *panels;
} steppe_matrix;

/* out [T, D] = A M + bias, or += A M if `accumulate`; A [T, N] as a list, bias [D] or NULL, out(t, d)
 * at out[t * row_stride + d * col_stride]. Returns 0, or 1 without memory. */
STEPPE_API int steppe_spmm(const void *values, const int16_t *index, const int64_t *offsets,
                           int dtype, int64_t T, int64_t tile, const steppe_matrix *m,
                           const void *bias, void *out, int64_t row_stride, int64_t col_stride,
                           int accumulate, int threads);

/* values of G Mᵀ + bias on a support; G [T, D] as panels, bias [N] or NULL. Returns 0, or 1 without
 * memory. */
STEPPE_API int steppe_sampled(const int16_t *index, const int64_t *offsets, int dtype, int64_t T,
                              int64_t tile, const void *panels_g, const steppe_matrix *m,
                              const void *bias, void *values, int threads);

/* The list of the transposed matrix [N, T], `tile_t` rows of the old one a tile; values_b may be
 * NULL. offsets_t is int64 [ceil(T / tile_t) * N + 1]. */
STEPPE_API void steppe_transpose(const void *values_a, const void *values_b, const int16_t *index,
                                 const int64_t *offsets, int dtype, int64_t T, int64_t N,
                                 int64_t tile, int64_t tile_t, void *values_a_t, void *values_b_t,
                                 int16_t *index_t, int64_t *offsets_t, int threads);

/* out [T], dtype: the sum of each row of a list. */
STEPPE_API void steppe_row_sums(const void *values, const int64_t *offsets, int dtype, int64_t T,
                                int64_t tiles, void *out, int threads);

/* out [T, F] = x Wᵀ + bias for few rows: x [T, D] with T <= 8, W [F, D] with rows `stride` apart. */
STEPPE_API void steppe_matvec(const void *x, int dtype, int64_t T, int64_t D, const void *w,
                              int64_t stride, const void *bias, int64_t F, void *out, int threads);

/* out [T, D] = A V + bias for few rows: A [T, F] as a list, T <= 8, V [F, D] with rows `stride`
 * apart. */
STEPPE_API void steppe_decode(const void *values, const int16_t *index, const int64_t *offsets,
                              int dtype, int64_t T, int64_t F, int64_t tile, const void *v,
                              int64_t stride, int64_t D, const void *bias, void *out, int threads);

/* values of x Wᵀ + bias on a support for few rows: x [T, D], W [F, D] with rows `stride` apart,
 * bias [F] or NULL. */
STEPPE_API void steppe_decode_sampled(const int16_t *index, const int64_t *offsets, int dtype,
                                      int64_t T, int64_t F, int64_t tile, const void *x,
                                      const void *w, int64_t stride, int64_t D, const void *bias,
                                      void *values, int threads);

/* Screening: which entries of x Wᵀ + bias can be above zero, told from an int8 product; for D below
 * 133,000. With width = D rounded up to a multiple of 128 and blocks = ceil(F / 64):
 *   bytes     uint8 [blocks * 4][width / 4][16][4]  W on its grids
 *   bounds    double [4][blocks * 64]               what the bound needs of the units
 *   integers  int8 [T][width]                       x on its grids
 *   tokens    32 bytes [T]                          what the bound needs of the tokens
 */

/* bytes and bounds of W [F, D]; the element (f, d) is w[f * row_stride + d / 64 * panel_stride +
 * d % 64]: panels have (64, 64 F), contiguous rows (D, 64). Returns 0, or 1 without memory. */
STEPPE_API int steppe_screen_weight(const void *w, int dtype, int64_t F, int64_t D,
                                    int64_t row_stride, int64_t panel_stride, uint8_t *bytes,
                                    double *bounds, int threads);

/* integers and tokens of x [T, D], rows `stride` apart. Returns 0, or 1 without memory. */
STEPPE_API int steppe_screen_tokens(const void *x, int dtype, int64_t T, int64_t D, int64_t stride,
                                    int8_t *integers, void *tokens, int threads);

/* masks [T, blocks]: bit j of a block is set if its unit j is a candidate, with bias [F] of the
 * dtype or NULL; counts [T, blocks] of them, for steppe_offsets. Returns how many there are; -1, with
 * nothing to be used, if there are more than `most`. */
STEPPE_API int64_t steppe_screen(const int8_t *integers, const void *tokens, int dtype, int64_t T,
                                 int64_t D, const uint8_t *bytes, const double *bounds,
                                 const void *bias, int64_t F, int64_t most, uint64_t *masks,
                                 int32_t *counts, int threads);

/* index of the list of the entries whose bits are set. */
STEPPE_API void steppe_list_masks(const uint64_t *masks, int64_t T, int64_t F, int64_t tile,
                                  const int64_t *offsets, int16_t *index, int threads);

/* counts int32 [lists] of the entries of each list that are not <= 0. Returns how many there are. */
STEPPE_API int64_t steppe_count_listed(const void *values, const int64_t *offsets, int dtype,
                                       int64_t lists, int32_t *counts, int threads);

/* The list of those entries, with tiles that are `merged` of the old ones wide: kept int64
 * [ceil(tiles / merged) * T + 1], its offsets, values and index. */
STEPPE_API void steppe_sift(const void *values, const int16_t *index, const int64_t *offsets,
                            const int32_t *counts, int dtype, int64_t T, int64_t tile,
                            int64_t tiles, int64_t merged, int64_t *kept, void *values_to,
                            int16_t *index_to, int threads);

/* A block as steppe_decode_mlp reads it. W, U and V are [F, D], their rows so far apart; `up` is NULL
 * in a block that is not gated, biases may be NULL. `bytes` and `bounds` are of W, or NULL. `copies`
 * are those among all these. */
typedef struct {
  const void *w, *w_bias, *up, *up_bias, *v, *v_bias;
  int64_t w_stride, up_stride, v_stride;
  int64_t D, F;
  const uint8_t *bytes;
  const double *bounds;
  const steppe_copied *copies;
  int64_t copy_count;
  int dtype;
} steppe_block;

/* What a call with few rows is to do, the same for as many calls as are alike. T <= 8. */
typedef struct {
  const steppe_block *block;
  int64_t T, most_candidates, most;
  float alpha, beta;
  int threads;
} steppe_few_call;

/* A whole block for few rows: p = x Wᵀ + w_bias, r = max(p, 0), a = alpha r + beta r², times
 * x Uᵀ + up_bias in a gated block, out = a V + v_bias; x and out [T, D]. r [T, F] is written, and
 * up_values [T, F] of a gated block where r is active, elsewhere 0; where r is NULL, neither. Where
 * there are `bytes` and `most_candidates` > 0 the first product is screened, with x on grids of 16
 * bits; if more than `most_candidates` are candidates, all is computed.
 * Returns n + (c + 1) 2³², with n the number of active entries and c of candidates, -1 without
 * screening; or STEPPE_NO_MEMORY; STEPPE_CHANGED, with nothing written, if a copy is no longer true;
 * STEPPE_TOO_MANY - (c + 1), with r alone written, if n is more than `most`. */
enum { STEPPE_NO_MEMORY = -1, STEPPE_CHANGED = -2, STEPPE_TOO_MANY = -3 };
STEPPE_API int64_t steppe_decode_mlp(const steppe_few_call *call, const void *x, void *r,
                                     void *up_values, void *out);

#ifdef __cplusplus
}
#endif
#endif

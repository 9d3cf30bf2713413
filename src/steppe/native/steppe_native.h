/* Sparse products of MLP blocks on the CPU: the C interface.
 *
 * A matrix [T, F] that is mostly zero is stored as column-tiled CSR. The columns are cut into tiles of
 * `tile` columns, a multiple of 64 and at most 32704; entries are sorted by tile, then row, then
 * column:
 *   offsets  int64 [tiles * T + 1]  entries of (tile j, row t): offsets[j*T + t] up to the next
 *   index    int16 [nnz]            column within its tile
 *   values   dtype [nnz]
 *
 * A dense matrix M [N, D] that rows are gathered from is stored as panels: [ceil(D / 64)][N][64], the
 * last one padded with zeros, so that the part of a row that is used at once lies together.
 *
 * dtype is 0 for float32 and 1 for bfloat16; sums are float32. `threads` is the size of the OpenMP
 * team. Every element of an output is summed by one thread in an order that does not depend on
 * `threads`: results are the same bits for any. Pointers need no alignment beyond their element's.
 * The caller checks lengths; nothing is checked here.
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

/* Memory that is watched for writes: `edges` has room for steppe_edges(start, bytes) bytes. */
typedef struct {
  const void *start;
  int64_t bytes;
  void *edges;
} steppe_watch;

/* A cached copy of watched memory. It is valid as long as nothing was written and `generation`, which is
 * raised before memory is watched again, is still `made_in`. */
typedef struct {
  const steppe_watch *watch;
  const int64_t *generation;
  int64_t made_in;
} steppe_copied;

/* A matrix M [N, D] that is gathered from. Its panels are in `panels` if `m` is NULL; else its element
 * (n, d) is m[n * row_stride + d * col_stride], and `panels` is scratch memory for the panels: its
 * contents are unspecified afterwards. */
typedef struct {
  const void *m;
  int64_t N, D, row_stride, col_stride;
  void *panels;
} steppe_matrix;

/* A block as steppe_decode_mlp reads it. W, U and V are [F, D], their rows so far apart; `up` is NULL
 * in a block that is not gated, biases may be NULL. `bytes` and `bounds` are of W, or NULL. `copies`
 * are the cached copies among all these. */
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

/* The settings of a decode call, the same for as many calls as are alike. T <= 8. */
typedef struct {
  const steppe_block *block;
  int64_t T, most_candidates, most;
  float alpha, beta;
  int threads;
} steppe_decode_call;

/* The structs above, for Python to check its own mirrors of them. */
#define STEPPE_STRUCTS(STRUCT) \
  STRUCT(watch) STRUCT(copied) STRUCT(matrix) STRUCT(block) STRUCT(decode_call)

/* Results of steppe_decode_mlp besides counts. */
enum { STEPPE_NO_MEMORY = -1, STEPPE_CHANGED = -2, STEPPE_TOO_MANY = -3 };

/* Raised with every change that an older Python side would not survive. */
STEPPE_API int steppe_abi_version(void);

#define FUNCTION(result, name, parameters) STEPPE_API result steppe_##name parameters;
#include "functions.def"

/* The kernels for one instruction set. */
typedef struct {
#define KERNEL(result, name, dtype, parameters, arguments) result(*name) parameters;
#include "functions.def"
} steppe_kernels;

/* Those for the best instruction set that this processor runs and STEPPE_ISA allows. */
STEPPE_API const steppe_kernels *steppe_chosen_kernels(void);

/* A function or kernel. Its signature has a letter for the result, then one for each parameter:
 * v void, i int, n int64, f float, s string, p any other pointer. */
typedef struct {
  const char *name, *signature;
  void (*address)(void);
} steppe_function;

/* All of them, up to one without a name. */
STEPPE_API const steppe_function *steppe_functions(void);

typedef struct {
  const char *name;
  int64_t bytes;
} steppe_struct;

/* The sizes of the structs above, up to one without a name. */
STEPPE_API const steppe_struct *steppe_structs(void);

#ifdef __cplusplus
}
#endif
#endif

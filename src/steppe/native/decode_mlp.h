// A whole block in decoding, T <= 8, in one call. The products themselves take so little time that a call
// from Python for each would add a third to it. Where the first product is screened, the bytes of the
// screen are read instead of W, a byte for each weight, then only the candidates' rows of W.
#pragma once

#include <algorithm>
#include <new>
#include <vector>

#include "decode.h"
#include "screen_decode.h"
#include "screen_filter.h"
#include "steppe_native.h"
#include "writes.h"

namespace steppe {
namespace STEPPE_TARGET {

// Columns per tile: so many rows of V stay in the second-level cache for all tokens. One token alone
// has no use for tiles, and longer CSR rows let more rows of V be read side by side.
inline int64_t decode_tile(int64_t T, int64_t F) {
  return T > 1 ? 256 : std::min(std::max(blocks_of(F), int64_t(1)) * kPanel, kMaxTile);
}

// A column-tiled CSR matrix that grows.
template <typename E>
struct Csr {
  Csr(int64_t T, int64_t F)
      : tile(decode_tile(T, F)), tiles(std::max<int64_t>((F + tile - 1) / tile, 1)),
        offsets(tiles * T + 1) {}
  void resize(int64_t entries) { index.resize(entries), values.resize(entries); }
  int64_t tile, tiles;
  std::vector<int64_t> offsets;
  std::vector<int16_t> index;
  std::vector<E> values;
};

// A call of a block.
template <typename E>
struct DecodeBlock {
  DecodeBlock(const steppe_decode_call &call, const E *x)
      : of(*call.block), x(x), w(in(of.w)), w_bias(in(of.w_bias)), up(in(of.up)),
        up_bias(in(of.up_bias)), v(in(of.v)), v_bias(in(of.v_bias)), T(call.T), D(of.D), F(of.F),
        alpha(call.alpha), beta(call.beta), threads(call.threads) {}
  static const E *in(const void *p) { return static_cast<const E *>(p); }
  const steppe_block &of;
  const E *x, *w, *w_bias, *up, *up_bias, *v, *v_bias;
  int64_t T, D, F;
  float alpha, beta;
  int threads;
};

// r in CSR form; in full too, [T, F], where `wanted` is given.
template <typename E>
void compute_all(const DecodeBlock<E> &block, Csr<E> &csr, E *wanted) {
  const int64_t T = block.T, F = block.F;
  std::vector<E> own(wanted == nullptr ? T * F : 0);
  E *const r = wanted == nullptr ? own.data() : wanted;
  matvec(block.x, T, block.D, block.w, block.of.w_stride, block.w_bias, F, r, block.threads);
  csr.resize(T * F);
  int64_t active = 0;
  for (int64_t j = 0; j < csr.tiles; ++j) {
    for (int64_t t = 0; t < T; ++t) {
      csr.offsets[j * T + t] = active;
      const int64_t width = std::min(csr.tile, F - j * csr.tile);
      for (int64_t f = 0; f < width; f += kPanel) {
        active += compact_block(r + t * F + j * csr.tile + f, std::min(kPanel, width - f), f,
                              csr.index.data() + active, csr.values.data() + active);
      }
    }
  }
  csr.offsets[csr.tiles * T] = active;
  csr.resize(active);
  if (wanted == nullptr) return;
  for (int64_t i = 0; i < T * F; ++i) {
    if (!is_active(to_float(r[i]))) r[i] = E{};
  }
}

// The candidates in CSR form, without values; returns their number. The index is left empty if there are
// more than `most`.
template <typename E>
int64_t find_candidates(const DecodeBlock<E> &block, int64_t most, Csr<E> &csr) {
  const int64_t T = block.T, blocks = blocks_of(block.F);
  std::vector<uint64_t> masks(T * blocks);
  screen_decode(few_tokens(block.x, T, block.D), block.of.bytes,
             Bounds(block.of.bounds, blocks * kPanel), block.w_bias, block.D, block.F,
             masks.data(), block.threads);
  int64_t found = 0;
  const int64_t per_tile = csr.tile / kPanel;
  for (int64_t j = 0; j < csr.tiles; ++j) {
    for (int64_t t = 0; t < T; ++t) {
      csr.offsets[j * T + t] = found;
      for (int64_t b = j * per_tile; b < std::min((j + 1) * per_tile, blocks); ++b) {
        found += __builtin_popcountll(masks[t * blocks + b]);
      }
    }
  }
  csr.offsets[csr.tiles * T] = found;
  if (found > most) return found;
  csr.resize(found);
  index_masks(masks.data(), T, block.F, csr.tile, csr.offsets.data(), csr.index.data(), 1);
  return found;
}

// Compute the candidates' values and keep the entries that are not <= 0; r [T, F] too if wanted.
template <typename E>
void compute_candidates(const DecodeBlock<E> &block, Csr<E> &csr, E *r) {
  const int64_t T = block.T, F = block.F, rows = csr.tiles * T;
  decode_sampled(csr.index.data(), csr.offsets.data(), T, F, csr.tile, block.x, block.w,
                 block.of.w_stride, block.D, block.w_bias, csr.values.data(), block.threads);
  if (r != nullptr) std::fill(r, r + T * F, E{});
  int64_t active = 0, first = 0;
  for (int64_t at = 0; at < rows; ++at) {
    const int64_t last = csr.offsets[at + 1];
    csr.offsets[at] = active;
    for (int64_t i = first; i < last; ++i) {
      const E value = csr.values[i];
      if (!is_active(to_float(value))) continue;
      if (r != nullptr) r[at % T * F + at / T * csr.tile + csr.index[i]] = value;
      csr.values[active] = value;
      csr.index[active++] = csr.index[i];
    }
    first = last;
  }
  csr.offsets[rows] = active;
  csr.resize(active);
}

// The products after the first: from r in CSR form to the output.
template <typename E>
void finish(const DecodeBlock<E> &block, Csr<E> &csr, E *up_values, E *out) {
  const int64_t T = block.T, F = block.F;
  std::vector<E> multipliers;
  if (block.up != nullptr) {
    multipliers.resize(csr.values.size());
    decode_sampled(csr.index.data(), csr.offsets.data(), T, F, csr.tile, block.x, block.up,
                   block.of.up_stride, block.D, block.up_bias, multipliers.data(), block.threads);
    if (up_values != nullptr) std::fill(up_values, up_values + T * F, E{});
  }
  for (int64_t at = 0; at < csr.tiles * T; ++at) {
    for (int64_t i = csr.offsets[at]; i < csr.offsets[at + 1]; ++i) {
      const float p = to_float(csr.values[i]);
      float a = block.alpha == 1 && block.beta == 0 ? p : p * (block.alpha + block.beta * p);
      if (block.up != nullptr) {
        if (up_values != nullptr) {
          up_values[at % T * F + at / T * csr.tile + csr.index[i]] = multipliers[i];
        }
        a *= to_float(multipliers[i]);
      }
      store(a, &csr.values[i]);
    }
  }
  decode(csr.values.data(), csr.index.data(), csr.offsets.data(), T, F, csr.tile, block.v,
         block.of.v_stride, block.D, block.v_bias, out, block.threads);
}

template <typename E>
int64_t compute_block(const DecodeBlock<E> &block, int64_t most_candidates, int64_t most, E *r,
                      E *up_values, E *out) {
  if (!writes::copies_hold(block.of.copies, block.of.copy_count)) return STEPPE_CHANGED;
  Csr<E> csr(block.T, block.F);
  const bool screens = block.of.bytes != nullptr && most_candidates > 0;
  const int64_t candidates = screens ? find_candidates(block, most_candidates, csr) : -1;
  if (screens && candidates <= most_candidates) {
    compute_candidates(block, csr, r);
  } else {
    compute_all(block, csr, r);
  }
  const int64_t active = int64_t(csr.values.size());
  if (active > most) return STEPPE_TOO_MANY - (candidates + 1);
  finish(block, csr, up_values, out);
  return active + ((candidates + 1) << 32);
}

template <typename E>
int64_t decode_mlp(const steppe_decode_call &call, const E *x, E *r, E *up_values, E *out) {
  try {
    return compute_block(DecodeBlock<E>(call, x), call.most_candidates, call.most, r, up_values, out);
  } catch (const std::bad_alloc &) {
    return STEPPE_NO_MEMORY;
  }
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

// A whole block for few rows, T <= 8: of so little work, calling each kernel for itself would be a
// third. Where the first product is screened, its bytes are read instead of W, and of W the rows of
// candidates.
#pragma once

#include <algorithm>
#include <vector>

#include "decode.h"
#include "screen_few.h"
#include "steppe_native.h"
#include "writes.h"

namespace steppe {
namespace STEPPE_TARGET {

// Columns of a tile: so many rows of V stay in the second-level cache for all tokens. One token alone
// has no use for tiles, and of a long list more rows are read side by side.
inline int64_t few_tile(int64_t T, int64_t F) {
  return T > 1 ? 256 : std::min(std::max(blocks_of(F), int64_t(1)) * kPanel, kMaxTile);
}

// A list of few rows.
template <typename E>
struct FewList {
  FewList(int64_t T, int64_t F)
      : tile(few_tile(T, F)), tiles(std::max<int64_t>((F + tile - 1) / tile, 1)),
        offsets(tiles * T + 1) {}
  void resize(int64_t entries) { index.resize(entries), values.resize(entries); }
  int64_t tile, tiles;
  std::vector<int64_t> offsets;
  std::vector<int16_t> index;
  std::vector<E> values;
};

// A call of a block.
template <typename E>
struct FewBlock {
  FewBlock(const steppe_few_call &call, const E *x)
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

// The list of r, and where r [T, F] is wanted it in full.
template <typename E>
void list_all(const FewBlock<E> &block, FewList<E> &list, E *wanted) {
  const int64_t T = block.T, F = block.F;
  std::vector<E> own(wanted == nullptr ? T * F : 0);
  E *const r = wanted == nullptr ? own.data() : wanted;
  matvec(block.x, T, block.D, block.w, block.of.w_stride, block.w_bias, F, r, block.threads);
  list.resize(T * F);
  int64_t active = 0;
  for (int64_t j = 0; j < list.tiles; ++j) {
    for (int64_t t = 0; t < T; ++t) {
      list.offsets[j * T + t] = active;
      const int64_t width = std::min(list.tile, F - j * list.tile);
      for (int64_t f = 0; f < width; f += kPanel) {
        active += list_active(r + t * F + j * list.tile + f, std::min(kPanel, width - f), f,
                              list.index.data() + active, list.values.data() + active);
      }
    }
  }
  list.offsets[list.tiles * T] = active;
  list.resize(active);
  if (wanted == nullptr) return;
  for (int64_t i = 0; i < T * F; ++i) {
    if (!is_active(to_float(r[i]))) r[i] = E{};
  }
}

// The list of the candidates, without values; the number of them. Nothing is listed if there are
// more than `most`.
template <typename E>
int64_t list_candidates(const FewBlock<E> &block, int64_t most, FewList<E> &list) {
  const int64_t T = block.T, blocks = blocks_of(block.F);
  std::vector<uint64_t> masks(T * blocks);
  screen_few(few_tokens(block.x, T, block.D), block.of.bytes,
             Bounds(block.of.bounds, blocks * kPanel), block.w_bias, block.D, block.F,
             masks.data(), block.threads);
  int64_t found = 0;
  const int64_t per_tile = list.tile / kPanel;
  for (int64_t j = 0; j < list.tiles; ++j) {
    for (int64_t t = 0; t < T; ++t) {
      list.offsets[j * T + t] = found;
      for (int64_t b = j * per_tile; b < std::min((j + 1) * per_tile, blocks); ++b) {
        found += __builtin_popcountll(masks[t * blocks + b]);
      }
    }
  }
  list.offsets[list.tiles * T] = found;
  if (found > most) return found;
  list.resize(found);
  list_masks(masks.data(), T, block.F, list.tile, list.offsets.data(), list.index.data(), 1);
  return found;
}

// The values of the candidates, of which those that are not <= 0 stay listed; r [T, F] if wanted.
template <typename E>
void keep_active_few(const FewBlock<E> &block, FewList<E> &list, E *r) {
  const int64_t T = block.T, F = block.F, lists = list.tiles * T;
  decode_sampled(list.index.data(), list.offsets.data(), T, F, list.tile, block.x, block.w,
                 block.of.w_stride, block.D, block.w_bias, list.values.data(), block.threads);
  if (r != nullptr) std::fill(r, r + T * F, E{});
  int64_t active = 0, first = 0;
  for (int64_t at = 0; at < lists; ++at) {
    const int64_t last = list.offsets[at + 1];
    list.offsets[at] = active;
    for (int64_t i = first; i < last; ++i) {
      const E value = list.values[i];
      if (!is_active(to_float(value))) continue;
      if (r != nullptr) r[at % T * F + at / T * list.tile + list.index[i]] = value;
      list.values[active] = value;
      list.index[active++] = list.index[i];
    }
    first = last;
  }
  list.offsets[lists] = active;
  list.resize(active);
}

// What comes after the first product: from the list of r to the output.
template <typename E>
void finish_few(const FewBlock<E> &block, FewList<E> &list, E *up_values, E *out) {
  const int64_t T = block.T, F = block.F;
  std::vector<E> multipliers;
  if (block.up != nullptr) {
    multipliers.resize(list.values.size());
    decode_sampled(list.index.data(), list.offsets.data(), T, F, list.tile, block.x, block.up,
                   block.of.up_stride, block.D, block.up_bias, multipliers.data(), block.threads);
    if (up_values != nullptr) std::fill(up_values, up_values + T * F, E{});
  }
  for (int64_t at = 0; at < list.tiles * T; ++at) {
    for (int64_t i = list.offsets[at]; i < list.offsets[at + 1]; ++i) {
      const float p = to_float(list.values[i]);
      float a = block.alpha == 1 && block.beta == 0 ? p : p * (block.alpha + block.beta * p);
      if (block.up != nullptr) {
        if (up_values != nullptr) {
          up_values[at % T * F + at / T * list.tile + list.index[i]] = multipliers[i];
        }
        a *= to_float(multipliers[i]);
      }
      store(a, &list.values[i]);
    }
  }
  decode(list.values.data(), list.index.data(), list.offsets.data(), T, F, list.tile, block.v,
         block.of.v_stride, block.D, block.v_bias, out, block.threads);
}

template <typename E>
int64_t decode_mlp(const FewBlock<E> &block, int64_t most_candidates, int64_t most, E *r,
                   E *up_values, E *out) {
  if (!writes::copies_hold(block.of.copies, block.of.copy_count)) return STEPPE_CHANGED;
  FewList<E> list(block.T, block.F);
  const bool screens = block.of.bytes != nullptr && most_candidates > 0;
  const int64_t candidates = screens ? list_candidates(block, most_candidates, list) : -1;
  if (screens && candidates <= most_candidates) {
    keep_active_few(block, list, r);
  } else {
    list_all(block, list, r);
  }
  const int64_t active = int64_t(list.values.size());
  if (active > most) return STEPPE_TOO_MANY - (candidates + 1);
  finish_few(block, list, up_values, out);
  return active + ((candidates + 1) << 32);
}

}  // namespace STEPPE_TARGET
}  // namespace steppe

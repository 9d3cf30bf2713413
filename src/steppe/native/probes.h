// Probes: whether values at a few places in memory are what they were.
#pragma once

#include <cstdint>
#include <cstring>

namespace steppe {

// values: `count` of them, of `size` bytes each.
inline bool probes_hold(const void *const *places, const void *values, int64_t count,
                        int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::memcmp(places[i], static_cast<const char *>(values) + i * size, size) != 0) return false;
  }
  return true;
}

}  // namespace steppe

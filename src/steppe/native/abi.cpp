// The C interface: chooses the target once, then hands on.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "steppe_native.h"
#include "writes.h"

namespace steppe {
namespace {

struct Target {
  const char *name;
  bool runs_here;
  const steppe_kernels *kernels;
};

#if defined(STEPPE_AMX)
// Whether the system lets this process use the tiles, 8 KB of state a thread, for which it has to ask.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The best target that this processor runs and STEPPE_ISA allows.
Target choose() {
#if defined(STEPPE_X86)
  const bool has_bf16 =
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#endif
  const Target targets[] = {
#if defined(STEPPE_X86)
#if defined(STEPPE_AMX)
      {"avx512+amx",
       has_bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           may_use_tiles(),
       &avx512_amx::kernels},
#endif
      {"avx512+bf16", has_bf16, &avx512_bf16::kernels},
      {"avx512+vnni",
       __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
       &avx512_vnni::kernels},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
       &avx512::kernels},
#if defined(STEPPE_AVX_VNNI)
      {"avx2+vnni",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("avxvnni"),
       &avx2_vnni::kernels},
#endif
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
       &avx2::kernels},
#endif
      {"portable", true, &portable::kernels},
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

// The letter of a type in a signature, see steppe_function.
template <typename T>
struct Letter;
template <>
struct Letter<void> { static constexpr char value = 'v'; };
template <>
struct Letter<int> { static constexpr char value = 'i'; };
template <>
struct Letter<int64_t> { static constexpr char value = 'n'; };
template <>
struct Letter<float> { static constexpr char value = 'f'; };
template <>
struct Letter<const char *> { static constexpr char value = 's'; };
template <typename T>
struct Letter<T *> { static constexpr char value = 'p'; };

template <typename Function>
struct Signature;
template <typename Result, typename... Parameters>
struct Signature<Result (*)(Parameters...)> {
  static constexpr char text[] = {Letter<Result>::value, Letter<Parameters>::value..., '\0'};
};

template <typename Function>
steppe_function described(const char *name, Function function) {
  return {name, Signature<Function>::text, reinterpret_cast<void (*)()>(function)};
}

}  // namespace
}  // namespace steppe

extern "C" {

int steppe_abi_version(void) { return 8; }

const steppe_kernels *steppe_chosen_kernels(void) { return steppe::target().kernels; }

const steppe_function *steppe_functions(void) {
  static const steppe_function all[] = {
#define FUNCTION(result, name, parameters) steppe::described(#name, &steppe_##name),
#define KERNEL(result, name, dtype, parameters, arguments) \
  steppe::described(#name, steppe::target().kernels->name),
#include "functions.def"
      {nullptr, nullptr, nullptr},
  };
  return all;
}

const steppe_struct *steppe_structs(void) {
#define STRUCT(name) {#name, sizeof(steppe_##name)},
  static const steppe_struct all[] = {STEPPE_STRUCTS(STRUCT){nullptr, 0}};
#undef STRUCT
  return all;
}

const char *steppe_isa(void) { return steppe::target().name; }

void steppe_prefer_huge_pages(void *start, int64_t bytes, int in_use) {
#if defined(__linux__)
  const uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / page * page;
  // Advice that the system does not take changes nothing but the speed.
  constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, which older headers lack
  if (first >= last) return;
  if (!in_use) (void)madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
  // New memory too: malloc may return memory that has its small pages already.
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

int steppe_watch_writes(const steppe_watch *watch, int again) {
  return steppe::writes::watch(*watch, again != 0);
}

void steppe_stop_watching(const steppe_watch *watch) {
  steppe::writes::stop(steppe::writes::Pages(*watch));
}

int steppe_copies_hold(const steppe_copied *copies, int64_t count) {
  return steppe::writes::copies_hold(copies, count);
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

}  // extern "C"

// Whether memory was written to, as the system knows it: no write by this process is missed, whoever
// makes it and however. A copy of a weight may be served only while its weight was not.
//
// The pages of a weight are write-protected through userfaultfd in its asynchronous mode (Linux 6.7):
// the first write to a page takes the protection off, inside the kernel, and nobody waits. The ioctl
// PAGEMAP_SCAN then finds pages without it in 1 to 3 µs for 9 MB. The parts of the weight on its first
// and its last page, which other data may share, are compared with a copy of them instead.
//
// Writes that do not go through this process's page tables would be missed: by another process to
// shared memory, which is not watched, by a device that has pinned the pages, by whoever writes to a file
// that is mapped. Of a private mapping, as safetensors makes them, the pages are therefore made this
// process's own first: it does not see later writes to the file.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__linux__) && __has_include(<linux/userfaultfd.h>)
#define STEPPE_WRITES
#include <cerrno>
#include <cstdio>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "steppe_native.h"

namespace steppe {
namespace writes {

constexpr uintptr_t kPage = 4096;

inline uintptr_t round_up(uintptr_t address) { return (address + kPage - 1) / kPage * kPage; }

// The whole pages of a range; the parts before and after them are its edges.
struct Pages {
  explicit Pages(const steppe_watch &of)
      : start(reinterpret_cast<uintptr_t>(of.start)), end(start + uintptr_t(of.bytes)),
        first(round_up(start)), last(end / kPage * kPage) {
    if (first >= last) first = last = end;  // no whole page: all of it is an edge
  }
  bool has_any() const { return first < last; }
  int64_t head() const { return int64_t(first - start); }
  int64_t tail() const { return int64_t(end - last); }
  uintptr_t start, end, first, last;
};

inline bool edges_hold(const steppe_watch &watch, const Pages &pages) {
  if (watch.bytes == 0) return true;  // there may be no address
  const char *from = static_cast<const char *>(watch.start);
  const char *saved = static_cast<const char *>(watch.edges);
  return std::memcmp(from, saved, size_t(pages.head())) == 0 &&
         std::memcmp(from + (pages.last - pages.start), saved + pages.head(),
                     size_t(pages.tail())) == 0;
}

inline void save_edges(const steppe_watch &watch, const Pages &pages) {
  if (watch.bytes == 0) return;
  const char *from = static_cast<const char *>(watch.start);
  char *to = static_cast<char *>(watch.edges);
  std::memcpy(to, from, size_t(pages.head()));
  std::memcpy(to + pages.head(), from + (pages.last - pages.start), size_t(pages.tail()));
}

#if defined(STEPPE_WRITES)

// Of linux/fs.h and linux/userfaultfd.h since 6.7; older headers lack them.
struct ScanArguments {
  uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct ScanRegion {
  uint64_t start, end, categories;
};
constexpr unsigned long kPagemapScan = _IOWR('f', 16, ScanArguments);
constexpr uint64_t kCheckWatched = 1 << 1;  // fail on pages that are not registered
constexpr uint64_t kIsWritten = 1 << 1;
constexpr uint64_t kUnpopulated = 1 << 13, kAsynchronous = 1 << 15;
constexpr int kUserModeOnly = 1;

struct Files {
  int faults = -1, pages = -1;
};
inline Files &files() {
  static Files opened;
  return opened;
}

inline void close_files() {
  Files &opened = files();
  if (opened.faults >= 0) close(opened.faults);
  if (opened.pages >= 0) close(opened.pages);
  opened = Files();
}

inline int protect(const Pages &pages, bool registers) {
  if (registers) {
    uffdio_register request{};
    request.range = {pages.first, pages.last - pages.first};
    request.mode = UFFDIO_REGISTER_MODE_WP;
    if (ioctl(files().faults, UFFDIO_REGISTER, &request) != 0) return errno;
  }
  uffdio_writeprotect request{};
  request.range = {pages.first, pages.last - pages.first};
  request.mode = UFFDIO_WRITEPROTECT_MODE_WP;
  return ioctl(files().faults, UFFDIO_WRITEPROTECT, &request) == 0 ? 0 : errno;
}

// True also where that cannot be found out, as of memory that was unmapped meanwhile.
inline bool were_written(const Pages &pages) {
  ScanRegion region;
  ScanArguments request{};
  request.size = sizeof(request);
  request.flags = kCheckWatched;
  request.start = pages.first, request.end = pages.last;
  request.vec = reinterpret_cast<uintptr_t>(&region), request.vec_len = 1;
  request.max_pages = 1;
  request.category_mask = request.return_mask = kIsWritten;
  return ioctl(files().pages, kPagemapScan, &request) != 0;
}

constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE of Linux 5.14

// Whether nobody else can write to a range, after its pages were made this process's own; false where
// that cannot be found out.
inline bool is_private(const Pages &pages) {
  FILE *maps = std::fopen("/proc/self/maps", "re");
  if (maps == nullptr) return false;
  char line[512], permissions[8];
  unsigned long first, last, inode;
  uintptr_t known = pages.start;
  bool is_private = true;
  while (is_private && known < pages.end && std::fgets(line, sizeof(line), maps) != nullptr) {
    const bool whole = std::strchr(line, '\n') != nullptr;
    const int read = std::sscanf(line, "%lx-%lx %7s %*x %*x:%*x %lu", &first, &last, permissions, &inode);
    if (read == 4 && first <= known && known < last) {
      const uintptr_t from = known / kPage * kPage, to = round_up(std::min<uintptr_t>(last, pages.end));
      is_private = permissions[3] == 'p' &&
                   (inode == 0 ||
                    madvise(reinterpret_cast<void *>(from), to - from, kPopulateWrite) == 0);
      known = last;
    }
    for (int c = whole ? '\n' : 0; c != '\n' && c != EOF;) c = std::fgetc(maps);
  }
  std::fclose(maps);
  return is_private && known >= pages.end;
}

// 0 if writes to two pages of our own are seen as they should be, else an errno.
inline int try_out() {
  const size_t bytes = 2 * kPage;
  void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return ENOMEM;
  volatile char *at = static_cast<volatile char *>(memory);
  at[0] = 1;
  const Pages pages(steppe_watch{memory, int64_t(bytes), nullptr});
  int error = protect(pages, true);
  if (error == 0 && were_written(pages)) error = ENOSYS;
  at[kPage] = 1;
  if (error == 0 && !were_written(pages)) error = ENOSYS;
  munmap(memory, bytes);
  return error;
}

inline int open_files() {
  if (sysconf(_SC_PAGESIZE) != long(kPage)) return ENOSYS;
  Files &opened = files();
  opened.faults = int(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | kUserModeOnly));
  if (opened.faults < 0) return errno;
  uffdio_api request{};
  request.api = UFFD_API;
  request.features = kUnpopulated | kAsynchronous;
  int error = ioctl(opened.faults, UFFDIO_API, &request) == 0 ? 0 : errno;
  if (error == 0) {
    opened.pages = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (opened.pages < 0) error = errno;
  }
  if (error == 0) error = try_out();
  if (error != 0) close_files();
  return error;
}

inline void stop(const Pages &pages) {
  uffdio_range range{pages.first, pages.last - pages.first};
  // Of memory that was unmapped there is nothing to be undone.
  if (pages.has_any()) (void)ioctl(files().faults, UFFDIO_UNREGISTER, &range);
}

#else

constexpr int ENOSYS_ = 38;
inline void close_files() {}
inline int open_files() { return ENOSYS_; }
inline int protect(const Pages &, bool) { return ENOSYS_; }
inline bool were_written(const Pages &) { return true; }
inline bool is_private(const Pages &) { return false; }
inline void stop(const Pages &) {}

#endif

// Begin to watch, or begin `again`: writes from now on are seen. 0, or an errno.
inline int watch(const steppe_watch &of, bool again) {
  const Pages pages(of);
  if (!again && !is_private(pages)) return EINVAL;
  const int error = pages.has_any() ? protect(pages, !again) : 0;
  save_edges(of, pages);
  return error;
}

// Whether the memory was left alone since then.
inline bool holds(const steppe_watch &of) {
  const Pages pages(of);
  return edges_hold(of, pages) && !(pages.has_any() && were_written(pages));
}

// Whether copies that were made in a generation of their weights are still valid. The generation is
// read last, since it is raised before memory is watched again.
inline bool copies_hold(const steppe_copied *copies, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!holds(*copies[i].watch) ||
        __atomic_load_n(copies[i].generation, __ATOMIC_ACQUIRE) != copies[i].made_in) {
      return false;
    }
  }
  return true;
}

}  // namespace writes
}  // namespace steppe

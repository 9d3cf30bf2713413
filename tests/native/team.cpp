// A team of std::threads in place of libgomp's, for ThreadSanitizer: libgomp is not built with it, so
// that what happens before its barriers seems to race with what happens after them. These are the
// functions of libgomp that g++ calls for the kernels; a missing one is an error of the linker.
//
// Threads are ordered by the start of a team, its barriers and its end, as OpenMP has it, and by nothing
// else: a loop's tasks are handed out without an order, or the races between them would go unseen.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace {

constexpr int kLoops = 4;  // of a parallel region

struct Team {
  explicit Team(unsigned size) : size(int(size)) { pthread_barrier_init(&barrier, nullptr, size); }
  ~Team() { pthread_barrier_destroy(&barrier); }
  int size;
  pthread_barrier_t barrier;
  std::atomic<long> handed_out[kLoops] = {};  // iterations of each loop
};

struct Member {
  Team *team = nullptr;
  int number = 0;
  int loop = -1;  // the one that it is in
  long start = 0, end = 0, step = 1, chunk = 1;
};
thread_local Member member;

}  // namespace

extern "C" {

int omp_get_thread_num() { return member.number; }
int omp_get_num_threads() { return member.team == nullptr ? 1 : member.team->size; }

void GOMP_barrier() { pthread_barrier_wait(&member.team->barrier); }

void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned) {
  Team team(threads);
  const auto run = [&](int number) {
    const Member outside = member;
    member = Member{&team, number};
    body(data);
    member = outside;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(run, int(i));
  run(0);
  for (std::thread &other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long *first, long *last) {
  const long taken = member.team->handed_out[member.loop].fetch_add(member.chunk,
                                                                    std::memory_order_relaxed);
  const long count = (member.end - member.start + member.step - 1) / member.step;
  if (taken >= count) return false;
  *first = member.start + taken * member.step;
  *last = member.start + std::min(taken + member.chunk, count) * member.step;
  return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long *first,
                                          long *last) {
  member.loop += 1;
  member.start = start, member.end = end, member.step = step, member.chunk = chunk;
  return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"

// Runs one kernel as a GPU would, one operating system thread for all: each GPU thread is a fibre,
// and each threadgroup runs to its end before the next one starts.
//
//   program JOB OUTPUT ORDER CHECK
//
// JOB holds the launch and the buffers (launch.py writes it), OUTPUT receives the outputs one after
// the other. ORDER is that of the threads and the threadgroups: 0 forwards, 1 backwards, more is
// the seed of a shuffle. CHECK is 1 for a kernel compiled in check mode.
// Findings are printed, one a line; the exit status is then 2.
#ifdef __APPLE__
#define _XOPEN_SOURCE 700  // or <ucontext.h> refuses
#define _DARWIN_C_SOURCE
#endif
#include "runtime.h"

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>

#include "checker.h"
#include "fibre.h"

namespace {

constexpr size_t kStackBytes = 256 << 10, kThreadgroupBytes = 32 << 10;

enum State { READY, AT_SIMD_OPERATION, AT_THREADGROUP_BARRIER, DONE };

struct Thread {
  Fibre fibre;
  MslAttributes attributes;
  char* stack;
  State state;
  int index, simdgroup, lane;
  MslOperation operation;  // that it waits at
  int line;
  unsigned exchanges;  // so far
  unsigned simd_epochs[2];
};

struct Simdgroup {
  int size, arrived, line;
  MslOperation operation;
  // Two buffers in turn: a lane may be at the next operation before another has read this one.
  alignas(16) unsigned char values[2][kMslSimdWidth][kMslLaneBytes];
};

struct Job {
  unsigned grid[3], threadgroup[3];
  std::vector<void*> buffers;
  std::vector<std::pair<char*, size_t>> outputs;
};

Job job;
int order;

// The threadgroup that runs now.
Thread threads[checker::kMaxThreads];
Simdgroup simdgroups[checker::kMaxThreads / kMslSimdWidth];
int size, arrived;  // threads of it, and those at the barrier
std::deque<int> ready;
Thread* running;
std::map<const void*, void*> threadgroup_memory;
std::vector<void*> owned_memory;  // of threadgroup_memory, where the checker does not own it
size_t threadgroup_bytes;

[[noreturn]] void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vprintf(format, arguments);
  va_end(arguments);
  printf("\n");
  checker::stop();
}

const char* name(MslOperation operation) {
  static const char* names[] = {"simd_sum",     "simd_product",    "simd_max",
                                "simd_min",     "simd_and",        "simd_or",
                                "simd_xor",     "simd_shuffle",    "simd_shuffle_xor",
                                "simd_shuffle_up", "simd_shuffle_down", "simd_broadcast",
                                "simd_prefix_sum", "simd_all or simd_any", "simdgroup_barrier"};
  return names[operation];
}

unsigned random_number() {  // Marsaglia's xorshift: <random> takes longer to compile than this file
  static unsigned state = order * 2654435769u | 1;
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}

void arrange(std::vector<int>& list) {
  if (order == 1) std::reverse(list.begin(), list.end());
  if (order < 2) return;
  for (size_t i = list.size(); i > 1; i--) std::swap(list[i - 1], list[random_number() % i]);
}

// Threads that may go on. Forwards they queue up, so that all advance alike. Backwards they go
// first, so that a simdgroup runs as far ahead of the others as it can. Shuffled, either.
void release(int first, int last) {
  std::vector<int> released;
  for (int i = first; i < last; i++) {
    threads[i].state = READY;
    released.push_back(i);
  }
  arrange(released);
  bool ahead = order == 1 || (order > 1 && random_number() % 2);
  ready.insert(ahead ? ready.begin() : ready.end(), released.begin(), released.end());
}

void pause(State state) {
  running->state = state;
  running->fibre.leave(false);
}

void meet_simdgroup(MslOperation operation, int line) {
  Simdgroup& group = simdgroups[running->simdgroup];
  if (group.arrived && (group.operation != operation || group.line != line)) {
    fail("DIVERGENCE: lanes of simdgroup %d are at different operations, "
         "%s at line=%d and %s at line=%d",
         running->simdgroup, name(group.operation), group.line, name(operation), line);
  }
  group.operation = running->operation = operation;
  group.line = running->line = line;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    int first = running->simdgroup * kMslSimdWidth;
    release(first, first + group.size);
  }
  pause(AT_SIMD_OPERATION);
}

void fibre_main() {
  Fibre::entered();
  msl_call_kernel(job.buffers.data(), &running->attributes);
  running->state = DONE;
  running->fibre.leave(true);
  __builtin_unreachable();
}

}  // namespace

extern "C" void msl_simd_exchange(const void* value, int bytes, MslOperation operation, int line,
                                  MslLanes* lanes) {
  Simdgroup& group = simdgroups[running->simdgroup];
  auto& values = group.values[running->exchanges++ % 2];
  memcpy(values[running->lane], value, bytes);
  meet_simdgroup(operation, line);
  *lanes = {&values[0][0], group.size, running->lane};
}

extern "C" void msl_simdgroup_barrier(int flags, int line) {
  meet_simdgroup(MSL_SIMDGROUP_BARRIER, line);
  for (int memory = 0; memory < 2; memory++) {
    if (flags >> memory & 1) checker::current.simd_epochs[memory]++;
  }
}

extern "C" void msl_threadgroup_barrier(int flags, int line) {
  running->line = line;
  running->state = AT_THREADGROUP_BARRIER;
  if (++arrived == size) {
    for (int i = 0; i < size; i++) {
      if (threads[i].line == line) continue;
      fail("DIVERGENCE: threads are at different barriers, line=%d and line=%d", threads[i].line,
           line);
    }
    arrived = 0;
    for (int memory = 0; memory < 2; memory++) {
      if (flags >> memory & 1) checker::current.epochs[memory]++;
    }
    release(0, size);
  }
  pause(running->state);
}

extern "C" void* msl_threadgroup_memory(const void* key, unsigned long bytes,
                                        unsigned long element_bytes, const char* name) {
  auto found = threadgroup_memory.find(key);
  if (found != threadgroup_memory.end()) return found->second;
  threadgroup_bytes += (bytes + 15) / 16 * 16;
  if (threadgroup_bytes > kThreadgroupBytes) {
    fail("THREADGROUP MEMORY: %zu bytes with %s, more than %zu", threadgroup_bytes, name,
         kThreadgroupBytes);
  }
  char* memory;
  if (checker::enabled) {
    memory = checker::allocate(bytes);
    checker::regions.push_back({std::string("threadgroup ") + name, memory, bytes, element_bytes,
                                checker::THREADGROUP,
                                std::vector<checker::Cell>(bytes / element_bytes)});
  } else {
    memory = static_cast<char*>(malloc(bytes));
    owned_memory.push_back(memory);
  }
  memset(memory, 0xFF, bytes);  // NaN: a GPU leaves it undefined
  return threadgroup_memory[key] = memory;
}

namespace {

void read(FILE* file, void* to, size_t bytes) {
  if (fread(to, 1, bytes, file) != bytes) fail("HARNESS: the job file is too short");
}

void read_job(const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) fail("HARNESS: cannot open %s", path);
  int64_t header[7];
  read(file, header, sizeof header);
  for (int axis = 0; axis < 3; axis++) {
    job.grid[axis] = header[1 + axis];
    job.threadgroup[axis] = std::min(header[4 + axis], header[1 + axis]);
  }
  for (int64_t i = 0; i < header[0]; i++) {
    struct {
      int64_t is_output, bytes, element_bytes, initialised, offset;
      char name[64];
    } buffer;
    read(file, &buffer, sizeof buffer);
    size_t bytes = buffer.bytes;
    char* memory =
        checker::enabled ? checker::allocate(bytes) : static_cast<char*>(malloc(bytes));
    read(file, memory, bytes);
    if (buffer.is_output) job.outputs.push_back({memory, bytes});
    if (checker::enabled) {
      checker::Region region{buffer.name, memory, bytes, size_t(buffer.element_bytes),
                             buffer.is_output ? checker::OUTPUT : checker::INPUT, {}};
      if (buffer.is_output) region.cells.resize(bytes / region.element_bytes);
      for (checker::Cell& cell : region.cells) cell.initialised = buffer.initialised;
      checker::regions.push_back(std::move(region));
    }
    job.buffers.push_back(memory + buffer.offset);
  }
  fclose(file);
}

// The stacks, each above a page that nobody may touch.
void allocate_stacks(int count) {
  size_t page = sysconf(_SC_PAGESIZE), bytes = kStackBytes + page;
  char* all = static_cast<char*>(mmap(nullptr, bytes * count, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0));
  if (all == MAP_FAILED) fail("HARNESS: out of memory for the stacks");
  for (int i = 0; i < count; i++) {
    mprotect(all + bytes * i, page, PROT_NONE);
    threads[i].stack = all + bytes * i + page;
  }
}

MslTriple triple(const unsigned* v) { return {v[0], v[1], v[2]}; }

void start_thread(int i, const unsigned* groups, const unsigned* group, const unsigned* extent) {
  Thread& thread = threads[i];
  const unsigned* full = job.threadgroup;
  unsigned local[3] = {i % extent[0], i / extent[0] % extent[1], i / extent[0] / extent[1]};
  unsigned global[3];
  for (int axis = 0; axis < 3; axis++) global[axis] = group[axis] * full[axis] + local[axis];
  unsigned index = i, count = size, full_count = full[0] * full[1] * full[2];

  thread.index = i;
  thread.simdgroup = i / kMslSimdWidth;
  thread.lane = i % kMslSimdWidth;
  thread.exchanges = thread.simd_epochs[0] = thread.simd_epochs[1] = 0;
  MslAttributes& a = thread.attributes;
  a.dispatch_threads_per_threadgroup = triple(full);
  a.grid_origin = {0, 0, 0};
  a.grid_size = a.threads_per_grid = triple(job.grid);
  a.thread_position_in_grid = triple(global);
  a.thread_position_in_threadgroup = triple(local);
  a.threadgroup_position_in_grid = triple(group);
  a.threadgroups_per_grid = triple(groups);
  a.threads_per_threadgroup = triple(extent);  // fewer in a ragged last threadgroup
  a.thread_index_in_threadgroup = index;
  a.thread_index_in_simdgroup = thread.lane;
  a.simdgroup_index_in_threadgroup = thread.simdgroup;
  a.simdgroups_per_threadgroup = (count + 31) / 32;
  a.dispatch_simdgroups_per_threadgroup = (full_count + 31) / 32;
  a.threads_per_simdgroup = a.thread_execution_width = kMslSimdWidth;
  a.thread_index_in_quadgroup = index % 4;
  a.quadgroup_index_in_threadgroup = index / 4;
  a.quadgroups_per_threadgroup = (count + 3) / 4;
  a.dispatch_quadgroups_per_threadgroup = (full_count + 3) / 4;
  thread.fibre.start(thread.stack, kStackBytes, fibre_main);
}

void check_all_done() {
  int done = 0, at_barrier = 0;
  const Thread* waiting = nullptr;
  for (int i = 0; i < size; i++) {
    done += threads[i].state == DONE;
    at_barrier += threads[i].state == AT_THREADGROUP_BARRIER;
    if (!waiting && threads[i].state != DONE) waiting = &threads[i];
  }
  if (!waiting) return;
  const char* where = waiting->state == AT_THREADGROUP_BARRIER ? "threadgroup_barrier"
                                                               : name(waiting->operation);
  fail("DIVERGENCE: %d of %d threads wait for ever, the first (thread %d) in %s at line=%d; "
       "%d have finished, %d are at a threadgroup barrier, %d at a SIMD operation",
       size - done, size, waiting->index, where, waiting->line, done, at_barrier,
       size - done - at_barrier);
}

void run_thread(Thread& thread, unsigned group) {
  using checker::current;
  running = &thread;
  current.stack = thread.stack;
  current.stack_bytes = kStackBytes;
  current.thread = group * checker::kMaxThreads + thread.index;
  std::copy_n(thread.simd_epochs, 2, current.simd_epochs);
  thread.fibre.enter();
  std::copy_n(current.simd_epochs, 2, thread.simd_epochs);
  current.stack = nullptr;
}

void run_threadgroup(unsigned group, const unsigned* groups) {
  unsigned position[3] = {group % groups[0], group / groups[0] % groups[1],
                          group / groups[0] / groups[1]};
  unsigned extent[3];
  for (int axis = 0; axis < 3; axis++) {
    unsigned full = job.threadgroup[axis];
    extent[axis] = std::min(full, job.grid[axis] - position[axis] * full);
  }
  size = extent[0] * extent[1] * extent[2];
  arrived = 0;
  threadgroup_bytes = 0;
  std::fill_n(checker::current.epochs, 2, 0);
  for (int i = 0; i * kMslSimdWidth < size; i++) {
    simdgroups[i].size = std::min(kMslSimdWidth, size - i * kMslSimdWidth);
    simdgroups[i].arrived = 0;
  }
  for (int i = 0; i < size; i++) start_thread(i, groups, position, extent);

  size_t regions = checker::regions.size(), arena_used = checker::arena_used;
  release(0, size);
  while (!ready.empty()) {
    Thread& next = threads[ready.front()];
    ready.pop_front();
    run_thread(next, group);
  }
  check_all_done();
  checker::regions.erase(checker::regions.begin() + regions, checker::regions.end());
  checker::arena_used = arena_used;
  threadgroup_memory.clear();
  for (void* memory : owned_memory) free(memory);
  owned_memory.clear();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 1;
  setvbuf(stdout, nullptr, _IOLBF, 0);  // a crash must not swallow findings
  order = atoi(argv[3]);
  checker::enabled = atoi(argv[4]);
  read_job(argv[1]);

  unsigned groups[3];
  for (int axis = 0; axis < 3; axis++)
    groups[axis] = (job.grid[axis] + job.threadgroup[axis] - 1) / job.threadgroup[axis];
  allocate_stacks(job.threadgroup[0] * job.threadgroup[1] * job.threadgroup[2]);
  std::vector<int> sequence(size_t(groups[0]) * groups[1] * groups[2]);
  for (size_t i = 0; i < sequence.size(); i++) sequence[i] = i;
  arrange(sequence);
  for (int group : sequence) run_threadgroup(group, groups);
  if (checker::reports) checker::stop();

  FILE* file = fopen(argv[2], "wb");
  if (!file) fail("HARNESS: cannot write %s", argv[2]);
  for (auto [memory, bytes] : job.outputs) fwrite(memory, 1, bytes, file);
  if (fclose(file)) fail("HARNESS: cannot write %s", argv[2]);
  return 0;
}

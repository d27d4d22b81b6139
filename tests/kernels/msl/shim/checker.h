// The checker: told of every memory access of the kernel, it reports accesses out of bounds,
// races, reads of what nobody wrote, and writes to inputs.
//
// It knows of an access from code compiled with -fsanitize=thread: that calls __tsan_read4(address)
// and the like before each (at the end of this file). The sanitizer's own library is not linked:
// it knows threads of an operating system, not barriers of a GPU.
//
// Two accesses race if nothing orders them: threads of two threadgroups are never ordered, those
// of one by a barrier with the flag of that memory. Every element remembers its last accesses and
// how many barriers ("epochs") came before them.
#pragma once
#include <dlfcn.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "runtime.h"

namespace checker {

enum Kind { INPUT, OUTPUT, THREADGROUP };
constexpr int kMaxThreads = 1024;  // of a threadgroup
constexpr size_t kArenaBytes = size_t(16) << 30, kGuardBytes = 64 << 10;

// Who runs now: kept up to date by the scheduler.
struct Current {
  const char* stack = nullptr;  // null while the runtime itself runs
  size_t stack_bytes = 0;
  int thread = 0;  // threadgroup * kMaxThreads + index in it
  // Barriers passed with the flag of [0] threadgroup and [1] device memory.
  unsigned epochs[2] = {}, simd_epochs[2] = {};
};

struct Access {
  int thread = -1;
  unsigned epoch = 0, simd_epoch = 0;
  bool atomic = false;
};

struct Cell {  // one element of a buffer
  Access write;
  // More than the last read, since the others may be ordered before a write that is not ordered
  // after them: the last one of another lane, simdgroup and threadgroup than its successor.
  Access read, read_other_lane, read_other_simdgroup, read_other_group;
  bool initialised = false;
};

struct Region {
  std::string name;
  char* start;
  size_t bytes, element_bytes;
  Kind kind;
  std::vector<Cell> cells;
};

inline bool enabled = false;
inline Current current;
inline std::vector<Region> regions;
inline int reports = 0;

inline char* arena = nullptr;
inline size_t arena_used = 0;
inline std::set<std::string> reported;

struct Place {  // of an access: an address in the program, or a line of the source
  const void* pc = nullptr;
  int line = 0;
};

inline std::string describe(int thread) {
  int index = thread % kMaxThreads;
  char text[96];
  snprintf(text, sizeof text, "threadgroup %d thread %d (simdgroup %d lane %d)",
           thread / kMaxThreads, index, index / kMslSimdWidth, index % kMslSimdWidth);
  return text;
}

// Where the program or library that contains the address was loaded; null for any other memory.
inline const char* image_of(const void* address) {
  Dl_info info;
  return dladdr(address, &info) ? static_cast<const char*>(info.dli_fbase) : nullptr;
}

inline std::string describe(Place place) {
  char text[48];
  if (place.line) {
    snprintf(text, sizeof text, "line=%d", place.line);
  } else {
    // The return address: the instruction before it is that of the access.
    const char* pc = static_cast<const char*>(place.pc) - 1;
    const char* base = image_of(pc);
    snprintf(text, sizeof text, "pc=0x%zx base=0x%zx", size_t(pc - base), size_t(base));
  }
  return text;
}

// One line for launch.py. The same finding at the same place is reported once.
inline void report(const char* finding, const std::string& what, int other, Place place) {
  std::string at = describe(place);
  if (!reported.insert(std::string(finding) + what.substr(0, what.find('[')) + at).second) return;
  if (reports++ >= 20) return;
  printf("%s: %s by %s%s%s at %s\n", finding, what.c_str(), describe(current.thread).c_str(),
         other >= 0 ? " against " : "", other >= 0 ? describe(other).c_str() : "", at.c_str());
}

[[noreturn]] inline void stop() {
  fflush(stdout);
  _Exit(2);
}

inline std::string element(const Region& region, ptrdiff_t offset) {
  ptrdiff_t size = region.element_bytes, index = offset / size - (offset % size < 0);
  return region.name + "[" + std::to_string(index) + "] of " +
         std::to_string(region.bytes / size);
}

// Memory between guard zones that belong to nobody, so that a miss hits no neighbour.
inline char* allocate(size_t bytes) {
  size_t page = sysconf(_SC_PAGESIZE);
  if (!arena) {
    arena = static_cast<char*>(mmap(nullptr, kArenaBytes, PROT_NONE,
                                    MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0));
    arena_used = kGuardBytes;
  }
  char* start = arena + arena_used;
  size_t used = (bytes + page - 1) / page * page;
  arena_used += used + kGuardBytes;
  if (arena == MAP_FAILED || arena_used > kArenaBytes ||
      mprotect(start, used, PROT_READ | PROT_WRITE)) {
    printf("HARNESS: out of memory for the checked buffers\n");
    stop();
  }
  return start;
}

inline bool ordered(const Access& before, const Access& now) {
  if (before.thread < 0 || before.thread == now.thread) return true;
  if (before.atomic && now.atomic) return true;
  if (before.thread / kMaxThreads != now.thread / kMaxThreads) return false;
  if (before.epoch != now.epoch) return true;
  bool same_simdgroup = before.thread / kMslSimdWidth == now.thread / kMslSimdWidth;
  return same_simdgroup && before.simd_epoch != now.simd_epoch;
}

inline void remember_read(Cell& cell, const Access& now) {
  const Access last = cell.read;
  cell.read = now;
  if (last.thread < 0 || last.thread == now.thread) return;
  if (last.thread / kMaxThreads != now.thread / kMaxThreads) {
    cell.read_other_group = last;
    cell.read_other_simdgroup = cell.read_other_lane = Access();
  } else if (last.thread / kMslSimdWidth != now.thread / kMslSimdWidth) {
    cell.read_other_simdgroup = last;
    cell.read_other_lane = Access();
  } else {
    cell.read_other_lane = last;
  }
}

inline void check_cell(Region& region, size_t index, bool write, const Access& now, Place place) {
  Cell& cell = region.cells[index];
  std::string what;
  auto name = [&] { return element(region, index * region.element_bytes); };
  if (!write && !cell.initialised) report("UNINITIALISED read", name(), -1, place);
  if (!ordered(cell.write, now)) {
    report(write ? "RACE write after write" : "RACE read after write", name(), cell.write.thread,
           place);
  }
  if (!write) return remember_read(cell, now);
  for (const Access* read : {&cell.read, &cell.read_other_lane, &cell.read_other_simdgroup,
                             &cell.read_other_group}) {
    if (ordered(*read, now)) continue;
    report("RACE write after read", name(), read->thread, place);
    break;
  }
  cell.write = now;
  cell.initialised = true;
}

inline void check(const void* address, size_t bytes, bool write, bool atomic, Place place) {
  if (!enabled || !current.stack || !bytes) return;
  char* start = static_cast<char*>(const_cast<void*>(address));
  if (start >= current.stack && start < current.stack + current.stack_bytes) return;  // private
  const char* finding = write ? "OUT OF BOUNDS write" : "OUT OF BOUNDS read";
  if (start < arena || start >= arena + kArenaBytes) {
    if (image_of(address)) return;  // a constant of the program
    report(finding, "an address of no buffer", -1, place);
    stop();
  }
  Region* nearest = nullptr;
  size_t distance = ~size_t(0);
  for (Region& region : regions) {
    char* end = region.start + region.bytes;
    size_t apart = start < region.start ? region.start - start
                   : start + bytes > end ? start + bytes - end
                                         : 0;
    if (apart < distance) {
      distance = apart;
      nearest = &region;
    }
    if (!apart) break;
  }
  Region& region = *nearest;
  ptrdiff_t offset = start - region.start;
  if (distance) {
    report(finding, element(region, offset), -1, place);
    stop();
  }
  if (region.kind == INPUT) {
    if (write) report("WRITE TO INPUT", element(region, offset), -1, place);
    return;
  }
  int memory = region.kind == THREADGROUP ? 0 : 1;
  Access now{current.thread, current.epochs[memory], current.simd_epochs[memory], atomic};
  size_t last = (offset + bytes - 1) / region.element_bytes;
  for (size_t i = offset / region.element_bytes; i <= last; i++)
    check_cell(region, i, write, now, place);
}

}  // namespace checker

#define MSL_HERE checker::Place{__builtin_return_address(0)}
#define MSL_HOOKS(size)                                                                         \
  void __tsan_read##size(void* p) { checker::check(p, size, false, false, MSL_HERE); }           \
  void __tsan_write##size(void* p) { checker::check(p, size, true, false, MSL_HERE); }           \
  void __tsan_read_write##size(void* p) {                                                        \
    checker::check(p, size, false, false, MSL_HERE);                                             \
    checker::check(p, size, true, false, MSL_HERE);                                              \
  }                                                                                              \
  void __tsan_unaligned_read##size(void* p) { checker::check(p, size, false, false, MSL_HERE); } \
  void __tsan_unaligned_write##size(void* p) { checker::check(p, size, true, false, MSL_HERE); } \
  void __tsan_unaligned_read_write##size(void* p) {                                              \
    checker::check(p, size, false, false, MSL_HERE);                                             \
    checker::check(p, size, true, false, MSL_HERE);                                              \
  }
extern "C" {
MSL_HOOKS(1) MSL_HOOKS(2) MSL_HOOKS(4) MSL_HOOKS(8) MSL_HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, unsigned long n) {
  checker::check(p, n, false, false, MSL_HERE);
}
void __tsan_write_range(void* p, unsigned long n) {
  checker::check(p, n, true, false, MSL_HERE);
}
void* __tsan_memcpy(void* to, const void* from, unsigned long n) {
  checker::check(from, n, false, false, MSL_HERE);
  checker::check(to, n, true, false, MSL_HERE);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, unsigned long n) {
  checker::check(from, n, false, false, MSL_HERE);
  checker::check(to, n, true, false, MSL_HERE);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, unsigned long n) {
  checker::check(to, n, true, false, MSL_HERE);
  return memset(to, value, n);
}
void msl_atomic_access(const void* p, int writes, int line) {
  checker::check(p, 4, writes, true, checker::Place{nullptr, line});
}
}
#undef MSL_HOOKS
#undef MSL_HERE

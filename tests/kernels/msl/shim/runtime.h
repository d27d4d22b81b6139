// What a compiled kernel and the runtime (runtime.cpp) know of each other.
#pragma once

struct MslTriple {
  unsigned x, y, z;
};

// What MSL passes to parameters such as [[thread_position_in_grid]], by the attribute's name.
struct MslAttributes {
  MslTriple dispatch_threads_per_threadgroup, grid_origin, grid_size, thread_position_in_grid,
      thread_position_in_threadgroup, threadgroup_position_in_grid, threadgroups_per_grid,
      threads_per_grid, threads_per_threadgroup;
  unsigned dispatch_quadgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup,
      quadgroup_index_in_threadgroup, quadgroups_per_threadgroup, simdgroup_index_in_threadgroup,
      simdgroups_per_threadgroup, thread_execution_width, thread_index_in_quadgroup,
      thread_index_in_simdgroup, thread_index_in_threadgroup, threads_per_simdgroup;
};

// SIMD operations, as the runtime names them in its reports.
enum MslOperation {
  MSL_SUM, MSL_PRODUCT, MSL_MAX, MSL_MIN, MSL_AND, MSL_OR, MSL_XOR,
  MSL_SHUFFLE, MSL_SHUFFLE_XOR, MSL_SHUFFLE_UP, MSL_SHUFFLE_DOWN, MSL_BROADCAST,
  MSL_PREFIX_SUM, MSL_VOTE, MSL_SIMDGROUP_BARRIER
};

constexpr int kMslSimdWidth = 32, kMslLaneBytes = 16;

// One lane's view of a SIMD operation, once all lanes have arrived.
struct MslLanes {
  const unsigned char* values;  // kMslLaneBytes for each lane
  int count;                    // lanes of this simdgroup: fewer than 32 in a ragged last one
  int lane;                     // the caller's
};

extern "C" {
// Every lane of the simdgroup meets here, at the same operation of the same line.
void msl_simd_exchange(const void* value, int size, MslOperation operation, int line,
                       MslLanes* lanes);
void msl_threadgroup_barrier(int flags, int line);
void msl_simdgroup_barrier(int flags, int line);
// The threadgroup's one object for this declaration (`key`), made by the thread that comes first.
void* msl_threadgroup_memory(const void* key, unsigned long bytes, unsigned long element_bytes,
                             const char* name);
// Before an atomic operation on 4 bytes.
void msl_atomic_access(const void* address, int writes, int line);
// Generated for each kernel: calls it for the current thread.
void msl_call_kernel(void** buffers, const MslAttributes* attributes);
}

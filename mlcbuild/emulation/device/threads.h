// The threads of a GPU on one CPU core. Each thread of a block is a fiber; blocks run one after the other.
//
// A thread runs until it waits at a barrier, at a shuffle, or ends. In which order the ready ones run is chosen by the
// caller: a kernel whose result depends on it has a race. What nobody wrote reads as 0xff bytes, which is NaN in every
// float type: fresh shared memory, what a lane that takes no part in a shuffle gives.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace emulation {

struct Index {
  unsigned x, y, z;
};

// Orders in which threads of a block, and blocks of a grid, run.
enum Order { FORWARD, BACKWARD, SCATTERED, ORDERS };

struct Launch {
  Index grid, block;
  size_t shared_bytes;  // dynamic shared memory
  int order;
  bool early;          // every thread waits for the kernel before
  void (*hide)(bool);  // what kernels write, from the first block's start until all of its threads wait; nullptr: nothing
  char* problem;  // filled with what went wrong; empty before
  size_t problem_size;
};

typedef void (*Thunk)(void** arguments);

// A kernel as the stand-in for a driver finds it: its thunk, and the sizes of its arguments.
struct Kernel {
  const char* name;  // nullptr behind the last of a table
  Thunk thunk;
  const size_t* sizes;
  size_t count;
};

// Run a kernel's thunk for every thread of the grid. False, with `launch.problem` filled, where threads are stuck.
bool run(Thunk thunk, void** arguments, const Launch& launch);

constexpr int WARP = 32;
constexpr int MOST_THREADS = 1024;  // of a block, by CUDA

extern Index thread_index, block_index, block_size, grid_size;
extern int thread;  // of the block, counted x first

void wait_for_block();  // __syncthreads
void wait_for_warp();   // __syncwarp
void wait_for_kernel();  // griddepcontrol.wait

// What thread `lane` of this warp gives in the same call; 0xffffffff where it does not take part.
uint32_t exchange(uint32_t value, int lane);

// A copy that a thread does not wait for: everybody finds poison there until it has. `from`: nullptr for zeros. Copies are
// waited for in groups, which end where the thread says so.
void copy_later(void* to, const void* from, size_t bytes);
void end_of_copies();
void wait_for_copies(int groups);  // until only those of the last `groups` groups may be on their way

// Shared memory number `slot` of the running block: poisoned when the block starts, a page that nobody may touch behind.
void* shared(int slot, size_t bytes);
void* dynamic_shared();

}  // namespace emulation

// A device that is no GPU: its memory, its modules, and the running of their kernels, whatever API is in front.
//
// A module's image is a shared object of kernels (source.py) behind a header. Each allocation lies between pages that
// nobody may touch, and what was not written yet reads as 0xff bytes.
//
// With `emulation_check(1)` every kernel runs in several orders of its threads, from the same memory each time, and all
// of the device's memory is compared: a difference is a race, and is noted. What a kernel writes to is found by closing
// all memory for writing before it runs: a page that it opens is kept as it was, and put back for the next order. Of a
// kernel that may begin before the one before has ended (`early`), all pages that kernels ever wrote to are closed until the
// threads of its first block have waited: who touches one is noted.
#pragma once
#include "threads.h"

namespace emulation {

constexpr int MOST_ARGUMENTS = 64;

struct Module;

struct Function {
  Function* next;
  const Module* module;
  const Kernel* kernel;
  long launches;
};

extern char problem[300];  // what went wrong last

void* allocate(size_t bytes);   // nullptr where there is no memory
bool release(void* place);      // false where it is no allocation
Module* load(const void* image);  // nullptr, with `problem` filled, where it is none of ours
Function* find(const Module* module, const char* kernel);  // nullptr where there is none

// Run a kernel. False, with `problem` filled and a note taken, where threads are stuck or touch what they may not.
bool run(Function& function, Index grid, Index block, size_t shared_bytes, bool early, void** arguments);

}  // namespace emulation

#define EXPORTED extern "C" __attribute__((visibility("default")))

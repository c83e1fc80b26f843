// Stand-ins for libcuda and libcudart with one device, the CPU: what TVM's CUDA runtime calls, and no more.
//
// A module's image is a shared object of kernels (source.py) behind a header. Everything happens at once, in the order of
// the calls; what is captured into a graph happens when the graph is launched. Each allocation lies between pages that
// nobody may touch, and what was not written yet reads as 0xff bytes.
//
// With `emulation_check(1)` every kernel runs in several orders of its threads, from the same memory each time, and all
// of the device's memory is compared: a difference is a race, and is noted. What a kernel writes to is found by closing
// all memory for writing before it runs: a page that it opens is kept as it was, and put back for the next order.
#define _GNU_SOURCE 1
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "threads.h"
#undef cudaGetDeviceProperties
#undef cudaGraphInstantiate

namespace {

constexpr size_t PAGE = 1 << 14, POISONED = 1 << 28;  // bytes; larger allocations are not filled
constexpr int MOST_ARGUMENTS = 64;
constexpr char HEADER[] = "mlcbuild kernels";  // 16 bytes, then the length of the shared object in 8

struct Allocation {
  Allocation* next;
  char* begin;
  size_t bytes;
  char* pages;  // of `room` bytes; the allocation ends where they end, but for its alignment
  size_t room;
  char *before, *first;  // the pages that the running kernel has opened: as they were, and as the first order left them
  bool* opened;          // by page
};

struct Module {
  void* handle;
  const emulation::Kernel* kernels;
  bool (*run)(emulation::Thunk, void**, const emulation::Launch&);
};

struct Function {
  Function* next;
  const Module* module;
  const emulation::Kernel* kernel;
  long launches;
};

// One thing that a stream is asked to do: a kernel, or where `function` is none, a copy.
struct Work {
  Work* next;
  Function* function;
  emulation::Index grid, block;
  size_t shared_bytes;
  void* arguments[MOST_ARGUMENTS];
  void* to;
  const void* from;
  size_t bytes;
};

struct Graph {
  Work *first, *last;
};

struct Note {
  Note* next;
  const char* kernel;
  char text[200];
};

Allocation* allocations;
Function* functions;
Note* notes;
Graph* capturing;
bool checking;
const char* running;  // the kernel, for the handler of signals
char problem[300] = "no problem";

void note(const char* kernel, const char* text) {
  for (Note* known = notes; known; known = known->next)
    if (known->kernel == kernel && !strcmp(known->text, text)) return;
  Note* added = static_cast<Note*>(calloc(1, sizeof(Note)));
  added->next = notes, added->kernel = kernel;
  snprintf(added->text, sizeof(added->text), "%s", text);
  notes = added;
}

char* map(size_t bytes, int protection) {
  void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

// Let the page be written to; what a kernel writes to is kept as it is first. False where it is none of ours, or open
// already.
bool open_page(char* at) {
  for (Allocation* one = allocations; one; one = one->next) {
    if (at < one->pages || at >= one->pages + one->room) continue;
    const size_t page = (at - one->pages) / PAGE;
    if (!one->opened || one->opened[page]) return false;
    one->opened[page] = true;
    if (running) {
      memcpy(one->before + page * PAGE, one->pages + page * PAGE, PAGE);
      memcpy(one->first + page * PAGE, one->pages + page * PAGE, PAGE);
    }
    mprotect(one->pages + page * PAGE, PAGE, PROT_READ | PROT_WRITE);
    return true;
  }
  return false;
}

// A kernel that touches what it may not ends the process, as the signal says; this says which kernel, and where.
void on_fault(int number, siginfo_t* info, void*) {
  char* at = static_cast<char*>(info->si_addr);
  if (checking && number == SIGSEGV && open_page(at)) return;
  signal(number, SIG_DFL);
  if (!running) return;
  char text[400];
  const bool outside = number == SIGSEGV || number == SIGBUS;
  const char* what = outside ? "touches memory that is not its own" : "makes an access that is not aligned";
  int length = snprintf(text, sizeof(text), "emulated device: %s %s\n", running, what);
  for (Allocation* one = allocations; one && outside; one = one->next) {
    const long behind = at - (one->begin + one->bytes), before = one->begin - at;
    if ((behind >= 0 && behind < long(PAGE)) || (before > 0 && before <= long(PAGE)))
      length = snprintf(text, sizeof(text), "emulated device: %s touches byte %ld %s an allocation of %zu bytes\n",
                        running, behind >= 0 ? behind + 1 : before, behind >= 0 ? "behind" : "before", one->bytes);
  }
  if (write(2, text, length) < 0) return;
}

void watch() {
  static bool watched;
  if (watched) return;
  watched = true;
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  stack_t stack = {};
  stack.ss_size = 1 << 16;
  stack.ss_sp = malloc(stack.ss_size);
  sigaltstack(&stack, nullptr);
  const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  for (int number : faults) sigaction(number, &action, nullptr);
}

// Call `each` with every page that the running kernel has opened.
template <class Each>
void opened_pages(Each each) {
  for (Allocation* one = allocations; one; one = one->next)
    for (size_t page = 0; page * PAGE < one->room; page++)
      if (one->opened[page]) each(*one, page * PAGE);
}

// Close what is open. Pages stay closed between kernels, as most are never written to again: to close and open all of
// them takes the system longer than many a kernel.
void close_all() {
  for (Allocation* one = allocations; one; one = one->next) {
    const size_t pages = one->room / PAGE;
    if (!one->opened) {
      one->opened = static_cast<bool*>(malloc(pages));
      memset(one->opened, 1, pages);
      one->before = map(one->room, PROT_READ | PROT_WRITE), one->first = map(one->room, PROT_READ | PROT_WRITE);
    }
    for (size_t page = 0, end; page < pages; page = end) {
      for (end = page; end < pages && one->opened[end];) one->opened[end++] = false;
      if (end > page) mprotect(one->pages + page * PAGE, (end - page) * PAGE, PROT_READ);
      else end++;
    }
  }
}

void open_all() {
  for (Allocation* one = allocations; one; one = one->next) {
    mprotect(one->pages, one->room, PROT_READ | PROT_WRITE);
    if (one->opened) memset(one->opened, 1, one->room / PAGE);
  }
}

void compare(const Work& work, int order) {
  long bytes = 0;
  opened_pages([&](const Allocation& one, size_t at) {
    if (!memcmp(one.pages + at, one.first + at, PAGE)) return;
    for (size_t i = at; i < at + PAGE; i++) bytes += one.pages[i] != one.first[i];
  });
  if (!bytes) return;
  char text[200];
  snprintf(text, sizeof(text), "a race: thread orders 0 and %d differ in %ld bytes", order, bytes);
  note(work.function->kernel->name, text);
}

bool run_in_order(Work& work, int order) {
  char text[200] = "";
  const emulation::Launch launch = {work.grid, work.block, work.shared_bytes, order, text, sizeof(text)};
  const emulation::Kernel& kernel = *work.function->kernel;
  running = kernel.name;
  const bool fine = work.function->module->run(kernel.thunk, work.arguments, launch);
  running = nullptr;
  if (!fine) {
    snprintf(problem, sizeof(problem), "%s: %s", kernel.name, text);
    note(kernel.name, text);
  }
  return fine;
}

bool run_kernel(Work& work) {
  watch();
  work.function->launches++;
  if (!checking) return run_in_order(work, emulation::FORWARD);
  close_all();
  bool fine = true;
  for (int order = 0; order < emulation::ORDERS && fine; order++) {
    if (order) opened_pages([](Allocation& one, size_t at) { memcpy(one.pages + at, one.before + at, PAGE); });
    fine = run_in_order(work, order);
    if (order) compare(work, order);
    else opened_pages([](Allocation& one, size_t at) { memcpy(one.first + at, one.pages + at, PAGE); });
  }
  return fine;
}

bool run_now(Work& work) {
  if (work.function) return run_kernel(work);
  memmove(work.to, work.from, work.bytes);
  return true;
}

bool submit(Work* work) {
  if (!capturing) {
    const bool fine = run_now(*work);
    for (void* argument : work->arguments) free(argument);
    free(work);
    return fine;
  }
  (capturing->last ? capturing->last->next : capturing->first) = work;
  capturing->last = work;
  return true;
}

Work* new_work() { return static_cast<Work*>(calloc(1, sizeof(Work))); }

CUresult no_module(const char* text) {
  snprintf(problem, sizeof(problem), "%s", text);
  return CUDA_ERROR_INVALID_IMAGE;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// What was noted, a line each: `note KERNEL TEXT` and `ran KERNEL LAUNCHES`. Returns the length that it needs.
EXPORTED size_t emulation_report(char* out, size_t room) {
  size_t length = 0;
  auto line = [&](const char* what, const char* kernel, const char* text) {
    const size_t left = length < room ? room - length : 0;
    length += snprintf(left ? out + length : nullptr, left, "%s %s %s\n", what, kernel, text);
  };
  for (Note* one = notes; one; one = one->next) line("note", one->kernel, one->text);
  for (Function* one = functions; one; one = one->next) {
    char count[32];
    snprintf(count, sizeof(count), "%ld", one->launches);
    line("ran", one->kernel->name, count);
  }
  return length;
}

// Notes from now on are of what comes now.
EXPORTED void emulation_forget() { notes = nullptr; }

EXPORTED void emulation_check(int on) {
  checking = on;
  if (!on) open_all();
}

// The driver

EXPORTED CUresult cuDeviceGetName(char* name, int room, CUdevice) {
  snprintf(name, room, "emulated by mlcbuild");
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
EXPORTED CUresult cuGetErrorName(CUresult, const char** name) { return *name = "EMULATED_DEVICE", CUDA_SUCCESS; }
EXPORTED CUresult cuGetErrorString(CUresult, const char** text) { return *text = problem, CUDA_SUCCESS; }
EXPORTED CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                         const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                         CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

EXPORTED CUresult cuModuleLoadData(CUmodule* out, const void* image) {
  const char* bytes = static_cast<const char*>(image);
  if (memcmp(bytes, HEADER, 16)) return no_module("the library holds kernels for a real device: build it for the emulated one");
  uint64_t length;
  memcpy(&length, bytes + 16, 8);
  const int file = memfd_create("kernels", MFD_CLOEXEC);
  for (uint64_t done = 0; done < length;) {
    const ssize_t wrote = write(file, bytes + 24 + done, length - done);
    if (wrote <= 0) return no_module("no memory for the module");
    done += wrote;
  }
  char path[64];
  snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
  Module* module = static_cast<Module*>(calloc(1, sizeof(Module)));
  module->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);  // the file stays open: another module would get its path
  if (!module->handle) return no_module(dlerror());
  module->kernels = static_cast<const emulation::Kernel*>(dlsym(module->handle, "emulation_kernels"));
  module->run = reinterpret_cast<decltype(module->run)>(dlsym(module->handle, "emulation_run"));
  *out = reinterpret_cast<CUmodule>(module);
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }  // its kernels' names are still in the report

EXPORTED CUresult cuModuleGetFunction(CUfunction* out, CUmodule given, const char* name) {
  const Module* module = reinterpret_cast<const Module*>(given);
  for (const emulation::Kernel* kernel = module->kernels; kernel->name; kernel++) {
    if (strcmp(kernel->name, name)) continue;
    Function* function = static_cast<Function*>(calloc(1, sizeof(Function)));
    function->next = functions, function->module = module, function->kernel = kernel;
    functions = function;
    *out = reinterpret_cast<CUfunction>(function);
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_NOT_FOUND;
}

EXPORTED CUresult cuLaunchKernelEx(const CUlaunchConfig* launch, CUfunction given, void** values, void**) {
  Function* function = reinterpret_cast<Function*>(given);
  const emulation::Kernel& kernel = *function->kernel;
  if (kernel.count > MOST_ARGUMENTS) return no_module("a kernel with too many arguments");
  Work* work = new_work();
  work->function = function;
  work->grid = {launch->gridDimX, launch->gridDimY, launch->gridDimZ};
  work->block = {launch->blockDimX, launch->blockDimY, launch->blockDimZ};
  work->shared_bytes = launch->sharedMemBytes;
  for (size_t i = 0; i < kernel.count; i++) {  // kept: the caller's go before a graph is launched
    work->arguments[i] = malloc(kernel.sizes[i]);
    memcpy(work->arguments[i], values[i], kernel.sizes[i]);
  }
  return submit(work) ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_FAILED;
}

// The runtime

EXPORTED cudaError_t cudaMalloc(void** out, size_t bytes) {
  Allocation* one = static_cast<Allocation*>(calloc(1, sizeof(Allocation)));
  one->room = (bytes + PAGE - 1) / PAGE * PAGE, one->bytes = bytes;
  char* memory = map(one->room + 2 * PAGE, PROT_NONE);
  if (!memory) return cudaErrorMemoryAllocation;
  one->pages = memory + PAGE;
  mprotect(one->pages, one->room, PROT_READ | PROT_WRITE);
  one->begin = one->pages + one->room - (bytes + 255) / 256 * 256;  // aligned as a device's allocations are
  if (bytes <= POISONED) memset(one->pages, 0xff, one->room);
  one->next = allocations, allocations = one;
  *out = one->begin;
  return cudaSuccess;
}

EXPORTED cudaError_t cudaFree(void* place) {
  for (Allocation** link = &allocations; *link; link = &(*link)->next) {
    Allocation* one = *link;
    if (one->begin != place) continue;
    *link = one->next;
    munmap(one->pages - PAGE, one->room + 2 * PAGE);
    if (one->opened) munmap(one->before, one->room), munmap(one->first, one->room), free(one->opened);
    free(one);
    return cudaSuccess;
  }
  return place ? cudaErrorInvalidValue : cudaSuccess;
}

EXPORTED cudaError_t cudaMallocHost(void** out, size_t bytes) {
  return (*out = aligned_alloc(256, (bytes + 255) / 256 * 256)) ? cudaSuccess : cudaErrorMemoryAllocation;
}
EXPORTED cudaError_t cudaFreeHost(void* place) { return free(place), cudaSuccess; }

static cudaError_t copy(void* to, const void* from, size_t bytes) {
  Work* work = new_work();
  work->to = to, work->from = from, work->bytes = bytes;
  submit(work);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, bytes);
}
EXPORTED cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t) {
  return copy(to, from, bytes);
}

EXPORTED cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  capturing = static_cast<Graph*>(calloc(1, sizeof(Graph)));
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* out) {
  *out = reinterpret_cast<cudaGraph_t>(capturing);
  capturing = nullptr;
  return cudaSuccess;
}
// The graph itself is what is launched, so it stays when TVM gives it back.
EXPORTED cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  *out = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  for (Work* work = reinterpret_cast<Graph*>(graph)->first; work; work = work->next)
    if (!run_now(*work)) return cudaErrorLaunchFailure;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
EXPORTED cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

EXPORTED cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr attribute, int) {
  struct {
    cudaDeviceAttr attribute;
    int value;
  } const known[] = {
      {cudaDevAttrMaxThreadsPerBlock, emulation::MOST_THREADS},
      {cudaDevAttrWarpSize, emulation::WARP},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMultiProcessorCount, 4},
      {cudaDevAttrMaxBlockDimX, emulation::MOST_THREADS},
      {cudaDevAttrMaxBlockDimY, emulation::MOST_THREADS},
      {cudaDevAttrMaxBlockDimZ, 64},
  };
  *out = 65536;
  for (const auto& one : known)
    if (one.attribute == attribute) *out = one.value;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int) {
  memset(out, 0, sizeof(*out));
  out->major = 9, out->warpSize = emulation::WARP, out->multiProcessorCount = 4, out->totalGlobalMem = 1l << 33;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* all_bytes) { return *free_bytes = *all_bytes = 1l << 33, cudaSuccess; }
EXPORTED cudaError_t cudaGetDeviceCount(int* out) { return *out = 1, cudaSuccess; }
EXPORTED cudaError_t cudaGetDevice(int* out) { return *out = 0, cudaSuccess; }
EXPORTED cudaError_t cudaSetDevice(int) { return cudaSuccess; }
EXPORTED cudaError_t cudaGetLastError() { return cudaSuccess; }
EXPORTED cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
EXPORTED const char* cudaGetErrorName(cudaError_t) { return "EMULATED_DEVICE"; }
EXPORTED const char* cudaGetErrorString(cudaError_t) { return problem; }
EXPORTED cudaError_t cudaStreamCreate(cudaStream_t* out) { return *out = reinterpret_cast<cudaStream_t>(1), cudaSuccess; }
EXPORTED cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned) { return cudaStreamCreate(out); }
EXPORTED cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORTED cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
EXPORTED cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
EXPORTED cudaError_t cudaEventCreate(cudaEvent_t* out) { return *out = reinterpret_cast<cudaEvent_t>(1), cudaSuccess; }
EXPORTED cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
EXPORTED cudaError_t cudaEventElapsedTime(float* out, cudaEvent_t, cudaEvent_t) { return *out = 0, cudaSuccess; }
EXPORTED cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
EXPORTED cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

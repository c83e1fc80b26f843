// Stand-ins for libcuda and libcudart with one device, the CPU: what TVM's CUDA runtime calls, and no more.
//
// Everything happens at once, in the order of the calls; what is captured into a graph happens when it is launched.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#undef cudaGetDeviceProperties
#undef cudaGraphInstantiate

namespace {

using emulation::Function;
using emulation::MOST_ARGUMENTS;
constexpr unsigned MOST_BLOCKS = 65535;  // along y and z, as CUDA has it
using emulation::Module;
using emulation::problem;

// One thing that a stream is asked to do: a kernel, or where `function` is none, a copy.
struct Work {
  Work* next;
  Function* function;
  emulation::Index grid, block;
  size_t shared_bytes;
  bool early;
  void* arguments[MOST_ARGUMENTS];
  void* to;
  const void* from;
  size_t bytes;
};

struct Graph {
  Work *first, *last;
};

Graph* capturing;

bool run_now(Work& work) {
  if (work.function) return emulation::run(*work.function, work.grid, work.block, work.shared_bytes, work.early, work.arguments);
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

}  // namespace

// The driver

EXPORTED CUresult cuDeviceGetName(char* name, int room, CUdevice) {
  snprintf(name, room, "emulated by mlcbuild");
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
// TVM shows the name alone, so it is what went wrong.
EXPORTED CUresult cuGetErrorName(CUresult, const char** name) { return *name = problem, CUDA_SUCCESS; }
EXPORTED CUresult cuGetErrorString(CUresult, const char** text) { return *text = problem, CUDA_SUCCESS; }
EXPORTED CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                         const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                         CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

EXPORTED CUresult cuModuleLoadData(CUmodule* out, const void* image) {
  Module* module = emulation::load(image);
  *out = reinterpret_cast<CUmodule>(module);
  return module ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}
EXPORTED CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }  // its kernels' names are still in the report

EXPORTED CUresult cuModuleGetFunction(CUfunction* out, CUmodule module, const char* name) {
  Function* function = emulation::find(reinterpret_cast<const Module*>(module), name);
  *out = reinterpret_cast<CUfunction>(function);
  return function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

EXPORTED CUresult cuLaunchKernelEx(const CUlaunchConfig* launch, CUfunction given, void** values, void**) {
  Function* function = reinterpret_cast<Function*>(given);
  const emulation::Kernel& kernel = *function->kernel;
  if (kernel.count > MOST_ARGUMENTS) {
    snprintf(problem, sizeof(problem), "%s has %zu arguments", kernel.name, kernel.count);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (launch->gridDimY > MOST_BLOCKS || launch->gridDimZ > MOST_BLOCKS) {
    snprintf(problem, sizeof(problem), "%s has %u x %u blocks along y and z", kernel.name, launch->gridDimY,
             launch->gridDimZ);
    return CUDA_ERROR_INVALID_VALUE;
  }
  Work* work = new_work();
  work->function = function;
  work->grid = {launch->gridDimX, launch->gridDimY, launch->gridDimZ};
  work->block = {launch->blockDimX, launch->blockDimY, launch->blockDimZ};
  work->shared_bytes = launch->sharedMemBytes;
  for (unsigned i = 0; i < launch->numAttrs; i++)
    if (launch->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      work->early = launch->attrs[i].value.programmaticStreamSerializationAllowed;
  for (size_t i = 0; i < kernel.count; i++) {  // kept: the caller's go before a graph is launched
    work->arguments[i] = malloc(kernel.sizes[i]);
    memcpy(work->arguments[i], values[i], kernel.sizes[i]);
  }
  return submit(work) ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_FAILED;
}

// The runtime

EXPORTED cudaError_t cudaMalloc(void** out, size_t bytes) {
  return (*out = emulation::allocate(bytes)) ? cudaSuccess : cudaErrorMemoryAllocation;
}
EXPORTED cudaError_t cudaFree(void* place) { return emulation::release(place) ? cudaSuccess : cudaErrorInvalidValue; }
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

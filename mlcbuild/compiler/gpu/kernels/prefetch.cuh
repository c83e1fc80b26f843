// What the next product reads first (the first 2 MB of its matrix at most), on its way from memory while this kernel ends and
// the next begins: else the memory rests between them, for as long as a launch takes.
#pragma once
#include "device.cuh"

namespace mlcbuild {

constexpr int LINE = 128;         // bytes that are fetched at once
constexpr int LAST_BLOCKS = 256;  // of a kernel, which end when it does

// The last blocks share out the first `bytes` of `next`, but for a part of a line.
template <class T>
__device__ __forceinline__ void prefetch_next(const T* next, int bytes) {
  const int grid = gridDim.x, blocks = min(grid, LAST_BLOCKS), block = static_cast<int>(blockIdx.x) - (grid - blocks);
  if (block < 0) return;
  const int lines = bytes / LINE, each = (lines + blocks - 1) / blocks, first = block * each;
  for (int i = threadIdx.x; i < each && first + i < lines; i += blockDim.x)
    fetch_line(reinterpret_cast<const char*>(next) + (first + i) * LINE);
}

}  // namespace mlcbuild

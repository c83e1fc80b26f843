// What the next product reads first, on its way from memory while this kernel ends and the next begins: else the memory rests
// between them, for as long as a launch takes.
#pragma once
#include "device.cuh"

namespace mlcbuild {

constexpr int LINE = 128;             // bytes that are fetched at once
constexpr unsigned LAST_BLOCKS = 256;  // of a kernel, which end when it does

// The last blocks share out the first KILOBYTES of `next`, or all `lines` that it has.
template <int KILOBYTES, class T>
__device__ __forceinline__ void prefetch_next(const T* next, int lines) {
  const unsigned blocks = min(static_cast<unsigned>(gridDim.x), LAST_BLOCKS), before = gridDim.x - blocks;
  if (blockIdx.x < before) return;
  const int all = min(lines, KILOBYTES * 1024 / LINE), each = (all + blocks - 1) / blocks;
  const int first = (blockIdx.x - before) * each;
  for (int i = threadIdx.x; i < each && first + i < all; i += blockDim.x)
    fetch_line(reinterpret_cast<const char*>(next) + static_cast<long long>(first + i) * LINE);
}

}  // namespace mlcbuild

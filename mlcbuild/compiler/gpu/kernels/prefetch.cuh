// What the next product reads first, on its way from memory while this kernel ends and the next begins: else the memory rests
// between them, for as long as a launch takes. Where that product follows attention, two kernels of the KV cache are launched
// before it, which hardly use the memory: each asks for another part. They are told of no matrix, so where it is lies in
// memory of the library's own.
#pragma once
#include "device.cuh"

namespace mlcbuild {

constexpr int LINE = 128;         // bytes that are fetched at once
constexpr int LAST_BLOCKS = 256;  // of a kernel, which end when it does

// What is left to be asked for of a matrix, and how much of it at once: bytes.
struct Unasked {
  const char* from;
  int bytes, part;

  // A block asks for its share of the next part, but for a part of a line.
  __device__ __forceinline__ void ask(int block, int blocks) const {
    const int lines = min(bytes, part) / LINE, each = (lines + blocks - 1) / blocks, first = block * each;
    for (int i = threadIdx.x; i < each && first + i < lines; i += blockDim.x)
      fetch_line(from + (first + i) * static_cast<long long>(LINE));
  }
  __device__ __forceinline__ Unasked rest() const { return {from + part, max(bytes - part, 0), part}; }
};
static __device__ Unasked behind_product, behind_rotary;

// The last blocks of a product ask for the first part of the `bytes` of `next`.
template <class T>
__device__ __forceinline__ void prefetch_next(const T* next, int bytes, int part) {
  const int grid = gridDim.x, blocks = min(grid, LAST_BLOCKS), block = static_cast<int>(blockIdx.x) - (grid - blocks);
  if (block < 0) return;
  const Unasked all = {reinterpret_cast<const char*>(next), bytes, part};
  all.ask(block, blocks);
  if (block == 0 && threadIdx.x == 0) behind_product = all.rest();
}

// What turns queries and keys asks for the second one.
__device__ __forceinline__ void prefetch_second() {
  const Unasked left = behind_product;
  left.ask(blockIdx.x, gridDim.x);
  if (blockIdx.x == 0 && threadIdx.x == 0) behind_rotary = left.rest();
}

// Attention asks for the third. Of this matrix nothing is asked for again.
__device__ __forceinline__ void prefetch_third() {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const Unasked left = behind_rotary;
  left.ask(block, gridDim.x * gridDim.y * gridDim.z);
  if (block == 0 && threadIdx.x == 0) behind_product.bytes = 0;
}

}  // namespace mlcbuild

// Products of few rows with what is before and behind them, in one launch.
//
// A norm of one row: each block takes the sum of squares again, while its first loads of w are on their way, and has the row
// that it multiplies in shared memory. A gate: a tile has eight rows of it, and the eight that they are multiplied with.
#pragma once
#include "few_rows.cuh"

namespace mlcbuild {

// x / sqrt(mean(x²) + eps) * weight (RMSNorm; Zhang and Sennrich, arXiv 1910.07467) goes to product.staged. What x is
// multiplied by in 16 bits is a power of two, which is exact but where a number becomes subnormal, and the weight; the rest is
// returned, for the sums to be multiplied by. The power is one that half has: 2^15 where x is next to nothing, as is eps.
// `parts`: WARPS floats.
template <class Product, class T, int K, int WARPS>
__device__ __forceinline__ float stage_normed(const Product& product, float* parts, const T* x, const T* weight,
                                              float eps) {
  constexpr int THREADS = 32 * WARPS, UNITS = Product::UNITS, EACH = (UNITS + THREADS - 1) / THREADS;
  constexpr int PAIRS = Product::PAIRS, IN_A_LOAD = Product::ALIGNED / 4;
  typedef typename Product::Part Part;
  const int lane = threadIdx.x % 32;
  uint32_t own[EACH][PAIRS], by[EACH][PAIRS];
  float squares[4] = {};
  __syncthreads();  // behind w's first loads, which x's, and what waits for them, are not to be put before
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int unit = i * THREADS + threadIdx.x, column = min(unit, UNITS - 1) * 2 * PAIRS;
    Product::template load_there<PAIRS, true>(own[i], x + column, (K - column) / 2);
    Product::template load_there<PAIRS, (EACH <= 2)>(by[i], weight + column, (K - column) / 2);
  }
  // A lane's numbers by those of the lanes that have its columns: eight rows' squares are among them.
#pragma unroll
  for (int i = 0; i < EACH; i++)
#pragma unroll
    for (int p = 0; p < PAIRS; p += 2) {
      const bool there = i * THREADS + threadIdx.x < UNITS;
      const uint32_t a = there ? own[i][p] : 0, b = there ? own[i][p + 1] : 0;
      multiply_tile<T>(squares, {a, 0, b, 0}, {a, b});
    }
  float sum = lane % 4 == lane / 8 ? squares[lane / 4 % 2] : 0.f;
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask, 32);
  if (lane == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += parts[w];
  const float all = rsqrtf(sum / K + eps), power = min(as<float>(as<uint32_t>(all) & 0x7f800000), 32768.f);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int unit = i * THREADS + threadIdx.x;
    if (unit >= UNITS) break;
    alignas(16) uint32_t to[PAIRS];
#pragma unroll
    for (int p = 0; p < PAIRS; p++)
      own[i][p] = Pairs<T>::multiply(Pairs<T>::multiply(own[i][p], Pairs<T>::of(power)), by[i][p]);
    Product::Code::sort(own[i], to), Product::Code::sort(own[i] + PAIRS / 2, to + PAIRS / 2);
    Part* place = reinterpret_cast<Part*>(product.staged + unit * PAIRS);
#pragma unroll
    for (int p = 0; p < PAIRS / IN_A_LOAD; p++) place[p] = *reinterpret_cast<const Part*>(to + p * IN_A_LOAD);
  }
  __syncthreads();
  return all / power;
}

// The same as few_rows; where NORMED, x is normed first. PAIRED: a row of the gate belongs to the one that is rows / 2 behind
// it, and a block has half as many. `shared`: few_rows' floats, then a norm's.
template <class FORMAT, int K, int MOST, int TILES, int WARPS, int AHEAD, bool NORMED, bool PAIRED>
__device__ __forceinline__ void fused_rows(float* results, float* shared, const typename FORMAT::Float* x,
                                           const typename FORMAT::Float* weight, const void* words,
                                           const typename FORMAT::Float* scales, float eps, int n, int rows, int block) {
  typedef typename FORMAT::Float T;
  typedef FewRows<FORMAT, K, MOST, TILES, WARPS, AHEAD, NORMED, PAIRED> Product;
  Product product(x, words, scales, n, rows, block);
  float rest = 1;
  if constexpr (NORMED) {
    float* parts = shared + WARPS * Product::ROWS * MOST;
    product.staged = reinterpret_cast<uint32_t*>(parts + WARPS);
    auto stage = [&] { rest = stage_normed<Product, T, K, WARPS>(product, parts, x, weight, eps); };
    sum_up<Product, MOST, TILES>(product, shared, n, stage);
  } else {
    sum_up<Product, MOST, TILES>(product, shared, n, [] {});
  }
  give_results<Product::ROWS, MOST, WARPS, PAIRED>(results, shared, n, rest);
}

}  // namespace mlcbuild

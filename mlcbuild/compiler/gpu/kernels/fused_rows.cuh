// Products of few rows with what is before and behind them, in one launch.
//
// A norm: each block takes the sums of squares of x's rows again, while its first loads of w are on their way. A gate: a tile
// has eight rows of the gate, and the eight of `up` that they are multiplied with.
#pragma once
#include "few_rows.cuh"

namespace mlcbuild {

// The same of rows of x that are x / sqrt(mean(x²) + eps) * weight (RMSNorm; Zhang and Sennrich, arXiv 1910.07467). PAIRED:
// results[2 * i] is the gate's, and the next that of `up`, for half of the rows. `shared`: beside these, those of a norm.
template <class FORMAT, int K, int MOST, int TILES, int WARPS, int AHEAD, bool PAIRED>
__device__ __forceinline__ void fused_rows(float* results, float* shared, const typename FORMAT::Float* x,
                                           const typename FORMAT::Float* weight, const void* words,
                                           const typename FORMAT::Float* scales, float eps, int n, int rows, int block) {
  typedef FewRows<FORMAT, K, MOST, TILES, WARPS, AHEAD, true, PAIRED> Product;
  constexpr int ROWS = Product::ROWS, THREADS = 32 * WARPS, FLOATS = ROWS * MOST, OF_X = PAIRED ? ROWS / 2 : ROWS;
  Product product(x, words, scales, n, rows, block);
  float* rest = shared + WARPS * FLOATS;  // of a norm: MOST factors, WARPS * MOST parts of sums, and x
  float* parts = rest + (MOST + 3) / 4 * 4;
  product.staged = reinterpret_cast<uint32_t*>(parts + (WARPS * MOST + 3) / 4 * 4);
  sum_up<Product, MOST, TILES>(product, shared, n, [&] {
    const float left = product.norm(parts, weight, eps);
    if (threadIdx.x < 32 && threadIdx.x % 4 == 0 && threadIdx.x / 4 < MOST) rest[threadIdx.x / 4] = left;
  });
#pragma unroll
  for (int i = 0; i < (OF_X * MOST + THREADS - 1) / THREADS; i++) {
    const int at = i * THREADS + threadIdx.x, m = at / OF_X, c = at % OF_X;
    const bool there = at < OF_X * n;
    const float by = there ? rest[m] : 0.f;
    if constexpr (PAIRED) {
      const int gate = m * ROWS + c / 8 * 16 + c % 8;
      results[2 * i] = there ? by * of_all_warps<WARPS, FLOATS>(shared, gate) : 0.f;
      results[2 * i + 1] = there ? by * of_all_warps<WARPS, FLOATS>(shared, gate + 8) : 0.f;
    } else {
      results[i] = there ? by * of_all_warps<WARPS, FLOATS>(shared, at) : 0.f;
    }
  }
}

}  // namespace mlcbuild

// Products of many rows of activations with a matrix: x [n, K] · w [rows, K]ᵀ, bound by tensor cores.
//
// Both operands come through shared memory, copied asynchronously STAGES - 1 steps ahead. Four lanes go along a row and
// take UNIT storage words each, and as many columns of x, as they lie in memory: which column of a product a number is, is
// free, as long as both operands agree. So packed words become the first operand of tensor cores in the registers
// that they are unpacked in, x needs no other order, and every load of a warp is of neighbouring bytes, without bank
// conflicts. A warp has 32 rows of w, which nobody else of its block unpacks, and WIDTH rows of x.
//
// Where there are few rows of w for a device's multiprocessors, a block has fewer of them, and its warps share out the columns.
//
// With experts, a block's rows of x are those that chose one of them: wherever a list says that they lie.
#pragma once
#include "weights.cuh"

namespace mlcbuild {

// WARPS_OF_W: of the block's four warps, which have rows of w of their own. TILES_OF_X: of 8 rows each. CHOICES: 0 where
// rows of x follow each other; else a list has choices, of which a row of x has so many.
template <class FORMAT, int K, int WARPS_OF_W, int TILES_OF_X, int STAGES, int CHOICES = 0>
struct ManyRows {
  typedef typename FORMAT::Float T;
  typedef typename FORMAT::Code Code;
  static constexpr int WARPS = 4, THREADS = 32 * WARPS, ALONG = WARPS / WARPS_OF_W, LANES = 4;
  static constexpr int TILES = 2, TOGETHER = 4;                       // of w and of x that are multiplied at once
  static constexpr int HEIGHT = 16 * TILES * WARPS_OF_W, WIDTH = 8 * TILES_OF_X;  // of a block
  static constexpr int PER_WORD = FORMAT::PER_WORD, UNIT = Code::UNIT, WORDS_OF_UNIT = LANES * UNIT;
  static constexpr int PAIRS = UNIT * PER_WORD / 2, COLUMNS = LANES * 2 * PAIRS;  // of a lane, of a unit
  static constexpr bool SCALED = FORMAT::COLUMNS_OF_A_SCALE > 0;
  static constexpr int GROUP = SCALED ? FORMAT::COLUMNS_OF_A_SCALE : 8, GROUPS = (K + GROUP - 1) / GROUP;
  static constexpr int WORDS_OF_ROW = GROUPS * GROUP / PER_WORD;
  static constexpr int UNITS = (WORDS_OF_ROW + WORDS_OF_UNIT - 1) / WORDS_OF_UNIT, STEPS = (UNITS + ALONG - 1) / ALONG;
  static constexpr bool EVEN = UNITS * COLUMNS == K && UNITS % ALONG == 0;  // nothing is behind the end of a row
  // Scales of a unit: as many as it has groups, of neighbouring words each.
  static constexpr int SCALES = GROUP % COLUMNS == 0         ? 1
                                : GROUP % (COLUMNS / 2) == 0 ? 2
                                : GROUP % (COLUMNS / 4) == 0 ? 4
                                                             : WORDS_OF_UNIT;
  static constexpr int COPY = K % 8 ? 8 : 16;  // bytes of x copied at once
  static constexpr int COPIES = ALONG * WIDTH * COLUMNS * 2 / COPY / THREADS, OF_ROW = COLUMNS * 2 / COPY;
  static constexpr int STRIDE = HEIGHT + (UNIT == 1 ? 8 : 4);  // of words of neighbouring rows, KN
  // A stage: x [ALONG, WIDTH, COLUMNS], words [ALONG, HEIGHT, 4 * UNIT] or [ALONG, 4 * UNIT, STRIDE], scales.
  static constexpr int BYTES_OF_X = ALONG * WIDTH * COLUMNS * 2;
  static constexpr int BYTES_OF_W = ALONG * WORDS_OF_UNIT * (FORMAT::TRANSPOSED ? STRIDE : HEIGHT) * 4;
  static constexpr int STAGE = BYTES_OF_X + BYTES_OF_W + (SCALED ? SCALES * THREADS * 2 : 0);
  static_assert(WORDS_OF_ROW % WORDS == 0 && GROUP % PER_WORD == 0 && ALONG * HEIGHT == THREADS, "whole loads");
  static_assert(COLUMNS * 2 % COPY == 0 && K * 2 % COPY == 0, "rows of x begin where a copy may");

  char* shared;
  int n, rows, first_of_x, first, thread, lane, warp;
  const T* x;
  const uint32_t* words;
  const T* scales;  // of this thread's row
  T waiting[SCALES];
  const T* listed[CHOICES ? COPIES : 1];  // where this thread's copies of x begin

  __device__ __forceinline__ ManyRows(char* shared, const T* x, const void* w, const T* s, int n, int rows, int first_of_x,
                                      int block, const int* list = nullptr)
      : shared(shared), n(n), rows(rows), first_of_x(first_of_x), first(block * HEIGHT), thread(threadIdx.x),
        lane(thread % 32), warp(thread / 32), x(x), words(static_cast<const uint32_t*>(w)) {
    const long long row = min(first + thread % HEIGHT, rows - 1);
    scales = s + (FORMAT::TRANSPOSED ? row : row * GROUPS);
    if constexpr (CHOICES) {
#pragma unroll
      for (int i = 0; i < COPIES; i++) {
        const int at = i * THREADS + thread;
        const long long of_x = load_given(list + max(place(at), 0)) / CHOICES;  // an expert that nobody chose ends at 0
        listed[i] = x + of_x * K + unit(0, at / (WIDTH * OF_ROW)) * COLUMNS + at % OF_ROW * (COPY / 2);
      }
    }
  }

  // Which row of x a copy is of, or of the list's choices.
  __device__ __forceinline__ int place(int at) const { return min(first_of_x + at / OF_ROW % WIDTH, n - 1); }

  // Unit of the row that `along` has in a step; behind the last one everything is zeros.
  __device__ __forceinline__ int unit(int step, int along) const { return step * ALONG + along; }

  __device__ __forceinline__ void copy(int step) const {
    char* stage = shared + step % STAGES * STAGE;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const int at = i * THREADS + thread, along = at / (WIDTH * OF_ROW);
      const int column = unit(step, along) * COLUMNS + at % OF_ROW * (COPY / 2);
      const bool there = EVEN || column < K;
      if constexpr (CHOICES) {
        copy_later<COPY>(stage + at * COPY, listed[i] + (there ? step * ALONG * COLUMNS : 0), there);
      } else {
        const long long row = place(at);
        copy_later<COPY>(stage + at * COPY, x + row * K + (there ? column : 0), there);
      }
    }
    char* to = stage + BYTES_OF_X;
#pragma unroll
    for (int i = 0; i < UNIT; i++) {
      const int at = i * THREADS + thread;
      if constexpr (FORMAT::TRANSPOSED) {
        constexpr int PIECES = HEIGHT / WORDS;
        const int own = at / PIECES, word = unit(step, 0) * WORDS_OF_UNIT + own, column = at % PIECES * WORDS;
        const bool there = EVEN || word < WORDS_OF_ROW;
        const long long from = (there ? word : 0) * static_cast<long long>(rows) + min(first + column, rows - WORDS);
        copy_later<16>(to + (own * STRIDE + column) * 4, words + from, there);
      } else {
        const int along = at / (UNIT * HEIGHT), word = (unit(step, along) * UNIT + at % UNIT) * WORDS;
        const bool there = EVEN || word < WORDS_OF_ROW;
        const long long row = min(first + at / UNIT % HEIGHT, rows - 1);
        copy_later<16>(to + at * 16, words + row * WORDS_OF_ROW + (there ? word : 0), there);
      }
    }
    end_of_copies();
  }

  // A thread has the scales of one row: loaded a step before they are put beside their words.
  __device__ __forceinline__ void load_scales(int step) {
#pragma unroll
    for (int i = 0; i < (SCALED ? SCALES : 0); i++) {
      const int word = (unit(step, thread / HEIGHT) * SCALES + i) * (WORDS_OF_UNIT / SCALES);
      const int group = EVEN ? word * PER_WORD / GROUP : min(word * PER_WORD / GROUP, GROUPS - 1);
      waiting[i] = __ldg(scales + (FORMAT::TRANSPOSED ? group * static_cast<long long>(rows) : group));
    }
  }
  __device__ __forceinline__ void keep_scales(int step) const {
    T* to = reinterpret_cast<T*>(shared + step % STAGES * STAGE + BYTES_OF_X + BYTES_OF_W) + thread;
#pragma unroll
    for (int i = 0; i < (SCALED ? SCALES : 0); i++) to[i * THREADS] = waiting[i];
  }

  typedef float Sums[TILES_OF_X][TILES][4];
  __device__ __forceinline__ void multiply(Sums& sums, int step) const {
    const char* stage = shared + step % STAGES * STAGE;
    const int along = warp / WARPS_OF_W, part = lane % LANES;
    const uint32_t* of_w = reinterpret_cast<const uint32_t*>(stage + BYTES_OF_X);
    const T* of_scales = reinterpret_cast<const T*>(stage + BYTES_OF_X + BYTES_OF_W);
    uint32_t a[TILES][2][PAIRS];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int half_of_tile = 0; half_of_tile < 2; half_of_tile++) {
        const int row = warp % WARPS_OF_W * 16 * TILES + t * 16 + half_of_tile * 8 + lane / LANES;
        uint32_t own[UNIT];
        if constexpr (FORMAT::TRANSPOSED) {
#pragma unroll
          for (int j = 0; j < UNIT; j++) own[j] = of_w[((along * LANES + part) * UNIT + j) * STRIDE + row];
        } else {
          read(own, of_w + (along * HEIGHT + row) * WORDS_OF_UNIT + part * UNIT);
        }
#pragma unroll
        for (int j = 0; j < UNIT; j++) {
          uint32_t* pairs = a[t][half_of_tile] + j * PER_WORD / 2;
          Code::in_order(own[j], pairs, static_cast<T*>(nullptr));
          if constexpr (SCALED) {
            const int which = (part * UNIT + j) * SCALES / WORDS_OF_UNIT;
            const uint32_t scale = twice(as<uint16_t>(of_scales[which * THREADS + along * HEIGHT + row]));
#pragma unroll
            for (int p = 0; p < PER_WORD / 2; p++) pairs[p] = Pairs<T>::multiply(pairs[p], scale);
          } else {
            pairs[0] |= n >> 31;  // 0, which the compiler is not to know: it would copy a load's words for each product
          }
        }
      }
    const uint32_t* of_x = reinterpret_cast<const uint32_t*>(stage);
#pragma unroll
    for (int tile = 0; tile < TILES_OF_X; tile += TOGETHER) {
      uint32_t b[TOGETHER][PAIRS];
#pragma unroll
      for (int i = 0; i < TOGETHER; i++)
        read(b[i], of_x + (along * WIDTH + (tile + i) * 8 + lane / LANES) * (COLUMNS / 2) + part * PAIRS);
      multiply_tiles<T>(sums + tile, a, b);
    }
  }

  // COUNT words, as many at once as their place is aligned to.
  template <int COUNT>
  static __device__ __forceinline__ void read(uint32_t (&to)[COUNT], const uint32_t* from) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
      for (int i = 0; i < COUNT; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(from + i);
        to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
      }
    } else if constexpr (COUNT % 2 == 0) {
#pragma unroll
      for (int i = 0; i < COUNT; i += 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(from + i);
        to[i] = two.x, to[i + 1] = two.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; i++) to[i] = from[i];
    }
  }

  __device__ __forceinline__ void run(Sums& sums) {
    // A caller that asks whether there is anything to do has sums in local memory, not in registers: the compiler's choice.
    const int steps = CHOICES && first_of_x >= n ? 0 : STEPS;
#pragma unroll
    for (auto& of_x : sums)
#pragma unroll
      for (auto& tile : of_x) tile[0] = tile[1] = tile[2] = tile[3] = 0;
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
      if (step < steps) load_scales(step), keep_scales(step), copy(step);
      else end_of_copies();
    }
    if (STAGES - 1 < steps) load_scales(STAGES - 1);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      wait_for_copies<STAGES - 2>();
      __syncthreads();  // the step is there, and the one before is used up
      const int next = step + STAGES - 1;
      if (next < steps) {
        keep_scales(next), copy(next);
        load_scales(min(next + 1, STEPS - 1));
      } else {
        end_of_copies();
      }
      multiply(sums, step);
    }
  }
};

// sums: those of a thread, for hand_over. shared: of BYTES.
template <class FORMAT, int K, int WARPS_OF_W, int TILES_OF_X, int STAGES, int BYTES>
__device__ __forceinline__ void many_rows(float* sums, void* shared, const typename FORMAT::Float* x, const void* words,
                                          const typename FORMAT::Float* scales, int n, int rows, int block_of_x,
                                          int block) {
  typedef ManyRows<FORMAT, K, WARPS_OF_W, TILES_OF_X, STAGES> Product;
  static_assert(STAGES * Product::STAGE <= BYTES, "a stage is larger than its caller knows");
  Product product(static_cast<char*>(shared), x, words, scales, n, rows, block_of_x * Product::WIDTH, block);
  product.run(*reinterpret_cast<typename Product::Sums*>(sums));
}

// The same of one expert's matrix, one of several that lie one after the other, with the rows of x whose choices are the
// `list`'s from `first` to `end`.
template <class FORMAT, int K, int WARPS_OF_W, int TILES_OF_X, int STAGES, int BYTES, int CHOICES>
__device__ __forceinline__ void rows_of_expert(float* sums, void* shared, const typename FORMAT::Float* x,
                                               const void* words, const typename FORMAT::Float* scales, const int* list,
                                               int first, int end, long long expert, int rows, int block) {
  typedef ManyRows<FORMAT, K, WARPS_OF_W, TILES_OF_X, STAGES, CHOICES> Product;
  static_assert(STAGES * Product::STAGE <= BYTES, "a stage is larger than its caller knows");
  const uint32_t* of_expert = static_cast<const uint32_t*>(words) + expert * rows * Product::WORDS_OF_ROW;
  const typename FORMAT::Float* own = Product::SCALED ? scales + expert * rows * Product::GROUPS : scales;
  Product product(static_cast<char*>(shared), x, of_expert, own, end, rows, first, block, list);
  product.run(*reinterpret_cast<typename Product::Sums*>(sums));
}

// The sums of rows of x from PART * PARTS on, PARTS of them, as [ALONG, PARTS, HEIGHT + 4] in shared memory: a sum over the
// first is the result. Rows of four numbers more, so that lanes write to different banks.
template <int WARPS_OF_W, int TILES_OF_X, int PARTS, int PART>
__device__ __forceinline__ void hand_over(float* shared, const float* sums) {
  constexpr int TILES = 2, HEIGHT = 16 * TILES * WARPS_OF_W, STRIDE = HEIGHT + 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* to = shared + warp / WARPS_OF_W * PARTS * STRIDE + warp % WARPS_OF_W * 16 * TILES + lane / 4;
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < PARTS / 8; tile++)
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        to[(tile * 8 + lane % 4 * 2 + i % 2) * STRIDE + t * 16 + i / 2 * 8] =
            sums[((PART * PARTS / 8 + tile) * TILES + t) * 4 + i];
  __syncthreads();
}

}  // namespace mlcbuild

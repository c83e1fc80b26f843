// Products of few rows of activations with a matrix: x [n, K] · w [rows, K]ᵀ, bound by reading w once.
//
// A block has 16 * TILES rows of w; its warps share out the columns, and add up through shared memory at the end. Four
// lanes go along a row, a load of 16 bytes each, `AHEAD` of them for each of a lane's 2 * TILES rows on their way
// before the first is used. What they unpack is the first operand of tensor cores, as it lies in their registers; the second is
// eight rows of x, so that up to eight cost what one does, and more rows unpack once for all. Sums are float32.
//
// float32 models, which tensor cores would round, multiply lane by lane and sum over the four lanes last.
#pragma once
#include "weights.cuh"

namespace mlcbuild {

// FORMAT: Weights<...>. MOST: rows of x at most, 1 or a multiple of 8. STAGED: the one row of x lies in shared memory, in the
// order of multiplying. PAIRED: w is the rows of a gate, and as many that are multiplied with it.
template <class FORMAT, int K, int MOST, int TILES, int WARPS, int AHEAD, bool STAGED = false, bool PAIRED = false>
struct FewRows {
  typedef typename FORMAT::Float T;
  typedef typename FORMAT::Code Code;
  static constexpr bool WIDE = sizeof(T) == 4;
  static constexpr int LANES = 4;                       // along a row
  static constexpr int ROWS = 16 * TILES, OWN = 2 * TILES;  // of w: of a block, of a lane
  static constexpr int CHUNK = FORMAT::CHUNK, PER_WORD = FORMAT::PER_WORD;
  static constexpr bool SCALED = FORMAT::COLUMNS_OF_A_SCALE > 0;
  static constexpr int GROUP = SCALED ? FORMAT::COLUMNS_OF_A_SCALE : CHUNK, GROUPS = (K + GROUP - 1) / GROUP;
  static constexpr int CHUNKS = GROUPS * GROUP / CHUNK;
  static constexpr int STEPS = (CHUNKS + LANES - 1) / LANES, EACH = (STEPS + WARPS - 1) / WARPS;  // of a block, a warp
  static constexpr bool EVEN = CHUNKS % LANES == 0;  // no lane loads behind the end, where its warp has something to do
  static constexpr bool WHOLE = K % CHUNK == 0;  // else the last load of a row has columns that are not there
  static constexpr int SCALES = !SCALED ? 0 : GROUP % CHUNK ? WORDS : 1;  // of a load
  static constexpr int TILES_OF_X = (MOST + 7) / 8;
  static constexpr int CHAINS = TILES_OF_X > 1 ? 1 : 2;  // of sums: for tensor cores not to wait
  static constexpr int ALIGNED = PER_WORD % 4 ? 8 : 16;  // bytes of activations read at once
  static constexpr int PAIRS = PER_WORD;                 // of two words
  static constexpr int UNITS = CHUNKS * WORDS / 2;       // of x, two words' columns each
  static_assert(GROUPS * GROUP % CHUNK == 0 && GROUP % PER_WORD == 0, "whole loads, and words of one scale");
  static_assert(K * sizeof(T) % ALIGNED == 0, "rows of x begin where a load may");
  static_assert(!STAGED || (!WIDE && MOST == 1), "16 bits, one row");
  static_assert(!PAIRED || !FORMAT::TRANSPOSED, "rows that lie apart");

  int n, rows, first, lane, warp;
  const T* x;  // where this lane's first load is in each
  uint32_t* staged = nullptr;  // UNITS * PAIRS
  const uint4* words[OWN];
  const T* scales[OWN];

  __device__ __forceinline__ FewRows(const T* x, const void* w, const T* s, int n, int rows, int block)
      : n(n), rows(rows), first(block * (PAIRED ? ROWS / 2 : ROWS)), lane(threadIdx.x % 32), warp(threadIdx.x / 32),
        x(x + chunk() * CHUNK) {
    const uint4* loads = static_cast<const uint4*>(w);
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      if constexpr (FORMAT::TRANSPOSED) {
        const int at = min(row(0), rows - OWN);
        words[own] = loads + (static_cast<long long>(chunk() * WORDS + own) * rows + at) / WORDS;
        scales[own] = s + at + own;
      } else {
        const long long at = min(row(own), rows - 1);
        words[own] = loads + at * CHUNKS + chunk();
        scales[own] = s + at * GROUPS;
      }
    }
  }

  struct Loaded {
    uint4 words[OWN];
    T scales[OWN][SCALES ? SCALES : 1];
  };

  // Rows are neighbours where words of neighbouring rows are. The place is that of the block's.
  __device__ __forceinline__ int place(int own) const {
    return FORMAT::TRANSPOSED ? lane / LANES * OWN + own : own * 8 + lane / LANES;
  }
  __device__ __forceinline__ int row(int own) const {
    return first + (PAIRED ? own / 2 * 8 + lane / LANES + own % 2 * (rows / 2) : place(own));
  }
  __device__ __forceinline__ int chunk() const { return warp * EACH * LANES + lane % LANES; }  // the first
  __device__ __forceinline__ bool there(int step) const {
    return EVEN ? true : chunk() + step * LANES < CHUNKS;
  }

  __device__ __forceinline__ void load(Loaded& to, int step) const {
    const bool in = there(step);
    uint4 four[OWN];
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      const long long past = step * LANES * (FORMAT::TRANSPOSED ? static_cast<long long>(rows) : 1);
      four[own] = in ? load_once(words[own] + past) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < SCALES; i++) {
        const int own_chunk = chunk() + step * LANES;
        const int group = GROUP == CHUNK ? own_chunk : (own_chunk * CHUNK + i * PER_WORD) / GROUP;
        const long long place = FORMAT::TRANSPOSED ? static_cast<long long>(group) * rows : group;
        to.scales[own][i] = in ? __ldg(scales[own] + place) : T(0.f);
      }
    }
    if constexpr (FORMAT::TRANSPOSED) {  // a load has a word of each row, and is to have four of one
      static_assert(OWN == WORDS);
      to.words[0] = make_uint4(four[0].x, four[1].x, four[2].x, four[3].x);
      to.words[1] = make_uint4(four[0].y, four[1].y, four[2].y, four[3].y);
      to.words[2] = make_uint4(four[0].z, four[1].z, four[2].z, four[3].z);
      to.words[3] = make_uint4(four[0].w, four[1].w, four[2].w, four[3].w);
    } else {
#pragma unroll
      for (int own = 0; own < OWN; own++) to.words[own] = four[own];
    }
  }

  // `COUNT` pairs of 16 bits of row `m` of x, from column `at` of a step's on, 0 where there are none. What belongs to a
  // step that is not there is multiplied by 0: the first step's.
  template <int COUNT>
  __device__ __forceinline__ void load_x(uint32_t (&to)[COUNT], int m, int step, int at) const {
    const int past = there(step) ? step * LANES * CHUNK : -chunk() * CHUNK;
    const T* from = x + past + at + (MOST == 1 ? 0 : static_cast<long long>(min(m, n - 1)) * K);
    load_there(to, from, WHOLE ? 0 : (K - chunk() * CHUNK - past - at) * static_cast<int>(sizeof(T)) / 4);
  }
  // The first `left` of them are there, or all. LATE: not before the last barrier.
  template <int COUNT, bool LATE = false>
  static __device__ __forceinline__ void load_there(uint32_t (&to)[COUNT], const T* from, int left) {
    if (WHOLE || left >= COUNT) {
      if constexpr (ALIGNED == 16) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
          const uint4* place = reinterpret_cast<const uint4*>(from) + i / 4;
          const uint4 four = LATE ? load_late(place) : load_given(place);
          to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
          const uint2* place = reinterpret_cast<const uint2*>(from) + i / 2;
          const uint2 two = LATE ? load_late(place) : load_given(place);
          to[i] = two.x, to[i + 1] = two.y;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; i++) to[i] = i < left ? load_given(reinterpret_cast<const uint32_t*>(from) + i) : 0;
    }
  }

  static __device__ __forceinline__ uint32_t word(const uint4& of, int i) {
    return i == 0 ? of.x : i == 1 ? of.y : i == 2 ? of.z : of.w;
  }

  // Two words of each row with as many columns of x: pairs of columns, of which tensor cores take two at once.
  typedef float Sums[TILES_OF_X][TILES][CHAINS][4];
  __device__ __forceinline__ void multiply(Sums& sums, const Loaded& from, int step) const {
#pragma unroll
    for (int i = 0; i < WORDS; i += 2) {
      uint32_t a[OWN][PAIRS];
#pragma unroll
      for (int own = 0; own < OWN; own++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          uint32_t* pairs = a[own] + j * PAIRS / 2;
          Code::unpack(word(from.words[own], i + j), pairs, static_cast<T*>(nullptr));
          if constexpr (SCALED) {
            const uint32_t scale = twice(as<uint16_t>(from.scales[own][SCALES == 1 ? 0 : i + j]));
#pragma unroll
            for (int p = 0; p < PAIRS / 2; p++) pairs[p] = Pairs<T>::multiply(pairs[p], scale);
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < TILES_OF_X; tile++) {
        if (tile > 0 && tile * 8 >= n) break;
        uint32_t given[PAIRS], b[PAIRS];
        if constexpr (STAGED) {
          read_staged(b, ((there(step) ? chunk() + step * LANES : 0) * WORDS + i) / 2);
        } else {
          load_x(given, tile * 8 + lane / LANES, step, i * PER_WORD);
          Code::sort(given, b), Code::sort(given + PAIRS / 2, b + PAIRS / 2);
        }
#pragma unroll
        for (int p = 0; p < PAIRS; p += 2)
#pragma unroll
          for (int t = 0; t < TILES; t++)
            multiply_tile<T>(sums[tile][t][(i + p) / 2 % CHAINS],
                             {a[2 * t][p], a[2 * t + 1][p], a[2 * t][p + 1], a[2 * t + 1][p + 1]}, {b[p], b[p + 1]});
      }
    }
  }

  // float32: sums[m][own] of this lane's columns.
  __device__ __forceinline__ void multiply_wide(float (&sums)[MOST][OWN], const Loaded& from, int step) const {
    float part[MOST][OWN];
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      if (i == 0 || SCALES == WORDS)
#pragma unroll
        for (int m = 0; m < MOST; m++)
#pragma unroll
          for (int own = 0; own < OWN; own++) part[m][own] = 0;
      float numbers[OWN][PER_WORD];
#pragma unroll
      for (int own = 0; own < OWN; own++) {
        uint32_t pairs[PER_WORD / 2];
        Code::unpack(word(from.words[own], i), pairs, static_cast<half*>(nullptr));
#pragma unroll
        for (int p = 0; p < PER_WORD / 2; p++) {
          const float2 two = Pairs<half>::wide(pairs[p]);
          numbers[own][Code::place(2 * p)] = two.x, numbers[own][Code::place(2 * p + 1)] = two.y;
        }
      }
#pragma unroll
      for (int m = 0; m < MOST; m++) {
        uint32_t given[PER_WORD];
        load_x(given, m, step, i * PER_WORD);
#pragma unroll
        for (int k = 0; k < PER_WORD; k++)
#pragma unroll
          for (int own = 0; own < OWN; own++) part[m][own] = fmaf(numbers[own][k], as<float>(given[k]), part[m][own]);
      }
      if (i == WORDS - 1 || SCALES == WORDS)
#pragma unroll
        for (int m = 0; m < MOST; m++)
#pragma unroll
          for (int own = 0; own < OWN; own++)
            sums[m][own] = fmaf(part[m][own], from.scales[own][SCALES == 1 ? 0 : i], sums[m][own]);
    }
  }

  template <class Any>
  __device__ __forceinline__ void add(Any& sums, const Loaded& from, int step) const {
    if constexpr (WIDE) multiply_wide(sums, from, step);
    else multiply(sums, from, step);
  }

  typedef typename Bytes<ALIGNED>::Type Part;  // of a unit
  __device__ __forceinline__ void read_staged(uint32_t (&to)[PAIRS], int unit) const {
    const Part* from = reinterpret_cast<const Part*>(staged + unit * PAIRS);
#pragma unroll
    for (int i = 0; i < PAIRS * 4 / ALIGNED; i++) {
      const Part part = from[i];
      const uint32_t* own = reinterpret_cast<const uint32_t*>(&part);
#pragma unroll
      for (int j = 0; j < ALIGNED / 4; j++) to[i * (ALIGNED / 4) + j] = own[j];
    }
  }

  // `before`: what is done while the first loads are on their way.
  template <class Any, class Before>
  __device__ __forceinline__ void run(Any& sums, Before before) const {
    // EACH at most, which the compiler is not to know: it would put off each load to where it is used.
    const int some = min(EACH, rows * EACH);
    const int steps = EACH * WARPS == STEPS ? some : min(some, STEPS - warp * EACH);
    Loaded loaded[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (EACH * WARPS == STEPS || a < steps) load(loaded[a], a);
    if constexpr (EARLY) kernel_before();
    before();
#pragma unroll 1
    for (int step = 0; step < steps; step += AHEAD) {
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        if (step + a < steps) add(sums, loaded[a], step + a);
        if (a + AHEAD < EACH && step + a + AHEAD < steps) load(loaded[a], step + a + AHEAD);
      }
    }
  }
};

// The sums of a block's rows for each row of x, in shared memory, by its warps: WARPS * MOST * ROWS floats.
template <class Product, int MOST, int TILES, class Before>
__device__ __forceinline__ void sum_up(const Product& product, float* shared, int n, Before before) {
  constexpr int ROWS = Product::ROWS;
  const int lane = product.lane;
  float* own = shared + product.warp * ROWS * MOST;
  if constexpr (Product::WIDE) {
    float sums[MOST][Product::OWN] = {};
    product.run(sums, before);
#pragma unroll
    for (int m = 0; m < MOST; m++)
#pragma unroll
      for (int i = 0; i < Product::OWN; i++) {
        float sum = sums[m][i];
        sum += __shfl_xor_sync(~0u, sum, 1, 32);
        sum += __shfl_xor_sync(~0u, sum, 2, 32);
        if (lane % 4 == 0) own[m * ROWS + product.place(i)] = sum;
      }
  } else {
    typename Product::Sums sums = {};
    product.run(sums, before);
#pragma unroll
    for (int tile = 0; tile < Product::TILES_OF_X; tile++)
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int column = tile * 8 + lane % 4 * 2 + i % 2;
          float sum = sums[tile][t][0][i];
          if constexpr (Product::CHAINS > 1) sum += sums[tile][t][1][i];
          if (column < min(n, MOST)) own[column * ROWS + product.place(2 * t + i / 2)] = sum;
        }
  }
  __syncthreads();
}

// A thread's results, times `by`: of what all warps have, number `at` = i * threads + thread. PAIRED: results[2 * i] is of a row
// of the gate, results[2 * i + 1] of the one that belongs to it, and there are half as many numbers.
template <int ROWS, int MOST, int WARPS, bool PAIRED>
__device__ __forceinline__ void give_results(float* results, const float* shared, int n, float by) {
  constexpr int THREADS = 32 * WARPS, EACH = PAIRED ? 2 : 1, OF_X = ROWS / EACH;
#pragma unroll
  for (int i = 0; i < (OF_X * MOST + THREADS - 1) / THREADS; i++) {
    const int at = i * THREADS + threadIdx.x, c = at % OF_X, place = PAIRED ? at / OF_X * ROWS + c / 8 * 16 + c % 8 : at;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      float sum = 0;
      if (at < OF_X * n)
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += shared[w * ROWS * MOST + place + 8 * j];
      results[EACH * i + j] = by * sum;
    }
  }
}

// results[i]: row `first + at % ROWS` of w with row `at / ROWS` of x, where at = i * threads + thread.
// `shared`: WARPS * ROWS * MOST floats.
template <class FORMAT, int K, int MOST, int TILES, int WARPS, int AHEAD>
__device__ __forceinline__ void few_rows(float* results, float* shared, const typename FORMAT::Float* x,
                                         const void* words, const typename FORMAT::Float* scales, int n, int rows,
                                         int block) {
  typedef FewRows<FORMAT, K, MOST, TILES, WARPS, AHEAD> Product;
  sum_up<Product, MOST, TILES>(Product(x, words, scales, n, rows, block), shared, n, [] {});
  give_results<Product::ROWS, MOST, WARPS, false>(results, shared, n, 1.f);
}

}  // namespace mlcbuild

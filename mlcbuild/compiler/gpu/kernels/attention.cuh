// Attention on tensor cores, whose operands lie in registers as loads of 16 bytes bring them.
//
// A warp has up to eight rows (queries) to a tile and takes 16 keys at a time. Keys [16, DIM] are the first operand of tensor
// cores and queries the second; then values [DIM, 16] are the first and the softmax the second. Which column of a product
// a number is, is free, as long as both operands agree: so lane % 4 has eight neighbouring numbers of a key, and lane / 4
// of a value, and nothing goes through shared memory. Sums, scores and the softmax are float32 (Dao, FlashAttention-2,
// arXiv 2307.08691).
//
// Of heads wider than 256, PARTS warps share the rows of a tile, each with the sums of 256 columns of values. All of them
// make the scores, from 128 numbers of a key at once. Queries have no registers then, and are read again in each step.
//
// SUMMED: 0, or how many numbers of a row of latents are its value. A row is the key, and its first half lies where keys
// do, its second one where values do; queries and results are rows [n, DIM], too, and a row's logarithm is there twice.
#pragma once
#include "device.cuh"

namespace mlcbuild {

constexpr int KEYS = 16;           // of a step, and tokens of a page
constexpr int SHARING = 8;         // rows of a tile: columns of a product
constexpr float NO_SCORE = -5e4f;  // of what is not seen
constexpr float LOG2_E = 1.4426950408889634f;

// How scores are made: `scale` of a layer that slides is negative; cap and bias are 0 where there are none.
struct Scoring {
  float scale, cap, bias;
};

// Which keys a layer's rows see. WINDOW: 0 where no layer has one; CHUNKED: it is that of the row's own chunk.
template <int WINDOW, bool CHUNKED>
__device__ __forceinline__ int first_key(float scale, int at, int position) {
  if (WINDOW == 0 || scale >= 0) return 0;
  return max(at - (CHUNKED ? position % max(WINDOW, 1) : WINDOW - 1), 0);
}

// Linear biases (ALiBi): 2 ** (-bias * h / HEADS) of head h, from 1; heads beyond a power of two are between those.
template <int HEADS>
__device__ __forceinline__ float slope(float bias, int head) {
  constexpr int POWER = 1 << (31 - __builtin_clz(HEADS));
  const float at = head < POWER ? (head + 1) / float(POWER) : (2 * (head - POWER) + 1) / float(2 * POWER);
  return exp2f(-bias * at);
}

// Columns of values that are summed, in whole loads: those behind the value are results that nobody reads.
template <int DIM, int SUMMED>
constexpr int SUMS = SUMMED > 0 ? (SUMMED + 7) / 8 * 8 : DIM;

// Where results go: the mean of values and the logarithm to base 2 of the sum of exponentials.
template <class T, int DIM, bool SINKS, int SUMMED = 0>
struct Results {
  T* output;       // [n, DIM]
  float* lse;      // [n]; [n, 2] of latents
  const T* query;  // [n, DIM]

  // Of row `row`. `own`: its own key is among those seen, and so is a sink's share, whose logit is the query's last number.
  // Returns what sums of values are multiplied by.
  __device__ __forceinline__ float finish(long long row, float most, float sum, bool own, bool writes) const {
    float log = sum > 0 ? most + log2f(sum) : NO_SCORE, by = sum > 0 ? 1 / sum : 0.f;
    if (SINKS && own) {
      const float sink = float(query[row * DIM + DIM - 1]) * LOG2_E, larger = max(log, sink);
      const float both = larger + log2f(exp2f(log - larger) + exp2f(sink - larger));
      by *= exp2f(log - both), log = both;
    }
    if (writes && SUMMED == 0) lse[row] = log;
    if (writes && SUMMED > 0) lse[2 * row] = lse[2 * row + 1] = log;
    return by;
  }
};

constexpr int MOST_COLUMNS = 256;
template <int COUNT>
constexpr int PARTS = (COUNT + MOST_COLUMNS - 1) / MOST_COLUMNS;

// A warp's rows, TILES of eight. Of each tile a lane has the scores of rows 2 * (lane % 4) and the next.
template <class T, int DIM, int TILES, int SUMMED = 0>
struct Rows {
  static constexpr int COUNT = SUMS<DIM, SUMMED>;                              // of a value's columns
  static constexpr int COLUMNS = COUNT < MOST_COLUMNS ? COUNT : MOST_COLUMNS;  // of these, a warp's
  static constexpr bool FULL = COUNT % COLUMNS + COLUMNS % 64 == 0;  // each lane has numbers in each load of values
  static constexpr bool KEPT = DIM <= MOST_COLUMNS;                  // registers are enough for queries,
  static constexpr int QUERY_LOADS = (DIM + 31) / 32;                // four lanes go along a key
  static constexpr int NUMBERS = KEPT ? DIM : 128;                   // of a key, at once
  static constexpr int KEY_LOADS = (NUMBERS + 31) / 32;
  static constexpr int VALUE_LOADS = (COLUMNS + 63) / 64;                  // eight lanes go along a value
  static constexpr bool EARLY = DIM <= 128;                                // for the next keys
  static_assert(DIM % 8 == 0 && sizeof(T) == 2, "loads of 16 bytes");

  int lane, part;  // of PARTS
  uint4 query[TILES][KEPT ? QUERY_LOADS : 1];
  const T* queries[TILES];       // where row lane / 4 is, null where there is none
  uint4 keys[2][KEY_LOADS];      // of tokens lane / 4 and that + 8
  uint4 values[4][VALUE_LOADS];  // of tokens 2 * (lane % 4), the next, and those + 8
  float sums[TILES][VALUE_LOADS][4][4];
  float most[TILES][2], total[TILES][2];  // the largest score; the sum of exponentials of this lane's tokens
  int first[TILES][2], end[TILES][2];     // keys that a row sees
  int position[TILES][2];                 // its own, as a key's number
  float slopes[TILES][2];

  __device__ __forceinline__ int column() const { return PARTS<COUNT> > 1 ? part * COLUMNS : 0; }
  __device__ __forceinline__ int row(int tile, int i) const { return tile * SHARING + lane % 4 * 2 + i; }
  // To the number `at` of a row, from where it would be if the row lay in one piece.
  static __device__ __forceinline__ long long past(int at, long long jump) {
    return SUMMED > 0 && at >= DIM / 2 ? jump : 0;
  }
  static __device__ __forceinline__ uint4 load(const T* from, bool there) {
    return there ? load_plain(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ uint4 load_query(const T* from, int i) const {
    const int dim = i * 32 + lane % 4 * 8;
    return load(from + dim, from != nullptr && (DIM % 32 == 0 || dim < DIM));
  }

  // `place(r)`: where row r is, null where there is none.
  template <class Place>
  __device__ __forceinline__ void begin(Place place) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      queries[t] = place(t * SHARING + lane / 4);
#pragma unroll
      for (int i = 0; KEPT && i < QUERY_LOADS; i++) query[t][i] = load_query(queries[t], i);
      most[t][0] = most[t][1] = NO_SCORE, total[t][0] = total[t][1] = 0;
#pragma unroll
      for (auto& load : sums[t])
#pragma unroll
        for (auto& two : load) two[0] = two[1] = two[2] = two[3] = 0;
    }
  }

  // Of a step that has `left` tokens; what is behind them is zeros: what lies in a page there may be no number. Of
  // keys, those NUMBERS that begin at of * NUMBERS.
  __device__ __forceinline__ void load_keys(const T* from, int stride, int left, long long jump, int of = 0) {
    if (left >= KEYS) load_keys<true>(from, stride, left, jump, of);
    else load_keys<false>(from, stride, left, jump, of);
  }
  __device__ __forceinline__ void load_values(const T* from, int stride, int left, long long jump) {
    if (left >= KEYS) load_values<true>(from, stride, left, jump);
    else load_values<false>(from, stride, left, jump);
  }
  template <bool ALL>
  __device__ __forceinline__ void load_keys(const T* from, int stride, int left, long long jump, int of) {
    from = one_address(from + lane / 4 * stride + lane % 4 * 8 + of * NUMBERS);
#pragma unroll
    for (int i = 0; i < KEY_LOADS; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int at = of * NUMBERS + i * 32 + lane % 4 * 8;
        const bool there = DIM % NUMBERS + NUMBERS % 32 == 0 || at < DIM;
        keys[j][i] = load(from + 8 * j * stride + i * 32 + past(at, jump), there && (ALL || lane / 4 + 8 * j < left));
      }
  }
  template <bool ALL>
  __device__ __forceinline__ void load_values(const T* from, int stride, int left, long long jump) {
    from = one_address(from + lane % 4 * 2 * stride + lane / 4 * 8 + column());
#pragma unroll
    for (int i = 0; i < VALUE_LOADS; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int token = j % 2 + j / 2 * 8, at = column() + i * 64 + lane / 4 * 8;
        const bool there = FULL || at < COUNT;
        values[j][i] = load(from + token * stride + i * 64 + past(at, jump), there && (ALL || lane % 4 * 2 + token < left));
      }
  }

  // Adds the products of queries and of the keys' numbers that were loaded last, from of * NUMBERS on.
  __device__ __forceinline__ void multiply(float (&products)[TILES][2][4], int of) const {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      const T* from = KEPT ? queries[t] : address_anew(queries[t]);
#pragma unroll
      for (int i = 0; i < KEY_LOADS; i++) {
        const int at = of * KEY_LOADS + i;
        if (at >= QUERY_LOADS) continue;
        const uint4 &a = keys[0][i], &b = keys[1][i], q = KEPT ? query[t][KEPT ? at : 0] : load_query(from, at);
        multiply_tile<T>(products[t][0], {a.x, b.x, a.y, b.y}, {q.x, q.y});
        multiply_tile<T>(products[t][1], {a.z, b.z, a.w, b.w}, {q.z, q.w});
      }
    }
  }

  // Scores of tokens start + lane / 4 and that + 8, in powers of two. `all`: every row sees every key of the step.
  __device__ __forceinline__ void score(float (&scores)[TILES][4], const float (&products)[TILES][2][4], const Scoring& by,
                                        int start, bool all) const {
    const float scale = fabsf(by.scale) * LOG2_E;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = start + lane / 4 + i / 2 * 8;
        float value = (products[t][0][i] + products[t][1][i]) * scale;
        if (by.cap != 0) value = by.cap * LOG2_E * (1.f - 2.f / (exp2f(min(value * (2.f / by.cap), 100.f)) + 1.f));
        if (by.bias != 0) value -= slopes[t][i % 2] * LOG2_E * (position[t][i % 2] - token);
        scores[t][i] = all || (first[t][i % 2] <= token && token < end[t][i % 2]) ? value : NO_SCORE;
      }
  }

  // The softmax so far goes on by a step, and what values are multiplied by becomes pairs of tokens of row lane / 4.
  __device__ __forceinline__ void go_on(uint32_t (&shares)[TILES][2], float (&scores)[TILES][4]) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      float by[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float largest = max(most[t][i], max(scores[t][i], scores[t][i + 2]));
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, mask, 32));
        by[i] = exp2f(most[t][i] - largest), most[t][i] = largest;
#pragma unroll
        for (int j = i; j < 4; j += 2) scores[t][j] = scores[t][j] > NO_SCORE ? exp2f(scores[t][j] - largest) : 0.f;
        total[t][i] = total[t][i] * by[i] + scores[t][i] + scores[t][i + 2];
      }
      shares[t][0] = transposed(Pairs<T>::of(scores[t][0], scores[t][1]));
      shares[t][1] = transposed(Pairs<T>::of(scores[t][2], scores[t][3]));
      if (by[0] != 1.f || by[1] != 1.f)
#pragma unroll
        for (auto& load : sums[t])
#pragma unroll
          for (auto& two : load)
#pragma unroll
            for (int i = 0; i < 4; i++) two[i] *= by[i % 2];
    }
  }

  static __device__ __forceinline__ uint32_t word(const uint4& of, int i) {
    return i == 0 ? of.x : i == 1 ? of.y : i == 2 ? of.z : of.w;
  }

  __device__ __forceinline__ void add_values(const uint32_t (&shares)[TILES][2]) {
    constexpr unsigned LOW = 0x5410, HIGH = 0x7632;  // halves of two words
#pragma unroll
    for (int i = 0; i < VALUE_LOADS; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t a = word(values[0][i], j), b = word(values[1][i], j), c = word(values[2][i], j),
                       d = word(values[3][i], j);
        const uint32_t both[4] = {__byte_perm(a, b, LOW), __byte_perm(a, b, HIGH), __byte_perm(c, d, LOW),
                                  __byte_perm(c, d, HIGH)};
#pragma unroll
        for (int t = 0; t < TILES; t++) multiply_tile<T>(sums[t][i][j], both, {shares[t][0], shares[t][1]});
      }
  }

  // Steps `at`, at + by, ... before `to`. Keys from `inner` on and before `outer` are seen by every row.
  template <class Source>
  __device__ __forceinline__ void run(const Source& source, const Scoring& scoring, int at, int to, int by, int inner,
                                      int outer) {
    const T* of_values = SUMMED > 0 ? source.keys : source.values;
    const long long jump = source.values - source.keys - DIM / 2;
    long long now = at < to ? source.place(at) : 0, next = 0;
    if (at < to) load_keys(source.keys + now, Source::STRIDE, source.left(at), jump);
#pragma unroll 1
    for (; at < to; at += by, now = next) {
      const bool more = at + by < to;
      if (more) next = source.place(at + by);
      if (EARLY) load_values(of_values + now, Source::STRIDE, source.left(at), jump);
      float products[TILES][2][4] = {};  // two chains of sums, for tensor cores not to wait
      float scores[TILES][4];
      uint32_t shares[TILES][2];
      const int start = at * KEYS;
      multiply(products, 0);
#pragma unroll
      for (int of = 1; of * NUMBERS < DIM; of++) {
        load_keys(source.keys + now, Source::STRIDE, source.left(at), jump, of);
        multiply(products, of);
      }
      score(scores, products, scoring, start, inner <= start && start + KEYS <= outer);
      if (EARLY && more) load_keys(source.keys + next, Source::STRIDE, source.left(at + by), jump);
      if (!EARLY) load_values(of_values + now, Source::STRIDE, source.left(at), jump);
      go_on(shares, scores);
      add_values(shares);
      if (!EARLY && more) load_keys(source.keys + next, Source::STRIDE, source.left(at + by), jump);
    }
#pragma unroll
    for (auto& of_tile : total)
#pragma unroll
      for (float& sum : of_tile)
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask, 32);
  }

  // Of row `row(tile, i)`: numbers lane / 4 * 8 + k of each 64, whose first is `column() + load * 64`.
  __device__ __forceinline__ float sum(int tile, int i, int load, int k) const {
    return sums[tile][load][k / 2][k % 2 * 2 + i];
  }
};

// Keys and values of a sequence, 16 tokens to a step: in pages [n, 2, KV_HEADS, KEYS, DIM] of the cache, where `numbers`
// are those of its own; of latents, [n, 2, 1, KEYS, DIM / 2].
template <class T, int DIM, int KV_HEADS, int SUMMED = 0>
struct Pages {
  static constexpr int STRIDE = SUMMED > 0 ? DIM / 2 : DIM;  // from token to token
  const T *keys, *values;
  const int* numbers;
  int length;

  __device__ __forceinline__ Pages(const T* pages, const int* numbers, int kv_head, int length)
      : keys(pages + kv_head * (KEYS * STRIDE)), values(keys + KV_HEADS * KEYS * STRIDE), numbers(numbers), length(length) {}
  __device__ __forceinline__ long long place(int step) const {
    return static_cast<long long>(numbers[step]) * (2 * KV_HEADS * KEYS * STRIDE);
  }
  __device__ __forceinline__ int left(int step) const { return length - step * KEYS; }
};

// Those of its new tokens [n, KV_HEADS, DIM], from the first token on, of one key head.
template <class T, int DIM, int KV_HEADS, int SUMMED = 0>
struct NewTokens {
  static constexpr int STRIDE = SUMMED > 0 ? DIM / 2 : KV_HEADS * DIM;
  const T *keys, *values;
  int length;

  __device__ __forceinline__ long long place(int step) const { return static_cast<long long>(step) * (KEYS * STRIDE); }
  __device__ __forceinline__ int left(int step) const { return length - step * KEYS; }
};

// Tokens of a sequence in the cache.
__device__ __forceinline__ int cached_tokens(const int* starts, const int* lengths, int sequence) {
  const int pages = starts[sequence + 1] - starts[sequence];
  return pages > 0 ? (pages - 1) * KEYS + lengths[sequence] : 0;
}

}  // namespace mlcbuild

// Attention of one new token of each sequence over its cached pages, bound by reading these once.
//
// Keys are split into parts, so that few sequences keep a whole device busy (Dao et al., "Flash-Decoding for long-context
// inference"): a block takes a part of the pages of one key head, for up to eight of its query heads, and its warps take
// pages by turns. Keys [16 tokens, DIM] are the first operand of tensor cores and queries the second; then values
// [DIM, 16 tokens] are the first and the softmax the second. Operands lie in registers as loads of 16 bytes bring them:
// which column of a product a number is, is free, as long as both operands agree. Sums, scores and the softmax are float32.
#pragma once
#include "device.cuh"

namespace mlcbuild {

constexpr int PAGE = 16;             // tokens of a page, and rows of a tile
constexpr int SHARING = 8;           // query heads of a block: columns of a tile
constexpr float NO_SCORE = -5e4f;    // of what is not seen
constexpr float LOG2_E = 1.4426950408889634f;

// Where results go, arrays of TVM's KV cache: the mean of values and the logarithm to base 2 of the sum of exponentials.
template <class T, int DIM, bool SINKS>
struct Results {
  T* output;       // [n, HEADS, DIM]
  float* lse;      // [n, HEADS]
  const T* query;  // [n, HEADS, DIM]

  // `own`: the token's own key is among those seen, and so is a sink's share, whose logit is the query's last number.
  __device__ __forceinline__ void write(long long head, int dim, float value, float most, float sum, bool own) const {
    float log = sum > 0 ? most + log2f(sum) : NO_SCORE, mean = sum > 0 ? value / sum : 0.f;
    if (SINKS && own) {
      const float sink = float(query[head * DIM + DIM - 1]) * LOG2_E, larger = max(log, sink);
      const float both = larger + log2f(exp2f(log - larger) + exp2f(sink - larger));
      mean *= exp2f(log - both), log = both;
    }
    output[head * DIM + dim] = T(mean);
    if (dim == 0) lse[head] = log;
  }
};

// WINDOW: of layers with a negative scale, 0 where there are none; CHUNKED: they see their own chunk of so many.
template <class T, int DIM, int HEADS, int KV_HEADS, int WARPS, int WINDOW, bool CHUNKED, bool SINKS>
struct DecodeAttention {
  static constexpr int GROUP = HEADS / KV_HEADS, TILES = (GROUP + SHARING - 1) / SHARING;
  static constexpr int KEY_LOADS = (DIM + 31) / 32;    // four lanes go along a key
  static constexpr int VALUE_LOADS = (DIM + 63) / 64;  // eight lanes go along a value
  static constexpr bool EARLY = DIM <= 128;            // registers are enough for the next keys
  static_assert(DIM % 8 == 0 && sizeof(T) == 2, "loads of 16 bytes");

  int lane, warp, kv_head, head;  // head: the first of the block
  int length, position, first;    // keys; the new token's position among them; the first key that it sees
  const int* numbers;             // of the sequence's pages
  const T* pages;
  float scale, cap, bias;         // in powers of two; 0 where there is no cap, no linear bias

  uint4 query[KEY_LOADS];
  uint4 keys[2][KEY_LOADS];      // of tokens lane / 4 and that + 8
  uint4 values[4][VALUE_LOADS];  // of tokens 2 * (lane % 4), the next, and those + 8
  float sums[VALUE_LOADS][4][4];
  float most[2], total[2];       // of heads 2 * (lane % 4) and the next; `total` of this lane's tokens

  __device__ __forceinline__ int own_head(int i) const { return head + lane % 4 * 2 + i; }
  __device__ __forceinline__ bool is_there(int of_block) const { return head + of_block < (kv_head + 1) * GROUP; }

  __device__ __forceinline__ const T* page(int number, int side) const {
    return pages + (static_cast<long long>(number) * 2 + side) * (KV_HEADS * PAGE * DIM) + kv_head * (PAGE * DIM);
  }
  static __device__ __forceinline__ uint4 load(const T* from, bool there) {
    return there ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void load_keys(int number) {
    const T* from = page(number, 0);
#pragma unroll
    for (int i = 0; i < KEY_LOADS; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int dim = i * 32 + lane % 4 * 8;
        keys[j][i] = load(from + (lane / 4 + 8 * j) * DIM + dim, DIM % 32 == 0 || dim < DIM);
      }
  }

  // Tokens behind the end are zeros: what lies in a page there may be no number.
  __device__ __forceinline__ void load_values(int number, int start) {
    const T* from = page(number, 1);
#pragma unroll
    for (int i = 0; i < VALUE_LOADS; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int dim = i * 64 + lane / 4 * 8, token = lane % 4 * 2 + j % 2 + j / 2 * 8;
        values[j][i] = load(from + token * DIM + dim, (DIM % 64 == 0 || dim < DIM) && start + token < length);
      }
  }

  __device__ __forceinline__ void load_query(const T* from) {
#pragma unroll
    for (int i = 0; i < KEY_LOADS; i++) {
      const int dim = i * 32 + lane % 4 * 8;
      query[i] = load(from + lane / 4 * DIM + dim, is_there(lane / 4) && (DIM % 32 == 0 || dim < DIM));
    }
  }

  // Scores of tokens lane / 4 and that + 8 with heads 2 * (lane % 4) and the next, in powers of two.
  __device__ __forceinline__ void score(float (&scores)[4], int start) const {
    float products[2][4] = {};  // two chains of sums, for tensor cores not to wait
#pragma unroll
    for (int i = 0; i < KEY_LOADS; i++) {
      const uint4 &a = keys[0][i], &b = keys[1][i];
      multiply_tile<T>(products[0], {a.x, b.x, a.y, b.y}, {query[i].x, query[i].y});
      multiply_tile<T>(products[1], {a.z, b.z, a.w, b.w}, {query[i].z, query[i].w});
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = start + lane / 4 + i / 2 * 8;
      float value = (products[0][i] + products[1][i]) * scale;
      if (cap != 0) value = cap * LOG2_E * (1.f - 2.f / (exp2f(min(value * (2.f / cap), 100.f)) + 1.f));
      if (bias != 0) value -= slope(own_head(i % 2)) * LOG2_E * (position - token);
      scores[i] = first <= token && token < length ? value : NO_SCORE;
    }
  }

  // Linear biases (ALiBi): 2 ** (-bias * h / HEADS) of head h, from 1; heads beyond a power of two are between those.
  __device__ __forceinline__ float slope(int of) const {
    constexpr int POWER = 1 << (31 - __builtin_clz(HEADS));
    const float at = of < POWER ? (of + 1) / float(POWER) : (2 * (of - POWER) + 1) / float(2 * POWER);
    return exp2f(-bias * at);
  }

  // The softmax so far goes on by a page, whose scores become probabilities [head lane / 4, tokens of this lane].
  __device__ __forceinline__ void go_on(uint32_t (&shares)[2], float (&scores)[4]) {
    float by[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float largest = max(most[i], max(scores[i], scores[i + 2]));
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, mask, 32));
      by[i] = exp2f(most[i] - largest), most[i] = largest;
#pragma unroll
      for (int j = i; j < 4; j += 2) scores[j] = scores[j] > NO_SCORE ? exp2f(scores[j] - largest) : 0.f;
      total[i] = total[i] * by[i] + scores[i] + scores[i + 2];
    }
    shares[0] = transposed(Pairs<T>::of(scores[0], scores[1])), shares[1] = transposed(Pairs<T>::of(scores[2], scores[3]));
#pragma unroll
    for (auto& load : sums)
#pragma unroll
      for (auto& row : load)
#pragma unroll
        for (int i = 0; i < 4; i++) row[i] *= by[i % 2];
  }

  static __device__ __forceinline__ uint32_t word(const uint4& of, int i) {
    return i == 0 ? of.x : i == 1 ? of.y : i == 2 ? of.z : of.w;
  }

  __device__ __forceinline__ void add_values(const uint32_t (&shares)[2]) {
    constexpr unsigned LOW = 0x5410, HIGH = 0x7632;  // halves of two words
#pragma unroll
    for (int i = 0; i < VALUE_LOADS; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t a = word(values[0][i], j), b = word(values[1][i], j), c = word(values[2][i], j),
                       d = word(values[3][i], j);
        multiply_tile<T>(sums[i][j], {__byte_perm(a, b, LOW), __byte_perm(a, b, HIGH), __byte_perm(c, d, LOW),
                                      __byte_perm(c, d, HIGH)}, {shares[0], shares[1]});
      }
  }

  // Pages from `begin` to `end`, of which this warp takes every WARPS-th.
  __device__ __forceinline__ void run(int begin, int end) {
    most[0] = most[1] = NO_SCORE, total[0] = total[1] = 0;
#pragma unroll
    for (auto& load : sums)
#pragma unroll
      for (auto& row : load) row[0] = row[1] = row[2] = row[3] = 0;
    int at = begin + warp, number = at < end ? numbers[at] : 0;
    if (at < end) load_keys(number);
#pragma unroll 1
    for (; at < end; at += WARPS) {
      const bool more = at + WARPS < end;
      const int next = more ? numbers[at + WARPS] : 0;
      if (EARLY) load_values(number, at * PAGE);
      float scores[4];
      uint32_t shares[2];
      score(scores, at * PAGE);
      if (EARLY && more) load_keys(next);
      if (!EARLY) load_values(number, at * PAGE);
      go_on(shares, scores);
      add_values(shares);
      if (!EARLY && more) load_keys(next);
      number = next;
    }
  }

  // What the warps have, [WARPS, SHARING, DIM + 2] floats: sums of values, the largest score, the sum of exponentials.
  __device__ __forceinline__ void share(float* shared) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float* to = shared + (warp * SHARING + lane % 4 * 2 + i) * (DIM + 2);
      float sum = total[i];
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask, 32);
      if (lane < 4) to[DIM] = most[i], to[DIM + 1] = sum;
#pragma unroll
      for (int j = 0; j < VALUE_LOADS; j++)
#pragma unroll
        for (int k = 0; k < 8; k++) {
          const int dim = j * 64 + lane / 4 * 8 + k;
          if (DIM % 64 == 0 || dim < DIM) to[dim] = sums[j][k / 2][k % 2 * 2 + i];
        }
    }
  }
};

// Part `part` of the keys of sequence `sequence` with the query heads `tile` (of KV_HEADS * TILES).
// `shared`: WARPS * SHARING * (DIM + 2) floats.
template <class T, int DIM, int HEADS, int KV_HEADS, int WARPS, int WINDOW, bool CHUNKED, bool SINKS>
__device__ __forceinline__ void decode_attention(float* shared, T* output, float* lse, float* parts, float* sums,
                                                 const T* query, const T* pages, const int* starts, const int* numbers,
                                                 const int* lengths, const int* offsets, const int* positions, float scale,
                                                 float cap, float bias, int splits, int sequence, int tile, int part) {
  typedef DecodeAttention<T, DIM, HEADS, KV_HEADS, WARPS, WINDOW, CHUNKED, SINKS> Attention;
  const Results<T, DIM, SINKS> results = {output, lse, query};
  const int begin = starts[sequence], count = starts[sequence + 1] - begin;
  Attention own;
  own.lane = threadIdx.x % 32, own.warp = threadIdx.x / 32;
  own.kv_head = tile / Attention::TILES, own.head = own.kv_head * Attention::GROUP + tile % Attention::TILES * SHARING;
  own.numbers = numbers + begin, own.pages = pages;
  own.length = count > 0 ? (count - 1) * PAGE + lengths[sequence] : 0;
  own.position = positions[sequence] - offsets[sequence];
  const int reach = WINDOW == 0 || scale >= 0 ? 0 : CHUNKED ? positions[sequence] % max(WINDOW, 1) + 1 : WINDOW;
  own.first = reach == 0 ? 0 : max(own.position - reach + 1, 0);
  own.scale = (WINDOW == 0 ? scale : fabsf(scale)) * LOG2_E, own.cap = cap, own.bias = bias;
  const long long head = static_cast<long long>(sequence) * HEADS + own.head;
  own.load_query(query + head * DIM);
  const int from = own.first / PAGE, all = max((own.length + PAGE - 1) / PAGE - from, 0);
  const int each = (all + splits - 1) / splits;
  own.run(from + part * each, from + min(all, (part + 1) * each));
  own.share(shared);
  __syncthreads();
  for (int at = threadIdx.x; at < SHARING * DIM && own.is_there(at / DIM); at += 32 * WARPS) {
    const int of_block = at / DIM, dim = at % DIM;
    const float* one = shared + of_block * (DIM + 2);
    float most = NO_SCORE, value = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) most = max(most, one[w * SHARING * (DIM + 2) + DIM]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float* warp = one + w * SHARING * (DIM + 2);
      const float by = exp2f(warp[DIM] - most);
      value += by * warp[dim], sum += by * warp[DIM + 1];
    }
    if (splits == 1) {
      results.write(head + of_block, dim, value, most, sum, own.position < own.length);
    } else {
      const long long place = (static_cast<long long>(sequence) * splits + part) * HEADS + own.head + of_block;
      parts[place * DIM + dim] = value;
      if (dim == 0) sums[2 * place] = most, sums[2 * place + 1] = sum;
    }
  }
}

// All parts into one, of number `at` (of HEADS * DIM) of a sequence.
template <class T, int DIM, int HEADS, bool SINKS>
__device__ __forceinline__ void join_parts(T* output, float* lse, const float* parts, const float* sums, const T* query,
                                           const int* starts, const int* lengths, const int* offsets,
                                           const int* positions, int splits, int sequence, int at) {
  if (at >= HEADS * DIM) return;
  const int head = at / DIM, dim = at % DIM, count = starts[sequence + 1] - starts[sequence];
  const int length = count > 0 ? (count - 1) * PAGE + lengths[sequence] : 0;
  const long long first = static_cast<long long>(sequence) * splits * HEADS + head;
  float most = NO_SCORE, value = 0, sum = 0;
  for (int part = 0; part < splits; part++) most = max(most, sums[2 * (first + part * HEADS)]);
#pragma unroll 4
  for (int part = 0; part < splits; part++) {
    const long long place = first + part * HEADS;
    const float by = exp2f(sums[2 * place] - most);
    value += by * parts[place * DIM + dim], sum += by * sums[2 * place + 1];
  }
  const bool own = positions[sequence] - offsets[sequence] < length;
  const Results<T, DIM, SINKS> results = {output, lse, query};
  results.write(static_cast<long long>(sequence) * HEADS + head, dim, value, most, sum, own);
}

}  // namespace mlcbuild

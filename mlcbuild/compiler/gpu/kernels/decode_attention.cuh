// Attention of one new token of each sequence over its cached pages, bound by reading these once.
//
// Keys are split into parts, so that few sequences keep a whole device busy (Dao et al., "Flash-Decoding for long-context
// inference"): a block takes a part of the pages of one key head, for up to eight of its query heads, and its warps take
// pages by turns. Where there is more than one part, the block that ends last joins them.
#pragma once
#include "attention.cuh"
#include "prefetch.cuh"

namespace mlcbuild {

// Where the key and the value of the only new token are, [KV_HEADS, STRIDE]: what turns queries and keys leaves it for the
// attention behind it, which puts them into the cache. (Of more tokens, a kernel between the two does.)
static __device__ const void *new_key, *new_value;

__device__ __forceinline__ void keep_new(const void* key, const void* value) { new_key = key, new_value = value; }

// How many parts have ended, of each sequence's tiles where there are several: 0 before and after every launch. Kernels of
// one library follow each other on a device, in one stream.
constexpr int COUNTED = 528;
static __device__ unsigned parts_ended[COUNTED];

// All parts of `heads` query heads into one, from head `head` of a sequence on, by a block.
template <class T, int DIM, int HEADS, int WARPS, bool SINKS, int SUMMED>
__device__ __forceinline__ void join_parts(const Results<T, DIM, SINKS, SUMMED>& results, const float* parts, const float* sums,
                                           int splits, int sequence, int head, int heads, bool own) {
  constexpr int COUNT = SUMS<DIM, SUMMED>, LOADED = DIM < 128 ? 8 : 16;  // parts whose loads are on their way, in registers that attention had
  for (int at = threadIdx.x; at < heads * (COUNT / 4); at += 32 * WARPS) {
    const int dim = at % (COUNT / 4) * 4, first = head + at / (COUNT / 4);
    const long long row = static_cast<long long>(sequence) * HEADS + first, place = row + sequence * (splits - 1LL) * HEADS;
    float most = NO_SCORE, sum = 0, value[4] = {};
    for (int part = 0; part < splits; part += LOADED) {
      float2 figures[LOADED];
      float4 values[LOADED];
#pragma unroll
      for (int i = 0; i < LOADED; i++) {
        const long long from = place + min(part + i, splits - 1) * HEADS;
        figures[i] = __ldcg(reinterpret_cast<const float2*>(sums) + from);
        values[i] = __ldcg(reinterpret_cast<const float4*>(parts + from * COUNT + dim));
      }
      float largest = most;
#pragma unroll
      for (int i = 0; i < LOADED; i++) largest = max(largest, figures[i].x);
      const float before = exp2f(most - largest);
      most = largest, sum *= before;
#pragma unroll
      for (float& one : value) one *= before;
#pragma unroll
      for (int i = 0; i < LOADED; i++) {
        const float by = part + i < splits ? exp2f(figures[i].x - most) : 0.f;
        sum += by * figures[i].y;
        value[0] += by * values[i].x, value[1] += by * values[i].y;
        value[2] += by * values[i].z, value[3] += by * values[i].w;
      }
    }
    const float by = results.finish(row, most, sum, own, dim == 0);
#pragma unroll
    for (int i = 0; i < 4; i++) results.output[row * DIM + dim + i] = T(value[i] * by);
  }
}

// Part `part` of the keys of sequence `sequence` with the query heads `tile` (of KV_HEADS * tiles of eight). Where there is
// one sequence, its new token is not in the cache yet: who has the last part puts it there (several tiles do, the same).
// `shared`: TURNS * SHARING * (COUNT + 2) floats: a warp's sums of values, largest score and sum of exponentials.
// parts [n, splits, HEADS, COUNT], sums [n, splits, HEADS, 2]: the same of a part, written where there are several. That is
// so only where n * KV_HEADS * tiles is less than BLOCKS.
template <class T, int DIM, int HEADS, int KV_HEADS, int WARPS, int BLOCKS, int WINDOW, bool CHUNKED, bool SINKS,
          int SUMMED = 0>
__device__ __forceinline__ void decode_attention(float* shared, T* output, float* lse, float* parts, float* sums,
                                                 const T* query, T* pages, const int* starts, const int* numbers,
                                                 const int* lengths, const int* offsets, const int* positions, float scale,
                                                 float cap, float bias, int sequences, int splits, int sequence, int tile,
                                                 int part) {
  static_assert(BLOCKS <= COUNTED, "a count for each tile");
  constexpr int GROUP = HEADS / KV_HEADS, TILES = (GROUP + SHARING - 1) / SHARING, COUNT = SUMS<DIM, SUMMED>;
  constexpr int WARP_FLOATS = SHARING * (COUNT + 2), TURNS = WARPS / PARTS<COUNT>;
  const int lane = threadIdx.x % 32, turn = threadIdx.x / 32 / PARTS<COUNT>, kv_head = tile / TILES;
  const int head = kv_head * GROUP + tile % TILES * SHARING, heads = min(SHARING, (kv_head + 1) * GROUP - head);
  const int length = cached_tokens(starts, lengths, sequence), position = positions[sequence] - offsets[sequence];
  const int first = first_key<WINDOW, CHUNKED>(scale, position, positions[sequence]);
  const long long row = static_cast<long long>(sequence) * HEADS + head;
  Rows<T, DIM, 1, SUMMED> rows;
  rows.lane = lane, rows.part = threadIdx.x / 32 % PARTS<COUNT>;
  rows.begin([&](int r) { return r < heads ? query + (row + r) * DIM : nullptr; });
#pragma unroll
  for (int i = 0; i < 2; i++) {
    rows.first[0][i] = first, rows.end[0][i] = length, rows.position[0][i] = position;
    rows.slopes[0][i] = slope<HEADS>(bias, head + rows.row(0, i));
  }
  const int from = first / KEYS, all = max((length + KEYS - 1) / KEYS - from, 0), each = (all + splits - 1) / splits;
  const Pages<T, DIM, KV_HEADS, SUMMED> source(pages, numbers + starts[sequence], kv_head, length);
  if (sequences == 1 && position < length && part == (all - 1) / each) {  // its own key is the last of this part
    typedef Pages<T, DIM, KV_HEADS, SUMMED> From;
    const long long place = source.place((length - 1) / KEYS) + (length - 1) % KEYS * From::STRIDE;
    T *keys = pages + (source.keys - pages) + place, *values = pages + (source.values - pages) + place;
    const T *key = static_cast<const T*>(new_key) + kv_head * From::STRIDE,
            *value = static_cast<const T*>(new_value) + kv_head * From::STRIDE;
    for (int i = threadIdx.x; i < From::STRIDE; i += 32 * WARPS) keys[i] = key[i], values[i] = value[i];
    __syncthreads();
  }
  rows.run(source, {scale, cap, bias}, from + part * each + turn, from + min(all, (part + 1) * each), TURNS, first, length);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float* to = shared + turn * WARP_FLOATS + rows.row(0, i) * (COUNT + 2);
    if (lane < 4 && rows.part == 0) to[COUNT] = rows.most[0][i], to[COUNT + 1] = rows.total[0][i];
#pragma unroll
    for (int j = 0; j < rows.VALUE_LOADS; j++)
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const int dim = rows.column() + j * 64 + lane / 4 * 8 + k;
        if (rows.FULL || dim < COUNT) to[dim] = rows.sum(0, i, j, k);
      }
  }
  __syncthreads();
  const Results<T, DIM, SINKS, SUMMED> results = {output, lse, query};
  for (int at = threadIdx.x; at < heads * COUNT; at += 32 * WARPS) {
    const int own = at / COUNT, dim = at % COUNT;
    const float* one = shared + own * (COUNT + 2);
    float most = NO_SCORE, value = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < TURNS; w++) most = max(most, one[w * WARP_FLOATS + COUNT]);
#pragma unroll
    for (int w = 0; w < TURNS; w++) {
      const float by = exp2f(one[w * WARP_FLOATS + COUNT] - most);
      value += by * one[w * WARP_FLOATS + dim], sum += by * one[w * WARP_FLOATS + COUNT + 1];
    }
    if (splits == 1) {
      output[(row + own) * DIM + dim] = T(value * results.finish(row + own, most, sum, position < length, dim == 0));
    } else {
      const long long place = (static_cast<long long>(sequence) * splits + part) * HEADS + head + own;
      parts[place * COUNT + dim] = value;
      if (dim == 0) sums[2 * place] = most, sums[2 * place + 1] = sum;
    }
  }
  if (splits == 1) return prefetch_third();
  // What all of this block have written is there before it is counted, and what all of the others have, once that is known:
  // a fence between barriers is of what the whole block does before and behind them (PTX ISA, causality order).
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared[0] = atomicInc(parts_ended + sequence * (KV_HEADS * TILES) + tile, splits - 1) == splits - 1;
    __threadfence();
  }
  __syncthreads();
  if (shared[0] == 0) return prefetch_third();
  join_parts<T, DIM, HEADS, WARPS>(results, parts, sums, splits, sequence, head, heads, position < length);
}

}  // namespace mlcbuild

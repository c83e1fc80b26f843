// Attention of one new token of each sequence over its cached pages, bound by reading these once.
//
// Keys are split into parts, so that few sequences keep a whole device busy (Dao et al., "Flash-Decoding for long-context
// inference"): a block takes a part of the pages of one key head, for up to eight of its query heads, and its warps take
// pages by turns. Where there is more than one part, join_parts makes one of them.
#pragma once
#include "attention.cuh"

namespace mlcbuild {

// Part `part` of the keys of sequence `sequence` with the query heads `tile` (of KV_HEADS * tiles of eight).
// `shared`: TURNS * SHARING * (DIM + 2) floats: a warp's sums of values, largest score and sum of exponentials.
// parts [n, splits, HEADS, DIM], sums [n, splits, HEADS, 2]: the same of a part, written where there are several.
template <class T, int DIM, int HEADS, int KV_HEADS, int WARPS, int WINDOW, bool CHUNKED, bool SINKS>
__device__ __forceinline__ void decode_attention(float* shared, T* output, float* lse, float* parts, float* sums,
                                                 const T* query, const T* pages, const int* starts, const int* numbers,
                                                 const int* lengths, const int* offsets, const int* positions, float scale,
                                                 float cap, float bias, int splits, int sequence, int tile, int part) {
  constexpr int GROUP = HEADS / KV_HEADS, TILES = (GROUP + SHARING - 1) / SHARING, WARP_FLOATS = SHARING * (DIM + 2);
  constexpr int TURNS = WARPS / PARTS<DIM>;
  const int lane = threadIdx.x % 32, turn = threadIdx.x / 32 / PARTS<DIM>, kv_head = tile / TILES;
  const int head = kv_head * GROUP + tile % TILES * SHARING, heads = min(SHARING, (kv_head + 1) * GROUP - head);
  const int length = cached_tokens(starts, lengths, sequence), position = positions[sequence] - offsets[sequence];
  const int first = first_key<WINDOW, CHUNKED>(scale, position, positions[sequence]);
  const long long row = static_cast<long long>(sequence) * HEADS + head;
  Rows<T, DIM, 1> rows;
  rows.lane = lane, rows.part = threadIdx.x / 32 % PARTS<DIM>;
  rows.begin([&](int r) { return r < heads ? query + (row + r) * DIM : nullptr; });
#pragma unroll
  for (int i = 0; i < 2; i++) {
    rows.first[0][i] = first, rows.end[0][i] = length, rows.position[0][i] = position;
    rows.slopes[0][i] = slope<HEADS>(bias, head + rows.row(0, i));
  }
  const int from = first / KEYS, all = max((length + KEYS - 1) / KEYS - from, 0), each = (all + splits - 1) / splits;
  const Pages<T, DIM, KV_HEADS> source(pages, numbers + starts[sequence], kv_head, length);
  rows.run(source, {scale, cap, bias}, from + part * each + turn, from + min(all, (part + 1) * each), TURNS, first, length);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float* to = shared + turn * WARP_FLOATS + rows.row(0, i) * (DIM + 2);
    if (lane < 4 && rows.part == 0) to[DIM] = rows.most[0][i], to[DIM + 1] = rows.total[0][i];
#pragma unroll
    for (int j = 0; j < rows.VALUE_LOADS; j++)
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const int dim = rows.column() + j * 64 + lane / 4 * 8 + k;
        if (rows.FULL || dim < DIM) to[dim] = rows.sum(0, i, j, k);
      }
  }
  __syncthreads();
  const Results<T, DIM, SINKS> results = {output, lse, query};
  for (int at = threadIdx.x; at < heads * DIM; at += 32 * WARPS) {
    const int own = at / DIM, dim = at % DIM;
    const float* one = shared + own * (DIM + 2);
    float most = NO_SCORE, value = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < TURNS; w++) most = max(most, one[w * WARP_FLOATS + DIM]);
#pragma unroll
    for (int w = 0; w < TURNS; w++) {
      const float by = exp2f(one[w * WARP_FLOATS + DIM] - most);
      value += by * one[w * WARP_FLOATS + dim], sum += by * one[w * WARP_FLOATS + DIM + 1];
    }
    if (splits == 1) {
      output[(row + own) * DIM + dim] = T(value * results.finish(row + own, most, sum, position < length, dim == 0));
    } else {
      const long long place = (static_cast<long long>(sequence) * splits + part) * HEADS + head + own;
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
  const int head = at / DIM, dim = at % DIM;
  const long long first = static_cast<long long>(sequence) * splits * HEADS + head;
  float most = NO_SCORE, value = 0, sum = 0;
  for (int part = 0; part < splits; part++) most = max(most, sums[2 * (first + part * HEADS)]);
#pragma unroll 4
  for (int part = 0; part < splits; part++) {
    const long long place = first + part * HEADS;
    const float by = exp2f(sums[2 * place] - most);
    value += by * parts[place * DIM + dim], sum += by * sums[2 * place + 1];
  }
  const bool own = positions[sequence] - offsets[sequence] < cached_tokens(starts, lengths, sequence);
  const Results<T, DIM, SINKS> results = {output, lse, query};
  const long long row = static_cast<long long>(sequence) * HEADS + head;
  output[row * DIM + dim] = T(value * results.finish(row, most, sum, own, dim == 0));
}

}  // namespace mlcbuild

// Attention of many new tokens, over their sequence's cached pages or over each other.
//
// Rows are a key head's queries, token by token: GROUP to a token. A warp has eight of them to a tile, and goes through
// the keys that any of them sees; warps of a block, whose rows are neighbours, find each other's keys in the L1 cache.
#pragma once
#include "attention.cuh"

namespace mlcbuild {

// Tile `at`, of ROWS rows: which sequence it is of, and the row that it begins with. `sequence` is `n` where there is none.
struct RowsOfSequence {
  int sequence, first;
};
template <int ROWS, int GROUP>
__device__ __forceinline__ RowsOfSequence rows_of(const int* starts, int n, int at) {
  int sequence = 0;
  for (; sequence < n; sequence++) {
    const int tiles = ((starts[sequence + 1] - starts[sequence]) * GROUP + ROWS - 1) / ROWS;
    if (at < tiles) break;
    at -= tiles;
  }
  return {sequence, at * ROWS};
}

// Rows from `first` on of a sequence's `tokens` new ones, which begin at `start` of query [n, HEADS, DIM] and positions
// [n], over `length` keys, of which the first is at position `offset`. `causal`: the last key is that of the last token.
// PAGED: keys are in the cache, and positions say which of them a window has; else they are those of the new tokens.
template <class T, int DIM, int HEADS, int KV_HEADS, int TILES, int WINDOW, bool CHUNKED, bool SINKS, int SUMMED,
          bool PAGED, class Source>
__device__ __forceinline__ void attend(T* output, float* lse, const T* query, const int* positions, const Source& source,
                                       const Scoring& scoring, bool causal, int offset, int start, int tokens, int length,
                                       int kv_head, int first) {
  constexpr int GROUP = HEADS / KV_HEADS, COUNT = SHARING * TILES, SHARED = PARTS<SUMS<DIM, SUMMED>>;
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32 % SHARED;
  const int begin = first + threadIdx.x / 32 / SHARED * COUNT, left = min(COUNT, tokens * GROUP - begin);
  if (left <= 0) return;
  const auto place = [&](int r) {
    return static_cast<long long>(start + (begin + r) / GROUP) * HEADS + kv_head * GROUP + (begin + r) % GROUP;
  };
  const auto own = [&](int r) {  // its number among the keys
    const int token = (begin + r) / GROUP;
    return PAGED ? positions[start + token] - offset : length - tokens + token;
  };
  const auto first_of = [&](int r) {
    return first_key<WINDOW, CHUNKED>(scoring.scale, own(r), WINDOW ? positions[start + (begin + r) / GROUP] : 0);
  };
  const auto end_of = [&](int r) {
    return causal ? min(length, length - tokens + (begin + r) / GROUP + 1) : length;
  };
  Rows<T, DIM, TILES, SUMMED> rows;
  rows.lane = lane, rows.part = part;
  rows.begin([&](int r) { return r < left ? query + place(r) * DIM : nullptr; });
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = min(rows.row(t, i), left - 1);
      rows.first[t][i] = first_of(r), rows.end[t][i] = end_of(r), rows.position[t][i] = own(r);
      rows.slopes[t][i] = slope<HEADS>(scoring.bias, kv_head * GROUP + (begin + r) % GROUP);
    }
  // Rows may be those of several sequences that share a prefix: their positions, and so what they see first, rise and fall.
  int least = rows.first[0][0], largest = least;
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int i = 0; i < 2; i++) least = min(least, rows.first[t][i]), largest = max(largest, rows.first[t][i]);
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {  // lanes that are alike but for lane % 4 hold all rows
    least = min(least, __shfl_xor_sync(~0u, least, mask, 32));
    largest = max(largest, __shfl_xor_sync(~0u, largest, mask, 32));
  }
  const int to = (end_of(left - 1) + KEYS - 1) / KEYS;
  rows.run(source, scoring, least / KEYS, to, 1, largest, end_of(0));
  const Results<T, DIM, SINKS, SUMMED> results = {output, lse, query};
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = rows.row(t, i);
      if (r >= left) continue;
      const bool there = !PAGED || rows.position[t][i] < length;
      const float by = results.finish(place(r), rows.most[t][i], rows.total[t][i], there, lane < 4 && part == 0);
#pragma unroll
      for (int j = 0; j < rows.VALUE_LOADS; j++) {
        const int dim = rows.column() + j * 64 + lane / 4 * 8;
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
          words[k] = Pairs<T>::of(rows.sum(t, i, j, 2 * k) * by, rows.sum(t, i, j, 2 * k + 1) * by);
        if (rows.FULL || dim < rows.COUNT)
          *reinterpret_cast<uint4*>(output + place(r) * DIM + dim) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
}

template <class T, int DIM, int HEADS, int KV_HEADS, int WARPS, int TILES, int WINDOW, bool CHUNKED, bool SINKS,
          int SUMMED = 0>
__device__ __forceinline__ void prefill_attention(T* output, float* lse, const T* query, const int* starts, const T* pages,
                                                  const int* page_starts, const int* numbers, const int* lengths,
                                                  const int* offsets, const int* positions, int causal, float scale,
                                                  float cap, float bias, int n, int tile, int kv_head) {
  const RowsOfSequence rows = rows_of<WARPS / PARTS<SUMS<DIM, SUMMED>> * TILES * SHARING, HEADS / KV_HEADS>(starts, n, tile);
  if (rows.sequence >= n) return;
  const int start = starts[rows.sequence], length = cached_tokens(page_starts, lengths, rows.sequence);
  const Pages<T, DIM, KV_HEADS, SUMMED> source(pages, numbers + page_starts[rows.sequence], kv_head, length);
  attend<T, DIM, HEADS, KV_HEADS, TILES, WINDOW, CHUNKED, SINKS, SUMMED, true>(
      output, lse, query, positions, source, {scale, cap, bias}, causal > 0, offsets[rows.sequence], start,
      starts[rows.sequence + 1] - start, length, kv_head, rows.first);
}

template <class T, int DIM, int HEADS, int KV_HEADS, int WARPS, int TILES, int WINDOW, bool CHUNKED, bool SINKS,
          int SUMMED = 0>
__device__ __forceinline__ void new_tokens_attention(T* output, float* lse, const T* query, const int* starts,
                                                     const T* keys, const T* values, const int* key_starts,
                                                     const int* positions, int causal, float scale, float cap, float bias,
                                                     int n, int tile, int kv_head) {
  const RowsOfSequence rows = rows_of<WARPS / PARTS<SUMS<DIM, SUMMED>> * TILES * SHARING, HEADS / KV_HEADS>(starts, n, tile);
  if (rows.sequence >= n) return;
  const int start = starts[rows.sequence], key_start = key_starts[rows.sequence];
  const int length = key_starts[rows.sequence + 1] - key_start;
  const long long place = (static_cast<long long>(key_start) * KV_HEADS + kv_head) * (SUMMED > 0 ? DIM / 2 : DIM);
  const NewTokens<T, DIM, KV_HEADS, SUMMED> source = {keys + place, values + place, length};
  attend<T, DIM, HEADS, KV_HEADS, TILES, WINDOW, CHUNKED, SINKS, SUMMED, false>(
      output, lse, query, positions, source, {scale, cap, bias}, causal > 0, 0, start, starts[rows.sequence + 1] - start,
      length, kv_head, rows.first);
}

}  // namespace mlcbuild

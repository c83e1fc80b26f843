// The matrix memory of xLSTM (Beck et al., arXiv 2405.04517, mLSTM). A head's memory [keys, dim + 1] is a row per key
// dimension; its last column is the sum of keys that outputs are divided by. Columns do not depend on each other, so a
// task has CHANNELS of them. Both gates are exponentials: the memory is kept times exp(-top), where top is the largest
// exponent so far, so that nothing overflows. All is float32, one token after the other.

#include "lanes.h"

#define MAX_STATE 256  // key dimensions
#define CHANNELS 64    // of a task, likewise in recurrent.py

// x: [sequences * tokens, heads * keys (queries) + heads * keys (keys) + heads * dim (values)]; gates, logarithms:
// [sequences * tokens, heads (of writing) + heads (of keeping)]; y: [sequences * tokens, heads, dim + 1], what is read
// and, last, what it is to be divided by; memories: [sequences, heads, keys, dim + 1]; tops: [sequences, heads].
//   top <- max(keep + top', write) with top' the one before; M <- exp(keep + top' - top) M + exp(write - top) k v^T;
//   y = M^T q keys^-1/2; of the last column, whose value is 1: max(|y|, exp(-top)) + eps
EXPORT void mlcbuild_mlstm(const f32 *x, const f32 *gates, const f32 *memory_in, const f32 *top_in, f32 *y,
                           f32 *memory_out, f32 *top_out, i64 tokens, i64 heads, i64 dim, i64 keys, i64 task, f32 eps) {
    i64 columns = dim + 1, blocks = (columns + CHANNELS - 1) / CHANNELS, pair = task / blocks;  // sequence and head
    i64 head = pair % heads, sequence = pair / heads, width = heads * (2 * keys + dim), place = pair * keys * columns;
    i64 first = task % blocks * CHANNELS, end = min_i64(first + CHANNELS, columns);
    f32 scale = 1.0f / __builtin_sqrtf((f32)keys);
    f32v state[MAX_STATE];
    for (i64 at = first; at < end; at += LANES) {
        i64 count = min_i64(end - at, LANES), values = min_i64(count, dim - at);
        f32 top = top_in[pair];
        for (i64 r = 0; r < keys; r++) state[r] = take(memory_in + place + r * columns + at, count);
        for (i64 t = 0; t < tokens; t++) {
            i64 row = sequence * tokens + t;
            const f32 *q = x + row * width + head * keys, *k = q + heads * keys;
            f32 write = gates[2 * row * heads + head], keep = gates[(2 * row + 1) * heads + head] + top;
            top = keep > write ? keep : write;
            f32v exponents = splat(-top), v = take(x + row * width + 2 * heads * keys + head * dim + at, values);
            exponents[0] = keep - top;
            exponents[1] = write - top;
            exponents = exp_v(exponents);
            if (values < count) v[values] = 1.0f;
            f32v kept = splat(exponents[0]), added = splat(exponents[1]) * v;
            f32v even = splat(0.0f), odd = splat(0.0f);  // two sums, so that one need not wait for the other
            for (i64 r = 0; r < keys; r++) {
                state[r] = kept * state[r] + splat(k[r]) * added;
                if (r & 1) odd += state[r] * splat(q[r]);
                else even += state[r] * splat(q[r]);
            }
            f32v out = (even + odd) * splat(scale);
            if (values < count) {
                f32 sum = __builtin_fabsf(out[values]), least = exponents[2];
                out[values] = (sum > least ? sum : least) + eps;
            }
            give(y + (row * heads + head) * columns + at, out, count);
        }
        for (i64 r = 0; r < keys; r++) give(memory_out + place + r * columns + at, state[r], count);
        if (at == 0) top_out[pair] = top;
    }
}

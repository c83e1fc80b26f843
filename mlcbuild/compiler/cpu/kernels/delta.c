// The gated delta rule (Yang et al., arXiv 2412.06464), and with a decay for each key dimension that of Kimi Linear (Kimi
// Team, arXiv 2510.26692). A head's state S [keys, dim] is a row per key dimension; its columns do not depend on each
// other, so a task has CHANNELS of them. All is float32.
//
// Tokens are taken in chunks (the WY form of Yang et al., arXiv 2406.06484). With d_i a token's decay, u_i the change that
// it brings, and D(j, i) = d_j+1 ... d_i, for the tokens 1 to n of a chunk, and S what was before them:
//   u_i = beta_i (v_i - S^T D(0, i) k_i - sum_{j<i} (k_i . D(j, i) k_j) u_j)
//   y_i = S^T D(0, i) q_i + sum_{j<=i} (q_i . D(j, i) k_j) u_j
//   S becomes D(0, n) S + sum_j D(j, n) k_j u_j^T
// So what is asked of the state, and what is written to it, are products of matrices. D is multiplied up token by token:
// nothing is divided by a decay, and none is too small.

#include "chunks.h"

#define MAX_STATE 256  // key dimensions
#define CHANNELS 128   // of a task, likewise in recurrent.py
#define ONCE 4         // vectors of a single token's columns

// A head's tokens. Rows of q, k and v are `width` apart, of the others as many as all heads have.
typedef struct {
    const f32 *q, *k, *v, *decay, *beta;
    f32 *y;
    i64 width, heads, keys, dim, each;
} rows;

// What the tokens of a chunk have in common for all columns of a head.
typedef struct {
    i64 count, stride;                 // tokens; keys, in whole vectors
    f32 asked[2 * CHUNK * MAX_STATE];  // [2, count, stride]: D(0, i) k_i, and D(0, i) q_i
    f32 written[CHUNK * MAX_STATE];    // [count, stride]: D(j, n) k_j
    f32 left[MAX_STATE];               // D(0, n)
    f32 known[CHUNK][CHUNK];           // beta_i k_i . D(j, i) k_j
    f32 seen[CHUNK][CHUNK];            // q_i . D(j, i) k_j
} chunk;

// to = from / sqrt(|from|^2 + 1e-6), times `scale`: [keys], and zeros up to a whole vector.
INLINE void unit(const f32 *from, f32 *to, i64 keys, f32 scale) {
    f32v part = splat(0.0f);
    for (i64 r = 0; r < keys; r += LANES) {
        f32v v = take(from + r, keys - r);
        part += v * v;
    }
    f32v factor = splat(scale / __builtin_sqrtf(sum(part) + 1e-6f));
    for (i64 r = 0; r < keys; r += LANES) store_float32(to + r, take(from + r, keys - r) * factor);
}

// Token i, and `some` before it from j on, whose keys fade.
INLINE void meet(chunk *c, i64 i, i64 j, const f32 *q, const f32 *decay, f32 beta, const int some) {
    f32v known[4] = {}, seen[4] = {};
    const f32 *k = c->written + i * c->stride;
    f32 *other = c->written + j * c->stride;
    for (i64 r = 0; r < c->stride; r += LANES) {
        f32v key = load_float32(k + r), query = load_float32(q + r), kept = load_float32(decay + r);
        for (int s = 0; s < some; s++) {
            f32v faded = settled(load_float32(other + s * c->stride + r) * kept);
            store_float32(other + s * c->stride + r, faded);
            known[s] += faded * key;
            seen[s] += faded * query;
        }
    }
    for (int s = 0; s < some; s++) {
        c->known[i][j + s] = beta * sum(known[s]);
        c->seen[i][j + s] = sum(seen[s]);
    }
}

// The tokens `first` to `first + count`.
INLINE void prepare(chunk *c, const rows *h, i64 first, i64 count) {
    const i64 stride = (h->keys + LANES - 1) / LANES * LANES;
    const f32 scale = 1.0f / __builtin_sqrtf((f32)h->keys);
    f32 q[MAX_STATE], decay[MAX_STATE];
    c->count = count;
    c->stride = stride;
    for (i64 r = 0; r < stride; r += LANES) store_float32(c->left + r, splat(1.0f));
    for (i64 i = 0; i < count; i++) {
        const f32 *kept = h->decay + (first + i) * h->heads * h->each, beta = h->beta[(first + i) * h->heads];
        f32 *k = c->written + i * stride;
        f32v seen = splat(0.0f);
        unit(h->q + (first + i) * h->width, q, h->keys, scale);
        unit(h->k + (first + i) * h->width, k, h->keys, 1.0f);
        for (i64 r = 0; r < stride; r += LANES) {
            f32v one = h->each == 1 ? splat(kept[0]) : take(kept + r, h->keys - r);
            f32v left = settled(load_float32(c->left + r) * one);
            store_float32(decay + r, one);
            store_float32(c->left + r, left);
            store_float32(c->asked + i * stride + r, load_float32(k + r) * left);
            store_float32(c->asked + (count + i) * stride + r, load_float32(q + r) * left);
            seen += load_float32(k + r) * load_float32(q + r);
        }
        c->seen[i][i] = sum(seen);
        i64 j = 0;
        for (; j + 4 <= i; j += 4) meet(c, i, j, q, decay, beta, 4);
        for (; j < i; j++) meet(c, i, j, q, decay, beta, 1);
    }
}

// A tile of columns from `at` on, `end` being the last one's: their state, and what is read for the chunk's tokens.
INLINE void advance(const chunk *c, const rows *h, i64 first, f32 *state, i64 at, i64 end) {
    f32 found[2 * CHUNK * ROWS], change[CHUNK * ROWS];
    for (i64 i = 0; i < 2 * c->count * ROWS; i += LANES) store_float32(found + i, splat(0.0f));
    ask(c->asked, c->stride, state, h->keys, 0, found, 2 * c->count);
    for (i64 i = 0; i < c->count; i++) {
        const f32 *v = h->v + (first + i) * h->width + at;
        f32 *y = h->y + (first + i) * h->heads * h->dim + at;
        f32v own[VECTORS], out[VECTORS], beta = splat(h->beta[(first + i) * h->heads]);
        for (int l = 0; l < VECTORS; l++) {
            own[l] = beta * (take(v + l * LANES, end - at - l * LANES) - load_float32(found + i * ROWS + l * LANES));
            out[l] = load_float32(found + (c->count + i) * ROWS + l * LANES);
        }
        for (i64 j = 0; j < i; j++)
            for (int l = 0; l < VECTORS; l++) {
                f32v other = load_float32(change + j * ROWS + l * LANES);
                own[l] -= splat(c->known[i][j]) * other;
                out[l] += splat(c->seen[i][j]) * other;
            }
        for (int l = 0; l < VECTORS; l++) {
            store_float32(change + i * ROWS + l * LANES, own[l]);
            give(y + l * LANES, out[l] + splat(c->seen[i][i]) * own[l], end - at - l * LANES);
        }
    }
    write(c->written, c->stride, change, c->count, c->left, state, h->keys);
}

// Row r of a state, from column `at` on, after it has faded.
INLINE f32v faded(const rows *h, const f32 *state, i64 r, i64 at, i64 end) {
    return take(state + r * h->dim + at, end - at) * splat(h->decay[h->each == 1 ? 0 : r]);
}

// A single token: the state goes by twice and is kept nowhere. y = S^T D q + (q . k) u with S what was before.
INLINE void only(const rows *h, const f32 *before, f32 *after, i64 at, i64 end) {
    f32 q[MAX_STATE], k[MAX_STATE];
    unit(h->q, q, h->keys, 1.0f / __builtin_sqrtf((f32)h->keys));
    unit(h->k, k, h->keys, 1.0f);
    f32v product = splat(0.0f), beta = splat(h->beta[0]);
    for (i64 r = 0; r < h->keys; r += LANES) product += load_float32(q + r) * load_float32(k + r);
    f32v seen = splat(sum(product));
    for (; at < end; at += ONCE * LANES) {
        f32v known[ONCE] = {}, out[ONCE] = {};
        for (i64 r = 0; r < h->keys; r++)
            for (int l = 0; l < ONCE; l++) {
                f32v s = faded(h, before, r, at + l * LANES, end);
                known[l] += s * splat(k[r]);
                out[l] += s * splat(q[r]);
            }
        for (int l = 0; l < ONCE; l++) {
            known[l] = beta * (take(h->v + at + l * LANES, end - at - l * LANES) - known[l]);
            give(h->y + at + l * LANES, out[l] + seen * known[l], end - at - l * LANES);
        }
        for (i64 r = 0; r < h->keys; r++)
            for (int l = 0; l < ONCE; l++) {
                f32v s = faded(h, before, r, at + l * LANES, end);
                give(after + r * h->dim + at + l * LANES, s + splat(k[r]) * known[l], end - at - l * LANES);
            }
    }
}

// x: [sequences * tokens, groups * keys (queries) + groups * keys (keys) + heads * dim (values)], a query and a key for
// heads / groups heads; decay, factors themselves: [sequences * tokens, heads, each] with `each` of 1 or keys; beta:
// [sequences * tokens, heads]; y: [sequences * tokens, heads * dim]; states: [sequences, heads, keys, dim].
//   S <- decay S; S <- S + k (beta (v - S^T k))^T; y = S^T q keys^-1/2, with q and k of length 1
EXPORT void mlcbuild_delta(const f32 *x, const f32 *decay, const f32 *beta, const f32 *state_in, f32 *y, f32 *state_out,
                           i64 tokens, i64 heads, i64 dim, i64 groups, i64 keys, i64 each, i64 task) {
    i64 blocks = (dim + CHANNELS - 1) / CHANNELS, head = task / blocks % heads, row = task / blocks / heads * tokens;
    i64 start = task % blocks * CHANNELS, end = min_i64(start + CHANNELS, dim), group = head / (heads / groups);
    i64 width = 2 * groups * keys + heads * dim, place = task / blocks * keys * dim;
    x += row * width;
    const rows h = {x + group * keys, x + (groups + group) * keys, x + 2 * groups * keys + head * dim,
                    decay + (row * heads + head) * each, beta + row * heads + head, y + (row * heads + head) * dim,
                    width, heads, keys, dim, each};
    if (tokens == 1) {
        only(&h, state_in + place, state_out + place, start, end);
        return;
    }
    chunk c;
    f32 state[MAX_STATE * CHANNELS];
    load_tiles(state, state_in + place, keys, dim, start, end);
    for (i64 first = 0; first < tokens; first += CHUNK) {
        prepare(&c, &h, first, min_i64(CHUNK, tokens - first));
        for (i64 at = start; at < end; at += ROWS) advance(&c, &h, first, state + (at - start) * keys, at, end);
    }
    store_tiles(state, state_out + place, keys, dim, start, end);
}

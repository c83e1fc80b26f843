// State spaces: the causal convolution and the selective scan of Mamba (Gu and Dao, arXiv 2312.00752) and Mamba-2 (Dao
// and Gu, arXiv 2405.21060). A vector holds neighbouring channels of one token; states are carried from token to token.
// All is float32, activations and parameters.

#include "chunks.h"

#define MAX_STATE 256  // values that a channel keeps
#define MAX_TAPS 32    // tokens that a convolution sees
#define CHANNELS 64    // of a convolution's task
#define COLUMNS 128    // of a head whose states are in tiles at once

// log(1 + exp(x)) = max(x, 0) + log(1 + u) with u = exp(-|x|); log(1 + u) = 2 artanh(s), s = u / (2 + u) <= 1/3: after
// s^15 the series has less than 2^-25 of its sum left.
INLINE f32v softplus_v(f32v x) {
    f32v zero = splat(0.0f), u = exp_v(select_v(x > zero, -x, x));
    f32v s = u / (splat(2.0f) + u), q = s * s, p = splat(1.0f / 15);
    p = p * q + splat(1.0f / 13);
    p = p * q + splat(1.0f / 11);
    p = p * q + splat(1.0f / 9);
    p = p * q + splat(1.0f / 7);
    p = p * q + splat(1.0f / 5);
    p = p * q + splat(1.0f / 3);
    p = p * q + splat(1.0f);
    return select_v(x > zero, x, zero) + splat(2.0f) * s * p;
}

// y[t, c] = silu(bias[c] + sum_j w[c, j] x[t - (taps - 1) + j, c]), or the sum itself. Before the first token come the last taps - 1 inputs
// of the call before, oldest first, which state_in keeps: [sequences, taps - 1, width]. x, y: [sequences * tokens,
// width]; bias may be null. One task: channels `task % blocks * CHANNELS` and on of sequence `task / blocks`.
EXPORT void mlcbuild_convolve(const f32 *x, const f32 *w, const f32 *bias, const f32 *state_in, f32 *y, f32 *state_out,
                              i64 tokens, i64 width, i64 taps, i64 task, i32 activated) {
    i64 blocks = (width + CHANNELS - 1) / CHANNELS, sequence = task / blocks, at = task % blocks * CHANNELS;
    i64 end = min_i64(at + CHANNELS, width), before = taps - 1;
    x += sequence * tokens * width;
    y += sequence * tokens * width;
    state_in += sequence * before * width;
    state_out += sequence * before * width;
    f32 factor[MAX_TAPS][CHANNELS];
    for (i64 c = at; c < end; c++)
        for (i64 j = 0; j < taps; j++) factor[j][c - at] = w[c * taps + j];
    for (i64 t = 0; t < tokens; t++) {
        for (i64 c = at; c < end; c += LANES) {
            i64 count = min_i64(end - c, LANES);
            f32v out = bias ? take(bias + c, count) : splat(0.0f);
            for (i64 j = 0; j < taps; j++) {
                i64 from = t + j - before;
                const f32 *row = from < 0 ? state_in + (from + before) * width : x + from * width;
                out += take(factor[j] + c - at, count) * take(row + c, count);
            }
            give(y + t * width + c, activated ? out / (splat(1.0f) + exp_v(-out)) : out, count);
        }
    }
    for (i64 j = 0; j < before; j++) {
        i64 from = tokens + j - before;
        const f32 *row = from < 0 ? state_in + (from + before) * width : x + from * width;
        for (i64 c = at; c < end; c++) state_out[j * width + c] = row[c];
    }
}

// What a task of a scan works on. Every channel has its own step, rate and skip, with `heads` channels; or a head has one
// of each for all of its channels.
typedef struct {
    const f32 *x, *step, *step_bias, *rate, *b, *c, *skip, *state_in;
    f32 *y, *state_out;
    i64 tokens, heads, width, groups, size;
    f32 least, most;
} scan;

// From a step before its bias on: clamp(softplus(step + bias)).
INLINE f32v step_of(const scan *p, f32v step, f32v bias) {
    step = softplus_v(step + bias);
    step = select_v(step < splat(p->least), splat(p->least), step);
    return select_v(step > splat(p->most), splat(p->most), step);
}

// The channels `at` to `at + count`, of the group `group`, where each has its own. A channel's state s is a vector of `size`:
//   s <- exp(step rate) s + step x b, y = s . c + skip x
INLINE void scan_lanes(const scan *p, i64 at, i64 group, i64 count) {
    f32v state[MAX_STATE], rate[MAX_STATE], bias = take(p->step_bias + at, count), skip = take(p->skip + at, count);
    for (i64 n = 0; n < p->size; n++) {
        state[n] = take(p->state_in + n * p->width + at, count);
        rate[n] = take(p->rate + n * p->width + at, count) * splat(LOG2E);
    }
    for (i64 t = 0; t < p->tokens; t++) {
        const f32 *b = p->b + (t * p->groups + group) * p->size, *c = p->c + (t * p->groups + group) * p->size;
        f32v step = step_of(p, take(p->step + t * p->heads + at, count), bias);
        f32v x = take(p->x + t * p->width + at, count), added = step * x;
        f32v even = skip * x, odd = splat(0.0f);  // two sums, so that one need not wait for the other
        for (i64 n = 0; n < p->size; n++) {
            state[n] = exp2_v(step * rate[n]) * state[n] + added * splat(b[n]);
            if (n & 1) odd += state[n] * splat(c[n]);
            else even += state[n] * splat(c[n]);
        }
        give(p->y + t * p->width + at, even + odd, count);
    }
    for (i64 n = 0; n < p->size; n++) give(p->state_out + n * p->width + at, state[n], count);
}

// The tokens of a head whose channels have one step a and one rate, in chunks (the dual form of Dao and Gu). With
// d_i = exp(a_i rate), for the tokens 1 to n of a chunk, and S [size, dim] what was before them:
//   y_i = d_1 ... d_i S^T c_i + sum_{j<=i} (c_i . b_j) d_j+1 ... d_i a_j x_j + skip x_i
//   S becomes d_1 ... d_n S + sum_j d_j+1 ... d_n a_j b_j x_j^T
// What the tokens have in common for all channels:
typedef struct {
    f32 until[CHUNK], left[MAX_STATE];  // d_1 ... d_i; d_1 ... d_n
    f32 added[CHUNK + LANES];           // d_j+1 ... d_n a_j
    f32 seen[CHUNK][CHUNK];             // what x_j adds to y_i
} chunk;

// The products of c_i with `some` b_j from j on.
INLINE void meet(const scan *p, const f32 *c, const f32 *b, f32 *seen, const int some) {
    f32v part[4] = {};
    for (i64 n = 0; n < p->size; n += LANES) {
        f32v one = take(c + n, p->size - n);
        for (int j = 0; j < some; j++) part[j] += one * take(b + j * p->groups * p->size + n, p->size - n);
    }
    for (int j = 0; j < some; j++) seen[j] = sum(part[j]);
}

INLINE void prepare(chunk *k, const scan *p, i64 first, i64 count, i64 head, i64 group) {
    const i64 stride = p->groups * p->size;
    f32 decay[CHUNK + LANES], until = 1.0f;
    for (i64 i = 0; i < count; i++) k->added[i] = p->step[(first + i) * p->heads + head];
    for (i64 i = 0; i < CHUNK; i += LANES) {
        f32v step = step_of(p, take(k->added + i, count - i), splat(p->step_bias[head]));
        store_float32(k->added + i, step);
        store_float32(decay + i, exp2_v(step * splat(p->rate[head] * LOG2E)));
    }
    for (i64 i = 0; i < count; i++) {
        const f32 *c = p->c + (first + i) * stride + group * p->size, *b = p->b + first * stride + group * p->size;
        i64 j = 0;
        for (; j + 4 <= i + 1; j += 4) meet(p, c, b + j * stride, k->seen[i] + j, 4);
        for (; j <= i; j++) meet(p, c, b + j * stride, k->seen[i] + j, 1);
        until = settled(splat(until * decay[i]))[0];
        k->until[i] = until;
        for (j = 0; j < i; j += LANES) {  // steps of tokens from i on stay as they are
            f32v faded = settled(load_float32(k->added + j) * splat(decay[i]));
            give(k->added + j, faded, i - j);
        }
        for (j = 0; j <= i; j++) k->seen[i][j] *= k->added[j];
        for (j = i + 1; j < CHUNK; j++) k->seen[i][j] = 0.0f;
        k->seen[i][i] += p->skip[head];
    }
    for (i64 n = 0; n < MAX_STATE; n += LANES) store_float32(k->left + n, splat(until));
}

// Channels `at` to `end` of a head.
NOINLINE void scan_chunks(const scan *p, i64 at, i64 end, i64 head, i64 group) {
    f32 state[MAX_STATE * COLUMNS], x[CHUNK * ROWS], y[CHUNK * ROWS];
    const i64 stride = p->groups * p->size;
    chunk k;
    load_tiles(state, p->state_in, p->size, p->width, at, end);
    for (i64 first = 0; first < p->tokens; first += CHUNK) {
        i64 count = min_i64(CHUNK, p->tokens - first), place = first * stride + group * p->size;
        prepare(&k, p, first, count, head, group);
        for (i64 column = at; column < end; column += ROWS) {
            f32 *tile = state + (column - at) * p->size;
            for (i64 i = 0; i < count; i++)
                for (i64 l = 0; l < ROWS; l += LANES) {
                    const f32 *from = p->x + (first + i) * p->width + column + l;
                    store_float32(x + i * ROWS + l, take(from, end - column - l));
                    store_float32(y + i * ROWS + l, splat(0.0f));
                }
            ask(p->c + place, stride, tile, p->size, 0, y, count);
            ask(k.seen[0], CHUNK, x, count, k.until, y, count);
            for (i64 i = 0; i < count; i++)
                for (i64 l = 0; l < ROWS; l += LANES) {
                    f32 *to = p->y + (first + i) * p->width + column + l, *own = x + i * ROWS + l;
                    give(to, load_float32(y + i * ROWS + l), end - column - l);
                    store_float32(own, load_float32(own) * splat(k.added[i]));
                }
            write(p->b + place, stride, x, count, k.left, tile, p->size);
        }
    }
    store_tiles(state, p->state_out, p->size, p->width, at, end);
}

// x, y: [sequences * tokens, heads * dim]; step: [sequences * tokens, heads]; step_bias, skip: [heads]; rate, below 0:
// [heads], or [size, heads] where `dim` is 1; b, c: [sequences * tokens, groups, size], one for heads / groups heads;
// states: [sequences, size, heads * dim]. One task: `block` channels of a sequence, dim or, where that is 1, any number.
EXPORT void mlcbuild_scan(const f32 *x, const f32 *step, const f32 *step_bias, const f32 *rate, const f32 *b,
                          const f32 *c, const f32 *skip, const f32 *state_in, f32 *y, f32 *state_out, i64 tokens,
                          i64 heads, i64 dim, i64 groups, i64 size, i64 each, i64 block, i64 task, f32 least,
                          f32 most) {
    i64 width = heads * dim, blocks = (width + block - 1) / block, sequence = task / blocks;
    i64 at = task % blocks * block, end = min_i64(at + block, width), head = at / dim, rows = sequence * tokens;
    const scan p = {x + rows * width, step + rows * heads, step_bias, rate, b + rows * groups * size,
                    c + rows * groups * size, skip, state_in + sequence * size * width, y + rows * width,
                    state_out + sequence * size * width, tokens, heads, width, groups, size, least, most};
    for (i64 count, shared = heads / groups; at < end; at += count) {
        if (each) {
            count = min_i64(min_i64(end - at, LANES), shared - at % shared);
            scan_lanes(&p, at, at / shared, count);
        } else {
            count = min_i64(end - at, COLUMNS);
            scan_chunks(&p, at, at + count, head, head / shared);
        }
    }
}

// State spaces: the causal convolution and the selective scan of Mamba (Gu and Dao, arXiv 2312.00752) and Mamba-2 (Dao
// and Gu, arXiv 2405.21060). A vector holds neighbouring channels of one token; states are carried from token to token.
// All is float32, activations and parameters.

#include "lanes.h"

#define MAX_STATE 256  // values that a channel keeps
#define MAX_TAPS 32    // tokens that a convolution sees
#define CHANNELS 64    // of a convolution's task

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

// What a task of a scan works on. `each`: every channel has its own step, rate and skip, with `heads` channels; else a
// head has one of each for its `dim` channels.
typedef struct {
    const f32 *x, *step, *step_bias, *rate, *b, *c, *skip, *state_in;
    f32 *y, *state_out;
    i64 tokens, heads, width, groups, size;
    f32 least, most;
} scan;

// The channels `at` to `at + count` of one head `head` in the group `group`. A channel's state s is a vector of `size`:
//   step = clamp(softplus(step + step_bias)), s <- exp(step rate) s + step x b, y = s . c + skip x
INLINE void scan_lanes(const scan *p, i64 at, i64 head, i64 group, i64 count, const int each) {
    f32v state[MAX_STATE], rate[MAX_STATE];
    for (i64 n = 0; n < p->size; n++) {
        state[n] = take(p->state_in + n * p->width + at, count);
        if (each) rate[n] = take(p->rate + n * p->width + at, count) * splat(LOG2E);
    }
    if (!each) rate[0] = splat(p->rate[head] * LOG2E);
    f32v bias = each ? take(p->step_bias + at, count) : splat(p->step_bias[head]);
    f32v skip = each ? take(p->skip + at, count) : splat(p->skip[head]);
    for (i64 t = 0; t < p->tokens; t++) {
        const f32 *step_at = p->step + t * p->heads, *b = p->b + (t * p->groups + group) * p->size;
        const f32 *c = p->c + (t * p->groups + group) * p->size;
        f32v step = softplus_v((each ? take(step_at + at, count) : splat(step_at[head])) + bias);
        step = select_v(step < splat(p->least), splat(p->least), step);
        step = select_v(step > splat(p->most), splat(p->most), step);
        f32v x = take(p->x + t * p->width + at, count), added = step * x, kept = exp2_v(step * rate[0]);
        f32v even = skip * x, odd = splat(0.0f);  // two sums, so that one need not wait for the other
        for (i64 n = 0; n < p->size; n++) {
            if (each && n) kept = exp2_v(step * rate[n]);
            state[n] = kept * state[n] + added * splat(b[n]);
            if (n & 1) odd += state[n] * splat(c[n]);
            else even += state[n] * splat(c[n]);
        }
        give(p->y + t * p->width + at, even + odd, count);
    }
    for (i64 n = 0; n < p->size; n++) give(p->state_out + n * p->width + at, state[n], count);
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
    for (i64 count; at < end; at += count) {
        count = min_i64(end - at, LANES);
        if (each) {
            i64 shared = heads / groups;
            count = min_i64(count, shared - at % shared);
            scan_lanes(&p, at, at, at / shared, count, 1);
        } else scan_lanes(&p, at, head, head / (heads / groups), count, 0);
    }
}

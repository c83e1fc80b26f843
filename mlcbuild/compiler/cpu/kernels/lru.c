// The real-gated linear recurrent unit of Griffin (De et al., arXiv 2402.19427). All is float32.

#include "lanes.h"

#define CHANNELS 64  // of a task, likewise in recurrent.py

// y = 1 / (1 + exp(-(x_h w_h + b_h))) for each head h. x, y: [n, heads * width]; w: [heads, width in, width out]; bias:
// [heads * width]. One task: head `task % heads` of row `task / heads`.
EXPORT void mlcbuild_lru_gates(const f32 *x, const f32 *w, const f32 *bias, f32 *y, i64 heads, i64 width, i64 task) {
    i64 head = task % heads;
    x += task * width;
    y += task * width;
    w += head * width * width;
    bias += head * width;
    for (i64 j = 0; j < width; j += LANES) {
        i64 count = min_i64(width - j, LANES);
        f32v total = take(bias + j, count);
        for (i64 d = 0; d < width; d++) total += splat(x[d]) * take(w + d * width + j, count);
        give(y + j, splat(1.0f) / (splat(1.0f) + exp_v(-total)), count);
    }
}

// s <- decay s + x, y = s for each channel. x, decay, y: [sequences * tokens, width]; states: [sequences, width]. One
// task: channels `task % blocks * CHANNELS` and on of sequence `task / blocks`.
EXPORT void mlcbuild_lru(const f32 *x, const f32 *decay, const f32 *state_in, f32 *y, f32 *state_out, i64 tokens,
                         i64 width, i64 task) {
    i64 blocks = (width + CHANNELS - 1) / CHANNELS, sequence = task / blocks, at = task % blocks * CHANNELS;
    i64 end = min_i64(at + CHANNELS, width), first = sequence * tokens * width;
    for (; at < end; at += LANES) {
        i64 count = min_i64(end - at, LANES);
        f32v state = take(state_in + sequence * width + at, count);
        for (i64 t = 0; t < tokens; t++) {
            i64 here = first + t * width + at;
            state = take(decay + here, count) * state + take(x + here, count);
            give(y + here, state, count);
        }
        give(state_out + sequence * width + at, state, count);
    }
}

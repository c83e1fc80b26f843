// The gated delta rule (Yang et al., arXiv 2412.06464), and with a decay for each key dimension that of Kimi Linear (Kimi
// Team, arXiv 2510.26692). A head's state S [keys, dim] is a row per key dimension; its columns do not depend on each
// other, so a task has CHANNELS of them. All is float32, one token after the other.

#include "lanes.h"

#define MAX_STATE 256  // key dimensions
#define CHANNELS 64    // of a task, likewise in recurrent.py

// to = from / sqrt(|from|^2 + 1e-6), times `scale`: [keys].
INLINE void unit(const f32 *from, f32 *to, i64 keys, f32 scale) {
    f32v part = splat(0.0f);
    for (i64 r = 0; r < keys; r += LANES) {
        f32v v = take(from + r, keys - r);
        part += v * v;
    }
    f32v factor = splat(scale / __builtin_sqrtf(sum(part) + 1e-6f));
    for (i64 r = 0; r < keys; r += LANES) give(to + r, take(from + r, keys - r) * factor, keys - r);
}

// x: [sequences * tokens, groups * keys (queries) + groups * keys (keys) + heads * dim (values)], a query and a key for
// heads / groups heads; decay, factors themselves: [sequences * tokens, heads, each] with `each` of 1 or keys; beta:
// [sequences * tokens, heads]; y: [sequences * tokens, heads * dim]; states: [sequences, heads, keys, dim].
//   S <- decay S; S <- S + k (beta (v - S^T k))^T; y = S^T q keys^-1/2, with q and k of length 1
EXPORT void mlcbuild_delta(const f32 *x, const f32 *decay, const f32 *beta, const f32 *state_in, f32 *y, f32 *state_out,
                           i64 tokens, i64 heads, i64 dim, i64 groups, i64 keys, i64 each, i64 task) {
    i64 blocks = (dim + CHANNELS - 1) / CHANNELS, head = task / blocks % heads, sequence = task / blocks / heads;
    i64 at = task % blocks * CHANNELS, end = min_i64(at + CHANNELS, dim), group = head / (heads / groups);
    i64 width = 2 * groups * keys + heads * dim, place = (sequence * heads + head) * keys * dim;
    f32 q[MAX_STATE], k[MAX_STATE], scale = 1.0f / __builtin_sqrtf((f32)keys);
    f32v state[MAX_STATE];
    for (; at < end; at += LANES) {
        i64 count = min_i64(end - at, LANES);
        for (i64 r = 0; r < keys; r++) state[r] = take(state_in + place + r * dim + at, count);
        for (i64 t = 0; t < tokens; t++) {
            i64 row = sequence * tokens + t;
            const f32 *here = x + row * width, *kept = decay + (row * heads + head) * each;
            unit(here + group * keys, q, keys, scale);
            unit(here + (groups + group) * keys, k, keys, 1.0f);
            f32v even = splat(0.0f), odd = splat(0.0f);  // two sums, so that one need not wait for the other
            for (i64 r = 0; r < keys; r++) {
                state[r] *= splat(kept[each == 1 ? 0 : r]);
                if (r & 1) odd += state[r] * splat(k[r]);
                else even += state[r] * splat(k[r]);
            }
            f32v v = take(here + 2 * groups * keys + head * dim + at, count);
            f32v change = splat(beta[row * heads + head]) * (v - (even + odd));
            even = odd = splat(0.0f);
            for (i64 r = 0; r < keys; r++) {
                state[r] += splat(k[r]) * change;
                if (r & 1) odd += state[r] * splat(q[r]);
                else even += state[r] * splat(q[r]);
            }
            give(y + (row * heads + head) * dim + at, even + odd, count);
        }
        for (i64 r = 0; r < keys; r++) give(state_out + place + r * dim + at, state[r], count);
    }
}

// The recurrences of RWKV: parallel over channels or heads, one token after the other, states in float32.
// Activations are float32; `decay` and `bonus` are float32 too (they are kept so in every format).

#include "common.h"

// RWKV-4 (Peng et al., arXiv 2305.13048, with the largest exponent kept apart so that nothing overflows), for LANES
// channels of one sequence. The state of a channel is (a, b, m): the sum of weighted values is a * exp(m), that of the
// weights b * exp(m).
//   out = (a e^m + v e^(bonus + k)) / (b e^m + e^(bonus + k));   a e^m <- a e^(m + decay) + v e^k, b likewise
// key, value, out: [sequences * tokens, width]; states: [sequences, width]. `decay` is the logarithm, below 0.
INLINE void wkv4_lanes(const f32 *key, const f32 *value, f32v decay, f32v bonus, f32v *a, f32v *b, f32v *m, f32 *out,
                       i64 tokens, i64 width) {
    for (i64 t = 0; t < tokens; t++) {
        f32v k = load_float32(key + t * width), v = load_float32(value + t * width);
        f32v now = k + bonus, top = select_v(*m > now, *m, now);
        f32v before = exp_v(*m - top), weight = exp_v(now - top);
        store_float32(out + t * width, (before * *a + weight * v) / (before * *b + weight));
        f32v old = *m + decay;
        top = select_v(old > k, old, k);
        before = exp_v(old - top);
        weight = exp_v(k - top);
        *a = before * *a + weight * v;
        *b = before * *b + weight;
        *m = top;
    }
}

// One task: channels `task % blocks * block` and on of sequence `task / blocks`.
EXPORT void mlcbuild_wkv4(const f32 *key, const f32 *value, const f32 *decay, const f32 *bonus, const f32 *a_in,
                          const f32 *b_in, const f32 *m_in, f32 *out, f32 *a_out, f32 *b_out, f32 *m_out, i64 tokens,
                          i64 width, i64 block, i64 task) {
    i64 blocks = (width + block - 1) / block, sequence = task / blocks, at = task % blocks * block;
    i64 end = min_i64(at + block, width), state = sequence * width, row = sequence * tokens * width;
    for (; at + LANES <= end; at += LANES) {
        f32v a = load_float32(a_in + state + at), b = load_float32(b_in + state + at);
        f32v m = load_float32(m_in + state + at);
        wkv4_lanes(key + row + at, value + row + at, load_float32(decay + at), load_float32(bonus + at), &a, &b, &m,
                   out + row + at, tokens, width);
        store_float32(a_out + state + at, a);
        store_float32(b_out + state + at, b);
        store_float32(m_out + state + at, m);
    }
    for (; at < end; at++) {  // what fills no vector, one channel and token at a time
        f32v a = splat(a_in[state + at]), b = splat(b_in[state + at]), m = splat(m_in[state + at]);
        for (i64 t = 0; t < tokens; t++) {
            f32 k[LANES], v[LANES], y[LANES];
            store_float32(k, splat(key[row + t * width + at]));
            store_float32(v, splat(value[row + t * width + at]));
            wkv4_lanes(k, v, splat(decay[at]), splat(bonus[at]), &a, &b, &m, y, 1, LANES);
            out[row + t * width + at] = y[0];
        }
        a_out[state + at] = a[0];
        b_out[state + at] = b[0];
        m_out[state + at] = m[0];
    }
}

// RWKV-5 and RWKV-6 (Eagle and Finch, arXiv 2404.05892), one head of one sequence per task. The state S [dim, dim] is
// kept as MLC keeps it: a row per value dimension i, a column per key dimension j.
//   out_i = sum_j r_j (S_ij + bonus_j k_j v_i);   S_ij <- decay_j S_ij + k_j v_i
// receptance, key, value, out: [sequences * tokens, heads * dim]; `decay` has a row per token (`decay_stride` apart), or
// one for all (`decay_stride` 0); it is the factor itself, between 0 and 1. states: [sequences, heads, dim, dim].
EXPORT void mlcbuild_wkv(const f32 *receptance, const f32 *key, const f32 *value, const f32 *decay, const f32 *bonus,
                         const f32 *state_in, f32 *out, f32 *state_out, i64 tokens, i64 heads, i64 dim,
                         i64 decay_stride, i64 task) {
    i64 sequence = task / heads, head = task % heads, width = heads * dim;
    const f32 *in = state_in + task * dim * dim, *u = bonus + head * dim;
    f32 *state = state_out + task * dim * dim;
    for (i64 i = 0; i < dim * dim; i++) state[i] = in[i];
    for (i64 t = 0; t < tokens; t++) {
        i64 row = sequence * tokens + t, at = row * width + head * dim;
        const f32 *r = receptance + at, *k = key + at, *v = value + at, *w = decay + row * decay_stride + head * dim;
        for (i64 i = 0; i < dim; i++) {
            f32 *s = state + i * dim, total = 0.0f;
            f32v part = splat(0.0f), v_i = splat(v[i]);
            i64 j = 0;
            for (; j + LANES <= dim; j += LANES) {
                f32v new = load_float32(k + j) * v_i, old = load_float32(s + j);
                part += load_float32(r + j) * (old + load_float32(u + j) * new);
                store_float32(s + j, load_float32(w + j) * old + new);
            }
            for (; j < dim; j++) {
                f32 new = k[j] * v[i];
                total += r[j] * (s[j] + u[j] * new);
                s[j] = w[j] * s[j] + new;
            }
            out[at + i] = total + sum(part);
        }
    }
}

// Row `task / groups` of x [n, groups * depth] times matrix `task % groups` of w [groups, depth, width], whose rows are
// walked in order: for matrices that are narrow on one side. y: [groups, n, width].
EXPORT void mlcbuild_project(const f32 *x, const model *w, f32 *y, i64 n, i64 groups, i64 depth, i64 width, i64 task) {
    i64 row = task / groups, group = task % groups;
    x += (row * groups + group) * depth;
    w += group * depth * width;
    y += (group * n + row) * width;
    for (i64 j = 0; j < width; j++) y[j] = 0.0f;
    for (i64 d = 0; d < depth; d++, w += width) {
        f32v x_d = splat(x[d]);
        i64 j = 0;
        for (; j + LANES <= width; j += LANES) store_float32(y + j, load_float32(y + j) + x_d * load_model(w + j));
        for (; j < width; j++) y[j] += x[d] * get_model(w + j);
    }
}

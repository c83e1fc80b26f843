// Kernels that work on one row: norms, activations, softmax, rotary embedding.

#include "common.h"

f32 sinf(f32);
f32 cosf(f32);

// y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, arXiv 1910.07467), over `width` values of one row.
EXPORT void mlcbuild_rms_norm(const f32 *x, const model *w, f32 *y, i64 row, i64 width, f32 eps) {
    x += row * width;
    y += row * width;
    f32v part = splat(0.0f);
    i64 k = 0;
    for (; k + LANES <= width; k += LANES) {
        f32v v = load_float32(x + k);
        part += v * v;
    }
    f32 total = sum(part);
    for (; k < width; k++) total += x[k] * x[k];
    f32 scale = 1.0f / __builtin_sqrtf(total / (f32)width + eps);
    for (k = 0; k + LANES <= width; k += LANES)
        store_float32(y + k, load_float32(x + k) * splat(scale) * load_model(w + k));
    for (; k < width; k++) y[k] = x[k] * scale * get_model(w + k);
}

// y = (x - mean) / sqrt(variance + eps) * w + b (Ba et al., arXiv 1607.06450) over `width` values of one row; w and b
// may be null. The variance is that of the differences, so that a large mean costs no digits.
EXPORT void mlcbuild_layer_norm(const f32 *x, const model *w, const model *b, f32 *y, i64 row, i64 width, f32 eps) {
    x += row * width;
    y += row * width;
    f32v part = splat(0.0f);
    i64 k = 0;
    for (; k + LANES <= width; k += LANES) part += load_float32(x + k);
    f32 total = sum(part);
    for (; k < width; k++) total += x[k];
    f32 mean = total / (f32)width;
    part = splat(0.0f);
    for (k = 0; k + LANES <= width; k += LANES) {
        f32v v = load_float32(x + k) - splat(mean);
        part += v * v;
    }
    total = sum(part);
    for (; k < width; k++) total += (x[k] - mean) * (x[k] - mean);
    f32 scale = 1.0f / __builtin_sqrtf(total / (f32)width + eps);
    for (k = 0; k + LANES <= width; k += LANES) {
        f32v v = (load_float32(x + k) - splat(mean)) * splat(scale);
        if (w) v *= load_model(w + k);
        if (b) v += load_model(b + k);
        store_float32(y + k, v);
    }
    for (; k < width; k++) {
        f32 v = (x[k] - mean) * scale;
        if (w) v *= get_model(w + k);
        if (b) v += get_model(b + k);
        y[k] = v;
    }
}

INLINE f32v silu_v(f32v x) { return x / (splat(1.0f) + exp_v(-x)); }

INLINE f32v relu_v(f32v x) { return select_v(x < splat(0.0f), splat(0.0f), x); }

INLINE f32v relu2_v(f32v x) { return relu_v(x) * relu_v(x); }

// x Phi(x) (Hendrycks and Gimpel, arXiv 1606.08415). erf by Abramowitz and Stegun 7.1.26, off by at most 1.5e-7.
INLINE f32v gelu_v(f32v x) {
    f32v a = x * splat(0.70710678118654752f);
    f32v magnitude = select_v(a < splat(0.0f), -a, a);
    f32v t = splat(1.0f) / (splat(1.0f) + splat(0.3275911f) * magnitude);
    f32v p = splat(1.061405429f);
    p = p * t - splat(1.453152027f);
    p = p * t + splat(1.421413741f);
    p = p * t - splat(0.284496736f);
    p = p * t + splat(0.254829592f);
    f32v tail = splat(0.5f) * p * t * exp_v(-(a * a));  // of the normal distribution, beyond |x|
    return x * select_v(a < splat(0.0f), tail, splat(1.0f) - tail);
}

// The same by tanh: x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
INLINE f32v gelu_tanh_v(f32v x) {
    f32v u = splat(0.79788456080286536f) * (x + splat(0.044715f) * x * x * x);
    return x / (splat(1.0f) + exp_v(splat(-2.0f) * u));
}

// y = activation(gate) * up for a row [gate | up] of 2 * width values, and y = activation(x) for one of width.
#define DEFINE_ACTIVATION(NAME)                                                                       \
    EXPORT void mlcbuild_gated_##NAME(const f32 *gate_up, f32 *y, i64 row, i64 width) {               \
        const f32 *gate = gate_up + row * 2 * width, *up = gate + width;                              \
        y += row * width;                                                                             \
        i64 k = 0;                                                                                    \
        for (; k + LANES <= width; k += LANES)                                                        \
            store_float32(y + k, NAME##_v(load_float32(gate + k)) * load_float32(up + k));            \
        for (; k < width; k++) y[k] = NAME##_v(splat(gate[k]))[0] * up[k];                            \
    }                                                                                                 \
    EXPORT void mlcbuild_activation_##NAME(const f32 *x, f32 *y, i64 row, i64 width) {                \
        x += row * width;                                                                             \
        y += row * width;                                                                             \
        i64 k = 0;                                                                                    \
        for (; k + LANES <= width; k += LANES) store_float32(y + k, NAME##_v(load_float32(x + k)));   \
        for (; k < width; k++) y[k] = NAME##_v(splat(x[k]))[0];                                       \
    }

DEFINE_ACTIVATION(silu)
DEFINE_ACTIVATION(gelu)
DEFINE_ACTIVATION(gelu_tanh)
DEFINE_ACTIVATION(relu)
DEFINE_ACTIVATION(relu2)

// y = softmax(x / temperature[row]); a temperature of 0 shares everything among the largest values, as MLC does.
EXPORT void mlcbuild_softmax(const f32 *x, const f32 *temperature, f32 *y, i64 row, i64 width) {
    x += row * width;
    y += row * width;
    f32 best = x[0];
    for (i64 k = 1; k < width; k++) best = max_f32(best, x[k]);
    if (temperature[row] < 1e-6f) {
        i64 ties = 0;
        for (i64 k = 0; k < width; k++) ties += x[k] == best;
        for (i64 k = 0; k < width; k++) y[k] = x[k] == best ? 1.0f / (f32)ties : 0.0f;
        return;
    }
    f32v scale = splat(LOG2E / temperature[row]), largest = splat(best), part = splat(0.0f);
    f32 total = 0.0f;
    i64 k = 0;
    for (; k + LANES <= width; k += LANES) {
        f32v e = exp2_v((load_float32(x + k) - largest) * scale);
        store_float32(y + k, e);
        part += e;
    }
    for (; k < width; k++) total += y[k] = exp2_v((splat(x[k]) - largest) * scale)[0];
    f32v inverse = splat(1.0f / (total + sum(part)));
    for (k = 0; k + LANES <= width; k += LANES) store_float32(y + k, load_float32(y + k) * inverse);
    for (; k < width; k++) y[k] *= inverse[0];
}

// One token's fused [query | key | value] heads: `heads`, `kv_heads` and again `kv_heads` of `dim` values.
//
// Each span of `span` values of the queries and keys, a head or all of them, is normed: divided by its root mean square
// or, where `centred`, brought to mean 0 and variance 1 before (Ba et al., arXiv 1607.06450). Weights and biases, where
// there are any, of one span and the next lie `stride` apart.
INLINE void norm_span(const model *in, const model *w, const model *b, model *out, i64 span, i32 centred, f32 eps) {
    f32v part = splat(0.0f), squares = splat(0.0f);
    f32 total = 0.0f, square = 0.0f;
    i64 d = 0;
    if (centred) {
        for (; d + LANES <= span; d += LANES) part += load_model(in + d);
        for (; d < span; d++) total += get_model(in + d);
    }
    f32 mean = (total + sum(part)) / (f32)span;
    for (d = 0; d + LANES <= span; d += LANES) {
        f32v v = load_model(in + d) - splat(mean);
        squares += v * v;
    }
    for (; d < span; d++) square += (get_model(in + d) - mean) * (get_model(in + d) - mean);
    f32 scale = 1.0f / __builtin_sqrtf((square + sum(squares)) / (f32)span + eps);
    for (d = 0; d + LANES <= span; d += LANES) {
        f32v value = (load_model(in + d) - splat(mean)) * splat(scale) * load_model(w + d);
        store_model(out + d, b ? value + load_model(b + d) : value);
    }
    for (; d < span; d++)
        put_model(out + d, (get_model(in + d) - mean) * scale * get_model(w + d) + (b ? get_model(b + d) : 0.0f));
}

EXPORT void mlcbuild_norm_heads(const model *qkv, const model *q_weight, const model *k_weight, const model *q_bias,
                                const model *k_bias, model *out, i64 row, i64 heads, i64 kv_heads, i64 dim,
                                i32 together, i64 stride, i32 centred, f32 eps) {
    i64 width = (heads + 2 * kv_heads) * dim, at = 0;
    const model *in = qkv + row * width;
    out += row * width;
    for (i64 side = 0; side < 2; side++) {
        i64 count = side ? kv_heads : heads, span = together ? count * dim : dim;
        const model *w = side ? k_weight : q_weight, *b = side ? k_bias : q_bias;
        for (i64 end = at + count * dim; at < end; at += span, w += stride, b = b ? b + stride : b)
            norm_span(in + at, w, b, out + at, span, centred, eps);
    }
    for (; at < width; at++) out[at] = in[at];
}

// Rotary embedding (Su et al., arXiv 2104.09864) of the first rotary_dim values of a head: the d-th pair is turned by
// position * frequency[d], times `factor`. Pairs are (d, d + rotary_dim / 2) or, where `neighbours`, (2 d, 2 d + 1).
#define MAX_ROTARY 512

INLINE void rope_angles(f32 *cosine, f32 *sine, i32 position, const f32 *frequency, i64 half, f32 factor) {
    for (i64 d = 0; d < half; d++) {
        f32 angle = (f32)position * frequency[d];
        cosine[d] = cosf(angle) * factor;
        sine[d] = sinf(angle) * factor;
    }
}

INLINE void turn(const model *in, model *out, i64 a, i64 b, f32 cosine, f32 sine) {
    f32 x = get_model(in + a), y = get_model(in + b);
    put_model(out + a, x * cosine - y * sine);
    put_model(out + b, y * cosine + x * sine);
}

INLINE void rope_head(const model *in, model *out, const f32 *cosine, const f32 *sine, i64 dim, i64 half,
                      i32 neighbours) {
    i64 d = 0;
    if (neighbours)
        for (; d < half; d++) turn(in, out, 2 * d, 2 * d + 1, cosine[d], sine[d]);
    for (; d + LANES <= half; d += LANES) {
        f32v a = load_model(in + d), b = load_model(in + d + half);
        f32v c = load_float32(cosine + d), s = load_float32(sine + d);
        store_model(out + d, a * c - b * s);
        store_model(out + d + half, b * c + a * s);
    }
    for (; d < half; d++) turn(in, out, d, d + half, cosine[d], sine[d]);
    for (d = 2 * half; d < dim; d++) out[d] = in[d];
}

// Queries and keys turned, and all three apart.
EXPORT void mlcbuild_rope(const model *qkv, const i32 *positions, model *q, model *k, model *v, const f32 *frequency,
                          i64 row, i64 heads, i64 kv_heads, i64 dim, i64 rotary_dim, i32 neighbours, f32 factor) {
    f32 cosine[MAX_ROTARY / 2], sine[MAX_ROTARY / 2];
    i64 half = rotary_dim / 2;
    rope_angles(cosine, sine, positions[row], frequency, half, factor);
    const model *in = qkv + row * (heads + 2 * kv_heads) * dim;
    for (i64 head = 0; head < heads + 2 * kv_heads; head++, in += dim) {
        model *out = head < heads ? q + (row * heads + head) * dim
                     : head < heads + kv_heads ? k + (row * kv_heads + head - heads) * dim
                                               : v + (row * kv_heads + head - heads - kv_heads) * dim;
        rope_head(in, out, cosine, sine, dim, head < heads + kv_heads ? half : 0, neighbours);
    }
}

// Queries and keys turned, all three still in one row.
EXPORT void mlcbuild_rope_fused(const model *qkv, const i32 *positions, const f32 *frequency, model *out, i64 row,
                                i64 heads, i64 kv_heads, i64 dim, i64 rotary_dim, i32 neighbours, f32 factor) {
    f32 cosine[MAX_ROTARY / 2], sine[MAX_ROTARY / 2];
    i64 half = rotary_dim / 2, fused = heads + 2 * kv_heads;
    rope_angles(cosine, sine, positions[row], frequency, half, factor);
    for (i64 head = 0; head < fused; head++) {
        i64 at = (row * fused + head) * dim;
        rope_head(qkv + at, out + at, cosine, sine, dim, head < heads + kv_heads ? half : 0, neighbours);
    }
}

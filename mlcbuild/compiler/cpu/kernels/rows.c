// Kernels that work on one row: norms, activations, softmax, rotary embedding.

#include "common.h"

f32 sinf(f32);
f32 cosf(f32);

// y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, arXiv 1910.07467), over `width` values of one row. Named by
// the dtype of w: activations are float32.
#define DEFINE_RMS_NORM(NAME, T, LOAD, W, LOAD_W, STORE)                                              \
    EXPORT void NAME(const T *x, const W *w, T *y, i64 row, i64 width, f32 eps) {                     \
        x += row * width;                                                                             \
        y += row * width;                                                                             \
        f32v part = splat(0.0f);                                                                      \
        i64 k = 0;                                                                                    \
        for (; k + LANES <= width; k += LANES) {                                                      \
            f32v v = LOAD(x + k);                                                                     \
            part += v * v;                                                                            \
        }                                                                                             \
        f32 total = sum(part);                                                                        \
        for (; k < width; k++) total += (f32)x[k] * (f32)x[k];                                        \
        f32 scale = 1.0f / __builtin_sqrtf(total / (f32)width + eps);                                 \
        for (k = 0; k + LANES <= width; k += LANES)                                                   \
            STORE(y + k, LOAD(x + k) * splat(scale) * LOAD_W(w + k));                                 \
        for (; k < width; k++) y[k] = (T)((f32)x[k] * scale * (f32)w[k]);                             \
    }

DEFINE_RMS_NORM(mlcbuild_rms_norm_float32, f32, load_f32, f32, load_f32, store_f32)
DEFINE_RMS_NORM(mlcbuild_rms_norm_float16, f32, load_f32, f16, load_f16, store_f32)

INLINE f32v silu_v(f32v x) { return x / (splat(1.0f) + exp_v(-x)); }

// y = silu(gate) * up for a row [gate | up] of 2 * width values.
#define DEFINE_GATED(NAME, ACTIVATION)                                                                \
    EXPORT void NAME(const f32 *gate_up, f32 *y, i64 row, i64 width) {                                \
        const f32 *gate = gate_up + row * 2 * width, *up = gate + width;                              \
        y += row * width;                                                                             \
        i64 k = 0;                                                                                    \
        for (; k + LANES <= width; k += LANES)                                                        \
            store_f32(y + k, ACTIVATION(load_f32(gate + k)) * load_f32(up + k));                      \
        for (; k < width; k++) y[k] = ACTIVATION(splat(gate[k]))[0] * up[k];                          \
    }

DEFINE_GATED(mlcbuild_gated_silu, silu_v)

// y = softmax(x / temperature[row]); a temperature of 0 shares everything among the largest values, as MLC does.
EXPORT void mlcbuild_softmax_float32(const f32 *x, const f32 *temperature, f32 *y, i64 row, i64 width) {
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
        f32v e = exp2_v((load_f32(x + k) - largest) * scale);
        store_f32(y + k, e);
        part += e;
    }
    for (; k < width; k++) total += y[k] = exp2_v((splat(x[k]) - largest) * scale)[0];
    f32v inverse = splat(1.0f / (total + sum(part)));
    for (k = 0; k + LANES <= width; k += LANES) store_f32(y + k, load_f32(y + k) * inverse);
    for (; k < width; k++) y[k] *= inverse[0];
}

// One token's fused [query | key | value] heads, split, the first two turned by its position
// (Su et al., arXiv 2104.09864): pairs are (d, d + rotary_dim / 2), the angle is position * frequency[d].
#define MAX_ROTARY 512

#define DEFINE_ROPE(NAME, T)                                                                          \
    EXPORT void NAME(const T *qkv, const i32 *positions, T *q, T *k, T *v, const f32 *frequency,      \
                     i64 row, i64 heads, i64 kv_heads, i64 dim, i64 rotary_dim) {                     \
        f32 cosine[MAX_ROTARY / 2], sine[MAX_ROTARY / 2];                                             \
        i64 half = rotary_dim / 2;                                                                    \
        for (i64 d = 0; d < half; d++) {                                                              \
            f32 angle = (f32)positions[row] * frequency[d];                                           \
            cosine[d] = cosf(angle);                                                                  \
            sine[d] = sinf(angle);                                                                    \
        }                                                                                             \
        const T *in = qkv + row * (heads + 2 * kv_heads) * dim;                                       \
        for (i64 head = 0; head < heads + 2 * kv_heads; head++, in += dim) {                          \
            T *out = head < heads ? q + (row * heads + head) * dim                                    \
                     : head < heads + kv_heads ? k + (row * kv_heads + head - heads) * dim            \
                                               : v + (row * kv_heads + head - heads - kv_heads) * dim; \
            i64 turned = head < heads + kv_heads ? half : 0;                                          \
            for (i64 d = 0; d < turned; d++) {                                                        \
                f32 a = (f32)in[d], b = (f32)in[d + half];                                            \
                out[d] = (T)(a * cosine[d] - b * sine[d]);                                            \
                out[d + half] = (T)(b * cosine[d] + a * sine[d]);                                     \
            }                                                                                         \
            for (i64 d = 2 * turned; d < dim; d++) out[d] = in[d];                                    \
        }                                                                                             \
    }

DEFINE_ROPE(mlcbuild_rope_float32, f32)
DEFINE_ROPE(mlcbuild_rope_float16, f16)

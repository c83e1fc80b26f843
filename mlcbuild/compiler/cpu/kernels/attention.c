// Attention of one query row and head over keys and values in pages, or in rows of the same call.
//
// The softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867), in powers of two: the state is the largest
// score m, the sum d of 2^(score - m), and the weighted sum of values. `lse` is m + log2(d), which is what the KV
// cache's merge step expects; a row that sees no key gives zeros and the lowest score.

#include "common.h"

f32 log2f(f32);

#define MAX_HEAD_DIM 512
#define LOWEST (-5e4f)
#define CHUNK 16  // positions scored together: a page

#define DEFINE_ATTENTION(T, LOAD, SUFFIX)                                                             \
    typedef struct {                                                                                  \
        f32 query[MAX_HEAD_DIM], value[MAX_HEAD_DIM], largest, total;                                 \
        i64 dim;                                                                                      \
    } state_##SUFFIX;                                                                                 \
                                                                                                      \
    INLINE void begin_##SUFFIX(state_##SUFFIX *s, const T *query, i64 dim, f32 scale) {               \
        for (i64 d = 0; d < dim; d++) s->query[d] = (f32)query[d] * (scale * LOG2E);                  \
        for (i64 d = 0; d < dim; d++) s->value[d] = 0.0f;                                             \
        s->largest = LOWEST;                                                                          \
        s->total = 0.0f;                                                                              \
        s->dim = dim;                                                                                 \
    }                                                                                                 \
                                                                                                      \
    /* `count` <= CHUNK positions, `stride` elements apart. */                                        \
    INLINE void add_##SUFFIX(state_##SUFFIX *s, const T *keys, const T *values, i64 stride, i64 count) { \
        f32 score[CHUNK];                                                                             \
        f32 largest = s->largest;                                                                     \
        i64 dim = s->dim;                                                                             \
        for (i64 i = 0; i < CHUNK; i++) score[i] = 2 * LOWEST;                                        \
        for (i64 i = 0; i < count; i++) {                                                             \
            const T *key = keys + i * stride;                                                         \
            f32v part = splat(0.0f);                                                                  \
            i64 d = 0;                                                                                \
            for (; d + LANES <= dim; d += LANES) part += load_f32(s->query + d) * LOAD(key + d);      \
            f32 total = sum(part);                                                                    \
            for (; d < dim; d++) total += s->query[d] * (f32)key[d];                                  \
            score[i] = total;                                                                         \
            largest = max_f32(largest, total);                                                        \
        }                                                                                             \
        f32 keep = exp2_v(splat(s->largest - largest))[0];                                            \
        s->largest = largest;                                                                         \
        s->total *= keep;                                                                             \
        for (i64 i = 0; i < CHUNK; i += LANES)                                                        \
            store_f32(score + i, exp2_v(load_f32(score + i) - splat(largest)));                       \
        for (i64 i = 0; i < count; i++) s->total += score[i];                                         \
        i64 d = 0;                                                                                    \
        for (; d + LANES <= dim; d += LANES) {                                                        \
            f32v sum_v = load_f32(s->value + d) * splat(keep);                                        \
            for (i64 i = 0; i < count; i++) sum_v += splat(score[i]) * LOAD(values + i * stride + d); \
            store_f32(s->value + d, sum_v);                                                           \
        }                                                                                             \
        for (; d < dim; d++) {                                                                        \
            f32 one = s->value[d] * keep;                                                             \
            for (i64 i = 0; i < count; i++) one += score[i] * (f32)values[i * stride + d];            \
            s->value[d] = one;                                                                        \
        }                                                                                             \
    }                                                                                                 \
                                                                                                      \
    INLINE void end_##SUFFIX(const state_##SUFFIX *s, T *out, f32 *lse) {                             \
        f32 inverse = s->total > 0.0f ? 1.0f / s->total : 0.0f;                                       \
        for (i64 d = 0; d < s->dim; d++) out[d] = (T)(s->value[d] * inverse);                         \
        *lse = s->total > 0.0f ? s->largest + log2f(s->total) : LOWEST;                               \
    }                                                                                                 \
                                                                                                      \
    /* Query `row` of [rows, heads, dim], which belongs to the sequence whose range in q_indptr holds it; keys and */ \
    /* values [rows, kv_heads, dim] are the same call's new tokens. */                                \
    EXPORT void mlcbuild_attention_ragged_##SUFFIX(const T *q, const i32 *q_indptr, const T *k, const T *v, \
                                                   const i32 *kv_indptr, T *out, f32 *lse, i64 heads, \
                                                   i64 kv_heads, i64 dim, i64 task, i32 causal, f32 scale) { \
        i64 row = task / heads, head = task % heads, b = 0;                                           \
        while (row >= q_indptr[b + 1]) b++;                                                           \
        i64 q_len = q_indptr[b + 1] - q_indptr[b], kv_len = kv_indptr[b + 1] - kv_indptr[b];          \
        i64 seen = causal ? kv_len - q_len + (row - q_indptr[b]) + 1 : kv_len;                        \
        i64 stride = kv_heads * dim, at = kv_indptr[b] * stride + head / (heads / kv_heads) * dim;    \
        state_##SUFFIX s;                                                                             \
        begin_##SUFFIX(&s, q + task * dim, dim, scale);                                               \
        for (i64 i = 0; i < seen; i += CHUNK)                                                         \
            add_##SUFFIX(&s, k + at + i * stride, v + at + i * stride, stride, min_i64(CHUNK, seen - i)); \
        end_##SUFFIX(&s, out + task * dim, lse + task);                                               \
    }                                                                                                 \
                                                                                                      \
    /* The same over cached pages [pages, 2, kv_heads, page, dim]. A sequence's first `sink` positions and those from */ \
    /* `window` on are visible; q_indptr may be null: one row per sequence. `sliding` > 0 bounds how far back a row */ \
    /* sees when the call is causal (its own tokens lie after the cached ones). */                    \
    EXPORT void mlcbuild_attention_paged_##SUFFIX(                                                    \
        const T *q, const i32 *q_indptr, const T *pages, const i32 *page_indptr, const i32 *page_values, \
        const i32 *last_page_len, const i32 *window, const i32 *sink, T *out, f32 *lse, i64 heads, i64 kv_heads, \
        i64 dim, i64 page, i64 task, i32 causal, i64 sliding, f32 scale) {                            \
        i64 row = task / heads, head = task % heads, b = 0, q_at = 0, q_len = 1;                      \
        if (q_indptr) {                                                                               \
            while (row >= q_indptr[b + 1]) b++;                                                       \
            q_at = row - q_indptr[b];                                                                 \
            q_len = q_indptr[b + 1] - q_indptr[b];                                                    \
        } else                                                                                        \
            b = row;                                                                                  \
        i64 first_page = page_indptr[b], held = page_indptr[b + 1] - first_page;                      \
        i64 sinks = sink ? sink[b] : 0, offset = window ? window[b] : 0;                              \
        i64 kv_len = held ? (held - 1) * page + last_page_len[b] - offset + sinks : 0;                \
        i64 begin = 0, seen = kv_len;                                                                 \
        if (causal && sliding > 0) {                                                                  \
            i64 back = sliding - q_at - 1 > 0 ? sliding - q_at - 1 : 0;                               \
            begin = kv_len - back > 0 ? kv_len - back : 0;                                            \
        } else if (causal)                                                                            \
            seen = min_i64(kv_len, kv_len - q_len + q_at + 1);                                        \
        i64 half = kv_heads * page * dim, at = head / (heads / kv_heads) * page * dim;                \
        state_##SUFFIX s;                                                                             \
        begin_##SUFFIX(&s, q + task * dim, dim, scale);                                               \
        for (i64 i = begin; i < seen;) {                                                              \
            i64 position = i < sinks ? i : i - sinks + offset, slot = position % page;                \
            i64 count = min_i64(page - slot, (i < sinks ? min_i64(sinks, seen) : seen) - i);          \
            count = min_i64(count, CHUNK);                                                            \
            const T *base = pages + (i64)page_values[first_page + position / page] * 2 * half + at + slot * dim; \
            add_##SUFFIX(&s, base, base + half, dim, count);                                          \
            i += count;                                                                               \
        }                                                                                             \
        end_##SUFFIX(&s, out + task * dim, lse + task);                                               \
    }                                                                                                 \
                                                                                                      \
    /* (out, lse) becomes the attention over both sets of keys, for one row and head. */              \
    EXPORT void mlcbuild_attention_merge_##SUFFIX(T *out, f32 *lse, const T *other, const f32 *other_lse, i64 dim, \
                                                  i64 task) {                                         \
        f32 a = lse[task], b = other_lse[task], largest = max_f32(a, b);                              \
        a = exp2_v(splat(a - largest))[0];                                                            \
        b = exp2_v(splat(b - largest))[0];                                                            \
        out += task * dim;                                                                            \
        other += task * dim;                                                                          \
        for (i64 d = 0; d < dim; d++) out[d] = (T)(((f32)out[d] * a + (f32)other[d] * b) / (a + b));  \
        lse[task] = log2f(a + b) + largest;                                                           \
    }

DEFINE_ATTENTION(f32, load_f32, float32)
DEFINE_ATTENTION(f16, load_f16, float16)

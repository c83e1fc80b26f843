// y = x · wᵀ for one format of weights, and rows of w looked up. Compiled once for each format that a library holds:
//
//   FORMAT            the name, part of every symbol
//   SCHEME_DENSE, SCHEME_GROUP (BITS, WORD_BITS, GROUP_SIZE, TRANSPOSED, ASYMMETRIC), SCHEME_MINMAX, SCHEME_AWQ (GROUP_SIZE)
//
// A scheme's header says how a tile of weights is unpacked to float32 [k][ROWS], which is all that products of many
// rows need. Where rows of w lie along memory it also has dot products (DOT_TOKENS rows of x and fewer), which read
// the weights once, as they are.

#include "experts.h"
#include "panels.h"

#define TOKENS 528      // activation rows that share one unpacked tile: a multiple of PACK_TOKENS
#define TASK_ROWS 32    // weight rows of one task; TASK_ROWS in linear.py

_Static_assert(TOKENS % PACK_TOKENS == 0 && PACK_TOKENS % WIDTH == 0, "a panel lies in one task and in one tile's share");

// The tensors of one weight matrix [n out, k in], in the order of quantization.schemes.parts.
typedef struct {
    const void *part[5];
    i64 n, k;
} weights;

#if defined(SCHEME_DENSE)
#include "linear_dense.h"
#elif defined(SCHEME_GROUP)
#include "linear_group.h"
#elif defined(SCHEME_MINMAX)
#include "linear_minmax.h"
#elif defined(SCHEME_AWQ)
#include "linear_awq.h"
#endif

#define NAME(what) JOIN(JOIN(JOIN(mlcbuild_, FORMAT), _), what)

// PACK_TOKENS rows of x [., k] at most, from the first-th of `tokens` on, in the order in which the product reads them.
// The i-th row is from[i] where there is such a table, else i.
NOINLINE void pack_rows(const void *x, i32 wide, const i32 *from, f32 *packed, i64 tokens, i64 first, i64 k, i64 stride) {
    i64 count = min_i64(PACK_TOKENS, tokens - first);
    if (from) from += first;
    else x = (const char *)x + first * k * (i64)(wide ? sizeof(f32) : sizeof(model));
    packed += first * stride;
#if DOT_TOKENS
    if (tokens <= DOT_TOKENS) {
        for (i64 t = 0; t < count; t++) pack_dot(x, row_of(from, t) * k, wide, packed, t, count, k, stride);
        return;
    }
#endif
#ifdef HAS_DIGIT_PANELS
    pack_digit_panels(x, wide, from, packed, count, k, stride);
#else
    pack_panels(x, wide, from, packed, count, k, stride);
#endif
}

// Columns first .. end - 1, TASK_ROWS at most, of `tokens` rows of y [., n]: the i-th is to[i], or i.
NOINLINE void multiply_rows(const f32 *x, const weights *w, void *y, i32 wide, const i32 *to, i64 tokens, i64 stride,
                            i64 first, i64 end) {
    i64 n = w->n, k = w->k;
#if DOT_TOKENS
    if (tokens <= DOT_TOKENS) {
        f32 out[DOT_TOKENS][TASK_ROWS];
        dot(x, stride, w, first, end - first, tokens, &out[0][0]);
        for (i64 t = 0; t < tokens; t++)
            for (i64 i = 0; i < end - first; i++) put_any(y, row_of(to, t) * n + first + i, out[t][i], wide);
        return;
    }
#endif
#ifdef HAS_DIGIT_PANELS
    digits_tile tile;
#else
    __attribute__((aligned(64))) f32 tile[(TILE_K + TILE_SLACK) * ROWS];
#endif
    __attribute__((aligned(64))) f32 acc[TOKENS * ROWS];
    for (i64 at = first; at < end; at += ROWS) {
        i64 rows = min_i64(ROWS, end - at);
        for (i64 token = 0; token < tokens; token += TOKENS) {
            i64 count = min_i64(TOKENS, tokens - token);
            for (i64 i = 0; i < count * ROWS; i += LANES) store_float32(acc + i, splat(0.0f));
#ifdef HAS_DIGIT_PANELS
            for (i64 start = 0; start < k; start += DIGITS_K) {
                i64 depth = min_i64(DIGITS_K, k - start);
                unpack_digits(w, at, rows, start, depth, &tile);
                multiply_digit_panels(x + token * stride, stride, start, &tile, depth, acc, count);
            }
#else
            for (i64 start = 0; start < k; start += TILE_K) {
                i64 depth = min_i64(TILE_K, k - start);
                unpack(w, at, rows, start, depth, tile);
                multiply_panels(x + token * stride, stride, start, tile, depth, acc, count);
            }
#endif
            for (i64 t = 0; t < count; t++) {
                i64 y_at = row_of(to, token + t) * n + at, i = 0;
                for (; i + LANES <= rows; i += LANES) store_any(y, y_at + i, load_float32(acc + t * ROWS + i), wide);
                for (; i < rows; i++) put_any(y, y_at + i, acc[t * ROWS + i], wide);
            }
        }
    }
}

// Activations [tokens, k] as the product reads them, PACK_TOKENS rows from `task` on.
EXPORT void NAME(pack)(const void *x, i32 wide, f32 *packed, i64 tokens, i64 k, i64 stride, i64 task) {
    pack_rows(x, wide, 0, packed, tokens, task * PACK_TOKENS, k, stride);
}

// TASK_ROWS columns of y [tokens, n] from `task` on.
EXPORT void NAME(multiply)(const f32 *x, const void *a, const void *b, const void *c, const void *d, const void *e,
                           void *y, i32 wide, i64 tokens, i64 n, i64 k, i64 stride, i64 task) {
    weights w = {{a, b, c, d, e}, n, k};
    i64 first = task * TASK_ROWS;
    multiply_rows(x, &w, y, wide, 0, tokens, stride, first, min_i64(first + TASK_ROWS, n));
}

// The same for experts, each of which multiplies the rows that chose it (experts.h): the task-th stretch of rows packed,
EXPORT void NAME(pack_experts)(const void *x, i32 wide, i32 *memory, f32 *packed, i64 pairs, i64 experts, i64 k, i64 stride,
                               i64 task) {
    plan p = plan_in(memory, experts, pairs);
    i64 expert = p.stretches[2 * task], first = p.first[expert], rows = p.first[expert + 1] - first;
    pack_rows(x, wide, p.from + first, packed + first * stride, rows, p.stretches[2 * task + 1], k, stride);
}

// and TASK_ROWS columns of y [pairs, n] for one expert, whose share of each part is so many bytes. Neighbouring tasks are
// of different experts: threads, which get neighbours, then have equally much to do.
EXPORT void NAME(multiply_experts)(const f32 *x, i32 *memory, const void *a, const void *b, const void *c, const void *d,
                                   const void *e, i64 a_bytes, i64 b_bytes, i64 c_bytes, i64 d_bytes, i64 e_bytes, f32 *y,
                                   i64 pairs, i64 experts, i64 n, i64 k, i64 stride, i64 task) {
    plan p = plan_in(memory, experts, pairs);
    i64 expert = p.active[task % *p.active_count], column = task / *p.active_count * TASK_ROWS;
    i64 first = p.first[expert], rows = p.first[expert + 1] - first;
    weights w = {{(const char *)a + expert * a_bytes, (const char *)b + expert * b_bytes, (const char *)c + expert * c_bytes,
                  (const char *)d + expert * d_bytes, (const char *)e + expert * e_bytes}, n, k};
    multiply_rows(x + first * stride, &w, y, 1, p.to + first, rows, stride, column, min_i64(column + TASK_ROWS, n));
}

#if HAS_VALUE
// Row ids[i] of w as row i of y [., k] of the model dtype.
EXPORT void NAME(embed)(const i32 *ids, const void *a, const void *b, model *y, i64 k, i64 i) {
    weights w = {{a, b}, 0, k};
    for (i64 at = 0; at < k; at++) put_model(y + i * k + at, value(&w, ids[i], at));
}
#endif

// What recurrences whose state is a matrix share where they take a chunk of tokens at once: the state in tiles of ROWS
// columns, and the products with it. All is float32.
#pragma once

#include "lanes.h"
#include "panels.h"

#define CHUNK 12  // tokens: twice as many fill panels of every WIDTH, too, and more would cost more than they spare

// 0 instead of what counts for nothing beside numbers near 1: what is too small for a normal number is slow on some
// processors, and decays get there within a chunk.
INLINE f32v settled(f32v v) {
    u32v size = *(u32v *)&v & 0x7fffffffu;
    return select_v((i32v)size < 0x0d800000, splat(0.0f), v);  // 2^-100
}

// A product of `rows` rows of a with b [depth][ROWS], a panel at a time; `keep` as for multiply_panel.
#define DEFINE_PRODUCT(NAME, BY_STEP, BY_ROW)                                                                        \
    DEFINE_PANEL(NAME##_wide, WIDTH, BY_STEP, BY_ROW)                                                                \
    DEFINE_PANEL(NAME##_4, 4, BY_STEP, BY_ROW)                                                                       \
    DEFINE_PANEL(NAME##_1, 1, BY_STEP, BY_ROW)                                                                       \
    INLINE void NAME(const f32 *a, i64 stride, const f32 *b, i64 depth, const f32 *keep, f32 *c, i64 rows) {         \
        for (i64 row = 0, width; row < rows; row += width) {                                                         \
            const f32 *from = a + row * (BY_ROW), *kept = keep ? keep + row : 0;                                     \
            width = rows - row >= WIDTH ? WIDTH : rows - row >= 4 ? 4 : 1;                                           \
            if (width == WIDTH) NAME##_wide(from, stride, b, depth, kept, c + row * ROWS);                           \
            else if (width == 4) NAME##_4(from, stride, b, depth, kept, c + row * ROWS);                             \
            else NAME##_1(from, stride, b, depth, kept, c + row * ROWS);                                             \
        }                                                                                                            \
    }
#define DEFINE_PANEL(NAME, WIDTH, BY_STEP, BY_ROW)                                                                   \
    NOINLINE void NAME(const f32 *a, i64 stride, const f32 *b, i64 depth, const f32 *keep, f32 *c) {                 \
        (void)stride;                                                                                                \
        multiply_panel(a, BY_STEP, BY_ROW, b, depth, keep, c, WIDTH);                                                \
    }

DEFINE_PRODUCT(ask, 1, stride)    // a [rows][stride]: what the state b is asked for
DEFINE_PRODUCT(write, stride, 1)  // a [depth][stride]: what is written to the state c

// Columns `at` to `end` of a state [keys][width] as tiles [keys][ROWS], and back. What is beyond is 0.
INLINE void load_tiles(f32 *tiles, const f32 *state, i64 keys, i64 width, i64 at, i64 end) {
    for (; at < end; at += ROWS)
        for (i64 r = 0; r < keys; r++, tiles += ROWS)
            for (i64 l = 0; l < ROWS; l += LANES) store_float32(tiles + l, take(state + r * width + at + l, end - at - l));
}

INLINE void store_tiles(const f32 *tiles, f32 *state, i64 keys, i64 width, i64 at, i64 end) {
    for (; at < end; at += ROWS)
        for (i64 r = 0; r < keys; r++, tiles += ROWS)
            for (i64 l = 0; l < ROWS; l += LANES) give(state + r * width + at + l, load_float32(tiles + l), end - at - l);
}

// The product under every many-row kernel: c[m][ROWS] += a[m] · b over a stretch of the inner dimension.
//
// `a` comes in panels: WIDTH rows at once as [k][WIDTH] float32, then 4, 2 and 1 for what is left. `b` is a tile
// [k][ROWS]. A panel's results stay in registers, one broadcast of `a` serves a whole row of the tile.
#pragma once

#include "common.h"

#if LANES == 16  // 32 registers
#define VECTORS 2
#define WIDTH 12
#elif LANES == 8  // 16 registers
#define VECTORS 2
#define WIDTH 6
#else  // 32 registers
#define VECTORS 4
#define WIDTH 6
#endif
#define ROWS (VECTORS * LANES)

INLINE i64 panel_width(i64 left) { return left >= WIDTH ? WIDTH : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// a[m] at step k is a[k * by_step + m * by_row]. Of c, keep[m] times what is there remains; all of it where that is null.
INLINE void multiply_panel(const f32 *a, i64 by_step, i64 by_row, const f32 *b, i64 depth, const f32 *keep, f32 *c,
                           const int width) {
    f32v acc[WIDTH][VECTORS] = {};  // from zero, not from c: long sums in stretches lose less
    for (i64 k = 0; k < depth; k++) {
        f32v row[VECTORS];
        for (int v = 0; v < VECTORS; v++) row[v] = load_float32(b + k * ROWS + v * LANES);
        for (int m = 0; m < width; m++) {
            f32v one = splat(a[k * by_step + m * by_row]);
            for (int v = 0; v < VECTORS; v++) acc[m][v] += one * row[v];
        }
    }
    for (int m = 0; m < width; m++)
        for (int v = 0; v < VECTORS; v++) {
            f32 *at = c + m * ROWS + v * LANES;
            store_float32(at, (keep ? load_float32(at) * splat(keep[m]) : load_float32(at)) + acc[m][v]);
        }
}

#define DEFINE_WIDTH(NAME, WIDTH, BY_STEP, BY_ROW) \
    NOINLINE void NAME(const f32 *a, const f32 *b, i64 depth, f32 *c) { multiply_panel(a, BY_STEP, BY_ROW, b, depth, 0, c, WIDTH); }

DEFINE_WIDTH(panel_wide, WIDTH, WIDTH, 1)
DEFINE_WIDTH(panel_4, 4, 4, 1)
DEFINE_WIDTH(panel_2, 2, 2, 1)
DEFINE_WIDTH(panel_1, 1, 1, 1)

// c [rows][ROWS] += a · b over `depth` steps from `start` on; `a` holds panels of `stride` steps.
INLINE void multiply_panels(const f32 *a, i64 stride, i64 start, const f32 *b, i64 depth, f32 *c, i64 rows) {
    for (i64 row = 0; row < rows;) {
        i64 width = panel_width(rows - row);
        const f32 *panel = a + row * stride + start * width;
        if (width == WIDTH) panel_wide(panel, b, depth, c + row * ROWS);
        else if (width == 4) panel_4(panel, b, depth, c + row * ROWS);
        else if (width == 2) panel_2(panel, b, depth, c + row * ROWS);
        else panel_1(panel, b, depth, c + row * ROWS);
        row += width;
    }
}

// Which row of x or y the i-th one is: table[i], or i where there is no table.
INLINE i64 row_of(const i32 *table, i64 i) { return table ? table[i] : i; }

// Panels of `rows` rows of x [., columns], those that `from` lists; `stride` >= columns steps each.
INLINE void pack_panels(const void *x, i32 wide, const i32 *from, f32 *out, i64 rows, i64 columns, i64 stride) {
    for (i64 row = 0; row < rows;) {
        i64 width = panel_width(rows - row), at[WIDTH], k = 0;
        f32 *panel = out + row * stride;
        for (i64 m = 0; m < width; m++) at[m] = row_of(from, row + m) * columns;
        // Blocks are turned in registers. A store may reach into what the next one writes, but not behind the panel.
        for (; width == WIDTH && k + 2 * LANES <= columns; k += LANES) {
            u32v block[LANES] = {};
            for (int m = 0; m < (WIDTH < LANES ? WIDTH : LANES); m++) {
                f32v v = load_any(x, at[m] + k, wide);
                block[m] = *(u32v *)&v;
            }
            transpose(block);
            for (int i = 0; i < LANES; i++) *(u32v *)(panel + (k + i) * WIDTH) = block[i];
#if WIDTH > LANES
            for (int m = LANES; m < WIDTH; m++)
                for (int i = 0; i < LANES; i++) panel[(k + i) * WIDTH + m] = get_any(x, at[m] + k + i, wide);
#endif
        }
        for (i64 m = 0; m < width; m++)
            for (i64 i = k; i < columns; i++) panel[i * width + m] = get_any(x, at[m] + i, wide);
        row += width;
    }
}

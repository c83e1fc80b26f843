// Weights as they are: part 0 [n, k] of the model dtype.
#define TILE_K 256
#define TILE_SLACK 0
#define DOT_TOKENS 6
#define HAS_VALUE 1
#define AHEAD 2048  // bytes that are fetched in advance: the rows of a task follow each other

INLINE f32 value(const weights *w, i64 row, i64 at) { return get_model((const model *)w->part[0] + row * w->k + at); }

INLINE void unpack(const weights *w, i64 first, i64 rows, i64 start, i64 depth, f32 *tile) {
    const model *at = (const model *)w->part[0] + first * w->k + start;
    for (int v = 0; v < VECTORS; v++) {
        i64 held = rows - v * LANES;
        for (i64 k = 0; k < depth; k += LANES) {
            u32v block[LANES];
            for (int r = 0; r < LANES; r++) {
                const model *row = at + (v * LANES + r) * w->k + k;
                f32v values = splat(0.0f);
                if (r < held) {
                    if (__builtin_expect(k + LANES <= depth, 1)) values = load_model(row);
                    else
                        for (i64 i = 0; k + i < depth; i++) values[i] = get_model(row + i);
                }
                block[r] = *(u32v *)&values;
            }
            transpose(block);
            i64 filled = min_i64(LANES, depth - k);
            for (i64 i = 0; i < filled; i++) *(u32v *)(tile + (k + i) * ROWS + v * LANES) = block[i];
        }
    }
}

INLINE void pack_dot(const void *x, i64 at, i32 wide, f32 *packed, i64 t, i64 tokens, i64 k, i64 stride) {
    f32 *out = packed + t * stride;
    (void)tokens;
    i64 i = 0;
    for (; i + LANES <= k; i += LANES) store_float32(out + i, load_any(x, at + i, wide));
    for (; i < k; i++) out[i] = get_any(x, at + i, wide);
}

INLINE void dot(const f32 *x, i64 stride, const weights *w, i64 first, i64 rows, i64 tokens, f32 *out) {
    i64 k = w->k;
    for (i64 r = 0; r < rows; r++) {
        const model *row = (const model *)w->part[0] + (first + r) * k;
        for (i64 t = 0; t < tokens; t++, x += stride) {
            f32v part[4] = {};
            i64 i = 0;
            for (; i + 4 * LANES <= k; i += 4 * LANES) {
                fetch((const char *)(row + i) + AHEAD, 0);
                if (sizeof(model) * 4 * LANES > 64) fetch((const char *)(row + i) + AHEAD + 64, 0);
                if (sizeof(model) * 4 * LANES > 128) {
                    fetch((const char *)(row + i) + AHEAD + 128, 0);
                    fetch((const char *)(row + i) + AHEAD + 192, 0);
                }
                for (int p = 0; p < 4; p++)
                    part[p] += load_float32(x + i + p * LANES) * load_model(row + i + p * LANES);
            }
            for (; i + LANES <= k; i += LANES) part[0] += load_float32(x + i) * load_model(row + i);
            f32 total = sum((part[0] + part[1]) + (part[2] + part[3]));
            for (; i < k; i++) total += x[i] * get_model(row + i);
            out[t * TASK_ROWS + r] = total;
        }
        x -= tokens * stride;
    }
}

// 8-bit codes between minima and maxima of rows and columns, of the model dtype:
//   parts: codes [k, n] uint8, scale_in [k], scale_out [n], min_in [k], min_out [n]
//   w[n][k] = (code + 1/2) * scale_in[k] * scale_out[n] + min_in[k] + min_out[n]
#define TILE_K 256
#define TILE_SLACK 0
#define DOT_TOKENS 0
#define HAS_VALUE 0

INLINE f32v load_some(const model *p, i64 held) {
    if (__builtin_expect(held >= LANES, 1)) return load_model(p);
    f32v v = splat(0.0f);
    for (i64 i = 0; i < held; i++) v[i] = get_model(p + i);
    return v;
}

INLINE void unpack(const weights *w, i64 first, i64 rows, i64 start, i64 depth, f32 *tile) {
    const model *scale_in = (const model *)w->part[1] + start, *min_in = (const model *)w->part[3] + start;
    for (int v = 0; v < VECTORS; v++) {
        i64 n = first + v * LANES, held = rows - v * LANES;
        f32v scale = load_some((const model *)w->part[2] + n, held), low = load_some((const model *)w->part[4] + n, held);
        for (i64 k = 0; k < depth; k++) {
            const u8 *codes = (const u8 *)w->part[0] + (start + k) * w->n + n;
            u8v code = {};
            if (__builtin_expect(held >= LANES, 1)) code = *(const u8v *)codes;
            else
                for (i64 i = 0; i < held; i++) code[i] = codes[i];
            f32v middle = __builtin_convertvector(__builtin_convertvector(code, i32v), f32v) + splat(0.5f);
            f32v step = scale * splat(get_model(scale_in + k));
            store_float32(tile + k * ROWS + v * LANES, middle * step + (low + splat(get_model(min_in + k))));
        }
    }
}

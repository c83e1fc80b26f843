// AutoAWQ's tensors: parts qweight [k, n / 8] uint32, qzeros [k / GROUP_SIZE, n / 8] uint32, scales [k / GROUP_SIZE, n].
// A word holds eight neighbours along n: column 0 in its lowest 4 bits, then 2, 4, 6, 1, 3, 5, 7. w = (code - zero) * scale.
#define TILE_K 256
#define TILE_SLACK 0
#define DOT_TOKENS 0
#define HAS_VALUE 0

// Codes of columns n .. n + LANES - 1 (n a multiple of 4) in one row of words.
INLINE f32v load_codes(const u32 *words, i64 n, i64 held) {
    static const u32 shift[8] = {0, 16, 4, 20, 8, 24, 12, 28};
    u32v word = {}, by = {};
    for (int lane = 0; lane < LANES; lane++) {
        word[lane] = lane < held ? words[(n + lane) / 8] : 0u;
        by[lane] = shift[(n + lane) % 8];
    }
    return __builtin_convertvector((i32v)((word >> by) & 15u), f32v);
}

INLINE void unpack(const weights *w, i64 first, i64 rows, i64 start, i64 depth, f32 *tile) {
    i64 words = w->n / 8;
    for (int v = 0; v < VECTORS; v++) {
        i64 n = first + v * LANES, held = rows - v * LANES;
        f32v zero = {}, scale = {};
        for (i64 k = start; k < start + depth; k++) {
            if (k == start || k % GROUP_SIZE == 0) {
                i64 group = k / GROUP_SIZE;
                const model *scales = (const model *)w->part[2] + group * w->n + n;
                zero = load_codes((const u32 *)w->part[1] + group * words, n, held);
                for (int lane = 0; lane < LANES; lane++) scale[lane] = lane < held ? get_model(scales + lane) : 0.0f;
            }
            f32v code = load_codes((const u32 *)w->part[0] + k * words, n, held);
            store_float32(tile + (k - start) * ROWS + v * LANES, (code - zero) * scale);
        }
    }
}

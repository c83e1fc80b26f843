// Products of many rows with activations in fixed point (fixed_point.h): what panels.h does, with codes left as bytes.
//
// Activations come in panels of TOGETHER rows, then single ones. A panel is, for every 32 columns, [8][DIGITS][width]
// words of four digits (those of the even codes of a word, then of its odd ones, the highest digit first), then
// -ZERO * sum(x) [width] int32 and the scale [width] float32: less than float32 would take. A tile is the bytes
// [quad of k][ROWS][4] of codes in the same order, and scales [32 columns][ROWS].

#define HAS_DIGIT_PANELS
#if LANES == 16
#define TOGETHER 4  // times the digits and VECTORS: sums that stay in 32 registers
#define EACH_QUAD UNROLL
#else
#define TOGETHER (4 / DIGITS)
// Unrolled, it would be put into another order, in which sums are few and codes do not stay in registers.
#define EACH_QUAD _Pragma("clang loop unroll(disable)")
#endif
#define DIGITS_K 512  // columns of a tile, which stays in the first-level cache
#define GROUP_INTS (8 * DIGITS + 2)  // 32-bit numbers of a row for 32 columns

typedef struct {
    u32v code[DIGITS_K / 4][VECTORS];
    f32v scale[DIGITS_K / 32][VECTORS];
} digits_tile;

INLINE i64 digits_width(i64 left) { return left >= TOGETHER ? TOGETHER : 1; }

INLINE void pack_digit_panels(const void *x, i32 wide, const i32 *from, f32 *out, i64 rows, i64 k, i64 stride) {
    for (i64 row = 0; row < rows;) {
        i64 width = digits_width(rows - row);
        for (i64 m = 0; m < width; m++) {
            i32 *panel = (i32 *)(out + row * stride) + m;
            for (i64 at = 0; at < k; at += 32, panel += GROUP_INTS * width) {
                fixed group = to_fixed(load_32(x, row_of(from, row + m) * k, at, wide, k));
                i32x4 sums = eights(group.value);
                for (int d = 0; d < DIGITS; d++) {
                    i8x16 evens = EVEN(group.digit[d]), odds = ODD(group.digit[d]);
                    i32x4 even = *(i32x4 *)&evens, odd = *(i32x4 *)&odds;
                    for (int word = 0; word < 4; word++) {
                        panel[(2 * DIGITS * word + d) * width] = even[word];
                        panel[(2 * DIGITS * word + DIGITS + d) * width] = odd[word];
                    }
                }
                panel[8 * DIGITS * width] = -ZERO * (sums[0] + sums[1] + sums[2] + sums[3]);
                ((f32 *)panel)[(8 * DIGITS + 1) * width] = group.scale;
            }
        }
        row += width;
    }
}

// Codes and scales of a tile's rows from `first` on, columns from `start` on, which is a multiple of DIGITS_K.
INLINE void unpack_digits(const weights *w, i64 first, i64 rows, i64 start, i64 depth, digits_tile *tile) {
    i64 groups = (w->k + GROUP_SIZE - 1) / GROUP_SIZE, words = groups * GROUP_WORDS;
    i64 begin = start / 8, end = begin + (depth + 31) / 32 * 4;
    const u32 *codes = (const u32 *)w->part[0];
    const scale_type *scales = (const scale_type *)w->part[1];
    for (int v = 0; v < VECTORS; v++) {
        i64 n = first + v * LANES, held = rows - v * LANES;
        for (i64 at = begin; at < end; at += LANES) {
            u32v block[LANES];
            i64 filled = min_i64(LANES, end - at);
#if TRANSPOSED
            for (i64 i = 0; i < filled; i++) block[i] = load_words(codes + (at + i) * w->n + n, held);
#else
            for (int r = 0; r < LANES; r++)
                block[r] = r < held ? load_words(codes + (n + r) * words + at, words - at) : (u32v){};
            transpose(block);
#endif
            for (i64 i = 0; i < filled; i++) {
                tile->code[2 * (at + i - begin)][v] = block[i] & 0x0f0f0f0fu;
                tile->code[2 * (at + i - begin) + 1][v] = (block[i] >> 4) & 0x0f0f0f0fu;
            }
        }
        for (i64 at = 0; at < (depth + 31) / 32; at++) {
            i64 group = (start + 32 * at) / GROUP_SIZE;
#if TRANSPOSED
            tile->scale[at][v] = load_affine(scales + group * w->n + n, 1, held).scale;
#else
            tile->scale[at][v] = load_affine(scales + n * groups + group, groups, held).scale;
#endif
        }
    }
    (void)words;
}

// Adds the products of four columns, the quad-th of 32.
INLINE void add_quad(const i32 *panel, const u32v (*codes)[VECTORS], i64 quad, sums (*acc)[TOGETHER][VECTORS], const int width) {
    bytes_v code[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) code[v] = (bytes_v)codes[quad][v];
    UNROLL for (int m = 0; m < width; m++)
        UNROLL for (int d = 0; d < DIGITS; d++) {
            i8v digits = (i8v)(panel[(DIGITS * quad + d) * width + m] - (i32v){});
            UNROLL for (int v = 0; v < VECTORS; v++) acc[d][m][v] = add_four(acc[d][m][v], code[v], digits);
        }
}

// c [width][ROWS] += panel · tile over `depth` columns.
INLINE void multiply_digits(const i32 *panel, const digits_tile *tile, i64 depth, f32 *c, const int width) {
    f32v out[TOGETHER][VECTORS] = {};  // from zero, not from c: long sums in stretches lose less
    for (i64 at = 0; at < (depth + 31) / 32; at++, panel += GROUP_INTS * width) {
        sums acc[DIGITS][TOGETHER][VECTORS] = {};
        add_quad(panel, tile->code + 8 * at, 0, acc, width);
        EACH_QUAD for (int quad = 1; quad < 8; quad++) add_quad(panel, tile->code + 8 * at, quad, acc, width);
        UNROLL for (int m = 0; m < width; m++) {
            u32 term = (u32)panel[8 * DIGITS * width + m];
            f32 scale = ((const f32 *)panel)[(8 * DIGITS + 1) * width + m];
            UNROLL for (int v = 0; v < VECTORS; v++) {
                u32v whole = (u32v)total(acc[0][m][v]);
                UNROLL for (int d = 1; d < DIGITS; d++) whole = (whole << 8) + (u32v)total(acc[d][m][v]);
                f32v product = __builtin_convertvector((i32v)(whole + term), f32v);
                out[m][v] += product * (tile->scale[at][v] * splat(scale));
            }
        }
    }
    UNROLL for (int m = 0; m < width; m++)
        UNROLL for (int v = 0; v < VECTORS; v++) {
            f32 *to = c + m * ROWS + v * LANES;
            store_float32(to, load_float32(to) + out[m][v]);
        }
}

NOINLINE void digits_wide(const i32 *panel, const digits_tile *tile, i64 depth, f32 *c) {
    multiply_digits(panel, tile, depth, c, TOGETHER);
}
NOINLINE void digits_1(const i32 *panel, const digits_tile *tile, i64 depth, f32 *c) {
    multiply_digits(panel, tile, depth, c, 1);
}

// c [rows][ROWS] += the activations' columns from `start` on · tile.
INLINE void multiply_digit_panels(const f32 *x, i64 stride, i64 start, const digits_tile *tile, i64 depth, f32 *c, i64 rows) {
    for (i64 row = 0; row < rows;) {
        i64 width = digits_width(rows - row);
        const i32 *panel = (const i32 *)(x + row * stride) + start / 32 * GROUP_INTS * width;
        if (width == TOGETHER) digits_wide(panel, tile, depth, c + row * ROWS);
        else digits_1(panel, tile, depth, c + row * ROWS);
        row += width;
    }
}

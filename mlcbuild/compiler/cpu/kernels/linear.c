// y = x · wᵀ for weights stored row by row, quantized in groups or not.
//
// Activations are first brought to float32 in the order in which weights unpack (`pack_*`), once per product. A word of
// E = 32 / bits weights is unpacked lane-wise: lane l of a register holds word l, and step j takes weight E·l + j from
// every lane by one shift. So the activations of a block of LANES words lie as [E][LANES], and one register of scales
// serves a whole block.

#include "common.h"

#define ROWS 16        // weight rows of one task
#define TOKENS 64      // activation rows that share one unpacked tile of weights
#define TILE 512       // columns of that tile: ROWS * TILE floats stay in the second-level cache

#if LANES == 8
#define TOKENS_AT_ONCE 2
#else
#define TOKENS_AT_ONCE 4
#endif
#define ROWS_AT_ONCE 4

// One row of activations, `columns` of them, as float32; zeros up to `padded`.
#define DEFINE_PACK_PLAIN(NAME, IN, LOAD)                                                             \
    EXPORT void NAME(const IN *x, f32 *out, i64 row, i64 columns, i64 padded) {                       \
        x += row * columns;                                                                           \
        out += row * padded;                                                                          \
        i64 k = 0;                                                                                    \
        for (; k + LANES <= columns; k += LANES) store_f32(out + k, LOAD(x + k));                     \
        for (; k < columns; k++) out[k] = (f32)x[k];                                                  \
        for (; k < padded; k++) out[k] = 0.0f;                                                        \
    }

DEFINE_PACK_PLAIN(mlcbuild_pack_float32, f32, load_f32)
DEFINE_PACK_PLAIN(mlcbuild_pack_float16, f16, load_f16)

// The same, in the order [block][j][lane] of weights unpacked from words of `per_word`.
#define DEFINE_PACK_WORDS(NAME, IN)                                                                   \
    EXPORT void NAME(const IN *x, f32 *out, i64 row, i64 columns, i64 padded, i64 per_word) {         \
        x += row * columns;                                                                           \
        out += row * padded;                                                                          \
        i64 block = LANES * per_word;                                                                 \
        for (i64 start = 0; start < padded; start += block)                                           \
            for (i64 j = 0; j < per_word; j++)                                                        \
                for (i64 lane = 0; lane < LANES; lane++) {                                            \
                    i64 k = start + lane * per_word + j;                                              \
                    out[start + j * LANES + lane] = k < columns ? (f32)x[k] : 0.0f;                   \
                }                                                                                     \
    }

DEFINE_PACK_WORDS(mlcbuild_pack_words_float32, f32)
DEFINE_PACK_WORDS(mlcbuild_pack_words_float16, f16)

// acc[t][r] += x[t] · w[r] over `columns` (a multiple of LANES) for a few tokens and rows at once.
INLINE void multiply_tile(const f32 *x, i64 x_stride, const f32 *w, i64 columns, f32 *acc, int tokens, int rows) {
    f32v part[TOKENS_AT_ONCE][ROWS_AT_ONCE];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) part[t][r] = splat(0.0f);
    for (i64 k = 0; k < columns; k += LANES) {
        f32v wv[ROWS_AT_ONCE];
        for (int r = 0; r < rows; r++) wv[r] = load_f32(w + r * TILE + k);
        for (int t = 0; t < tokens; t++) {
            f32v xv = load_f32(x + t * x_stride + k);
            for (int r = 0; r < rows; r++) part[t][r] += xv * wv[r];
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) acc[t * ROWS + r] += sum(part[t][r]);
}

// The same for any number of tokens up to TOKENS and all ROWS of the tile.
INLINE void multiply_tokens(const f32 *x, i64 x_stride, const f32 *w, i64 columns, f32 *acc, i64 tokens) {
    for (int r = 0; r < ROWS; r += ROWS_AT_ONCE) {
        i64 t = 0;
        for (; t + TOKENS_AT_ONCE <= tokens; t += TOKENS_AT_ONCE)
            multiply_tile(x + t * x_stride, x_stride, w + r * TILE, columns, acc + t * ROWS + r, TOKENS_AT_ONCE, ROWS_AT_ONCE);
        for (; t < tokens; t++)
            multiply_tile(x + t * x_stride, x_stride, w + r * TILE, columns, acc + t * ROWS + r, 1, ROWS_AT_ONCE);
    }
}

#define DEFINE_STORE(NAME, OUT)                                                                       \
    INLINE void NAME(OUT *y, i64 y_stride, const f32 *acc, i64 tokens, i64 rows) {                    \
        for (i64 t = 0; t < tokens; t++)                                                              \
            for (i64 r = 0; r < rows; r++) y[t * y_stride + r] = (OUT)acc[t * ROWS + r];              \
    }

DEFINE_STORE(write_float32, f32)
DEFINE_STORE(write_float16, f16)

#define WEIGHT f32
#define LOAD_WEIGHT load_f32
#define OUT f32
#define NAME mlcbuild_linear_float32_float32
#define WRITE write_float32
#include "linear_dense.inc"
#undef NAME
#undef OUT
#undef WRITE
#undef WEIGHT
#undef LOAD_WEIGHT

#define WEIGHT f16
#define LOAD_WEIGHT load_f16
#define OUT f32
#define NAME mlcbuild_linear_float16_float32
#define WRITE write_float32
#include "linear_dense.inc"
#undef NAME
#undef OUT
#undef WRITE
#define OUT f16
#define NAME mlcbuild_linear_float16_float16
#define WRITE write_float16
#include "linear_dense.inc"
#undef NAME
#undef OUT
#undef WRITE
#undef WEIGHT
#undef LOAD_WEIGHT

// Group-quantized weights: bits, words in a group.
#define BITS 4
#define GROUP_WORDS 4
#define SCALE f32
#define OUT f32
#define NAME mlcbuild_linear_int4_float32_float32
#define WRITE write_float32
#include "linear_group.inc"
#undef NAME
#undef OUT
#undef WRITE
#undef SCALE

#define SCALE f16
#define OUT f32
#define NAME mlcbuild_linear_int4_float16_float32
#define WRITE write_float32
#include "linear_group.inc"
#undef NAME
#undef OUT
#undef WRITE
#define OUT f16
#define NAME mlcbuild_linear_int4_float16_float16
#define WRITE write_float16
#include "linear_group.inc"
#undef NAME
#undef OUT
#undef WRITE
#undef SCALE

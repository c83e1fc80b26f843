// Dot products of 4-bit codes with activations in fixed point (fixed_point.h).
//
// A block of LANES words takes its activations as [DIGITS][even codes, odd codes][4 * LANES] bytes, the highest digit
// first, then -ZERO times the sum of each word's eight [LANES] int32, and the scale [LANES] float32: no more bytes than
// in float32, whose place they take.

#define TERM_AT (8 * DIGITS * LANES)
#define SCALE_AT (TERM_AT + 4 * LANES)
#define BLOCK_BYTES (SCALE_AT + 4 * LANES)

INLINE void pack_dot(const void *x, i64 from, i32 wide, f32 *out, i64 k) {
    i8 *block = (i8 *)out;
    for (i64 start = 0; start < k; start += 8 * LANES, block += BLOCK_BYTES)
        for (i64 lane = 0; lane < LANES; lane += 4) {
            fixed group = to_fixed(load_32(x, from, start + 8 * lane, wide, k));
            i8 *at = block + lane * 4;
            for (int d = 0; d < DIGITS; d++) {
                *(i8x16 *)(at + 8 * d * LANES) = group.even[d];
                *(i8x16 *)(at + (8 * d + 4) * LANES) = group.odd[d];
            }
            *(i32x4 *)(at + TERM_AT) = group.eights * -ZERO;
            *(f32x4 *)(at + SCALE_AT) = (f32x4){} + group.scale;
        }
}

#ifndef AHEAD
#define AHEAD 16384  // bytes of words that are fetched in advance: some rows further on
#endif
#ifndef SCALES_AHEAD
#define SCALES_AHEAD (AHEAD / 32 * (int)sizeof(scale_type))  // those of the same rows
#endif
#ifndef AT_ONCE
#define AT_ONCE 4   // rows that share the loads of the activations
#endif

// One block of the activations, held in registers for all rows.
typedef struct {
    i8v digit[2 * DIGITS];
    i32v term;
    f32v scale;
} block;

INLINE block load_block(const i8 *x) {
    block b;
    for (int d = 0; d < 2 * DIGITS; d++) b.digit[d] = *(const i8v *)(x + d * 4 * LANES);
    b.term = *(const i32v *)(x + TERM_AT);
    b.scale = load_float32((const f32 *)(x + SCALE_AT));
    return b;
}

INLINE f32v dot_block(const block *x, u32v word, f32v scale, f32v acc) {
    bytes_v even = (bytes_v)(word & 0x0f0f0f0fu), odd = (bytes_v)((word >> 4) & 0x0f0f0f0fu);
    i32v total = {};
    UNROLL for (int d = 0; d < DIGITS; d++) total = dot8(total << 8, even, odd, x->digit[2 * d], x->digit[2 * d + 1]);
    return acc + __builtin_convertvector(total + x->term, f32v) * (scale * x->scale);
}

INLINE void dot_rows(const f32 *packed, const u32 *codes, const scale_type *scales, i64 words, i64 groups, f32 *out, const int count) {
    f32v acc[AT_ONCE] = {};
    const i8 *x = (const i8 *)packed;
    i64 at = 0;
    for (; at + GROUP_WORDS * LANES <= words; at += GROUP_WORDS * LANES) {
        affine a[AT_ONCE];
        UNROLL for (int r = 0; r < count; r++) {
            const scale_type *scale = scales + r * groups + at / GROUP_WORDS;
            __builtin_prefetch((const char *)scale + SCALES_AHEAD);
            a[r] = affine_v(scale);
        }
        UNROLL for (int b = 0; b < GROUP_WORDS; b++, x += BLOCK_BYTES) {
            block loaded = load_block(x);
            UNROLL for (int r = 0; r < count; r++) {
                const u32 *word = codes + r * words + at + b * LANES;
                __builtin_prefetch((const char *)word + AHEAD);
                acc[r] = dot_block(&loaded, *(const u32v *)word, choose_affine(a[r], b).scale, acc[r]);
            }
        }
    }
    for (; at < words; at += LANES, x += BLOCK_BYTES) {
        block loaded = load_block(x);
        UNROLL for (int r = 0; r < count; r++) {
            u32v word = load_words(codes + r * words + at, words - at);
            acc[r] = dot_block(&loaded, word, spread_affine(scales + r * groups, at, words - at).scale, acc[r]);
        }
    }
    UNROLL for (int r = 0; r < count; r++) out[r] = sum(acc[r]);
}

INLINE void dot(const f32 *x, i64 stride, const weights *w, i64 first, i64 rows, i64 tokens, f32 *out) {
    i64 groups = (w->k + GROUP_SIZE - 1) / GROUP_SIZE, words = groups * GROUP_WORDS;
    const u32 *codes = (const u32 *)w->part[0] + first * words;
    const scale_type *scales = (const scale_type *)w->part[1] + first * groups;
    i64 r = 0;
    for (; r + AT_ONCE <= rows; r += AT_ONCE)
        for (i64 t = 0; t < tokens; t++)
            dot_rows(x + t * stride, codes + r * words, scales + r * groups, words, groups, out + t * TASK_ROWS + r, AT_ONCE);
    for (; r < rows; r++)
        for (i64 t = 0; t < tokens; t++)
            dot_rows(x + t * stride, codes + r * words, scales + r * groups, words, groups, out + t * TASK_ROWS + r, 1);
}

// Dot products of 4-bit codes with activations in fixed point (fixed_point.h).
//
// A block of LANES words takes its activations as digits x2, x1, x0 of [even codes, odd codes][4 * LANES] bytes, then
// -ZERO times the sum of each word's eight [LANES] int32, and the scale [LANES] float32: as many bytes as in float32.

#define BLOCK_BYTES (32 * LANES)

INLINE void pack_dot(const void *x, i64 from, i32 wide, f32 *out, i64 k) {
    for (i64 start = 0; start < k; start += 8 * LANES)
        for (i64 lane = 0; lane < LANES; lane += 4) {
            fixed group = to_fixed(load_32(x, from, start + 8 * lane, wide, k));
            i8 *at = (i8 *)(out + start) + lane * 4;
            for (int d = 0; d < 3; d++) {
                *(i8x16 *)(at + 8 * d * LANES) = group.even[d];
                *(i8x16 *)(at + (8 * d + 4) * LANES) = group.odd[d];
            }
            *(i32x4 *)(at + 24 * LANES) = group.eights * -ZERO;
            *(f32x4 *)(at + 28 * LANES) = (f32x4){} + group.scale;
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
    i8v digit[6];
    i32v term;
    f32v scale;
} block;

INLINE block load_block(const i8 *x) {
    block b;
    for (int d = 0; d < 6; d++) b.digit[d] = *(const i8v *)(x + d * 4 * LANES);
    b.term = *(const i32v *)(x + 24 * LANES);
    b.scale = load_float32((const f32 *)(x + 28 * LANES));
    return b;
}

INLINE f32v dot_block(const block *x, u32v word, f32v scale, f32v acc) {
    bytes_v even = (bytes_v)(word & 0x0f0f0f0fu), odd = (bytes_v)((word >> 4) & 0x0f0f0f0fu);
    i32v total = dot8((i32v){}, even, odd, x->digit[0], x->digit[1]) << 8;
    total = dot8(total, even, odd, x->digit[2], x->digit[3]) << 8;
    total = dot8(total, even, odd, x->digit[4], x->digit[5]) + x->term;
    return acc + __builtin_convertvector(total, f32v) * (scale * x->scale);
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

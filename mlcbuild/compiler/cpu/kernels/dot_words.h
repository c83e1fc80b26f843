// Dot products with words taken lane by lane: lane l of a register holds word l of LANES neighbours, step j takes code j
// of every word. The activations of such a block lie as [j][lane], so one register of scales serves the whole block.

INLINE void pack_dot(const void *x, i64 from, i32 wide, f32 *out, i64 k) {
    for (i64 start = 0; start < k; start += LANES * PER_WORD)
        for (int lane = 0; lane < LANES; lane++)
            UNROLL for (int j = 0; j < PER_WORD; j++) {
                i64 at = start + lane * PER_WORD + j;
                out[start + j * LANES + lane] = at < k ? get_any(x, from + at, wide) : 0.0f;
            }
}

#ifndef AHEAD
#define AHEAD 4096  // bytes of words that are fetched in advance: rows follow each other
#endif

INLINE f32v dot_block(const f32 *x, u32v word, affine a) {
    f32v even = {}, odd = {};  // in turns: an addition waits for the one before
    UNROLL for (int j = 0; j < PER_WORD; j++) {
        f32v w = centred(word >> (u32)(BITS * j));
        if (ASYMMETRIC) w = w * a.scale + a.minimum;
        if (j % 2) odd += w * load_float32(x + j * LANES);
        else even += w * load_float32(x + j * LANES);
    }
    return ASYMMETRIC ? even + odd : (even + odd) * a.scale;
}

INLINE f32 dot_row(const f32 *x, const WORD *codes, const scale_type *scales, i64 words) {
    f32v acc = {};
    i64 at = 0;
    for (; at + GROUP_WORDS * LANES <= words; at += GROUP_WORDS * LANES) {
        affine groups = affine_v(scales + at / GROUP_WORDS);
        for (int b = 0; b < GROUP_WORDS; b++) {
            const WORD *from = codes + at + b * LANES;
            fetch((const char *)from + AHEAD);
            acc += dot_block(x + (at + b * LANES) * PER_WORD, load_words(from, LANES), choose_affine(groups, b));
        }
    }
    for (; at < words; at += LANES)
        acc += dot_block(x + at * PER_WORD, load_words(codes + at, words - at), spread_affine(scales, at, 1, words));
    return sum(acc);
}

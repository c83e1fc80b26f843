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
#define AHEAD 16384  // bytes of words that are fetched in advance: some rows further on
#endif
#define AT_ONCE 4   // rows that share the loads of the activations

INLINE void dot_block(const f32 *x, const u32v *word, const affine *a, f32v *acc, const int count) {
    f32v even[AT_ONCE] = {}, odd[AT_ONCE] = {};
    UNROLL for (int j = 0; j < PER_WORD; j++) {
        f32v one = load_float32(x + j * LANES);
        UNROLL for (int r = 0; r < count; r++) {
            f32v w = centred(word[r] >> (u32)(BITS * j));
            if (ASYMMETRIC) w = w * a[r].scale + a[r].minimum;
            if (j % 2) odd[r] += w * one;
            else even[r] += w * one;
        }
    }
    UNROLL for (int r = 0; r < count; r++) acc[r] += ASYMMETRIC ? even[r] + odd[r] : (even[r] + odd[r]) * a[r].scale;
}

INLINE void dot_rows(const f32 *x, const WORD *codes, const scale_type *scales, i64 words, i64 groups, f32 *out, const int count) {
    f32v acc[AT_ONCE] = {};
    u32v word[AT_ONCE];
    affine all[AT_ONCE], a[AT_ONCE];
    i64 at = 0;
    for (; at + GROUP_WORDS * LANES <= words; at += GROUP_WORDS * LANES) {
        UNROLL for (int r = 0; r < count; r++) all[r] = affine_v(scales + r * groups + at / GROUP_WORDS);
        for (int b = 0; b < GROUP_WORDS; b++) {
            UNROLL for (int r = 0; r < count; r++) {
                const WORD *from = codes + r * words + at + b * LANES;
                __builtin_prefetch((const char *)from + AHEAD);
                word[r] = load_words(from, LANES);
                a[r] = choose_affine(all[r], b);
            }
            dot_block(x + (at + b * LANES) * PER_WORD, word, a, acc, count);
        }
    }
    for (; at < words; at += LANES) {
        UNROLL for (int r = 0; r < count; r++) {
            word[r] = load_words(codes + r * words + at, words - at);
            a[r] = spread_affine(scales + r * groups, at, words - at);
        }
        dot_block(x + at * PER_WORD, word, a, acc, count);
    }
    UNROLL for (int r = 0; r < count; r++) out[r] = sum(acc[r]);
}

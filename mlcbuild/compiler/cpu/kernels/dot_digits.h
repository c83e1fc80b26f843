// Dot products of codes with activations in fixed point (fixed_point.h), the codes taken apart into bytes.
//
// A word's codes are QUADS times four bytes. A block of LANES words takes its activations as [DIGITS][QUADS][4 * LANES]
// bytes, the highest digit first. WORDS_AT_ONCE words are a unit, whose activations share a scale and whose weights do.
// The LANES units of WORDS_AT_ONCE blocks are a stretch: before its blocks, -ZERO times the sum of each unit's activations
// and their scale, [LANES] float32 each. That is no more bytes than activations have in float32, whose place they take.

#if BITS == 4
#define QUADS 2  // even codes, odd codes
#define WORDS_AT_ONCE 4  // neighbours whose activations share a scale: 32 of them at most
INLINE void split(u32v word, bytes_v *out) {
    out[0] = (bytes_v)(word & 0x0f0f0f0fu);
    out[1] = high_nibbles(word);
}
INLINE i32v add_products(i32v acc, const bytes_v *code, const i8v *x) { return dot8(acc, code[0], code[1], x[0], x[1]); }
#elif BITS == 8
#define QUADS 1
#define WORDS_AT_ONCE 8
INLINE void split(u32v word, bytes_v *out) { out[0] = (bytes_v)word; }
INLINE i32v add_products(i32v acc, const bytes_v *code, const i8v *x) { return dot4(acc, code[0], x[0]); }
#elif BITS == 3
#define QUADS 3  // in order; the last two bytes are nothing, multiplied with zero
#define WORDS_AT_ONCE 2
INLINE void split(u32v word, bytes_v *out) {
    typedef unsigned long long u64v __attribute__((vector_size(64)));
    // Of each byte the first of eight bits, among the 64 of two words.
    const u64v first = (u64v){} + 0x2926232009060300ull, next = (u64v){} + 0x0c0c0c0c0c0c0c0cull;
    UNROLL for (int quad = 0; quad < QUADS; quad++) {
        i8v from = (i8v)(first + (unsigned long long)quad * next);
        out[quad] = (bytes_v)__builtin_ia32_vpmultishiftqb512(from, (i8v)word) & 7;
    }
}
INLINE i32v add_products(i32v acc, const bytes_v *code, const i8v *x) {
    return dot4(dot4(dot4(acc, code[0], x[0]), code[1], x[1]), code[2], x[2]);
}
#endif

#define HEAD_BYTES (2 * 4 * LANES)
#define BLOCK_BYTES (4 * QUADS * DIGITS * LANES)
#define STRETCH_WORDS (WORDS_AT_ONCE * LANES)
#define STRETCH_BYTES (HEAD_BYTES + WORDS_AT_ONCE * BLOCK_BYTES)
_Static_assert(HEAD_BYTES + BLOCK_BYTES <= 4 * PER_WORD * LANES, "a stretch takes the place of its activations in float32");
_Static_assert(GROUP_WORDS % WORDS_AT_ONCE == 0, "the weights of a unit have one scale");

// The activations of a unit, the unit-th of a stretch.
INLINE void put_unit(fixed group, i8 *stretch, i64 unit) {
    i8 *block = stretch + HEAD_BYTES + unit * WORDS_AT_ONCE / LANES * BLOCK_BYTES;
    i64 lane = unit * WORDS_AT_ONCE % LANES;
#if BITS == 4
    for (int d = 0; d < DIGITS; d++) {
        *(i8x16 *)(block + (8 * d) * LANES + 4 * lane) = EVEN(group.digit[d]);
        *(i8x16 *)(block + (8 * d + 4) * LANES + 4 * lane) = ODD(group.digit[d]);
    }
#else
    for (i64 word = 0; word < WORDS_AT_ONCE; word++)
        for (i64 j = 0; j < 4 * QUADS; j++) {
            i64 from = word * PER_WORD + j, to = j / 4 * 4 * LANES + 4 * (lane + word) + j % 4;
            for (i64 d = 0; d < DIGITS; d++) block[4 * QUADS * d * LANES + to] = j < PER_WORD ? group.digit[d][from] : 0;
        }
#endif
    ((f32 *)stretch)[unit] = (f32)(__builtin_reduce_add(group.value) * -ZERO);
    ((f32 *)stretch)[LANES + unit] = group.scale;
}

INLINE void pack_dot(const void *x, i64 from, i32 wide, f32 *out, i64 k) {
    i8 *stretch = (i8 *)out;
    i64 blocks = (k + PER_WORD * LANES - 1) / (PER_WORD * LANES), units = blocks * LANES / WORDS_AT_ONCE;
    for (i64 first = 0; first < units; first += LANES, stretch += STRETCH_BYTES) {
        store_float32((f32 *)stretch, splat(0.0f));
        store_float32((f32 *)stretch + LANES, splat(0.0f));
        for (i64 unit = 0; unit < min_i64(LANES, units - first); unit++) {
            i64 at = (first + unit) * WORDS_AT_ONCE * PER_WORD, end = min_i64(k, at + WORDS_AT_ONCE * PER_WORD);
            put_unit(to_fixed(load_32(x, from, at, wide, end)), stretch, unit);
        }
    }
}

#ifndef AHEAD
#define AHEAD 4096  // bytes of words that are fetched in advance: rows follow each other
#endif
#define SCALES_AHEAD (AHEAD / 32 * (int)sizeof(scale_type))  // those of the same words

// The products of LANES words with the b-th block of a stretch, scaled; `units` are the scales of the stretch's units.
INLINE f32v dot_block(const i8 *stretch, int b, u32v word, f32v units) {
    const i8v *digits = (const i8v *)(stretch + HEAD_BYTES + b * BLOCK_BYTES);
    bytes_v code[QUADS];
    split(word, code);
    i32v total = {}, unit;
    UNROLL for (int d = 0; d < DIGITS; d++) total = add_products(total << 8, code, digits + QUADS * d);
    for (int lane = 0; lane < LANES; lane++) unit[lane] = (b * LANES + lane) / WORDS_AT_ONCE;
    return __builtin_convertvector(total, f32v) * permute(units, unit);
}

// Scales of a stretch's units from those of LANES groups; the s-th stretch of these groups.
INLINE f32v unit_scales(f32v groups, int s) {
    i32v index;
    for (int unit = 0; unit < LANES; unit++) index[unit] = (s * LANES + unit) * WORDS_AT_ONCE / GROUP_WORDS;
    return permute(groups, index);
}

INLINE f32 dot_row(const f32 *packed, const u32 *codes, const scale_type *scales, i64 words) {
    f32v acc[2] = {};  // in turns: an addition waits for the one before
    const i8 *x = (const i8 *)packed;
    i64 at = 0;
    while (at + GROUP_WORDS * LANES <= words) {
        const scale_type *scale = scales + at / GROUP_WORDS;
        f32v groups = affine_v(scale).scale;
        fetch((const char *)scale + SCALES_AHEAD);
        UNROLL for (int s = 0; s < GROUP_WORDS / WORDS_AT_ONCE; s++, at += STRETCH_WORDS, x += STRETCH_BYTES) {
            f32v units = unit_scales(groups, s) * load_float32((const f32 *)x + LANES);
            acc[1] += units * load_float32((const f32 *)x);
            UNROLL for (int b = 0; b < WORDS_AT_ONCE; b++) {
                const u32 *word = codes + at + b * LANES;
                fetch((const char *)word + AHEAD);
                acc[b % 2] += dot_block(x, b, *(const u32v *)word, units);
            }
        }
    }
    for (; at < words; at += STRETCH_WORDS, x += STRETCH_BYTES) {
        f32v units = spread_affine(scales, at, WORDS_AT_ONCE, words).scale * load_float32((const f32 *)x + LANES);
        acc[1] += units * load_float32((const f32 *)x);
        UNROLL for (int b = 0; b < WORDS_AT_ONCE; b++) {
            i64 first = at + b * LANES;
            if (first < words) acc[b % 2] += dot_block(x, b, load_words(codes + first, words - first), units);
        }
    }
    return sum(acc[0] + acc[1]);
}

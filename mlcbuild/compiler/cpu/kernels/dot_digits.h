// Dot products of codes with activations in fixed point (fixed_point.h), the codes taken apart into bytes.
//
// A word's codes are QUADS times four bytes. A block of LANES words takes its activations as [DIGITS][QUADS][4 * LANES]
// bytes, the highest digit first, then -ZERO times the sum of each word's [LANES] int32, and the scale [LANES] float32: no
// more bytes than in float32, whose place they take.

#if BITS == 4
#define QUADS 2  // even codes, odd codes
#define WORDS_AT_ONCE 4  // neighbours whose activations share a scale: 32 of them at most
INLINE void split(u32v word, bytes_v *out) {
    out[0] = (bytes_v)(word & 0x0f0f0f0fu);
    out[1] = (bytes_v)((word >> 4) & 0x0f0f0f0fu);
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

#define TERM_AT (4 * QUADS * DIGITS * LANES)
#define SCALE_AT (TERM_AT + 4 * LANES)
#define BLOCK_BYTES (SCALE_AT + 4 * LANES)
_Static_assert(BLOCK_BYTES <= 4 * PER_WORD * LANES, "a block takes the place of its activations in float32");

// The activations of WORDS_AT_ONCE words, `lane` being the first.
INLINE void put_words(fixed group, i8 *block, i64 lane) {
#if BITS == 4
    for (int d = 0; d < DIGITS; d++) {
        *(i8x16 *)(block + (8 * d) * LANES + 4 * lane) = EVEN(group.digit[d]);
        *(i8x16 *)(block + (8 * d + 4) * LANES + 4 * lane) = ODD(group.digit[d]);
    }
    *(i32x4 *)(block + TERM_AT + 4 * lane) = eights(group.value) * -ZERO;
#else
    for (i64 word = 0; word < WORDS_AT_ONCE; word++) {
        i32 total = 0;
        for (i64 j = 0; j < 4 * QUADS; j++) {
            i64 from = word * PER_WORD + j, to = j / 4 * 4 * LANES + 4 * (lane + word) + j % 4;
            for (i64 d = 0; d < DIGITS; d++) block[4 * QUADS * d * LANES + to] = j < PER_WORD ? group.digit[d][from] : 0;
            if (j < PER_WORD) total += group.value[from];
        }
        ((i32 *)(block + TERM_AT))[lane + word] = total * -ZERO;
    }
#endif
    for (int word = 0; word < WORDS_AT_ONCE; word++) ((f32 *)(block + SCALE_AT))[lane + word] = group.scale;
}

INLINE void pack_dot(const void *x, i64 from, i32 wide, f32 *out, i64 k) {
    i8 *block = (i8 *)out;
    for (i64 start = 0; start < k; start += PER_WORD * LANES, block += BLOCK_BYTES)
        for (i64 lane = 0; lane < LANES; lane += WORDS_AT_ONCE) {
            i64 at = start + PER_WORD * lane, end = min_i64(k, at + PER_WORD * WORDS_AT_ONCE);
            put_words(to_fixed(load_32(x, from, at, wide, end)), block, lane);
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
    i8v digit[DIGITS * QUADS];
    i32v term;
    f32v scale;
} block;

INLINE block load_block(const i8 *x) {
    block b;
    for (int d = 0; d < DIGITS * QUADS; d++) b.digit[d] = *(const i8v *)(x + d * 4 * LANES);
    b.term = *(const i32v *)(x + TERM_AT);
    b.scale = load_float32((const f32 *)(x + SCALE_AT));
    return b;
}

INLINE f32v dot_block(const block *x, u32v word, f32v scale, f32v acc) {
    bytes_v code[QUADS];
    split(word, code);
    i32v total = {};
    UNROLL for (int d = 0; d < DIGITS; d++) total = add_products(total << 8, code, x->digit + QUADS * d);
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

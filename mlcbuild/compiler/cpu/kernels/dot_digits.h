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

// Adds the products of LANES words of each row with the b-th block of each token's stretch. `units` are the products of
// the scales of both, a unit's in each lane.
INLINE void dot_block(const i8 *stretch, i64 stride, int b, const u32v *word, f32v (*units)[TOKENS_AT_ONCE],
                      f32v (*acc)[TOKENS_AT_ONCE], const int rows, const int tokens) {
    bytes_v code[ROWS_AT_ONCE][QUADS];
    i32v unit;
    for (int lane = 0; lane < LANES; lane++) unit[lane] = (b * LANES + lane) / WORDS_AT_ONCE;
    UNROLL for (int r = 0; r < rows; r++) split(word[r], code[r]);
    UNROLL for (int t = 0; t < tokens; t++) {
        const i8v *digits = (const i8v *)(stretch + t * stride + HEAD_BYTES + b * BLOCK_BYTES);
        UNROLL for (int r = 0; r < rows; r++) {
            i32v total = {};
            UNROLL for (int d = 0; d < DIGITS; d++) total = add_products(total << 8, code[r], digits + QUADS * d);
            acc[r][t] += __builtin_convertvector(total, f32v) * permute(units[r][t], unit);
        }
    }
}

// Scales of a stretch's units from those of LANES groups; the s-th stretch of these groups.
INLINE f32v unit_scales(f32v groups, int s) {
    i32v index;
    for (int unit = 0; unit < LANES; unit++) index[unit] = (s * LANES + unit) * WORDS_AT_ONCE / GROUP_WORDS;
    return permute(groups, index);
}

// The products of the scales of a row's units and of each token's, and what the codes' zero adds up to.
INLINE void begin_stretch(const i8 *stretch, i64 stride, f32v scale, f32v *units, f32v *acc, const int tokens) {
    UNROLL for (int t = 0; t < tokens; t++) {
        const f32 *head = (const f32 *)(stretch + t * stride);
        units[t] = scale * load_float32(head + LANES);
        acc[t] += units[t] * load_float32(head);
    }
}

// out[t * TASK_ROWS + r] = the products of `words` words of `rows` rows, which have `groups` groups, with `tokens` tokens,
// `stride` bytes from one token to the next.
INLINE void dot_tile(const void *packed, i64 stride, const u32 *codes, const scale_type *scales, i64 groups, i64 words,
                     f32 *out, const int rows, const int tokens) {
    // In turns where there is one sum: an addition waits for the one before.
    f32v acc[2][ROWS_AT_ONCE][TOKENS_AT_ONCE] = {}, units[ROWS_AT_ONCE][TOKENS_AT_ONCE];
    u32v word[ROWS_AT_ONCE];
    const i8 *x = (const i8 *)packed;
    i64 at = 0, row_words = groups * GROUP_WORDS, ahead = bytes_ahead(row_words, rows);
    while (at + GROUP_WORDS * LANES <= words) {
        f32v scale[ROWS_AT_ONCE];
        UNROLL for (int r = 0; r < rows; r++) {
            const scale_type *from = scales + r * groups + at / GROUP_WORDS;
            fetch(from + ahead / (4 * GROUP_WORDS), rows > 1);
            scale[r] = affine_v(from).scale;
        }
        UNROLL for (int s = 0; s < GROUP_WORDS / WORDS_AT_ONCE; s++, at += STRETCH_WORDS, x += STRETCH_BYTES) {
            UNROLL for (int r = 0; r < rows; r++)
                begin_stretch(x, stride, unit_scales(scale[r], s), units[r], acc[1][r], tokens);
            UNROLL for (int b = 0; b < WORDS_AT_ONCE; b++) {
                UNROLL for (int r = 0; r < rows; r++) {
                    const u32 *from = codes + r * row_words + at + b * LANES;
                    fetch((const char *)from + ahead, rows > 1);
                    word[r] = *(const u32v *)from;
                }
                dot_block(x, stride, b, word, units, acc[rows * tokens == 1 && b % 2], rows, tokens);
            }
        }
    }
    for (; at < words; at += STRETCH_WORDS, x += STRETCH_BYTES) {
        UNROLL for (int r = 0; r < rows; r++) {
            f32v scale = spread_affine(scales + r * groups, at, WORDS_AT_ONCE, words).scale;
            begin_stretch(x, stride, scale, units[r], acc[1][r], tokens);
        }
        UNROLL for (int b = 0; b < WORDS_AT_ONCE; b++) {
            i64 first = at + b * LANES;
            if (first >= words) break;
            UNROLL for (int r = 0; r < rows; r++) word[r] = load_words(codes + r * row_words + first, words - first);
            dot_block(x, stride, b, word, units, acc[0], rows, tokens);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < tokens; t++) out[t * TASK_ROWS + r] = sum(acc[0][r][t] + acc[1][r][t]);
}

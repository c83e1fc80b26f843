// Dot products of codes with activations in fixed point (fixed_point.h), the codes taken apart into bytes.
//
// WORDS_AT_ONCE neighbouring words are a unit, whose activations share a scale and whose weights do. LANES units are a
// stretch: as many registers, turned so that lane l of each holds a word of one unit. Then a unit's products are summed as
// whole numbers, and turning costs the same for many tokens as for one. What no stretch is left for, at a row's end, is
// taken register by register as it lies: a lane holds one word.
//
// A stretch's activations are, per lane, -ZERO * sum(x) [LANES] int32 and the scale [LANES] float32; then for each register
// [DIGITS][QUADS][4 * LANES] bytes, the highest digit first, where a word's codes are QUADS times four bytes. A register's
// are the same, of one. That is no more than activations take in float32, whose place it is. The tokens' parts of a stretch
// lie one after the other: rows of some KB each would meet in the same few lines of the first-level cache.

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
#define WORDS_AT_ONCE 4
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

#define ROWS_AT_ONCE 2
#define TOKENS_AT_ONCE 4
#define HEAD_BYTES (2 * 4 * LANES)
#define BLOCK_BYTES (4 * QUADS * DIGITS * LANES)
#define STRETCH_WORDS (WORDS_AT_ONCE * LANES)
#define STRETCH_BYTES (HEAD_BYTES + WORDS_AT_ONCE * BLOCK_BYTES)
#define REGISTER_BYTES (HEAD_BYTES + BLOCK_BYTES)
_Static_assert(REGISTER_BYTES <= 4 * PER_WORD * LANES, "a register takes the place of its activations in float32");
_Static_assert(GROUP_WORDS % WORDS_AT_ONCE == 0, "the weights of a unit have one scale");

// The unit that lane `lane` has after `turn`.
INLINE int unit_in(int lane) {
    int word = lane % 4 * WORDS_AT_ONCE;  // in the four lanes of each register that are turned together
    return (word / 4 * LANES + lane / 4 * 4 + word % 4) / WORDS_AT_ONCE;
}

// The first words of these units, in the lanes.
INLINE u32v unit_words(void) {
    u32v words;
    UNROLL for (int lane = 0; lane < LANES; lane++) words[lane] = (u32)(unit_in(lane) * WORDS_AT_ONCE);
    return words;
}

#if LANES == 16
#define EVENS(a, b) __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30)
#define ODDS(a, b) __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31)
#elif LANES == 8
#define EVENS(a, b) __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14)
#define ODDS(a, b) __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15)
#else
#define EVENS(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ODDS(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#endif

// A stretch's words: v[j] gets word j of every unit. Four lanes stay four lanes, as the fastest shuffles have it.
INLINE void turn(u32v v[WORDS_AT_ONCE]) {
    UNROLL for (int step = 1; step < WORDS_AT_ONCE; step *= 2) {
        u32v apart[WORDS_AT_ONCE];
        UNROLL for (int i = 0; i < WORDS_AT_ONCE / 2; i++) {
            apart[i] = EVENS(v[2 * i], v[2 * i + 1]);
            apart[i + WORDS_AT_ONCE / 2] = ODDS(v[2 * i], v[2 * i + 1]);
        }
        UNROLL for (int i = 0; i < WORDS_AT_ONCE; i++) v[i] = apart[i];
    }
}

// The activations of word `word` of a unit, in a register's lane.
INLINE void put_word(const fixed *unit, int word, i8 *lane) {
    UNROLL for (int d = 0; d < DIGITS; d++) {
        i8 *to = lane + 4 * QUADS * d * LANES;
#if BITS == 4
        i8x16 evens = EVEN(unit->digit[d]), odds = ODD(unit->digit[d]);
        *(i32 *)to = (*(i32x4 *)&evens)[word];
        *(i32 *)(to + 4 * LANES) = (*(i32x4 *)&odds)[word];
#else
        for (i64 j = 0; j < 4 * QUADS; j++)
            to[j / 4 * 4 * LANES + j % 4] = j < PER_WORD ? unit->digit[d][word * PER_WORD + j] : 0;
#endif
    }
}

// What codes of ZERO add, and the scale.
INLINE void put_head(i32 total, f32 scale, i8 *head, i64 lane) {
    ((i32 *)head)[lane] = total * -ZERO;
    ((f32 *)head)[LANES + lane] = scale;
}

// The unit of activations from column `at` on; behind k they are zeros.
INLINE fixed load_unit(const void *x, i64 from, i64 at, i32 wide, i64 k) {
    return to_fixed(load_32(x, from, at, wide, min_i64(k, at + WORDS_AT_ONCE * PER_WORD)));
}

// Token `t` of `tokens`, whose activations are those of x from element `from` on.
INLINE void pack_dot(const void *x, i64 from, i32 wide, f32 *packed, i64 t, i64 tokens, i64 k, i64 stride) {
    (void)stride;
    i64 word = 0, words = words_held(k);
    i8 *to = (i8 *)packed;
    for (; word + STRETCH_WORDS <= words; word += STRETCH_WORDS, to += tokens * STRETCH_BYTES)
        for (int lane = 0; lane < LANES; lane++) {
            fixed unit = load_unit(x, from, (word + unit_in(lane) * WORDS_AT_ONCE) * PER_WORD, wide, k);
            i8 *head = to + t * STRETCH_BYTES;
            for (int j = 0; j < WORDS_AT_ONCE; j++) put_word(&unit, j, head + HEAD_BYTES + j * BLOCK_BYTES + 4 * lane);
            put_head(__builtin_reduce_add(unit.value), unit.scale, head, lane);
        }
    for (; word < words; word += LANES, to += tokens * REGISTER_BYTES)
        for (int lane = 0; lane < LANES; lane += WORDS_AT_ONCE) {
            fixed unit = load_unit(x, from, (word + lane) * PER_WORD, wide, k);
            i8 *head = to + t * REGISTER_BYTES;
            for (int j = 0; j < WORDS_AT_ONCE; j++) {
                i32 total = 0;
                for (int i = 0; i < PER_WORD; i++) total += unit.value[j * PER_WORD + i];
                put_word(&unit, j, head + HEAD_BYTES + 4 * (lane + j));
                put_head(total, unit.scale, head, lane + j);
            }
        }
}

INLINE void fetch_bytes(const char *p, const int bytes) {
    UNROLL for (int i = 0; i < bytes; i += 64) fetch(p + i, 0);
}

// Adds the products of a stretch of each row, or of one register of it, whose lanes have these scales, with each token.
INLINE void dot_stretch(const i8 *x, u32v (*word)[WORDS_AT_ONCE], const f32v *scale, f32v (*acc)[TOKENS_AT_ONCE],
                        const int rows, const int tokens, const int registers) {
    bytes_v code[ROWS_AT_ONCE][WORDS_AT_ONCE][QUADS];
    UNROLL for (int r = 0; r < rows; r++) {
        if (registers > 1) turn(word[r]);
        UNROLL for (int j = 0; j < registers; j++) split(word[r][j], code[r][j]);
    }
    UNROLL for (int t = 0; t < tokens; t++, x += HEAD_BYTES + registers * BLOCK_BYTES) {
        u32v total[ROWS_AT_ONCE] = {};
        UNROLL for (int d = 0; d < DIGITS; d++) {
            i32v sum[ROWS_AT_ONCE];
            UNROLL for (int r = 0; r < rows; r++) sum[r] = d == DIGITS - 1 ? *(const i32v *)x : (i32v){};
            UNROLL for (int j = 0; j < registers; j++)
                UNROLL for (int r = 0; r < rows; r++)
                    sum[r] = add_products(sum[r], code[r][j], (const i8v *)(x + HEAD_BYTES + j * BLOCK_BYTES) + QUADS * d);
            UNROLL for (int r = 0; r < rows; r++) total[r] = (total[r] << 8) + (u32v)sum[r];
        }
        UNROLL for (int r = 0; r < rows; r++)
            acc[r][t] += __builtin_convertvector((i32v)total[r], f32v) * (scale[r] * load_float32((const f32 *)x + LANES));
    }
}

// out[t * TASK_ROWS + r] = the products of `words` words of `rows` rows, which have `groups` groups, with tokens from the
// `from`-th on of all that are packed. `next` and `next_scales` are what is to be fetched meanwhile: a share of as many
// bytes as the rows have, one of `shares`, from the first to the last.
INLINE void dot_tile(const i8 *x, i64 from, i64 all, const u32 *codes, const scale_type *scales, i64 groups, i64 words,
                     f32 *out, const char *next, const char *next_scales, const int rows, const int tokens, const int shares) {
    f32v acc[ROWS_AT_ONCE][TOKENS_AT_ONCE] = {}, group[ROWS_AT_ONCE], scale[ROWS_AT_ONCE];
    u32v word[ROWS_AT_ONCE][WORDS_AT_ONCE];
    i64 at = 0, row_words = groups * GROUP_WORDS;
#define TAKE_STRETCH(INDEX) \
    fetch_bytes(next, rows * 4 * STRETCH_WORDS / shares); \
    next += rows * 4 * STRETCH_WORDS / shares; \
    UNROLL for (int r = 0; r < rows; r++) { \
        UNROLL for (int j = 0; j < WORDS_AT_ONCE; j++) word[r][j] = *(const u32v *)(codes + r * row_words + at + j * LANES); \
        scale[r] = permute(group[r], INDEX); \
    } \
    dot_stretch(x + from * STRETCH_BYTES, word, scale, acc, rows, tokens, WORDS_AT_ONCE); \
    at += STRETCH_WORDS; \
    x += all * STRETCH_BYTES
    while (at + GROUP_WORDS * LANES <= words) {
        UNROLL for (int r = 0; r < rows; r++) group[r] = affine_v(scales + r * groups + at / GROUP_WORDS).scale;
        fetch_bytes(next_scales, rows * LANES * (int)sizeof(scale_type) / shares);
        next_scales += rows * LANES * (int)sizeof(scale_type) / shares;
        UNROLL for (int s = 0; s < GROUP_WORDS / WORDS_AT_ONCE; s++) {
            TAKE_STRETCH((i32v)((unit_words() + (u32)(s * STRETCH_WORDS)) / GROUP_WORDS));
        }
    }
    if (at < words) {  // less than LANES groups
        UNROLL for (int r = 0; r < rows; r++) group[r] = last_affine(scales + r * groups, groups).scale;
        if (STRETCH_WORDS < GROUP_WORDS * LANES)
            while (at + STRETCH_WORDS <= words) {
                TAKE_STRETCH(in_last(unit_words() + (u32)at, groups));
            }
        for (; at < words; at += LANES, x += all * REGISTER_BYTES) {
            i32v index = in_last(lane_numbers() + (u32)at, groups);
            fetch_bytes(next, rows * 4 * LANES / shares);
            UNROLL for (int r = 0; r < rows; r++) {
                word[r][0] = load_first(codes + r * row_words + at, words - at);
                scale[r] = permute(group[r], index);
            }
            next += rows * 4 * LANES / shares;
            dot_stretch(x + from * REGISTER_BYTES, word, scale, acc, rows, tokens, 1);
        }
    }
#undef TAKE_STRETCH
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < tokens; t++) out[t * TASK_ROWS + r] = sum(acc[r][t]);
}

#define DEFINE_DOT(R, T, SHARES) \
    NOINLINE void dot_##R##_##T##_##SHARES(const i8 *x, i64 from, i64 all, const u32 *codes, const scale_type *scales, \
                                           i64 groups, i64 words, f32 *out, const char *next, const char *next_scales) { \
        dot_tile(x, from, all, codes, scales, groups, words, out, next, next_scales, R, T, SHARES); \
    }
DEFINE_DOT(1, 1, 1)
DEFINE_DOT(2, 2, 1)
DEFINE_DOT(2, 3, 1)
DEFINE_DOT(2, 4, 1)
DEFINE_DOT(2, 1, 2)
DEFINE_DOT(2, 2, 2)
DEFINE_DOT(2, 3, 2)
DEFINE_DOT(2, 4, 2)

INLINE void dot(const f32 *packed, i64 stride, const weights *w, i64 first, i64 rows, i64 tokens, f32 *out) {
    i64 groups = (w->k + GROUP_SIZE - 1) / GROUP_SIZE, row_words = groups * GROUP_WORDS, words = words_held(w->k), r = 0;
    i64 turn = 8 * row_words, ahead = (AHEAD + turn - 1) / turn * turn;  // of two rows, whole turns
    const i8 *x = (const i8 *)packed;
    const u32 *codes = (const u32 *)w->part[0] + first * row_words;
    const scale_type *scales = (const scale_type *)w->part[1] + first * groups;
    (void)stride;
#define DOT(R, T, SHARES, FROM, BEFORE) \
    dot_##R##_##T##_##SHARES(x, FROM, tokens, codes + r * row_words, scales + r * groups, groups, words, \
        out + (FROM) * TASK_ROWS + r, (const char *)(codes + r * row_words) + (BEFORE), \
        (const char *)(scales + r * groups) + (BEFORE) / (4 * GROUP_WORDS) * (i64)sizeof(scale_type))
    // Of one token, one row after the other: memory is read fastest in one line. With more, rows share what they load, and
    // what is fetched in advance is one line all the same.
    for (; tokens > 1 && r + 2 <= rows; r += 2) {
        if (tokens == 2) DOT(2, 2, 1, 0, ahead);
        else if (tokens == 3) DOT(2, 3, 1, 0, ahead);
        else if (tokens == 4) DOT(2, 4, 1, 0, ahead);
        else {
            DOT(2, 4, 2, 0, ahead);
            if (tokens == 5) DOT(2, 1, 2, 4, ahead + turn / 2);
            else if (tokens == 6) DOT(2, 2, 2, 4, ahead + turn / 2);
            else if (tokens == 7) DOT(2, 3, 2, 4, ahead + turn / 2);
            else DOT(2, 4, 2, 4, ahead + turn / 2);
        }
    }
    for (; r < rows; r++)
        for (i64 t = 0; t < tokens; t++) DOT(1, 1, 1, t, AHEAD);
#undef DOT
}

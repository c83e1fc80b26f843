// Dot products with words taken lane by lane: lane l of a register holds word l of LANES neighbours, step j takes code j
// of every word. The activations of such a block lie as [j][lane], so one register of scales serves the whole block.

INLINE affine permute_affine(affine a, i32v index) {
    return (affine){permute(a.scale, index), ASYMMETRIC ? permute(a.minimum, index) : a.minimum};
}

// What LANES words are scaled by: block `b` of GROUP_WORDS whole blocks, whose LANES scales are given.
INLINE affine choose_affine(affine all, int b) {
    return permute_affine(all, (i32v)((lane_numbers() + (u32)(b * LANES)) / GROUP_WORDS));
}

#define ROWS_AT_ONCE 4
#define TOKENS_AT_ONCE 2

// How far in advance words are fetched: of one row, what follows it; of rows that take turns, whole turns.
INLINE i64 bytes_ahead(i64 words, const int rows) {
    i64 turn = rows * words * (i64)sizeof(WORD);
    return rows == 1 ? AHEAD : (16384 + turn - 1) / turn * turn;
}

INLINE void pack_dot(const void *x, i64 from, i32 wide, f32 *packed, i64 t, i64 tokens, i64 k, i64 stride) {
    f32 *out = packed + t * stride;
    (void)tokens;
    for (i64 start = 0; start < k; start += LANES * PER_WORD)
        for (int lane = 0; lane < LANES; lane++)
            UNROLL for (int j = 0; j < PER_WORD; j++) {
                i64 at = start + lane * PER_WORD + j;
                out[start + j * LANES + lane] = at < k ? get_any(x, from + at, wide) : 0.0f;
            }
}

// Adds the products of LANES words of each row with each token's activations of them.
INLINE void dot_block(const f32 *x, i64 stride, const u32v *word, const affine *a, f32v (*acc)[TOKENS_AT_ONCE],
                      const int rows, const int tokens) {
    // In turns where there is one sum: an addition waits for the one before.
    f32v part[2][ROWS_AT_ONCE][TOKENS_AT_ONCE] = {};
    UNROLL for (int j = 0; j < PER_WORD; j++)
        UNROLL for (int r = 0; r < rows; r++) {
            f32v w = centred(word[r] >> (u32)(BITS * j));
            if (ASYMMETRIC) w = w * a[r].scale + a[r].minimum;
            UNROLL for (int t = 0; t < tokens; t++)
                part[rows * tokens == 1 && j % 2][r][t] += w * load_float32(x + t * stride + j * LANES);
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < tokens; t++) {
            f32v sum = part[0][r][t] + part[1][r][t];
            acc[r][t] += ASYMMETRIC ? sum : sum * a[r].scale;
        }
}

// out[t * TASK_ROWS + r] = the products of `words` words of `rows` rows, which have `groups` groups, with `tokens` tokens,
// `stride` numbers from one token to the next.
INLINE void dot_tile(const f32 *x, i64 stride, const WORD *codes, const scale_type *scales, i64 groups, i64 words,
                     f32 *out, const int rows, const int tokens) {
    f32v acc[ROWS_AT_ONCE][TOKENS_AT_ONCE] = {};
    u32v word[ROWS_AT_ONCE];
    affine all[ROWS_AT_ONCE], a[ROWS_AT_ONCE];
    i64 at = 0, row_words = groups * GROUP_WORDS, ahead = bytes_ahead(row_words, rows);
    for (; at + GROUP_WORDS * LANES <= words; at += GROUP_WORDS * LANES) {
        UNROLL for (int r = 0; r < rows; r++) all[r] = affine_v(scales + r * groups + at / GROUP_WORDS);
        for (int b = 0; b < GROUP_WORDS; b++) {
            UNROLL for (int r = 0; r < rows; r++) {
                const WORD *from = codes + r * row_words + at + b * LANES;
                fetch((const char *)from + ahead, rows > 1);
                word[r] = load_words(from, LANES);
                a[r] = choose_affine(all[r], b);
            }
            dot_block(x + (at + b * LANES) * PER_WORD, stride, word, a, acc, rows, tokens);
        }
    }
    if (at < words)  // what is left is less than LANES groups
        UNROLL for (int r = 0; r < rows; r++) all[r] = last_affine(scales + r * groups, groups);
    for (; at < words; at += LANES) {
        i32v index = in_last(lane_numbers() + (u32)at, groups);
        UNROLL for (int r = 0; r < rows; r++) {
            word[r] = load_words(codes + r * row_words + at, words - at);
            a[r] = permute_affine(all[r], index);
        }
        dot_block(x + at * PER_WORD, stride, word, a, acc, rows, tokens);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < tokens; t++) out[t * TASK_ROWS + r] = sum(acc[r][t]);
}

INLINE void dot(const f32 *x, i64 stride, const weights *w, i64 first, i64 rows, i64 tokens, f32 *out) {
    i64 groups = (w->k + GROUP_SIZE - 1) / GROUP_SIZE, words = groups * GROUP_WORDS;
    const WORD *codes = (const WORD *)w->part[0] + first * words;
    const scale_type *scales = (const scale_type *)w->part[1] + first * groups;
    i64 held = words_held(w->k), r = 0;
#define TILE(R, T) \
    dot_tile(x + t * stride, stride, codes + r * words, scales + r * groups, groups, held, out + t * TASK_ROWS + r, R, T)
    // Of one token, one row after the other: memory is read fastest in one line, a quarter slower where rows alternate.
    // With more, the multiplications take longer than the reading, and several rows share what is loaded for them.
    for (; tokens > 1 && r + ROWS_AT_ONCE <= rows; r += ROWS_AT_ONCE) {
        i64 t = 0;
        for (; t + TOKENS_AT_ONCE <= tokens; t += TOKENS_AT_ONCE) TILE(ROWS_AT_ONCE, TOKENS_AT_ONCE);
        for (; t < tokens; t++) TILE(ROWS_AT_ONCE, 1);
    }
    for (; r < rows; r++)
        for (i64 t = 0; t < tokens; t++) TILE(1, 1);
#undef TILE
}

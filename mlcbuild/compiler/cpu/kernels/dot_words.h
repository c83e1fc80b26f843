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
// `stride` bytes from one token to the next.
INLINE void dot_tile(const void *packed, i64 stride, const WORD *codes, const scale_type *scales, i64 groups, i64 words,
                     f32 *out, const int rows, const int tokens) {
    f32v acc[ROWS_AT_ONCE][TOKENS_AT_ONCE] = {};
    u32v word[ROWS_AT_ONCE];
    affine all[ROWS_AT_ONCE], a[ROWS_AT_ONCE];
    const f32 *x = (const f32 *)packed;
    i64 at = 0, row_words = groups * GROUP_WORDS, ahead = bytes_ahead(row_words, rows);
    stride /= (i64)sizeof(f32);
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
    for (; at < words; at += LANES) {
        UNROLL for (int r = 0; r < rows; r++) {
            word[r] = load_words(codes + r * row_words + at, words - at);
            a[r] = spread_affine(scales + r * groups, at, 1, words);
        }
        dot_block(x + at * PER_WORD, stride, word, a, acc, rows, tokens);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < tokens; t++) out[t * TASK_ROWS + r] = sum(acc[r][t]);
}

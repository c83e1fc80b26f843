// Codes in groups along k (docs/quantization.md): WORD_BITS / BITS codes to a word, the lowest bits first.
//   part 0  words [n, words] WORD; part 1: scales [n, groups] of the model dtype. TRANSPOSED: [words, n], [groups, n].
//   w = (code - ZERO) * scale. ASYMMETRIC: part 1 holds pairs of bfloat16, scale and minimum; w = code * scale + minimum.
#include "bytes.h"
#include "fixed_point.h"

#define WORD JOIN(u, WORD_BITS)
#define PER_WORD (WORD_BITS / BITS)
#define GROUP_WORDS (GROUP_SIZE / PER_WORD)
#define MASK ((1u << BITS) - 1u)
#define ZERO (ASYMMETRIC ? 0 : (1 << (BITS - 1)) - 1)
#define UNIT (16 * PER_WORD)  // a stretch of k is a whole number of registers of words on every CPU
#define TILE_K (UNIT >= 256 ? UNIT : 256 / UNIT * UNIT)
#define TILE_SLACK PER_WORD
#define DOT_TOKENS (TRANSPOSED ? 0 : 8)
#define HAS_VALUE (!TRANSPOSED)

#if ASYMMETRIC
typedef u32 scale_type;
#else
typedef model scale_type;
#endif

typedef struct {
    f32v scale, minimum;
} affine;

INLINE affine affine_v(const scale_type *p) {
#if ASYMMETRIC
    u32v both = *(const u32v *)p, low = both << 16, high = both & 0xffff0000u;
    return (affine){*(f32v *)&low, *(f32v *)&high};
#else
    return (affine){load_model(p), splat(0.0f)};
#endif
}

// Codes in the lowest bits of each lane, whatever lies above them, as code - ZERO.
INLINE f32v centred(u32v word) {
#if LANES == 16 && BITS <= 4
    f32v table;
    for (int i = 0; i < 16; i++) table[i] = (f32)((int)(i & MASK) - ZERO);
    return __builtin_ia32_permvarsf512(table, (i32v)word);
#elif LANES == 8 && BITS <= 3
    f32v table;
    for (int i = 0; i < 8; i++) table[i] = (f32)((int)(i & MASK) - ZERO);
    return __builtin_ia32_permvarsf256(table, (i32v)word);
#else
    return __builtin_convertvector((i32v)(word & MASK) - ZERO, f32v);
#endif
}

INLINE f32v dequantized(u32v word, int j, affine a) {
    f32v w = centred(word >> (u32)(BITS * j)) * a.scale;
    return ASYMMETRIC ? w + a.minimum : w;
}

// LANES words from p on, of which `held` are there.
INLINE u32v load_words(const WORD *p, i64 held) {
#if WORD_BITS == 32
    return load_first(p, held);
#else
    typedef WORD words_v __attribute__((vector_size(sizeof(WORD) * LANES), aligned(sizeof(WORD))));
    if (__builtin_expect(held >= LANES, 1)) return __builtin_convertvector(*(const words_v *)p, u32v);
    u32v v = {};
    for (i64 i = 0; i < held; i++) v[i] = p[i];
    return v;
#endif
}

INLINE affine load_affine(const scale_type *p, i64 stride, i64 held) {
    if (stride == 1 && __builtin_expect(held >= LANES, 1)) return affine_v(p);
    scale_type some[LANES] = {0};
    for (i64 i = 0; i < min_i64(held, LANES); i++) some[i] = p[i * stride];
    return affine_v(some);
}

// `first`, `rows`: a tile's rows; `start`, `depth`: its stretch of k. Values behind the stretch's end may be written.
INLINE void unpack(const weights *w, i64 first, i64 rows, i64 start, i64 depth, f32 *tile) {
    i64 groups = (w->k + GROUP_SIZE - 1) / GROUP_SIZE, words = groups * GROUP_WORDS;
    i64 begin = start / PER_WORD, end = (start + depth + PER_WORD - 1) / PER_WORD;
    const WORD *codes = (const WORD *)w->part[0];
    const scale_type *scales = (const scale_type *)w->part[1];
    for (int v = 0; v < VECTORS; v++) {
        i64 n = first + v * LANES, held = rows - v * LANES;
        f32 *out = tile + v * LANES;
        affine a = {};
#if TRANSPOSED
        (void)words;
        for (i64 at = begin; at < end; at++) {
            if (at == begin || at % GROUP_WORDS == 0) a = load_affine(scales + at / GROUP_WORDS * w->n + n, 1, held);
            u32v word = load_words(codes + at * w->n + n, held);
            for (int j = 0; j < PER_WORD; j++, out += ROWS) store_float32(out, dequantized(word, j, a));
        }
#else
        for (i64 at = begin; at < end; at += LANES) {
            u32v block[LANES];
            for (int r = 0; r < LANES; r++)
                block[r] = r < held ? load_words(codes + (n + r) * words + at, words - at) : (u32v){};
            transpose(block);
            i64 filled = min_i64(LANES, end - at);
            for (i64 i = 0; i < filled; i++) {
                if ((at + i) % GROUP_WORDS == 0 || at + i == begin)
                    a = load_affine(scales + n * groups + (at + i) / GROUP_WORDS, groups, held);
                for (int j = 0; j < PER_WORD; j++, out += ROWS) store_float32(out, dequantized(block[i], j, a));
            }
        }
#endif
    }
}

#if !TRANSPOSED

INLINE f32 value(const weights *w, i64 row, i64 at) {
    i64 groups = (w->k + GROUP_SIZE - 1) / GROUP_SIZE;
    u32 word = ((const WORD *)w->part[0])[row * groups * GROUP_WORDS + at / PER_WORD];
    affine a = load_affine((const scale_type *)w->part[1] + row * groups + at / GROUP_SIZE, 1, 1);
    f32 code = (f32)((i32)(word >> (BITS * (at % PER_WORD)) & MASK) - ZERO);
    return ASYMMETRIC ? code * a.scale[0] + a.minimum[0] : code * a.scale[0];
}

#define AHEAD 4096  // bytes in advance of which words of a row are fetched

// Words of a row of k columns that have activations: what lies behind k, to the end of a group, has none.
INLINE i64 words_held(i64 k) {
    i64 words = (k + GROUP_SIZE - 1) / GROUP_SIZE * GROUP_WORDS;
    return min_i64(words, (k + PER_WORD * LANES - 1) / (PER_WORD * LANES) * LANES);
}

// The last LANES of a row's `groups` groups, which start at last_group: all of its end, where no more are left. A row of
// fewer has zeros behind them.
INLINE i64 last_group(i64 groups) { return groups > LANES ? groups - LANES : 0; }
INLINE affine last_affine(const scale_type *row, i64 groups) {
    return load_affine(row + last_group(groups), 1, groups);
}

// Of those, the ones of words `at` of the row; behind its end, where activations are zeros, the last.
INLINE i32v in_last(u32v at, i64 groups) {
    u32v last = (u32v){} + (u32)(groups - 1);
    return (i32v)(__builtin_elementwise_min(at / GROUP_WORDS, last) - (u32)last_group(groups));
}

// 0, 1, 2 ... in the lanes.
INLINE u32v lane_numbers(void) {
    u32v lanes;
    UNROLL for (int lane = 0; lane < LANES; lane++) lanes[lane] = (u32)lane;
    return lanes;
}

// Codes of 8 and of 3 bits fill bytes only where an instruction takes them unsigned and whole, and spreads them out.
#if ASYMMETRIC || WORD_BITS != 32
#include "dot_words.h"
#elif (BITS == 4 && GROUP_SIZE % 32 == 0 && defined(HAS_DOT8)) || \
    (BITS == 8 && GROUP_SIZE % 32 == 0 && DIGITS < 3 && defined(HAS_DOT4)) || \
    (BITS == 3 && GROUP_SIZE % 20 == 0 && DIGITS < 3 && defined(HAS_DOT4) && defined(__AVX512VBMI__))
#include "dot_digits.h"
#else
#include "dot_words.h"
#endif

#endif

#if BITS == 4 && WORD_BITS == 32 && GROUP_SIZE % 32 == 0 && !ASYMMETRIC && DIGITS <= MOST_DIGITS
#include "panels_digits.h"
#endif

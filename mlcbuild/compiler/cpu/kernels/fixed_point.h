// Activations in fixed point, more precise than what the model dtype can hold.
//
// 32 neighbours share a scale and are whole numbers of DIGITS signed digits of 8 bits, x = (x[0] * 256 + x[1]) * 256 + ...,
// so that instructions which multiply bytes and add give exact sums of products with codes q:
//   sum((q - ZERO) * x) = (sum(q * x[0]) * 256 + sum(q * x[1])) * 256 + ... - ZERO * sum(x)
// Over 32 products with codes of 4 bits, or 4 of 8 bits and two digits, that is less than 2^31, and integers that
// overflow on the way come back.
//
// ACTIVATION_BITS says how many bits activations have where that is fewer than they would take: 8 are one digit, 16 two.
// A model of float32 takes three digits, a rounding of 2^-24 of the largest among the 32: what float32 itself is. A model
// of 16-bit floats takes two, 2^-16 of the largest: its weights' scales, embeddings and keys are rounded to 2^-11 or more.
#pragma once

#include "common.h"

#define DIGITS_float32 3
#define DIGITS_float16 2
#define DIGITS_bfloat16 2
#if defined(ACTIVATION_BITS) && ACTIVATION_BITS == 8
#define DIGITS 1
#elif defined(ACTIVATION_BITS)
#define DIGITS 2
#else
#define DIGITS JOIN(DIGITS_, MODEL)
#endif

// Whatever the registers' width: the compiler splits these.
typedef f32 f32x32 __attribute__((vector_size(128), aligned(4)));
typedef i32 i32x32 __attribute__((vector_size(128), aligned(4)));
typedef u32 u32x32 __attribute__((vector_size(128), aligned(4)));
typedef i32 i32x16 __attribute__((vector_size(64), aligned(4)));
typedef i32 i32x8 __attribute__((vector_size(32), aligned(4)));
typedef i32 i32x4 __attribute__((vector_size(16), aligned(4)));
typedef f32 f32x4 __attribute__((vector_size(16), aligned(4)));
typedef i8 i8x16 __attribute__((vector_size(16), aligned(1)));
typedef i8 i8x32 __attribute__((vector_size(32), aligned(1)));
#define EVEN(v) __builtin_shufflevector(v, v, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(v) __builtin_shufflevector(v, v, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)

// Just below the number whose digits are all 127: digits are within -128 .. 127 however it rounds.
#if DIGITS == 3
#define LARGEST 8355000.0f
#elif DIGITS == 2
#define LARGEST 32638.0f
#else
#define LARGEST 127.0f
#endif

typedef struct {
    i32x32 value;
    i8x32 digit[DIGITS];  // the highest first
    f32 scale;
} fixed;

// Finite x over `top`, the largest magnitude among them, as whole numbers up to LARGEST.
INLINE i32x32 whole(f32x32 x, f32 top) {
    const f32x32 magic = (f32x32){} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    f32x32 scaled = x * (LARGEST / top);
#if DIGITS == 3
    // Numbers this large have no bit for a half to spare: they are rounded as multiples of 256 and what is left.
    f32x32 high = scaled * 0x1p-8f + magic - magic, low = scaled - high * 256.0f;
    return __builtin_convertvector(high, i32x32) * 256 + __builtin_convertvector(low + magic - magic, i32x32);
#else
    return __builtin_convertvector(scaled + magic - magic, i32x32);
#endif
}

INLINE fixed to_fixed(f32x32 x) {
    i32x32 magnitude = *(i32x32 *)&x & 0x7fffffff;  // ordered like the floats
    i32 top_bits = __builtin_reduce_max(magnitude);
    f32 top = *(f32 *)&top_bits;
    fixed out = {};
    out.scale = top_bits >= 0x7f800000 ? __builtin_nanf("") : top / LARGEST;
    if (top > 1e-30f && top_bits < 0x7f800000) out.value = whole(x, top);
    i32x32 rest = out.value;
    UNROLL for (int d = DIGITS - 1; d >= 0; d--) {
        i32x32 digit = rest << 24 >> 24;
        rest = (rest - digit) >> 8;
        out.digit[d] = __builtin_convertvector(digit, i8x32);
    }
    return out;
}

// The sum of each eight neighbours.
INLINE i32x4 eights(i32x32 v) {
    i32x16 pairs = EVEN(v) + ODD(v);
    i32x8 fours = __builtin_shufflevector(pairs, pairs, 0, 2, 4, 6, 8, 10, 12, 14) +
                  __builtin_shufflevector(pairs, pairs, 1, 3, 5, 7, 9, 11, 13, 15);
    return __builtin_shufflevector(fours, fours, 0, 2, 4, 6) + __builtin_shufflevector(fours, fours, 1, 3, 5, 7);
}

// The 32 activations of a row of `k` from `at` on, zeros behind its end; the row starts at element `from` of x.
INLINE f32x32 load_32(const void *x, i64 from, i64 at, i32 wide, i64 k) {
    f32 some[32];
    i64 i = 0;
    for (; i < 32 && at + i + LANES <= k; i += LANES) store_float32(some + i, load_any(x, from + at + i, wide));
    for (; i < 32; i++) some[i] = at + i < k ? get_any(x, from + at + i, wide) : 0.0f;
    return *(f32x32 *)some;
}

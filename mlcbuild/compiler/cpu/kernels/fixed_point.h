// Activations in fixed point, exactly as precise as float32 ones.
//
// 32 neighbours share a scale and are whole numbers of 24 bits, a rounding of 2^-24 of the largest among them. Such a
// number is three signed digits of 8 bits, x = (x2 * 256 + x1) * 256 + x0, so that instructions which multiply bytes and
// add give exact sums of products with 4-bit codes q:
//   sum((q - ZERO) * x) = (sum(q * x2) * 256 + sum(q * x1)) * 256 + sum(q * x0) - ZERO * sum(x)
// Over 32 products that is less than 2^31, and integers that overflow on the way come back.
#pragma once

#include "common.h"

// Whatever the registers' width: the compiler splits these.
typedef f32 f32x32 __attribute__((vector_size(128), aligned(4)));
typedef i32 i32x32 __attribute__((vector_size(128), aligned(4)));
typedef u32 u32x32 __attribute__((vector_size(128), aligned(4)));
typedef i32 i32x16 __attribute__((vector_size(64), aligned(4)));
typedef i32 i32x8 __attribute__((vector_size(32), aligned(4)));
typedef i32 i32x4 __attribute__((vector_size(16), aligned(4)));
typedef f32 f32x4 __attribute__((vector_size(16), aligned(4)));
typedef i8 i8x16 __attribute__((vector_size(16), aligned(1)));
#define EVEN(v) __builtin_shufflevector(v, v, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(v) __builtin_shufflevector(v, v, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)

#define LARGEST 8355000.0f  // just below 127 * 65536 + 127 * 256 + 127: digits are within -128 .. 127 however it rounds

// Digits x2, x1, x0 of those at even and at odd places, as four words of eight codes hold them; the sum of each eight.
typedef struct {
    i8x16 even[3], odd[3];
    i32x4 eights;
    f32 scale;
} fixed;

INLINE fixed to_fixed(f32x32 x) {
    i32x32 magnitude = *(i32x32 *)&x & 0x7fffffff;  // ordered like the floats
    i32 top_bits = __builtin_reduce_max(magnitude);
    f32 top = *(f32 *)&top_bits;
    fixed out;
    out.scale = top / LARGEST;
    // Numbers this large have no bit for a half to spare: they are rounded as multiples of 256 and what is left.
    i32x32 value = {};
    if (top_bits >= 0x7f800000) out.scale = __builtin_nanf("");
    else if (top > 1e-30f) {
        const f32x32 magic = (f32x32){} + 12582912.0f;  // 1.5 * 2^23
        f32x32 scaled = x * (LARGEST / top), high = scaled * 0x1p-8f + magic - magic, low = scaled - high * 256.0f;
        value = __builtin_convertvector(high, i32x32) * 256 + __builtin_convertvector(low + magic - magic, i32x32);
    }
    i32x32 x0 = value << 24 >> 24, rest = (value - x0) >> 8, x1 = rest << 24 >> 24, x2 = (rest - x1) >> 8;
    out.even[0] = __builtin_convertvector(EVEN(x2), i8x16);
    out.odd[0] = __builtin_convertvector(ODD(x2), i8x16);
    out.even[1] = __builtin_convertvector(EVEN(x1), i8x16);
    out.odd[1] = __builtin_convertvector(ODD(x1), i8x16);
    out.even[2] = __builtin_convertvector(EVEN(x0), i8x16);
    out.odd[2] = __builtin_convertvector(ODD(x0), i8x16);
    i32x16 pairs = EVEN(value) + ODD(value);
    i32x8 fours = __builtin_shufflevector(pairs, pairs, 0, 2, 4, 6, 8, 10, 12, 14) +
                  __builtin_shufflevector(pairs, pairs, 1, 3, 5, 7, 9, 11, 13, 15);
    out.eights = __builtin_shufflevector(fours, fours, 0, 2, 4, 6) + __builtin_shufflevector(fours, fours, 1, 3, 5, 7);
    return out;
}

// The 32 activations of a row of `k` from `at` on, zeros behind its end; the row starts at element `from` of x.
INLINE f32x32 load_32(const void *x, i64 from, i64 at, i32 wide, i64 k) {
    f32 some[32];
    i64 i = 0;
    for (; i < 32 && at + i + LANES <= k; i += LANES) store_float32(some + i, load_any(x, from + at + i, wide));
    for (; i < 32; i++) some[i] = at + i < k ? get_any(x, from + at + i, wide) : 0.0f;
    return *(f32x32 *)some;
}

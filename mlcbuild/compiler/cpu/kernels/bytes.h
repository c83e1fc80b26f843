// Sums of products of bytes, which processors have instructions for: dot8 adds to each lane of `acc` the products of its
// four unsigned bytes a, b (below 16) with the signed bytes x, y. HAS_DOT8 says that there is one, HAS_DOT4 that a and b
// may have all 8 bits.
//
// add_four and total do the same for up to 8 registers of codes, one after the other: `sums` may be narrower than the
// total. Numbers of up to MOST_DIGITS signed bytes are multiplied faster so than floats even where registers hold many rows.
#pragma once

#include "common.h"

typedef i8 i8v __attribute__((vector_size(4 * LANES), aligned(1)));
typedef u8 bytes_v __attribute__((vector_size(4 * LANES), aligned(1)));
typedef i16 i16v __attribute__((vector_size(4 * LANES), aligned(2)));

// The high four bits of each byte.
INLINE bytes_v high_nibbles(u32v word) {
#if LANES == 16 && defined(__GFNI__) && defined(__AVX512BW__)
    // A matrix of bits, of which each byte of the result is the product with one of the word: one instruction.
    typedef char chars __attribute__((vector_size(64)));
    typedef long long longs __attribute__((vector_size(64)));
    return (bytes_v)__builtin_ia32_vgf2p8affineqb_v64qi((chars)word, (chars)((longs){} + 0x1020408000000000ll), 0);
#else
    return (bytes_v)((word >> 4) & 0x0f0f0f0fu);
#endif
}

#if LANES == 16 && defined(__AVX512VNNI__)
#define HAS_DOT8
#define HAS_DOT4
#define MOST_DIGITS 3
INLINE i32v dot4(i32v acc, bytes_v a, i8v x) { return __builtin_ia32_vpdpbusd512(acc, a, x); }
INLINE i32v dot8(i32v acc, bytes_v a, bytes_v b, i8v x, i8v y) { return dot4(dot4(acc, a, x), b, y); }
#elif LANES == 16 && defined(__AVX512BW__)
#define HAS_DOT8
INLINE i32v dot8(i32v acc, bytes_v a, bytes_v b, i8v x, i8v y) {
    i16v pairs = __builtin_ia32_pmaddubsw512((i8v)a, x) + __builtin_ia32_pmaddubsw512((i8v)b, y);
    return acc + __builtin_ia32_pmaddwd512(pairs, (i16v){} + 1);
}
#elif LANES == 8 && defined(__AVXVNNI__)
#define HAS_DOT8
#define MOST_DIGITS 2
INLINE i32v dot4(i32v acc, bytes_v a, i8v x) { return __builtin_ia32_vpdpbusd256(acc, a, x); }
INLINE i32v dot8(i32v acc, bytes_v a, bytes_v b, i8v x, i8v y) { return dot4(dot4(acc, a, x), b, y); }
#elif LANES == 8 && defined(__AVX2__)
#define HAS_DOT8
#define MOST_DIGITS 1
#define SUMS_OF_16_BITS
INLINE i32v dot8(i32v acc, bytes_v a, bytes_v b, i8v x, i8v y) {
    i16v pairs = __builtin_ia32_pmaddubsw256((i8v)a, x) + __builtin_ia32_pmaddubsw256((i8v)b, y);
    return acc + __builtin_ia32_pmaddwd256(pairs, (i16v){} + 1);
}
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define HAS_DOT8
#define MOST_DIGITS 2
INLINE i32v dot4(i32v acc, bytes_v a, i8v x) {
    return (i32v)vdotq_s32((int32x4_t)acc, (int8x16_t)a, (int8x16_t)x);
}
INLINE i32v dot8(i32v acc, bytes_v a, bytes_v b, i8v x, i8v y) { return dot4(dot4(acc, a, x), b, y); }
#endif

#ifndef MOST_DIGITS
#define MOST_DIGITS 0
#elif defined(SUMS_OF_16_BITS)
// 8 times two products of 15 and -128 are -30720: additions of 16 bits, which are twice as many numbers, suffice.
typedef i16v sums;
INLINE sums add_four(sums acc, bytes_v a, i8v x) { return acc + __builtin_ia32_pmaddubsw256((i8v)a, x); }
INLINE i32v total(sums acc) { return __builtin_ia32_pmaddwd256(acc, (i16v){} + 1); }
#else
typedef i32v sums;
INLINE sums add_four(sums acc, bytes_v a, i8v x) { return dot4(acc, a, x); }
INLINE i32v total(sums acc) { return acc; }
#endif

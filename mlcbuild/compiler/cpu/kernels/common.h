// Types and helpers that every kernel uses. Plain C with clang's vector extensions: the same source serves AVX2,
// AVX-512 and NEON, and needs no header of the target system, so that zig can cross-compile it for any of them.
#pragma once

typedef unsigned int u32;
typedef int i32;
typedef long long i64;
typedef _Float16 f16;
typedef float f32;

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

// The alignment of one element: rows of odd length start anywhere.
typedef f32 f32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef f16 f16v __attribute__((vector_size(2 * LANES), aligned(2)));
typedef u32 u32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef i32 i32v __attribute__((vector_size(4 * LANES), aligned(4)));

#define INLINE static inline __attribute__((always_inline))
#ifndef EXPORT  // tests export the kernels, to call them one by one
#define EXPORT __attribute__((visibility("hidden")))
#endif

INLINE f32v load_f32(const f32 *p) { return *(const f32v *)p; }
INLINE f32v load_f16(const f16 *p) { return __builtin_convertvector(*(const f16v *)p, f32v); }
INLINE void store_f32(f32 *p, f32v v) { *(f32v *)p = v; }
INLINE void store_f16(f16 *p, f32v v) { *(f16v *)p = __builtin_convertvector(v, f16v); }

INLINE f32v splat(f32 value) { return (f32v){} + value; }

// Pairwise, in a fixed order: the result does not depend on how the compiler feels.
INLINE f32 sum(f32v v) {
    f32 lane[LANES];
    store_f32(lane, v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

INLINE i64 min_i64(i64 a, i64 b) { return a < b ? a : b; }
INLINE f32 max_f32(f32 a, f32 b) { return a > b ? a : b; }

// Lane by lane `yes` where the comparison holds, else `no`; a NaN compares false, so that it is not lost on the way.
INLINE f32v select_v(i32v mask, f32v yes, f32v no) {
    i32v bits = (mask & *(i32v *)&yes) | (~mask & *(i32v *)&no);
    return *(f32v *)&bits;
}

// 2^x for |x| < 2^22, relative error about 1e-7; below -126 the result is 0.
// x = n + r with |r| <= 1/2; 2^r is the Taylor polynomial of exp(r ln 2), whose seventh term is below 2^-24.
INLINE f32v exp2_v(f32v x) {
    x = select_v(x < splat(-126.0f), splat(-127.0f), x);
    x = select_v(x > splat(127.0f), splat(127.0f), x);
    const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    f32v n = (x + magic) - magic;
    f32v r = x - n;
    f32v p = splat(1.525273380405984e-5f);
    p = p * r + splat(1.540353039338161e-4f);
    p = p * r + splat(1.333355814642844e-3f);
    p = p * r + splat(9.618129107628477e-3f);
    p = p * r + splat(5.550410866482158e-2f);
    p = p * r + splat(2.402265069591007e-1f);
    p = p * r + splat(6.931471805599453e-1f);
    p = p * r + splat(1.0f);
    i32v exponent = (__builtin_convertvector(n, i32v) + 127) << 23;
    f32v scale = *(f32v *)&exponent;
    return p * scale;
}

#define LOG2E 1.4426950408889634f

INLINE f32v exp_v(f32v x) { return exp2_v(x * splat(LOG2E)); }

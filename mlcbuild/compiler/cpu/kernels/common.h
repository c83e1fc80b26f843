// Types and helpers that every kernel uses. Plain C with clang's vector extensions: the same source serves AVX2,
// AVX-512 and NEON, and needs no header of the target system, so that zig can cross-compile it for any of them.
//
// Kernels are compiled for one model dtype: MODEL is float32, float16 or bfloat16. Activations between blocks are
// float32; what a kernel may take or give in either is marked by a `wide` argument: 1 for float32, 0 for MODEL.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
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
typedef u32 u32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef i32 i32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef u16 u16v __attribute__((vector_size(2 * LANES), aligned(2)));
typedef u8 u8v __attribute__((vector_size(LANES), aligned(1)));
typedef _Float16 f16v __attribute__((vector_size(2 * LANES), aligned(2)));

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline, unused))
#ifndef EXPORT  // tests export the kernels, to call them one by one
#define EXPORT __attribute__((visibility("hidden")))
#endif

#define UNROLL _Pragma("clang loop unroll(full)")  // loops over what must stay in registers

// Asks in advance for memory that is read once, or that is read again soon. What is read once no cache need keep; but
// Intel's processors (Sapphire Rapids) then read a third slower than into all caches, where AMD's read as fast as memory goes.
// Only a target that names an AMD processor has that: levels, as those of stock targets (x86-64-v4), name none.
INLINE void fetch(const void *p, const int again) {
#if defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
    if (!again) {
        __builtin_prefetch(p, 0, 0);
        return;
    }
#endif
    (void)again;
    __builtin_prefetch(p, 0, 3);
}

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

// Minus zero changes no value (plus zero would change -0), so that this is one instruction.
INLINE f32v splat(f32 value) { return value - (f32v){}; }

// For each dtype T: its C type, and T's values loaded, stored, read and written as float32.
typedef f32 type_float32;
typedef _Float16 type_float16;
typedef u16 type_bfloat16;  // its bits

INLINE f32v load_float32(const f32 *p) { return *(const f32v *)p; }
INLINE void store_float32(f32 *p, f32v v) { *(f32v *)p = v; }
INLINE f32 get_float32(const f32 *p) { return *p; }
INLINE void put_float32(f32 *p, f32 v) { *p = v; }

INLINE f32v load_float16(const type_float16 *p) { return __builtin_convertvector(*(const f16v *)p, f32v); }
INLINE void store_float16(type_float16 *p, f32v v) { *(f16v *)p = __builtin_convertvector(v, f16v); }
INLINE f32 get_float16(const type_float16 *p) { return (f32)*p; }
INLINE void put_float16(type_float16 *p, f32 v) { *p = (type_float16)v; }

// Half to even; a NaN stays one because its highest mantissa bit is set.
INLINE u32v round_bfloat16(f32v v) {
    u32v bits = *(u32v *)&v;
    u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    u32v nan = (u32v)((bits & 0x7fffffffu) > 0x7f800000u);
    return (nan & ((bits >> 16) | 0x40u)) | (~nan & rounded);
}
INLINE f32v load_bfloat16(const u16 *p) {
    u32v bits = __builtin_convertvector(*(const u16v *)p, u32v) << 16;
    return *(f32v *)&bits;
}
INLINE void store_bfloat16(u16 *p, f32v v) { *(u16v *)p = __builtin_convertvector(round_bfloat16(v), u16v); }
INLINE f32 get_bfloat16(const u16 *p) {
    u32 bits = (u32)*p << 16;
    return *(f32 *)&bits;
}
INLINE void put_bfloat16(u16 *p, f32 v) { *p = (u16)round_bfloat16(splat(v))[0]; }

typedef JOIN(type_, MODEL) model;
#define load_model JOIN(load_, MODEL)
#define store_model JOIN(store_, MODEL)
#define get_model JOIN(get_, MODEL)
#define put_model JOIN(put_, MODEL)

INLINE f32v load_any(const void *p, i64 at, i32 wide) {
    return wide ? load_float32((const f32 *)p + at) : load_model((const model *)p + at);
}
INLINE f32 get_any(const void *p, i64 at, i32 wide) {
    return wide ? ((const f32 *)p)[at] : get_model((const model *)p + at);
}
INLINE void store_any(void *p, i64 at, f32v v, i32 wide) {
    if (wide) store_float32((f32 *)p + at, v);
    else store_model((model *)p + at, v);
}
INLINE void put_any(void *p, i64 at, f32 v, i32 wide) {
    if (wide) ((f32 *)p)[at] = v;
    else put_model((model *)p + at, v);
}

// Pairwise, in a fixed order: the result does not depend on how the compiler feels.
INLINE f32 sum(f32v v) {
#if LANES == 16
    typedef f32 f32x8 __attribute__((vector_size(32)));
    f32x8 eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LANES == 8
    f32v eight = v;
#endif
    typedef f32 f32x4 __attribute__((vector_size(16)));
#if LANES >= 8
    f32x4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
    f32v four = v;
#endif
    f32x4 two = four + __builtin_shufflevector(four, four, 2, 3, 2, 3);
    return two[0] + two[1];
}

// The first `count` of LANES words; the others are 0. What lies behind is not touched.
INLINE u32v load_first(const u32 *p, i64 count) {
    if (__builtin_expect(count >= LANES, 1)) return *(const u32v *)p;
#if LANES == 16
    return (u32v)__builtin_ia32_loaddqusi512_mask((const i32 *)p, (i32v){}, (u16)((1u << (count > 0 ? count : 0)) - 1));
#elif LANES == 8
    typedef f32 whole __attribute__((vector_size(32)));
    i32v held = (i32v){0, 1, 2, 3, 4, 5, 6, 7} < (i32v){} + (i32)count;
    return (u32v)__builtin_ia32_maskloadps256((const whole *)p, held);
#else
    u32v v = {};
    for (i64 i = 0; i < count; i++) v[i] = p[i];
    return v;
#endif
}

INLINE i64 min_i64(i64 a, i64 b) { return a < b ? a : b; }
INLINE f32 max_f32(f32 a, f32 b) { return a > b ? a : b; }

// Lane by lane `yes` where the comparison holds, else `no`; a NaN compares false, so that it is not lost on the way.
INLINE f32v select_v(i32v mask, f32v yes, f32v no) {
    i32v bits = (mask & *(i32v *)&yes) | (~mask & *(i32v *)&no);
    return *(f32v *)&bits;
}

// Lane by lane v[index], index below LANES.
INLINE f32v permute(f32v v, i32v index) {
#if LANES == 16
    return __builtin_ia32_permvarsf512(v, index);
#elif LANES == 8
    return __builtin_ia32_permvarsf256(v, index);
#else
    f32v out;
    for (int lane = 0; lane < LANES; lane++) out[lane] = v[index[lane]];
    return out;
#endif
}

// v[i][j] becomes v[j][i]: log2(LANES) times the first and the second half are interleaved.
#if LANES == 16
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

INLINE void transpose(u32v v[LANES]) {
    for (int step = 1; step < LANES; step *= 2) {
        u32v mixed[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            mixed[2 * i] = LOW(v[i], v[i + LANES / 2]);
            mixed[2 * i + 1] = HIGH(v[i], v[i + LANES / 2]);
        }
        for (int i = 0; i < LANES; i++) v[i] = mixed[i];
    }
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

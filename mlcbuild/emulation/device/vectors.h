// Vectors of two to four numbers as Metal and OpenCL have them, and the functions of numbers that both take.
#pragma once
#include "language.h"

typedef _Float16 half;
typedef unsigned long ulong;

template <class T, int N>
struct VectorParts;
template <class T>
struct alignas(2 * sizeof(T)) VectorParts<T, 2> {
  union {
    struct { T x, y; };
    struct { T s0, s1; };
    T number[2];
  };
};
template <class T>
struct alignas(4 * sizeof(T)) VectorParts<T, 3> {
  union {
    struct { T x, y, z; };
    struct { T s0, s1, s2; };
    T number[3];
  };
};
template <class T>
struct alignas(4 * sizeof(T)) VectorParts<T, 4> {
  union {
    struct { T x, y, z, w; };
    struct { T s0, s1, s2, s3; };
    T number[4];
  };
};

template <class T, int N>
struct Vector : VectorParts<T, N> {
  Vector() = default;
  explicit Vector(T all) {
    for (T& each : this->number) each = all;
  }
  template <class... U>
    requires(sizeof...(U) == N)
  Vector(U... given) {
    int i = 0;
    ((this->number[i++] = T(given)), ...);
  }
  template <class U>
  explicit Vector(const Vector<U, N>& other) {
    for (int i = 0; i < N; i++) this->number[i] = T(other.number[i]);
  }
  T& operator[](int i) { return this->number[i]; }
  T operator[](int i) const { return this->number[i]; }
};

#define EMULATION_OPERATOR(OP)                                                     \
  template <class T, int N>                                                        \
  static inline Vector<T, N> operator OP(const Vector<T, N>& a, const Vector<T, N>& b) { \
    Vector<T, N> made;                                                             \
    for (int i = 0; i < N; i++) made[i] = T(a[i] OP b[i]);                         \
    return made;                                                                   \
  }                                                                                \
  template <class T, int N>                                                        \
  static inline Vector<T, N> operator OP(const Vector<T, N>& a, T b) {             \
    return a OP Vector<T, N>(b);                                                   \
  }                                                                                \
  template <class T, int N>                                                        \
  static inline Vector<T, N> operator OP(T a, const Vector<T, N>& b) {             \
    return Vector<T, N>(a) OP b;                                                   \
  }
EMULATION_OPERATOR(+)
EMULATION_OPERATOR(-)
EMULATION_OPERATOR(*)
EMULATION_OPERATOR(/)
EMULATION_OPERATOR(%)
EMULATION_OPERATOR(>>)
EMULATION_OPERATOR(<<)
EMULATION_OPERATOR(&)
EMULATION_OPERATOR(|)
EMULATION_OPERATOR(^)

#define EMULATION_VECTORS(T) \
  typedef Vector<T, 2> T##2; \
  typedef Vector<T, 3> T##3; \
  typedef Vector<T, 4> T##4;
EMULATION_VECTORS(char)
EMULATION_VECTORS(uchar)
EMULATION_VECTORS(short)
EMULATION_VECTORS(ushort)
EMULATION_VECTORS(int)
EMULATION_VECTORS(uint)
EMULATION_VECTORS(long)
EMULATION_VECTORS(ulong)
EMULATION_VECTORS(half)
EMULATION_VECTORS(float)

// A function of one float: of halves and of vectors too. Both sides of `max` and its like have one type, as there.
#define EMULATION_OF_FLOATS(NAME, OF_FLOAT)                          \
  static inline float NAME(float x) { return OF_FLOAT(x); }          \
  static inline half NAME(half x) { return half(OF_FLOAT(float(x))); } \
  template <class T, int N>                                          \
  static inline Vector<T, N> NAME(Vector<T, N> x) {                  \
    for (T& each : x.number) each = NAME(each);                      \
    return x;                                                        \
  }
static inline float emulation_rsqrt(float x) { return 1.0f / sqrtf(x); }
EMULATION_OF_FLOATS(acos, acosf)
EMULATION_OF_FLOATS(acosh, acoshf)
EMULATION_OF_FLOATS(asin, asinf)
EMULATION_OF_FLOATS(asinh, asinhf)
EMULATION_OF_FLOATS(atan, atanf)
EMULATION_OF_FLOATS(atanh, atanhf)
EMULATION_OF_FLOATS(ceil, ceilf)
EMULATION_OF_FLOATS(cos, cosf)
EMULATION_OF_FLOATS(cosh, coshf)
EMULATION_OF_FLOATS(exp, expf)
EMULATION_OF_FLOATS(exp2, exp2f)
EMULATION_OF_FLOATS(fabs, fabsf)
EMULATION_OF_FLOATS(floor, floorf)
EMULATION_OF_FLOATS(log, logf)
EMULATION_OF_FLOATS(log2, log2f)
EMULATION_OF_FLOATS(log10, log10f)
EMULATION_OF_FLOATS(rint, rintf)
EMULATION_OF_FLOATS(round, roundf)
EMULATION_OF_FLOATS(rsqrt, emulation_rsqrt)
EMULATION_OF_FLOATS(sin, sinf)
EMULATION_OF_FLOATS(sinh, sinhf)
EMULATION_OF_FLOATS(sqrt, sqrtf)
EMULATION_OF_FLOATS(tan, tanf)
EMULATION_OF_FLOATS(tanh, tanhf)
EMULATION_OF_FLOATS(trunc, truncf)

template <class T>
static inline T max(T a, T b) { return a > b ? a : b; }
template <class T>
static inline T min(T a, T b) { return a < b ? a : b; }
static inline float pow(float x, float y) { return powf(x, y); }
static inline float fmod(float x, float y) { return fmodf(x, y); }
static inline float atan2(float x, float y) { return atan2f(x, y); }
#define EMULATION_OF_PAIRS(NAME)                                           \
  template <class T, int N>                                                \
  static inline Vector<T, N> NAME(Vector<T, N> x, Vector<T, N> y) {        \
    for (int i = 0; i < N; i++) x[i] = NAME(x[i], y[i]);                   \
    return x;                                                              \
  }
EMULATION_OF_PAIRS(max)
EMULATION_OF_PAIRS(min)
EMULATION_OF_PAIRS(pow)
template <class To, class From>
static inline To emulation_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

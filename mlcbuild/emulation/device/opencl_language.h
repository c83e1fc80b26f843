// OpenCL C as TVM writes it, in C++ for this CPU. OpenCL promises no lockstep, and threads have none here.
#pragma once
#include "vectors.h"

EMULATION_OF_FLOATS(cbrt, cbrtf)
EMULATION_OF_FLOATS(erf, erff)
EMULATION_OF_FLOATS(log1p, log1pf)

enum { CLK_LOCAL_MEM_FENCE = 1, CLK_GLOBAL_MEM_FENCE = 2 };
static inline void barrier(int) { emulation::wait_for_block(); }

static inline unsigned emulation_of(const emulation::Index& index, uint axis) {
  return axis == 0 ? index.x : axis == 1 ? index.y : index.z;
}
static inline size_t get_local_id(uint axis) { return emulation_of(emulation::thread_index, axis); }
static inline size_t get_group_id(uint axis) { return emulation_of(emulation::block_index, axis); }
static inline size_t get_local_size(uint axis) { return emulation_of(emulation::block_size, axis); }
static inline size_t get_num_groups(uint axis) { return emulation_of(emulation::grid_size, axis); }

// Vectors in memory are aligned as their numbers are.
#define EMULATION_ACCESS(N)                                                                 \
  template <class T>                                                                        \
  static inline Vector<T, N> vload##N(size_t offset, const T* from) {                       \
    Vector<T, N> made;                                                                      \
    for (int i = 0; i < N; i++) made[i] = from[offset * N + i];                             \
    return made;                                                                            \
  }                                                                                         \
  template <class T>                                                                        \
  static inline void vstore##N(const Vector<T, N>& value, size_t offset, T* to) {           \
    for (int i = 0; i < N; i++) to[offset * N + i] = value[i];                              \
  }
EMULATION_ACCESS(2)
EMULATION_ACCESS(3)
EMULATION_ACCESS(4)

#define EMULATION_CONVERSION(T)                                                  \
  static inline T convert_##T(auto x) { return T(x); }                           \
  template <class U>                                                             \
  static inline Vector<T, 2> convert_##T##2(Vector<U, 2> x) { return Vector<T, 2>(x); } \
  template <class U>                                                             \
  static inline Vector<T, 3> convert_##T##3(Vector<U, 3> x) { return Vector<T, 3>(x); } \
  template <class U>                                                             \
  static inline Vector<T, 4> convert_##T##4(Vector<U, 4> x) { return Vector<T, 4>(x); } \
  static inline T as_##T(auto x) { return emulation_bits<T>(x); }
EMULATION_CONVERSION(char)
EMULATION_CONVERSION(uchar)
EMULATION_CONVERSION(short)
EMULATION_CONVERSION(ushort)
EMULATION_CONVERSION(int)
EMULATION_CONVERSION(uint)
EMULATION_CONVERSION(long)
EMULATION_CONVERSION(ulong)
EMULATION_CONVERSION(half)
EMULATION_CONVERSION(float)

template <class T>
static inline T select(T otherwise, T chosen, auto condition) {
  static_assert(sizeof(condition) == sizeof(T), "a condition as wide as the values");
  return condition ? chosen : otherwise;
}

#define __kernel static
#define __global
#define __local
#define __constant const
#define __private
#define restrict __restrict

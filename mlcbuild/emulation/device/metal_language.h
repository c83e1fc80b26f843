// Metal's language as TVM writes it, in C++ for this CPU.
//
// Metal runs a SIMD-group in lockstep only for the functions that are named after it: between others its threads may be
// anywhere, and are so here. So what lanes tell each other through threadgroup memory needs a barrier.
#pragma once
#include "vectors.h"

template <class To, class From>
static inline To as_type(From from) { return emulation_bits<To>(from); }
template <class T>
static inline T select(T otherwise, T chosen, bool condition) { return condition ? chosen : otherwise; }
static inline half operator""h(long double number) { return half(number); }

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
static inline void threadgroup_barrier(mem_flags) { emulation::wait_for_block(); }
static inline void simdgroup_barrier(mem_flags) { emulation::wait_for_warp(); }

template <class T>
static inline T simd_shuffle(T value, ushort lane) { return emulation_exchange(value, lane); }
template <class T>
static inline T simd_shuffle_xor(T value, ushort mask) { return emulation_exchange(value, emulation_lane() ^ mask); }
template <class T>
static inline T simd_shuffle_down(T value, ushort by) { return emulation_exchange(value, emulation_lane() + by); }
template <class T>
static inline T simd_shuffle_up(T value, ushort by) { return emulation_exchange(value, emulation_lane() - by); }

// A matrix belongs to a SIMD-group; its first lane holds all of it and does all the work.
template <class T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  static_assert(ROWS == 8 && COLUMNS == 8, "matrices of 8 x 8");
  T value[8][8];
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;

template <class T, int ROWS, int COLUMNS>
static inline simdgroup_matrix<T, ROWS, COLUMNS> make_filled_simdgroup_matrix(T number) {
  simdgroup_matrix<T, ROWS, COLUMNS> made;
  for (auto& row : made.value)
    for (T& cell : row) cell = number;
  return made;
}
template <class T>
static inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const T* from, ulong stride, int, bool transposed) {
  if (emulation_lane()) return;
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) matrix.value[i][j] = transposed ? from[j * stride + i] : from[i * stride + j];
}
template <class T>
static inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& matrix, T* to, ulong stride, int, bool transposed) {
  if (emulation_lane()) return;
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) to[transposed ? j * stride + i : i * stride + j] = matrix.value[i][j];
}
template <class R, class A, class B, class C>
static inline void simdgroup_multiply_accumulate(simdgroup_matrix<R, 8, 8>& result, const simdgroup_matrix<A, 8, 8>& a,
                                                 const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c) {
  if (emulation_lane()) return;
  simdgroup_matrix<R, 8, 8> made;
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) {
      float sum = c.value[i][j];
      for (int k = 0; k < 8; k++) sum += float(a.value[i][k]) * float(b.value[k][j]);
      made.value[i][j] = R(sum);
    }
  result = made;
}

// A kernel's `blockIdx` and `threadIdx` are declared with as many axes as it uses.
template <class T>
struct EmulationIndex;
template <>
struct EmulationIndex<uint> {
  static uint of(const emulation::Index& index) { return index.x; }
};
template <>
struct EmulationIndex<uint2> {
  static uint2 of(const emulation::Index& index) { return {index.x, index.y}; }
};
template <>
struct EmulationIndex<uint3> {
  static uint3 of(const emulation::Index& index) { return {index.x, index.y, index.z}; }
};

#define kernel static
#define device
#define thread
#define threadgroup
#define constant const

// What kernels want of a CUDA device beyond CUDA C: two 16-bit floats in a register, loads of 16 bytes, tensor cores.
// The emulated device has its own of what is between the lines (mlcbuild/emulation/device/pairs.h).
#pragma once
#ifndef EMULATED_DEVICE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#endif

namespace mlcbuild {

template <int BYTES>
struct Bytes;
template <>
struct Bytes<8> { typedef uint2 Type; };
template <>
struct Bytes<16> { typedef uint4 Type; };

}  // namespace mlcbuild

#ifndef EMULATED_DEVICE
namespace mlcbuild {

// sums += a * b: 16 rows, 16 columns of a, 8 columns of b. Of a lane: rows lane / 4 and that + 8, k in four places.
template <class T>
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (!__is_same(T, __nv_bfloat16)) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#pragma unroll
    for (int half_of_k = 0; half_of_k < 2; half_of_k++)
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
          : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
          : "r"(a[2 * half_of_k]), "r"(a[2 * half_of_k + 1]), "r"(b[half_of_k]));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Bytes to shared memory that are there once their thread has waited for them; zeros where there is nothing to copy.
template <int BYTES>
__device__ __forceinline__ void copy_later(void* to, const void* from, bool there) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  typedef typename Bytes<BYTES>::Type All;
  *static_cast<All*>(to) = there ? *static_cast<const All*>(from) : All{};
#else
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(there ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(place), "l"(from), "r"(there ? 8 : 0) : "memory");
#endif
}

// A step's copies end here; wait until only those of the last STEPS steps may still be on their way.
__device__ __forceinline__ void end_of_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int STEPS>
__device__ __forceinline__ void wait_for_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(STEPS) : "memory");
#endif
}

// Tiles of 16 rows of a with tiles of 8 rows of b, over four lanes' PAIRS of neighbouring columns. A lane has rows lane / 4
// and that + 8 of each tile of a, and row lane / 4 of each of b.
template <class T, int A, int B, int PAIRS>
__device__ __forceinline__ void multiply_tiles(float (*sums)[A][4], const uint32_t (&a)[A][2][PAIRS],
                                               const uint32_t (&b)[B][PAIRS]) {
#pragma unroll
  for (int p = 0; p < PAIRS; p += 2)
#pragma unroll
    for (int j = 0; j < B; j++)
#pragma unroll
      for (int i = 0; i < A; i++)
        multiply_tile<T>(sums[j][i], {a[i][0][p], a[i][1][p], a[i][0][p + 1], a[i][1][p + 1]}, {b[j][p], b[j][p + 1]});
}

// Of a matrix of 8 x 8 numbers of 16 bits, of which a lane has two neighbours in row lane / 4: those of its transpose.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// An address that what lies beside it is counted from: else the compiler computes one for each.
template <class T>
__device__ __forceinline__ const T* one_address(const T* place) {
  asm("" : "+l"(place));
  return place;
}

// An address that the compiler does not know: what lies there is loaded each time, and not kept.
template <class T>
__device__ __forceinline__ const T* address_anew(const T* place) {
  asm volatile("" : "+l"(place));
  return place;
}

// 16 or 8 bytes, read where the program does so: not before the last barrier.
__device__ __forceinline__ uint4 load_late(const uint4* place) {
  uint4 four;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
               : "l"(place)
               : "memory");
  return four;
}

__device__ __forceinline__ uint2 load_late(const uint2* place) {
  uint2 two;
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(two.x), "=r"(two.y) : "l"(place) : "memory");
  return two;
}

// The next kernel may begin, as far as this function; what the kernels before have written is there behind it (PTX ISA,
// griddepcontrol: all of them have ended). A kernel of a library that begins early calls it before it touches what a kernel
// writes: nothing but weights is read before.
__device__ __forceinline__ void kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A load of what this kernel may have written, from memory that the compiler may not know to be the device's.
__device__ __forceinline__ uint4 load_plain(const uint4* place) {
  __builtin_assume(__isGlobal(place));
  return *place;
}

// A line of memory is fetched into the cache of the device, and nobody waits for it.
__device__ __forceinline__ void fetch_line(const void* place) { asm volatile("prefetch.global.L2 [%0];" ::"l"(place)); }

// (word & mask) | ones, one instruction.
__device__ __forceinline__ uint32_t masked(uint32_t word, uint32_t mask, uint32_t ones) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(ones));
  return result;
}

}  // namespace mlcbuild
#endif

namespace mlcbuild {

// Arithmetic of two floats of type T, which lie in one register.
template <class T>
struct Pairs;

template <class To, class From>
__device__ __forceinline__ To as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  return *reinterpret_cast<To*>(&from);
}

template <>
struct Pairs<half> {
  static __device__ __forceinline__ uint32_t of(float x) { return as<uint32_t>(__float2half2_rn(x)); }
  static __device__ __forceinline__ uint32_t of(float x, float y) { return as<uint32_t>(__floats2half2_rn(x, y)); }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
    return as<uint32_t>(__hadd2(as<half2>(a), as<half2>(b)));
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    return as<uint32_t>(__hmul2(as<half2>(a), as<half2>(b)));
  }
  static __device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    return as<uint32_t>(__hfma2(as<half2>(a), as<half2>(b), as<half2>(c)));
  }
  static __device__ __forceinline__ float2 wide(uint32_t a) { return __half22float2(as<half2>(a)); }
};

template <>
struct Pairs<__nv_bfloat16> {
  typedef __nv_bfloat162 Pair;
  static __device__ __forceinline__ uint32_t of(float x) { return as<uint32_t>(__float2bfloat162_rn(x)); }
  static __device__ __forceinline__ uint32_t of(float x, float y) { return as<uint32_t>(__floats2bfloat162_rn(x, y)); }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
    return as<uint32_t>(__hadd2(as<Pair>(a), as<Pair>(b)));
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    return as<uint32_t>(__hmul2(as<Pair>(a), as<Pair>(b)));
  }
};

#ifdef BEGINS_EARLY
constexpr bool EARLY = true;
#else
constexpr bool EARLY = false;
#endif

// What a kernel before has written. Of a kernel that began early, __ldg is no promise that it can keep: such a load is not
// bound to its place in the program, nor is its cache told of other kernels' writes (PTX ISA, ld.global.nc).
template <class T>
__device__ __forceinline__ T load_given(const T* place) {
  if constexpr (EARLY) return *place;
  return __ldg(place);
}

// Two 16-bit floats that are the same one.
__device__ __forceinline__ uint32_t twice(uint16_t bits) { return bits * 0x10001u; }

// 16 bytes of a matrix, which nobody reads again.
__device__ __forceinline__ uint4 load_once(const uint4* place) { return __ldcs(place); }

}  // namespace mlcbuild

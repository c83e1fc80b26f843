// Packed weights in registers: how a storage word's codes become numbers, and in which order (docs/quantization.md).
//
// A code is put into the mantissa of a float whose unit in the last place is one (1024 of float16, 128 of bfloat16), and
// that number and the code of zero are taken away again: exact, and no conversion from integer, which GPUs are slow at.
// Two codes that lie 16 bits apart are unpacked at once, so words come apart in another order than they are stored in;
// the activations are brought into the same one.
#pragma once
#include "device.cuh"

namespace mlcbuild {

constexpr uint32_t ONES_HALF = 0x64006400, ONES_BFLOAT = 0x43004300;  // 1024 and 128, twice
constexpr int WORDS = 4;                                               // of a load: 16 bytes

// (masked field + 1024 * FIELD) / FIELD - 1024 - middle, of codes that lie log2(FIELD) bits up.
template <int FIELD, uint32_t MASK, int MIDDLE>
__device__ __forceinline__ uint32_t half_field(uint32_t word) {
  const uint32_t number = masked(word, MASK, ONES_HALF);
  if constexpr (FIELD == 1) return Pairs<half>::add(number, Pairs<half>::of(-1024.f - MIDDLE));
  return Pairs<half>::multiply_add(number, Pairs<half>::of(1.f / FIELD), Pairs<half>::of(-1024.f / FIELD - MIDDLE));
}

template <uint32_t MASK, int MIDDLE>
__device__ __forceinline__ uint32_t bfloat_field(uint32_t word) {
  return Pairs<__nv_bfloat16>::add(masked(word, MASK, ONES_BFLOAT), Pairs<__nv_bfloat16>::of(-128.f - MIDDLE));
}

// Two numbers from the lowest bits of two 16-bit halves, of MASK each.
template <uint32_t MASK, int MIDDLE>
__device__ __forceinline__ uint32_t low_field(uint32_t word, half*) { return half_field<1, MASK, MIDDLE>(word); }
template <uint32_t MASK, int MIDDLE>
__device__ __forceinline__ uint32_t low_field(uint32_t word, __nv_bfloat16*) { return bfloat_field<MASK, MIDDLE>(word); }

// Codes of one word: `pairs` of numbers code - middle, and `sorted` activations in the same order, as pairs too.
// `in_order` unpacks pairs of neighbours, for more instructions. UNIT: words that a lane takes at once for many rows.
template <int BITS>
struct Codes;

template <>
struct Codes<4> {
  static constexpr int PER_WORD = 8, MIDDLE = 7, UNIT = 1;
  template <class T>
  static __device__ __forceinline__ void in_order(uint32_t w, uint32_t* pairs, T* of) {
    const uint32_t odd = w >> 4;
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = low_field<0x000f000f, MIDDLE>(__byte_perm(w, odd, i | (4 + i) << 8), of);
  }
  static __device__ __forceinline__ void unpack(uint32_t w, uint32_t* pairs, half*) {
    pairs[0] = half_field<1, 0x000f000f, MIDDLE>(w), pairs[1] = half_field<16, 0x00f000f0, MIDDLE>(w);
    w >>= 8;
    pairs[2] = half_field<1, 0x000f000f, MIDDLE>(w), pairs[3] = half_field<16, 0x00f000f0, MIDDLE>(w);
  }
  static __device__ __forceinline__ void unpack(uint32_t w, uint32_t* pairs, __nv_bfloat16*) {
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = bfloat_field<0x000f000f, MIDDLE>(w >> 4 * i);
  }
  // 0 1 2 3 4 5 6 7 -> 0 4, 1 5, 2 6, 3 7
  static __device__ __forceinline__ void sort(const uint32_t* x, uint32_t* sorted) {
#pragma unroll
    for (int i = 0; i < 4; i++) sorted[i] = __byte_perm(x[i / 2], x[i / 2 + 2], i % 2 ? 0x7632 : 0x5410);
  }
  static __device__ constexpr int place(int i) { return i / 2 + i % 2 * 4; }
};

template <>
struct Codes<3> {
  static constexpr int PER_WORD = 10, MIDDLE = 3, UNIT = 2;
  template <class T>
  static __device__ __forceinline__ void in_order(uint32_t w, uint32_t* pairs, T* of) {
#pragma unroll
    for (int i = 0; i < 5; i++) {
      const uint32_t odd = 6 * i < 13 ? w << (13 - 6 * i) : w >> (6 * i - 13);  // its code at bit 16
      pairs[i] = low_field<0x00070007, MIDDLE>(__byte_perm(w >> 6 * i, odd, 0x7610), of);
    }
  }
  // Five codes to 16 bits.
  static __device__ __forceinline__ uint32_t spread(uint32_t w) { return (w & 0x7fff) | (w << 1 & 0x7fff0000); }
  static __device__ __forceinline__ void unpack(uint32_t w, uint32_t* pairs, half*) {
    w = spread(w);
    pairs[0] = half_field<1, 0x00070007, MIDDLE>(w), pairs[1] = half_field<8, 0x00380038, MIDDLE>(w);
    pairs[2] = half_field<64, 0x01c001c0, MIDDLE>(w);
    w >>= 9;
    pairs[3] = half_field<1, 0x00070007, MIDDLE>(w), pairs[4] = half_field<8, 0x00380038, MIDDLE>(w);
  }
  static __device__ __forceinline__ void unpack(uint32_t w, uint32_t* pairs, __nv_bfloat16*) {
    w = spread(w);
#pragma unroll
    for (int i = 0; i < 5; i++) pairs[i] = bfloat_field<0x00070007, MIDDLE>(w >> 3 * i);
  }
  // 0 1 2 3 4 5 6 7 8 9 -> 0 5, 1 6, 2 7, 3 8, 4 9
  static __device__ __forceinline__ void sort(const uint32_t* x, uint32_t* sorted) {
#pragma unroll
    for (int i = 0; i < 5; i++) sorted[i] = __byte_perm(x[i / 2], x[(i + 5) / 2], i % 2 ? 0x5432 : 0x7610);
  }
  static __device__ constexpr int place(int i) { return i / 2 + i % 2 * 5; }
};

template <>
struct Codes<8> {
  static constexpr int PER_WORD = 4, MIDDLE = 127, UNIT = 2;
  template <class T>
  static __device__ __forceinline__ void in_order(uint32_t w, uint32_t* pairs, T* of) { unpack(w, pairs, of); }
  static __device__ __forceinline__ void unpack(uint32_t w, uint32_t* pairs, half*) {
    const uint32_t less = Pairs<half>::of(-1024.f - MIDDLE);
    pairs[0] = Pairs<half>::add(__byte_perm(w, ONES_HALF, 0x5150), less);
    pairs[1] = Pairs<half>::add(__byte_perm(w, ONES_HALF, 0x5352), less);
  }
  static __device__ __forceinline__ void unpack(uint32_t w, uint32_t* pairs, __nv_bfloat16*) {
#pragma unroll
    for (int i = 0; i < 2; i++) pairs[i] = Pairs<__nv_bfloat16>::of(number(w, 2 * i), number(w, 2 * i + 1));
  }
  static __device__ __forceinline__ float number(uint32_t w, int i) {
    return as<float>(__byte_perm(w, 0x4b000000, 0x7540 | i)) - (8388608.f + MIDDLE);
  }
  static __device__ __forceinline__ void sort(const uint32_t* x, uint32_t* sorted) {
    sorted[0] = x[0], sorted[1] = x[1];
  }
  static __device__ constexpr int place(int i) { return i; }
};

template <>
struct Codes<16> {  // numbers as they are, without scales
  static constexpr int PER_WORD = 2, UNIT = 4;
  template <class T>
  static __device__ __forceinline__ void in_order(uint32_t w, uint32_t* pairs, T*) { pairs[0] = w; }
  template <class T>
  static __device__ __forceinline__ void unpack(uint32_t w, uint32_t* pairs, T*) {
    pairs[0] = w;
  }
  static __device__ __forceinline__ void sort(const uint32_t* x, uint32_t* sorted) { sorted[0] = x[0]; }
};

// A matrix's format. T: of activations and scales; GROUP: columns that share a scale, 0 where there are none.
// ACROSS: words [K / PER_WORD, N] and scales [K / GROUP, N], not [N, ...].
template <class T, int BITS, int GROUP, bool ACROSS>
struct Weights {
  typedef T Float;
  typedef Codes<BITS> Code;
  static constexpr int PER_WORD = Code::PER_WORD, CHUNK = WORDS * PER_WORD;  // columns of a load
  static constexpr int COLUMNS_OF_A_SCALE = GROUP;
  static constexpr bool TRANSPOSED = ACROSS;
};

}  // namespace mlcbuild

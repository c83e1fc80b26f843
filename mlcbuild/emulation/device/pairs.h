// What kernels of mlcbuild's own call (compiler/gpu/kernels/device.cuh): two 16-bit floats at once, bytes, tensor cores.
#pragma once

#define EMULATION_PAIRS(T, PAIR, FROM_ONE, FROM_TWO)                                                        \
  static inline PAIR FROM_ONE(float x) { return {T(x), T(x)}; }                                             \
  static inline PAIR FROM_TWO(float x, float y) { return {T(x), T(y)}; }                                    \
  static inline PAIR __hadd2(PAIR a, PAIR b) { return {a.x + b.x, a.y + b.y}; }                             \
  static inline PAIR __hmul2(PAIR a, PAIR b) { return {a.x * b.x, a.y * b.y}; }
EMULATION_PAIRS(half, half2, __float2half2_rn, __floats2half2_rn)
EMULATION_PAIRS(nv_bfloat16, nv_bfloat162, __float2bfloat162_rn, __floats2bfloat162_rn)
typedef nv_bfloat162 __nv_bfloat162;

static inline half emulation_fma(half a, half b, half c) { return half(float(a) * float(b) + float(c)); }
static inline half2 __hfma2(half2 a, half2 b, half2 c) {
  return {emulation_fma(a.x, b.x, c.x), emulation_fma(a.y, b.y, c.y)};
}
static inline float2 __half22float2(half2 a) { return {float(a.x), float(a.y)}; }
extern "C" float fmaf(float, float, float);

// Byte i of the result is byte `selector >> 4 * i & 7` of the eight bytes of a and b.
static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

namespace mlcbuild {

static inline uint32_t masked(uint32_t word, uint32_t mask, uint32_t ones) { return (word & mask) | ones; }

static inline void kernel_before() { emulation::wait_for_kernel(); }

struct Operands {
  uint32_t a[4], b[2];
};

// mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): a lane has rows lane / 4 and that + 8 of `a`, column
// lane / 4 of `b`, and of both the columns and rows 2 * (lane % 4), the next, and those + 8.
template <class T>
static inline void multiply_tile(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static Operands given[emulation::MOST_THREADS];
  memcpy(given[emulation::thread].a, a, sizeof(a)), memcpy(given[emulation::thread].b, b, sizeof(b));
  emulation::wait_for_warp();
  const int lane = emulation_lane(), first = emulation::thread - lane;
  for (int i = 0; i < 4; i++)
    for (int t = 0; t < 4; t++)
      for (int part = 0; part < 2; part++) {
        T x[2], y[2];
        memcpy(x, &given[first + lane / 4 * 4 + t].a[2 * part + i / 2], 4);
        memcpy(y, &given[first + (lane % 4 * 2 + i % 2) * 4 + t].b[part], 4);
        sums[i] += float(x[0]) * float(y[0]) + float(x[1]) * float(y[1]);
      }
  emulation::wait_for_warp();
}

// cp.async: BYTES to a place that is aligned to them.
template <int BYTES>
static inline void copy_later(void* to, const void* from, bool there) {
  struct alignas(BYTES) All { char bytes[BYTES]; };
  emulation::copy_later(emulation_aligned<All>(to), there ? emulation_aligned<All>(from) : nullptr, BYTES);
}
static inline void end_of_copies() { emulation::end_of_copies(); }
template <int STEPS>
static inline void wait_for_copies() { emulation::wait_for_copies(STEPS); }

// Many such products at once, with the sums where the lanes have them: one lane does the work of its warp, eight columns at
// a time, for nearly all time of a prefill is spent here. A lane has the same columns of both operands.
template <class T, int A, int B, int PAIRS>
static inline void multiply_tiles(float (*sums)[A][4], const uint32_t (&a)[A][2][PAIRS], const uint32_t (&b)[B][PAIRS]) {
  typedef float Row __attribute__((vector_size(32)));
  constexpr int EACH = 2 * PAIRS, K = 4 * EACH;
  struct Given {
    float (*sums)[A][4];
    float a[A][2][EACH], b[B][EACH];
  };
  static Given given[emulation::MOST_THREADS];
  static Row columns[K][B];
  Given& own = given[emulation::thread];
  auto widen = [](float (&to)[EACH], const uint32_t (&from)[PAIRS]) {
    T numbers[EACH];
    memcpy(numbers, from, sizeof(numbers));
    for (int k = 0; k < EACH; k++) to[k] = numbers[k];
  };
  own.sums = sums;
  for (int i = 0; i < A; i++) widen(own.a[i][0], a[i][0]), widen(own.a[i][1], a[i][1]);
  for (int j = 0; j < B; j++) widen(own.b[j], b[j]);
  emulation::wait_for_warp();
  if (emulation_lane() == 0) {
    const Given* warp = &given[emulation::thread];
    for (int k = 0; k < K; k++)
      for (int j = 0; j < B; j++)
        for (int c = 0; c < 8; c++) columns[k][j][c] = warp[c * 4 + k / EACH].b[j][k % EACH];
    for (int row = 0; row < 16 * A; row++) {
      const Given* of_row = warp + row % 8 * 4;
      const int i = row / 16, half_of_tile = row / 8 % 2;
      Row all[B];
      for (int j = 0; j < B; j++)
        for (int c = 0; c < 8; c++) all[j][c] = of_row[c / 2].sums[j][i][half_of_tile * 2 + c % 2];
      for (int k = 0; k < K; k++)
        for (int j = 0; j < B; j++) all[j] += of_row[k / EACH].a[i][half_of_tile][k % EACH] * columns[k][j];
      for (int j = 0; j < B; j++)
        for (int c = 0; c < 8; c++) of_row[c / 2].sums[j][i][half_of_tile * 2 + c % 2] = all[j][c];
    }
  }
  emulation::wait_for_warp();
}

static inline void fetch_line(const void* place) { static_cast<void>(*static_cast<const volatile char*>(place)); }
template <class T>
static inline T load_late(const T* place) { return *emulation_aligned<const T>(place); }
static inline uint4 load_plain(const uint4* place) { return *emulation_aligned<const uint4>(place); }

template <class T>
static inline const T* one_address(const T* place) { return place; }
template <class T>
static inline const T* address_anew(const T* place) { return place; }

// movmatrix.m8n8.trans: two neighbours in row lane / 4 become those of the transpose.
static inline uint32_t transposed(uint32_t pair) {
  const int lane = emulation_lane(), row = lane / 4, column = lane % 4 * 2;
  uint32_t from[2] = {emulation_exchange(pair, column * 4 + row / 2), emulation_exchange(pair, column * 4 + 4 + row / 2)};
  return from[0] >> row % 2 * 16 & 0xffff | (from[1] >> row % 2 * 16) << 16;
}

}  // namespace mlcbuild

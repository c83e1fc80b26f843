// CUDA C as TVM writes it, in C++ for this CPU: types, vectors, arithmetic, warp operations, tensor cores.
#pragma once
#include "language.h"

#define EMULATION_DOUBLE(NAME) extern "C" double NAME(double);
EMULATION_FUNCTIONS(EMULATION_DOUBLE)
extern "C" double pow(double, double);

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

// 16-bit floats: stored in 16 bits, computed in float32 and rounded after each operation, to nearest even, as GPUs do.
struct half {
  _Float16 value;
  half() = default;
  half(Number auto number) : value(static_cast<_Float16>(static_cast<float>(number))) {}
  half(double number) : value(static_cast<_Float16>(number)) {}
  operator float() const { return static_cast<float>(value); }
};

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(Number auto number) {
    const float wide = static_cast<float>(number);
    uint32_t raw;
    memcpy(&raw, &wide, 4);
    bits = wide != wide ? 0x7fff : (raw + 0x7fff + (raw >> 16 & 1)) >> 16;
  }
  operator float() const {
    const uint32_t raw = static_cast<uint32_t>(bits) << 16;
    float wide;
    memcpy(&wide, &raw, 4);
    return wide;
  }
};
typedef half __half;
typedef nv_bfloat16 __nv_bfloat16;

#define EMULATION_ARITHMETIC(T)                                              \
  static inline T operator+(T a, T b) { return T(float(a) + float(b)); }     \
  static inline T operator-(T a, T b) { return T(float(a) - float(b)); }     \
  static inline T operator*(T a, T b) { return T(float(a) * float(b)); }     \
  static inline T operator/(T a, T b) { return T(float(a) / float(b)); }     \
  static inline T operator-(T a) { return T(-float(a)); }                    \
  static inline bool operator<(T a, T b) { return float(a) < float(b); }     \
  static inline bool operator>(T a, T b) { return float(a) > float(b); }     \
  static inline bool operator<=(T a, T b) { return float(a) <= float(b); }   \
  static inline bool operator>=(T a, T b) { return float(a) >= float(b); }   \
  static inline bool operator==(T a, T b) { return float(a) == float(b); }   \
  static inline bool operator!=(T a, T b) { return float(a) != float(b); }   \
  static inline T max(T a, T b) { return a > b ? a : b; }                    \
  static inline T min(T a, T b) { return a < b ? a : b; }
EMULATION_ARITHMETIC(half)
EMULATION_ARITHMETIC(nv_bfloat16)

#define EMULATION_NARROW(NAME)                                                       \
  static inline half h##NAME(half x) { return half(NAME##f(float(x))); }             \
  static inline nv_bfloat16 h##NAME(nv_bfloat16 x) { return nv_bfloat16(NAME##f(float(x))); }
EMULATION_FUNCTIONS(EMULATION_NARROW)

static inline half __float2half_rn(float x) { return half(x); }
static inline half __float2half(float x) { return half(x); }
static inline float __half2float(half x) { return x; }
static inline nv_bfloat16 __float2bfloat16_rn(float x) { return nv_bfloat16(x); }
static inline nv_bfloat16 __float2bfloat16(float x) { return nv_bfloat16(x); }
static inline float __bfloat162float(nv_bfloat16 x) { return x; }

#define EMULATION_VECTOR(T, NAME)                                                       \
  struct alignas(sizeof(T) * 2) NAME##2 { T x, y; };                                    \
  struct NAME##3 { T x, y, z; };                                                        \
  struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) NAME##4 { T x, y, z, w; };    \
  static inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                     \
  static inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }             \
  static inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATION_VECTOR(float, float)
EMULATION_VECTOR(double, double)
EMULATION_VECTOR(int, int)
EMULATION_VECTOR(uint, uint)
EMULATION_VECTOR(char, char)
EMULATION_VECTOR(uchar, uchar)
EMULATION_VECTOR(short, short)
EMULATION_VECTOR(ushort, ushort)
EMULATION_VECTOR(long long, longlong)
EMULATION_VECTOR(unsigned long long, ulonglong)
EMULATION_VECTOR(half, half)
EMULATION_VECTOR(nv_bfloat16, bfloat16)
typedef bfloat162 nv_bfloat162;
typedef bfloat164 nv_bfloat164;
#define make_nv_bfloat162 make_bfloat162
#define make_nv_bfloat164 make_bfloat164

static inline uint __pack_half2(half low, half high) {
  uint16_t a, b;
  memcpy(&a, &low, 2), memcpy(&b, &high, 2);
  return static_cast<uint>(b) << 16 | a;
}

static inline auto max(Number auto a, Number auto b) { return a > b ? a : b; }
static inline auto min(Number auto a, Number auto b) { return a < b ? a : b; }
template <class T>
static inline T __ldg(const T* place) { return *emulation_aligned<const T>(place); }
template <class T>
static inline T __ldcg(const T* place) { return *emulation_aligned<const T>(place); }
template <class T>
static inline T __ldcs(const T* place) { return *emulation_aligned<const T>(place); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __int_as_float(int raw) { float x; memcpy(&x, &raw, 4); return x; }
static inline int __float_as_int(float x) { int raw; memcpy(&raw, &x, 4); return raw; }
static inline float emulation_fast_exp(float x) { return expf(x); }
static inline float emulation_fast_log(float x) { return logf(x); }
#define __expf emulation_fast_exp
#define __logf emulation_fast_log
static inline int __popc(unsigned x) { return __builtin_popcount(x); }

static inline void __syncthreads() { emulation::wait_for_block(); }
static inline void __syncwarp(unsigned = ~0u) { emulation::wait_for_warp(); }
static inline void __threadfence() {}
static inline unsigned atomicInc(unsigned* place, unsigned last) {  // blocks follow each other, and one thread runs at a time
  const unsigned before = *place;
  *place = before >= last ? 0 : before + 1;
  return before;
}
static inline unsigned __activemask() { return ~0u; }

// A lane that would reach beyond its group of `width` gets its own value back.
template <class T>
static inline T __shfl_down_sync(unsigned, T value, int by, int width = 32) {
  const int lane = emulation_lane();
  return emulation_exchange(value, lane % width + by < width ? lane + by : lane);
}
template <class T>
static inline T __shfl_up_sync(unsigned, T value, int by, int width = 32) {
  const int lane = emulation_lane();
  return emulation_exchange(value, lane % width >= by ? lane - by : lane);
}
template <class T>
static inline T __shfl_sync(unsigned, T value, int from, int width = 32) {
  return emulation_exchange(value, emulation_lane() / width * width + from % width);
}
template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
  const int lane = emulation_lane(), from = lane ^ mask;
  return emulation_exchange(value, from / width == lane / width ? from : lane);
}

#define EMULATED_DEVICE
#include "pairs.h"

// Tensor cores: 16 x 16 x 16. A fragment belongs to a warp; its first lane holds all of it and does all the work.
namespace nvcuda {
namespace wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = row_major>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "fragments of 16 x 16 x 16");
  T value[16][16];
};

static inline bool leads() { return emulation_lane() == 0; }

template <class Fragment>
void fill_fragment(Fragment& fragment, float number) {
  if (!leads()) return;
  for (auto& row : fragment.value)
    for (auto& cell : row) cell = number;
}
template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& fragment, const T* from, unsigned stride) {
  if (!leads()) return;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++)
      fragment.value[i][j] = __is_same(Layout, col_major) ? from[j * stride + i] : from[i * stride + j];
}
// Rows of 16 as vectors, whatever the compiler is told to optimise: nearly all time of a prefill is spent here.
typedef float Row __attribute__((vector_size(64)));
static inline Row wide(const float (&row)[16]) {
  Row all;
  memcpy(&all, row, sizeof(all));
  return all;
}
static inline Row wide(const half (&row)[16]) {
  _Float16 __attribute__((vector_size(32))) all;
  memcpy(&all, row, sizeof(all));
  return __builtin_convertvector(all, Row);
}
static inline Row wide(const nv_bfloat16 (&row)[16]) {
  Row all;
  for (int j = 0; j < 16; j++) all[j] = row[j];
  return all;
}

template <class Result, class A, class B, class C>
void mma_sync(Result& result, const A& a, const B& b, const C& c) {
  if (!leads()) return;
  Row columns[16];
  for (int k = 0; k < 16; k++) columns[k] = wide(b.value[k]);
  for (int i = 0; i < 16; i++) {
    Row sum = wide(c.value[i]);
    const Row row = wide(a.value[i]);
    for (int k = 0; k < 16; k++) sum += row[k] * columns[k];
    for (int j = 0; j < 16; j++) result.value[i][j] = sum[j];
  }
}
template <class T, class Fragment>
void store_matrix_sync(T* to, const Fragment& fragment, unsigned stride, layout_t layout) {
  if (!leads()) return;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[layout == mem_row_major ? i * stride + j : j * stride + i] = fragment.value[i][j];
}
}  // namespace wmma
}  // namespace nvcuda

// What the languages of kernels have in common, in C++ for this CPU: numbers, mathematics, exchange between lanes, thunks.
#pragma once
#include "threads.h"

// The mathematical functions that kernels call, of the process that loads them: no header and no library of the host's.
#define EMULATION_FUNCTIONS(OF) \
  OF(acos) OF(acosh) OF(asin) OF(asinh) OF(atan) OF(atanh) \
  OF(cbrt) OF(ceil) OF(cos) OF(cosh) OF(erf) OF(exp) \
  OF(exp2) OF(fabs) OF(floor) OF(log) OF(log1p) OF(log2) \
  OF(log10) OF(nearbyint) OF(rint) OF(round) OF(sin) OF(sinh) \
  OF(sqrt) OF(tan) OF(tanh) OF(trunc)
#define EMULATION_FLOAT(NAME) extern "C" float NAME##f(float);
EMULATION_FUNCTIONS(EMULATION_FLOAT)
extern "C" float powf(float, float);
extern "C" float fmodf(float, float);
extern "C" float atan2f(float, float);

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;

template <class T>
concept Number = __is_arithmetic(T);

// Vectors are aligned as on the device (16 bytes at most): an access that is not is a fault there, and is one here.
template <class T>
static inline T* emulation_aligned(const void* place) {
  if (reinterpret_cast<uintptr_t>(place) % alignof(T)) __builtin_trap();
  return static_cast<T*>(const_cast<void*>(place));
}

template <class T>
static inline T emulation_exchange(T value, int lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 2, "shuffles of 16 and 32 bits");
  uint32_t raw = 0;
  memcpy(&raw, &value, sizeof(T));
  raw = emulation::exchange(raw, lane);
  memcpy(&value, &raw, sizeof(T));
  return value;
}
static inline int emulation_lane() { return emulation::thread % emulation::WARP; }

// The thunk of a kernel, and its row in the table.
namespace emulation {
template <class Function>
struct Arguments;
template <class... T>
struct Arguments<void(T...)> {
  static constexpr size_t count = sizeof...(T);
  static constexpr size_t sizes[count + 1] = {sizeof(T)..., 0};
  static void call(void (*kernel)(T...), void** values) {
    // Braces give the order in which `values` is counted up.
    struct Call {
      Call(void (*kernel)(T...), T... given) { kernel(given...); }
    };
    Call{kernel, *static_cast<T*>(*values++)...};
  }
};
}  // namespace emulation
#define EMULATION_KERNEL(NAME)                                                                          \
  {#NAME, [](void** values) { emulation::Arguments<decltype(NAME)>::call(NAME, values); },              \
   emulation::Arguments<decltype(NAME)>::sizes, emulation::Arguments<decltype(NAME)>::count}

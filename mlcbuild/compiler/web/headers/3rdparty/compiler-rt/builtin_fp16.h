// Conversions between IEEE half and single precision under the names by which TVM's runtime calls them.
#pragma once

#include <cstdint>
#include <cstring>

template <typename From, typename FromBits, int, typename To, typename ToBits, int>
inline To __truncXfYf2__(From from) {
  // Rounded to nearest even by the addition of a power of two, below whose last place nothing survives.
  float value = static_cast<float>(from), magnitude = value < 0 ? -value : value;
  uint32_t bits, sign, rounded;
  std::memcpy(&bits, &value, 4);
  sign = bits >> 16 & 0x8000;
  if (value != value) return static_cast<To>(sign | 0x7e00);
  if (magnitude >= 65520.0f) return static_cast<To>(sign | 0x7c00);
  if (magnitude < 6.103515625e-05f) {  // 2^-14: what is smaller has a fixed last place, 2^-24
    float shifted = magnitude + 0.5f;
    std::memcpy(&rounded, &shifted, 4);
    return static_cast<To>(sign | (rounded - 0x3f000000));
  }
  rounded = (bits & 0x7fffffff) - (112u << 23);
  return static_cast<To>(sign | (rounded + 0xfff + (rounded >> 13 & 1)) >> 13);
}

template <typename From, typename FromBits, int, typename To, typename ToBits, int>
inline To __extendXfYf2__(From from) {
  uint32_t half = static_cast<uint16_t>(from), magnitude = half & 0x7fff, bits;
  float value;
  if (magnitude < 0x400) {
    value = static_cast<float>(magnitude) * 5.9604644775390625e-08f;  // 2^-24
  } else {
    bits = (magnitude << 13) + (magnitude >= 0x7c00 ? 224u << 23 : 112u << 23);
    std::memcpy(&value, &bits, 4);
  }
  return half & 0x8000 ? -value : value;
}

// Small helpers of TVM's runtime.
#pragma once

#include <tvm/ffi/string.h>

#include <cctype>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

namespace tvm {
namespace support {

inline bool IsNumber(const std::string& text) {
  for (unsigned char letter : text)
    if (!std::isdigit(letter)) return false;
  return !text.empty();
}

inline bool StartsWith(const ffi::String& text, const char* prefix) {
  return std::strncmp(text.c_str(), prefix, std::strlen(prefix)) == 0;
}

template <typename T>
uint64_t HashCombine(uint64_t key, const T& value) {
  return key ^ (std::hash<T>()(value) + 0x9e3779b97f4a7c15ull + (key << 12) + (key >> 4));
}

}  // namespace support
}  // namespace tvm

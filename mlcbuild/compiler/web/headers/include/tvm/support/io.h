// Byte streams for TVM's runtime: this project's own version of a header that apache-tvm's wheel leaves out.
#pragma once

#include <cstddef>
#include <type_traits>

namespace tvm {
namespace support {

// How a type is written and read; serializer.h has the usual ones, others bring their own.
template <typename T, typename = void>
struct Serializer;

class Stream {
 public:
  virtual ~Stream() = default;
  virtual size_t Read(void* to, size_t size) = 0;
  virtual size_t Write(const void* from, size_t size) = 0;

  template <typename T>
  bool Read(T* value) {
    return Serializer<T>::Read(this, value);
  }
  template <typename T>
  void Write(const T& value) {
    Serializer<T>::Write(this, value);
  }
  template <typename T>
  bool ReadArray(T* values, size_t count) {
    for (T* end = values + count; values != end; values++)
      if (!Read<T>(values)) return false;
    return true;
  }
  template <typename T>
  void WriteArray(const T* values, size_t count) {
    for (const T* end = values + count; values != end; values++) Write<T>(*values);
  }
};

}  // namespace support
}  // namespace tvm

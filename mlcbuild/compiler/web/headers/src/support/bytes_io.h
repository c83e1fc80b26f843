// Streams over bytes in memory.
#pragma once

#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace tvm {
namespace support {

class BytesInStream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;
  explicit BytesInStream(const std::string& bytes) : at_(bytes.data()), left_(bytes.size()) {}
  explicit BytesInStream(const ffi::Bytes& bytes) : at_(bytes.data()), left_(bytes.size()) {}
  BytesInStream(const char* data, size_t size) : at_(data), left_(size) {}
  size_t Read(void* to, size_t size) override {
    size = std::min(size, left_);
    if (size != 0) std::memcpy(to, at_, size);
    at_ += size;
    left_ -= size;
    return size;
  }
  size_t Write(const void*, size_t) override { return 0; }

 private:
  const char* at_;
  size_t left_;
};

class BytesOutStream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;
  explicit BytesOutStream(std::string* bytes) : bytes_(bytes) {}
  size_t Read(void*, size_t) override { return 0; }
  size_t Write(const void* from, size_t size) override {
    bytes_->append(static_cast<const char*>(from), size);
    return size;
  }

 private:
  std::string* bytes_;
};

}  // namespace support
}  // namespace tvm

// Base64 (RFC 4648) as streams around streams.
#pragma once

#include <tvm/support/io.h>

#include <cstdint>
#include <cstring>

namespace tvm {
namespace support {

constexpr char kBase64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

class Base64InStream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;
  explicit Base64InStream(Stream* source) : source_(source) {}
  void InitPosition() {}
  size_t Read(void* to, size_t size) override {
    auto* out = static_cast<uint8_t*>(to);
    size_t done = 0;
    char letter;
    while (done < size) {
      if (held_ < 8) {
        if (source_->Read(static_cast<void*>(&letter), 1) != 1 || letter == '=') break;
        const char* found = letter ? std::strchr(kBase64, letter) : nullptr;
        if (found == nullptr) continue;  // white space
        bits_ = bits_ << 6 | static_cast<uint32_t>(found - kBase64);
        held_ += 6;
      } else {
        held_ -= 8;
        out[done++] = static_cast<uint8_t>(bits_ >> held_);
      }
    }
    return done;
  }
  size_t Write(const void*, size_t) override { return 0; }

 private:
  Stream* source_;
  uint32_t bits_ = 0;
  int held_ = 0;  // bits of bits_ that are still to be given
};

class Base64OutStream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;
  explicit Base64OutStream(Stream* sink) : sink_(sink) {}
  size_t Read(void*, size_t) override { return 0; }
  size_t Write(const void* from, size_t size) override {
    auto* in = static_cast<const uint8_t*>(from);
    for (size_t i = 0; i < size; i++) {
      bits_ = bits_ << 8 | in[i];
      held_ += 8;
      while (held_ >= 6) Put(kBase64[bits_ >> (held_ -= 6) & 63]);
    }
    return size;
  }
  void Finish() {
    if (held_ != 0) Put(kBase64[bits_ << (6 - held_) & 63]);
    held_ = 0;
    while (written_ % 4 != 0) Put('=');
  }

 private:
  void Put(char letter) {
    sink_->Write(static_cast<const void*>(&letter), 1);
    written_++;
  }
  Stream* sink_;
  uint32_t bits_ = 0;
  int held_ = 0;
  size_t written_ = 0;
};

}  // namespace support
}  // namespace tvm

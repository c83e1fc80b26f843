// A queue of bytes that is filled and emptied by callbacks.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

namespace tvm {
namespace support {

class RingBuffer {
 public:
  size_t bytes_available() const { return bytes_.size() - start_; }
  size_t capacity() const { return bytes_.capacity(); }
  void Reserve(size_t size) { bytes_.reserve(size); }
  void Read(void* to, size_t size) {
    std::memcpy(to, bytes_.data() + start_, size);
    Drop(size);
  }
  void Write(const void* from, size_t size) {
    auto* first = static_cast<const char*>(from);
    bytes_.insert(bytes_.end(), first, first + size);
  }
  // `send(data, size)` returns how many it took.
  template <typename Send>
  size_t ReadWithCallback(Send send, size_t most) {
    size_t taken = send(bytes_.data() + start_, std::min(most, bytes_available()));
    Drop(taken);
    return taken;
  }
  // `receive(data, size)` returns how many it gave.
  template <typename Receive>
  size_t WriteWithCallback(Receive receive, size_t most) {
    size_t before = bytes_.size();
    bytes_.resize(before + most);
    size_t given = receive(bytes_.data() + before, most);
    bytes_.resize(before + given);
    return given;
  }

 private:
  void Drop(size_t size) {
    start_ += size;
    if (start_ == bytes_.size()) {
      bytes_.clear();
      start_ = 0;
    }
  }
  std::vector<char> bytes_;
  size_t start_ = 0;
};

}  // namespace support
}  // namespace tvm

// Memory that is given back all at once.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace tvm {
namespace support {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { RecycleAll(); }
  void FreeAll() { RecycleAll(); }
  void RecycleAll() {
    for (void* block : blocks_) std::free(block);
    blocks_.clear();
  }
  template <typename T>
  T* allocate_(int count = 1) {
    blocks_.push_back(std::malloc(sizeof(T) * static_cast<size_t>(count > 0 ? count : 1)));
    return static_cast<T*>(blocks_.back());
  }
  template <typename T, typename... Arguments>
  T* make(Arguments&&... arguments) {
    return new (allocate_<T>()) T(std::forward<Arguments>(arguments)...);
  }

 private:
  std::vector<void*> blocks_;
};

}  // namespace support
}  // namespace tvm

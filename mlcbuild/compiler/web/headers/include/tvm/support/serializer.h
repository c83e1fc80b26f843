// The format of values in a library's bytes: numbers little-endian, strings and containers behind a 64-bit length.
// WebAssembly is little-endian, so numbers are copied as they are.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace tvm {
namespace support {

template <typename T>
struct Serializer<T, std::enable_if_t<std::is_arithmetic_v<T> || std::is_enum_v<T>>> {
  static constexpr bool enabled = true;
  static bool Read(Stream* stream, T* value) { return stream->Read(static_cast<void*>(value), sizeof(T)) == sizeof(T); }
  static void Write(Stream* stream, const T& value) { stream->Write(static_cast<const void*>(&value), sizeof(T)); }
};

template <typename Text>
struct TextSerializer {
  static constexpr bool enabled = true;
  static bool Read(Stream* stream, Text* value) {
    uint64_t size;
    if (!stream->Read(&size)) return false;
    std::string text(size, '\0');
    bool whole = stream->Read(static_cast<void*>(text.data()), text.size()) == size;
    *value = Text(std::move(text));
    return whole;
  }
  static void Write(Stream* stream, const Text& value) {
    stream->Write<uint64_t>(value.size());
    stream->Write(static_cast<const void*>(value.data()), value.size());
  }
};
template <>
struct Serializer<std::string> : TextSerializer<std::string> {};
template <>
struct Serializer<ffi::String> : TextSerializer<ffi::String> {};
template <>
struct Serializer<ffi::Bytes> : TextSerializer<ffi::Bytes> {};

template <typename A, typename B>
struct Serializer<std::pair<A, B>> {
  static constexpr bool enabled = true;
  static bool Read(Stream* stream, std::pair<A, B>* value) {
    return stream->Read(&value->first) && stream->Read(&value->second);
  }
  static void Write(Stream* stream, const std::pair<A, B>& value) {
    stream->Write(value.first);
    stream->Write(value.second);
  }
};

// `add(list, item)` appends what was read.
template <typename List, typename Item, void (*add)(List*, Item&&)>
struct ListSerializer {
  static constexpr bool enabled = true;
  static bool Read(Stream* stream, List* list) {
    uint64_t count;
    if (!stream->Read(&count)) return false;
    *list = List();
    while (count--) {
      Item item;
      if (!stream->Read(&item)) return false;
      add(list, std::move(item));
    }
    return true;
  }
  static void Write(Stream* stream, const List& list) {
    stream->Write<uint64_t>(list.size());
    for (const auto& item : list) stream->Write(Item(item));
  }
};

template <typename List, typename Item>
void Append(List* list, Item&& item) {
  list->push_back(std::move(item));
}
template <typename K, typename V>
void SetEntry(ffi::Map<K, V>* map, std::pair<K, V>&& entry) {
  map->Set(std::move(entry.first), std::move(entry.second));
}
template <typename K, typename V>
void InsertEntry(std::unordered_map<K, V>* map, std::pair<K, V>&& entry) {
  map->insert(std::move(entry));
}

template <typename T>
struct Serializer<std::vector<T>> : ListSerializer<std::vector<T>, T, Append<std::vector<T>, T>> {};
template <typename T>
struct Serializer<ffi::Array<T>> : ListSerializer<ffi::Array<T>, T, Append<ffi::Array<T>, T>> {};
template <typename K, typename V>
struct Serializer<ffi::Map<K, V>> : ListSerializer<ffi::Map<K, V>, std::pair<K, V>, SetEntry<K, V>> {};
template <typename K, typename V>
struct Serializer<std::unordered_map<K, V>>
    : ListSerializer<std::unordered_map<K, V>, std::pair<K, V>, InsertEntry<K, V>> {};

template <>
struct Serializer<DLDataType> {
  static constexpr bool enabled = true;
  static bool Read(Stream* stream, DLDataType* value) {
    return stream->Read(&value->code) && stream->Read(&value->bits) && stream->Read(&value->lanes);
  }
  static void Write(Stream* stream, const DLDataType& value) {
    stream->Write<uint8_t>(value.code);
    stream->Write<uint8_t>(value.bits);
    stream->Write<uint16_t>(value.lanes);
  }
};

template <>
struct Serializer<DLDevice> {
  static constexpr bool enabled = true;
  static bool Read(Stream* stream, DLDevice* value) {
    int32_t type = 0;
    bool whole = stream->Read(&type) && stream->Read(&value->device_id);
    value->device_type = static_cast<DLDeviceType>(type);
    return whole;
  }
  static void Write(Stream* stream, const DLDevice& value) {
    stream->Write<int32_t>(value.device_type);
    stream->Write<int32_t>(value.device_id);
  }
};

}  // namespace support
}  // namespace tvm

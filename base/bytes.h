// Plain values to bytes and back, for messages between ranks. Reading never trusts the length.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace ternion::base {

class ByteWriter {
 public:
  template <typename T>
  void Put(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  template <typename T>
  void PutVector(const std::vector<T>& values) {
    static_assert(std::is_trivially_copyable_v<T>);
    Put(static_cast<uint32_t>(values.size()));
    bytes_.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  }
  std::string Take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

// After a read past the end, ok() is false and every value is zero or empty.
class ByteReader {
 public:
  explicit ByteReader(const std::string& bytes) : bytes_(bytes) {}

  template <typename T>
  T Get() {
    static_assert(std::is_trivially_copyable_v<T>);
    T value{};
    if (Take(sizeof(T))) std::memcpy(&value, bytes_.data() + offset_ - sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  std::vector<T> GetVector() {
    const uint64_t bytes = uint64_t{Get<uint32_t>()} * sizeof(T);
    if (!Take(bytes)) return {};
    std::vector<T> values(bytes / sizeof(T));
    if (bytes > 0) std::memcpy(values.data(), bytes_.data() + offset_ - bytes, bytes);
    return values;
  }
  bool ok() const { return ok_; }
  bool AtEnd() const { return offset_ == bytes_.size(); }

 private:
  bool Take(uint64_t bytes) {
    ok_ = ok_ && bytes <= bytes_.size() - offset_;
    if (ok_) offset_ += bytes;
    return ok_;
  }

  const std::string& bytes_;
  size_t offset_ = 0;
  bool ok_ = true;
};

}  // namespace ternion::base

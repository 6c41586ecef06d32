// Files: read-only maps, and writes that either finish or leave nothing behind.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ternion::base {

// A whole file mapped read-only. Pages are loaded when touched. Move-only.
class MappedFile {
 public:
  // NotFound, PermissionDenied or InvalidArgument (a directory, an empty file) with the path in the
  // text.
  static absl::StatusOr<MappedFile> Open(const std::string& path);

  MappedFile() = default;
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }
  MappedFile& operator=(MappedFile&& other) noexcept;

  std::span<const uint8_t> bytes() const { return {data_, size_}; }
  // Tells the kernel that bytes [offset, offset + size) will not be read again soon.
  void Release(size_t offset, size_t size) const;

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// The file's whole content. `max_bytes` guards against reading a disk into memory.
absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes = size_t{1} << 30);

// A file that appears under its name only when Commit succeeds; until then, and after an error,
// `path` is as it was before.
class AtomicFile {
 public:
  static absl::StatusOr<AtomicFile> Create(const std::string& path);

  ~AtomicFile();
  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&&) = delete;

  absl::Status Write(std::span<const uint8_t> bytes);
  absl::Status Write(absl::string_view text);
  absl::Status Commit();

 private:
  AtomicFile(std::string path, std::string temporary, int fd);

  std::string path_;
  std::string temporary_;
  int fd_ = -1;
};

absl::Status WriteFileAtomically(const std::string& path, absl::string_view content);

}  // namespace ternion::base

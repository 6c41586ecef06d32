// safetensors files, mapped and checked. Nothing is read but the headers until a tensor is touched.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/file.h"

namespace ternion::runtime {

enum class DType : uint8_t {
  kBool,
  kU8,
  kI8,
  kI16,
  kU16,
  kF16,
  kBf16,
  kI32,
  kU32,
  kF32,
  kI64,
  kU64,
  kF64
};

absl::string_view DTypeName(DType dtype);  // as in the header: "BF16", "U8", ...
int64_t DTypeBytes(DType dtype);

// A tensor in a mapped file. Row-major. `data` has no alignment beyond the file's (read by memcpy).
struct TensorView {
  DType dtype = DType::kU8;
  std::vector<int64_t> shape;
  std::span<const uint8_t> data;  // exactly DTypeBytes * product(shape) bytes

  int64_t num_elements() const;
  int64_t bytes() const { return num_elements() * DTypeBytes(dtype); }
};

// One or several safetensors files as one name -> tensor map. Immutable once opened; thread-safe.
class SafetensorsFile {
 public:
  // A single file. Checks (FORMATS.md): header length against the file and a 100 MB cap, JSON, no
  // duplicate keys, known dtypes, shapes and overflow-safe sizes, offsets in range, in order and
  // non-overlapping. InvalidArgument names the file and the tensor.
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);

  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  base::MappedFile file_;
  std::map<std::string, TensorView, std::less<>> tensors_;
};

// All tensors of a model directory: model.safetensors, or the shards named by
// model.safetensors.index.json (shard names must be plain file names inside the directory; every
// tensor of the index must be in its shard, and no tensor in two).
class TensorStore {
 public:
  static absl::StatusOr<TensorStore> Open(const std::string& directory);
  // Tensors that no file holds: their `data` is empty.
  static TensorStore WithoutData(std::map<std::string, TensorView, std::less<>> tensors);

  const TensorView* Find(absl::string_view name) const;  // null when absent
  // NotFound names the tensor.
  absl::StatusOr<TensorView> Get(absl::string_view name) const;
  std::vector<std::string> Names() const;  // sorted

 private:
  std::vector<SafetensorsFile> files_;
  std::map<std::string, TensorView, std::less<>> without_data_;
  std::map<std::string, const TensorView*, std::less<>> index_;
};

// Writes one safetensors file tensor by tensor, so that a model larger than memory can be written.
// The format has no padding: PyTorch can view every tensor only if no entry starts at an odd
// multiple of a smaller type, so give the wider dtypes first. Nothing appears under `path` before
// Finish succeeds.
class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
  };
  static absl::StatusOr<SafetensorsWriter> Create(const std::string& path,
                                                  const std::vector<Entry>& entries);
  // The next bytes of the data section: entries' data, in the order given, in pieces of any size.
  absl::Status Append(std::span<const uint8_t> bytes);
  // InvalidArgument when fewer or more bytes came than the entries need.
  absl::Status Finish();

 private:
  SafetensorsWriter(std::string path, base::AtomicFile file, uint64_t data_bytes);

  std::string path_;
  base::AtomicFile file_;
  uint64_t data_bytes_ = 0;
  uint64_t written_bytes_ = 0;
};

}  // namespace ternion::runtime

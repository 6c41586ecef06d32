#include "runtime/safetensors.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/string_view.h"
#include "base/checked.h"
#include "base/status.h"
#include "runtime/strict_json.h"
#include "runtime/utf8.h"

namespace ternion::runtime {
namespace {

using Json = nlohmann::json;
using TensorMap = std::map<std::string, TensorView, std::less<>>;

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kMaxIndexBytes = 100'000'000;
constexpr char kMetadataKey[] = "__metadata__";

struct DTypeInfo {
  absl::string_view name;
  int64_t bytes;
};

// In the order of DType.
constexpr std::array<DTypeInfo, 13> kDTypes = {{{"BOOL", 1},
                                                {"U8", 1},
                                                {"I8", 1},
                                                {"I16", 2},
                                                {"U16", 2},
                                                {"F16", 2},
                                                {"BF16", 2},
                                                {"I32", 4},
                                                {"U32", 4},
                                                {"F32", 4},
                                                {"I64", 8},
                                                {"U64", 8},
                                                {"F64", 8}}};

std::optional<DType> DTypeFromName(absl::string_view name) {
  for (size_t i = 0; i < kDTypes.size(); ++i) {
    if (kDTypes[i].name == name) return static_cast<DType>(i);
  }
  return std::nullopt;
}

// A name from a file, short enough and harmless for a one-line message.
std::string Quoted(absl::string_view name) {
  std::string quoted = absl::StrCat("\"", name.substr(0, 200), "\"");
  std::replace_if(
      quoted.begin(), quoted.end(), [](unsigned char c) { return c < 0x20; }, ' ');
  return quoted;
}

// Bytes of a tensor, or nothing when a dimension or the product is out of range.
std::optional<uint64_t> TensorBytes(DType dtype, const std::vector<int64_t>& shape) {
  uint64_t bytes = static_cast<uint64_t>(DTypeBytes(dtype));
  for (const int64_t dimension : shape) {
    if (dimension < 0) return std::nullopt;
    const std::optional<uint64_t> product =
        base::CheckedMul(bytes, static_cast<uint64_t>(dimension));
    if (!product.has_value()) return std::nullopt;
    bytes = *product;
  }
  if (bytes > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
  return bytes;
}

// A tensor as the header describes it.
struct HeaderEntry {
  absl::string_view name;
  DType dtype = DType::kU8;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // in the data section
  uint64_t end = 0;
};

absl::Status ParseDType(const Json& tensor, HeaderEntry* entry) {
  const Json* dtype = FindMember(tensor, "dtype");
  if (dtype == nullptr || !dtype->is_string()) {
    return absl::InvalidArgumentError("dtype is missing or no string");
  }
  const std::string& name = dtype->get_ref<const std::string&>();
  const std::optional<DType> known = DTypeFromName(name);
  if (!known.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat("unknown dtype ", Quoted(name)));
  }
  entry->dtype = *known;
  return absl::OkStatus();
}

absl::Status ParseShape(const Json& tensor, HeaderEntry* entry) {
  const Json* shape = FindMember(tensor, "shape");
  if (shape == nullptr || !shape->is_array()) {
    return absl::InvalidArgumentError("shape is missing or no array");
  }
  for (const Json& dimension : *shape) {
    // Negative, fractional and too large numbers are not unsigned.
    if (!dimension.is_number_unsigned() ||
        dimension.get<uint64_t>() > std::numeric_limits<int64_t>::max()) {
      return absl::InvalidArgumentError("shape holds something other than sizes");
    }
    entry->shape.push_back(dimension.get<int64_t>());
  }
  return absl::OkStatus();
}

absl::Status ParseOffsets(const Json& tensor, HeaderEntry* entry) {
  const Json* offsets = FindMember(tensor, "data_offsets");
  if (offsets == nullptr || !offsets->is_array() || offsets->size() != 2 ||
      !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
    return absl::InvalidArgumentError("data_offsets is not a pair of byte offsets");
  }
  entry->begin = (*offsets)[0].get<uint64_t>();
  entry->end = (*offsets)[1].get<uint64_t>();
  return absl::OkStatus();
}

absl::StatusOr<HeaderEntry> ParseEntry(absl::string_view name, const Json& tensor,
                                       uint64_t data_bytes) {
  if (!tensor.is_object()) return absl::InvalidArgumentError("not an object");
  HeaderEntry entry;
  entry.name = name;
  TERNION_RETURN_IF_ERROR(ParseDType(tensor, &entry));
  TERNION_RETURN_IF_ERROR(ParseShape(tensor, &entry));
  TERNION_RETURN_IF_ERROR(ParseOffsets(tensor, &entry));
  if (entry.begin > entry.end || entry.end > data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("data_offsets [", entry.begin, ", ", entry.end,
                                                   "] outside of ", data_bytes, " data bytes"));
  }
  const std::optional<uint64_t> bytes = TensorBytes(entry.dtype, entry.shape);
  if (!bytes.has_value()) return absl::InvalidArgumentError("shape overflows 64 bits");
  if (*bytes != entry.end - entry.begin) {
    return absl::InvalidArgumentError(absl::StrCat(
        "shape and dtype need ", *bytes, " bytes, data_offsets give ", entry.end - entry.begin));
  }
  return entry;
}

absl::Status CheckMetadata(const Json& metadata) {
  if (!metadata.is_object()) return absl::InvalidArgumentError("__metadata__ is not an object");
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat("__metadata__: ", Quoted(key), " is not a string"));
    }
  }
  return absl::OkStatus();
}

// As the format demands, the tensors cover the data section without gap or overlap.
absl::Status CheckCoverage(std::vector<HeaderEntry>* entries, uint64_t data_bytes) {
  std::sort(entries->begin(), entries->end(), [](const HeaderEntry& a, const HeaderEntry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t covered = 0;
  for (const HeaderEntry& entry : *entries) {
    if (entry.begin != covered) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tensor ", Quoted(entry.name), entry.begin < covered ? ": overlaps" : ": leaves a gap to",
          " the tensor before it"));
    }
    covered = entry.end;
  }
  if (covered != data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the tensors cover ", covered, " of ", data_bytes, " data bytes"));
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorMap> ParseHeader(absl::string_view header, std::span<const uint8_t> data) {
  TERNION_ASSIGN_OR_RETURN(const Json json, ParseJson(header));
  if (!json.is_object()) return absl::InvalidArgumentError("the header is not a JSON object");
  std::vector<HeaderEntry> entries;
  for (const auto& [name, value] : json.items()) {
    if (name == kMetadataKey) {
      TERNION_RETURN_IF_ERROR(CheckMetadata(value));
      continue;
    }
    absl::StatusOr<HeaderEntry> entry = ParseEntry(name, value, data.size());
    if (!entry.ok()) {
      return base::Annotate(entry.status(), absl::StrCat("tensor ", Quoted(name)));
    }
    entries.push_back(*std::move(entry));
  }
  TERNION_RETURN_IF_ERROR(CheckCoverage(&entries, data.size()));
  TensorMap tensors;
  for (HeaderEntry& entry : entries) {
    tensors[std::string(entry.name)] = {entry.dtype, std::move(entry.shape),
                                        data.subspan(entry.begin, entry.end - entry.begin)};
  }
  return tensors;
}

absl::StatusOr<TensorMap> ParseFile(std::span<const uint8_t> bytes) {
  if (bytes.size() < kLengthBytes) {
    return absl::InvalidArgumentError("too short for a safetensors file");
  }
  uint64_t header_bytes = 0;
  for (uint64_t i = 0; i < kLengthBytes; ++i) header_bytes |= uint64_t{bytes[i]} << (8 * i);
  const std::span<const uint8_t> rest = bytes.subspan(kLengthBytes);
  if (header_bytes > kMaxHeaderBytes || header_bytes > rest.size()) {
    return absl::InvalidArgumentError(absl::StrCat("header length ", header_bytes, " exceeds ",
                                                   std::min<uint64_t>(kMaxHeaderBytes, rest.size()),
                                                   " bytes"));
  }
  return ParseHeader({reinterpret_cast<const char*>(rest.data()), header_bytes},
                     rest.subspan(header_bytes));
}

bool IsPlainFileName(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
}

// weight_map of an index file: tensor name -> shard name.
absl::StatusOr<std::map<std::string, std::string>> ReadIndex(const std::string& path) {
  TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(path, kMaxIndexBytes));
  const absl::StatusOr<Json> json = ParseJson(text);
  if (!json.ok()) return base::Annotate(json.status(), path);
  const Json* weight_map = FindMember(*json, "weight_map");
  if (weight_map == nullptr || !weight_map->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": weight_map is missing or no object"));
  }
  std::map<std::string, std::string> shards;
  for (const auto& [name, shard] : weight_map->items()) {
    if (!shard.is_string() || !IsPlainFileName(shard.get_ref<const std::string&>())) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": the shard of tensor ", Quoted(name), " is not a plain file name"));
    }
    shards[name] = shard.get<std::string>();
  }
  return shards;
}

// The files that hold the model in `directory`, and where its index says each tensor is (empty for
// an unsharded model).
struct ModelFiles {
  std::vector<std::string> names;
  std::map<std::string, std::string> shard_of_tensor;
};

absl::StatusOr<ModelFiles> FindModelFiles(const std::string& directory) {
  std::error_code ignored;
  if (std::filesystem::exists(absl::StrCat(directory, "/model.safetensors"), ignored)) {
    return ModelFiles{{"model.safetensors"}, {}};
  }
  const std::string index = absl::StrCat(directory, "/model.safetensors.index.json");
  if (!std::filesystem::exists(index, ignored)) {
    return absl::NotFoundError(
        absl::StrCat(directory, " has neither model.safetensors nor model.safetensors.index.json"));
  }
  ModelFiles files;
  TERNION_ASSIGN_OR_RETURN(files.shard_of_tensor, ReadIndex(index));
  std::set<std::string> names;
  for (const auto& [tensor, shard] : files.shard_of_tensor) names.insert(shard);
  files.names.assign(names.begin(), names.end());
  return files;
}

// Appends to `header` what the file says about `entry`, whose data begins at `*offset`, and moves
// `*offset` behind it.
absl::Status DescribeEntry(const SafetensorsWriter::Entry& entry, uint64_t* offset, Json* header) {
  const std::optional<uint64_t> bytes = TensorBytes(entry.dtype, entry.shape);
  const std::optional<uint64_t> end = base::CheckedAdd(*offset, bytes.value_or(0));
  if (!bytes.has_value() || !end.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", Quoted(entry.name), ": negative or overflowing shape"));
  }
  if (!IsValidUtf8(entry.name)) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", Quoted(entry.name), ": name is not UTF-8"));
  }
  if (entry.name == kMetadataKey || header->contains(entry.name)) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", Quoted(entry.name), ": name is taken"));
  }
  (*header)[entry.name] = {{"dtype", std::string(DTypeName(entry.dtype))},
                           {"shape", entry.shape},
                           {"data_offsets", {*offset, *end}}};
  *offset = *end;
  return absl::OkStatus();
}

std::string LittleEndian64(uint64_t value) {
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(value >> (8 * i));
  return bytes;
}

}  // namespace

absl::string_view DTypeName(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].name; }

int64_t DTypeBytes(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].bytes; }

int64_t TensorView::num_elements() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  SafetensorsFile result;
  result.path_ = path;
  TERNION_ASSIGN_OR_RETURN(result.file_, base::MappedFile::Open(path));
  absl::StatusOr<TensorMap> tensors = ParseFile(result.file_.bytes());
  if (!tensors.ok()) return base::Annotate(tensors.status(), path);
  result.tensors_ = *std::move(tensors);
  return result;
}

absl::StatusOr<TensorStore> TensorStore::Open(const std::string& directory) {
  TERNION_ASSIGN_OR_RETURN(const ModelFiles files, FindModelFiles(directory));
  TensorStore store;
  std::map<absl::string_view, absl::string_view> shard_of_tensor;
  for (const std::string& name : files.names) {
    TERNION_ASSIGN_OR_RETURN(SafetensorsFile file,
                             SafetensorsFile::Open(absl::StrCat(directory, "/", name)));
    store.files_.push_back(std::move(file));
    // Map nodes, unlike the files, stay where they are when `files_` grows.
    for (const auto& [tensor, view] : store.files_.back().tensors()) {
      if (!store.index_.emplace(tensor, &view).second) {
        return absl::InvalidArgumentError(absl::StrCat(directory, ": tensor ", Quoted(tensor),
                                                       " is in ", name, " and in ",
                                                       shard_of_tensor[tensor]));
      }
      shard_of_tensor[tensor] = name;
    }
  }
  for (const auto& [tensor, shard] : files.shard_of_tensor) {
    const auto found = shard_of_tensor.find(tensor);
    if (found == shard_of_tensor.end() || found->second != shard) {
      return absl::InvalidArgumentError(absl::StrCat(directory, ": tensor ", Quoted(tensor),
                                                     " is not in ", shard, ", as the index says"));
    }
  }
  return store;
}

TensorStore TensorStore::WithoutData(std::map<std::string, TensorView, std::less<>> tensors) {
  TensorStore store;
  store.without_data_ = std::move(tensors);
  for (const auto& [name, tensor] : store.without_data_) store.index_.emplace(name, &tensor);
  return store;
}

const TensorView* TensorStore::Find(absl::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : found->second;
}

absl::StatusOr<TensorView> TensorStore::Get(absl::string_view name) const {
  const TensorView* tensor = Find(name);
  if (tensor == nullptr) return absl::NotFoundError(absl::StrCat("no tensor ", Quoted(name)));
  return *tensor;
}

std::vector<std::string> TensorStore::Names() const {
  std::vector<std::string> names;
  names.reserve(index_.size());
  for (const auto& [name, tensor] : index_) names.push_back(name);
  return names;
}

absl::StatusOr<SafetensorsWriter> SafetensorsWriter::Create(const std::string& path,
                                                            const std::vector<Entry>& entries) {
  // Readers such as transformers want to be told the framework.
  Json header = {{kMetadataKey, {{"format", "pt"}}}};
  uint64_t data_bytes = 0;
  for (const Entry& entry : entries) {
    TERNION_RETURN_IF_ERROR(base::Annotate(DescribeEntry(entry, &data_bytes, &header), path));
  }
  std::string text = header.dump();
  text.resize(base::RoundUp(static_cast<int64_t>(text.size()), 8), ' ');
  if (text.size() > kMaxHeaderBytes) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": too many tensors for one file"));
  }
  TERNION_ASSIGN_OR_RETURN(base::AtomicFile file, base::AtomicFile::Create(path));
  TERNION_RETURN_IF_ERROR(file.Write(LittleEndian64(text.size())));
  TERNION_RETURN_IF_ERROR(file.Write(text));
  return SafetensorsWriter(path, std::move(file), data_bytes);
}

SafetensorsWriter::SafetensorsWriter(std::string path, base::AtomicFile file, uint64_t data_bytes)
    : path_(std::move(path)), file_(std::move(file)), data_bytes_(data_bytes) {}

absl::Status SafetensorsWriter::Append(std::span<const uint8_t> bytes) {
  if (bytes.size() > data_bytes_ - written_bytes_) {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": more data than the ", data_bytes_, " bytes its tensors need"));
  }
  TERNION_RETURN_IF_ERROR(file_.Write(bytes));
  written_bytes_ += bytes.size();
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  if (written_bytes_ != data_bytes_) {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": ", written_bytes_, " of the ",
                                                   data_bytes_, " bytes its tensors need"));
  }
  return file_.Commit();
}

}  // namespace ternion::runtime

#include "runtime/safetensors.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gtest/gtest.h"
#include "tests/testing/temp_dir.h"

namespace ternion::runtime {
namespace {

namespace fs = std::filesystem;

class SafetensorsTest : public ::testing::Test {
 protected:
  std::string Path(const std::string& name) const { return directory_.path(name); }

  std::string WriteBytes(const std::string& name, const std::string& bytes) const {
    return directory_.Write(name, bytes);
  }

  // A file of header `json` and `num_data_bytes` bytes 0, 1, 2, ...
  std::string WriteFile(const std::string& name, const std::string& json,
                        size_t num_data_bytes) const {
    std::string bytes(8, '\0');
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(json.size() >> (8 * i));
    bytes += json;
    for (size_t i = 0; i < num_data_bytes; ++i) bytes += static_cast<char>(i);
    return WriteBytes(name, bytes);
  }

  // One line, naming the file, of kind InvalidArgument, and with `expected` in it.
  void ExpectRefused(const std::string& json, size_t num_data_bytes, const std::string& expected) {
    const std::string path = WriteFile("bad.safetensors", json, num_data_bytes);
    ExpectError(SafetensorsFile::Open(path).status(), expected, json);
    EXPECT_TRUE(absl::StrContains(SafetensorsFile::Open(path).status().message(), path)) << json;
  }

  static void ExpectError(const absl::Status& status, const std::string& expected,
                          const std::string& what) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << what << ": " << status;
    EXPECT_TRUE(absl::StrContains(status.message(), expected)) << what << ": " << status;
    EXPECT_FALSE(absl::StrContains(status.message(), "\n")) << what << ": " << status;
  }

  const test::TempDir directory_;
};

std::span<const uint8_t> AsBytes(const std::string& text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

std::string AsString(std::span<const uint8_t> bytes) { return {bytes.begin(), bytes.end()}; }

// Touches every byte that an opened file hands out.
uint64_t Sum(const SafetensorsFile& file) {
  uint64_t sum = 0;
  for (const auto& [name, tensor] : file.tensors()) {
    EXPECT_EQ(tensor.num_elements() * DTypeBytes(tensor.dtype),
              static_cast<int64_t>(tensor.data.size()));
    for (const uint8_t byte : tensor.data) sum += byte;
  }
  return sum;
}

TEST_F(SafetensorsTest, RoundTripsEveryDType) {
  std::mt19937 random(1);
  std::vector<SafetensorsWriter::Entry> entries;
  std::string data;
  for (int i = 0; i <= static_cast<int>(DType::kF64); ++i) {
    const DType dtype = static_cast<DType>(i);
    entries.push_back({absl::StrCat("layer.", i, ".", DTypeName(dtype), " \xC3\xA9\"\\"),
                       dtype,
                       {3, static_cast<int64_t>(random() % 4), 5}});
    const size_t bytes = 15 * entries.back().shape[1] * DTypeBytes(dtype);
    for (size_t k = 0; k < bytes; ++k) data += static_cast<char>(random());
  }
  entries.push_back({"scalar", DType::kF32, {}});
  data += "\1\2\3\4";
  entries.push_back({"empty", DType::kF64, {7, 0, int64_t{1} << 40}});
  const std::string path = Path("all.safetensors");
  auto writer = SafetensorsWriter::Create(path, entries);
  ASSERT_TRUE(writer.ok()) << writer.status();
  for (size_t i = 0; i < data.size();) {  // pieces that match no tensor's border
    const size_t piece = std::min<size_t>(1 + random() % 97, data.size() - i);
    ASSERT_TRUE(writer->Append(AsBytes(data.substr(i, piece))).ok());
    i += piece;
  }
  EXPECT_FALSE(fs::exists(path));
  ASSERT_TRUE(writer->Finish().ok());

  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->path(), path);
  ASSERT_EQ(file->tensors().size(), entries.size());
  size_t offset = 0;
  for (const auto& entry : entries) {
    const TensorView& tensor = file->tensors().at(entry.name);
    EXPECT_EQ(tensor.dtype, entry.dtype);
    EXPECT_EQ(tensor.shape, entry.shape);
    EXPECT_EQ(AsString(tensor.data), data.substr(offset, tensor.data.size())) << entry.name;
    offset += tensor.data.size();
  }
  EXPECT_EQ(offset, data.size());
}

TEST_F(SafetensorsTest, DTypesHaveTheirNamesAndSizes) {
  const std::map<std::string, int64_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"I16", 2}, {"U16", 2}, {"F16", 2}, {"BF16", 2},
      {"I32", 4},  {"U32", 4}, {"F32", 4}, {"I64", 8}, {"U64", 8}, {"F64", 8}};
  for (const auto& [name, bytes] : sizes) {
    const auto file = SafetensorsFile::Open(
        WriteFile("t",
                  absl::StrCat("{\"x\":{\"dtype\":\"", name,
                               "\",\"shape\":[3],\"data_offsets\":[0,", 3 * bytes, "]}}"),
                  3 * bytes));
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ(DTypeName(file->tensors().at("x").dtype), name);
    EXPECT_EQ(DTypeBytes(file->tensors().at("x").dtype), bytes);
    EXPECT_EQ(file->tensors().at("x").num_elements(), 3);
  }
}

TEST_F(SafetensorsTest, ReadsWhatTheFormatAllows) {
  // Order of keys does not matter, padding and metadata are allowed, unknown fields are ignored.
  const auto file = SafetensorsFile::Open(WriteFile(
      "t",
      R"({"__metadata__":{"a":"b"},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5],"x":1},)"
      R"("z":{"dtype":"F32","shape":[0],"data_offsets":[3,3]},)"
      R"("a":{"shape":[3,1],"data_offsets":[0,3],"dtype":"I8"}}   )",
      5));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(AsString(file->tensors().at("a").data), std::string("\0\1\2", 3));
  EXPECT_EQ(AsString(file->tensors().at("b").data), "\3\4");
  EXPECT_TRUE(file->tensors().at("z").data.empty());
  EXPECT_EQ(file->tensors().count("__metadata__"), 0u);
  EXPECT_TRUE(SafetensorsFile::Open(WriteFile("none", "{}", 0)).ok());
}

TEST_F(SafetensorsTest, RefusesBadHeaders) {
  const auto tensor = [](const std::string& dtype, const std::string& shape,
                         const std::string& offsets) {
    return absl::StrCat(R"({"x.weight":{"dtype":)", dtype, R"(,"shape":)", shape,
                        R"(,"data_offsets":)", offsets, "}}");
  };
  const struct {
    std::string json;
    size_t num_data_bytes;
    std::string expected;
  } cases[] = {
      {"", 0, "parse error"},
      {"[]", 0, "not a JSON object"},
      {"null", 0, "not a JSON object"},
      {"{", 0, "parse error"},
      {"{}{}", 0, "parse error"},
      {"{\"a\xFF\":1}", 0, "parse error"},
      {"{\"x\":NaN}", 0, "parse error"},
      {"{\"x\":1e999}", 0, "number overflow"},
      {std::string(100000, '['), 0, "nested too deeply"},
      {R"({"x.weight":3})", 0, "not an object"},
      {R"({"x.weight":{}})", 0, "dtype"},
      {R"({"__metadata__":3})", 0, "__metadata__"},
      {R"({"__metadata__":{"a":3}})", 0, "\"a\" is not a string"},
      {R"({"__metadata__":{},"__metadata__":{}})", 0, "duplicate key \"__metadata__\""},
      {tensor("3", "[1]", "[0,1]"), 1, "dtype"},
      {tensor("\"F7\"", "[1]", "[0,1]"), 1, "unknown dtype \"F7\""},
      {tensor("\"f32\"", "[1]", "[0,4]"), 4, "unknown dtype"},
      {tensor("\"U8\"", "1", "[0,1]"), 1, "shape"},
      {tensor("\"U8\"", "[\"1\"]", "[0,1]"), 1, "shape"},
      {tensor("\"U8\"", "[1.0]", "[0,1]"), 1, "shape"},
      {tensor("\"U8\"", "[-1]", "[0,1]"), 1, "shape"},
      {tensor("\"U8\"", "[1e300]", "[0,1]"), 1, "shape"},
      {tensor("\"U8\"", "[null]", "[0,1]"), 1, "shape"},
      {tensor("\"U8\"", "[18446744073709551616]", "[0,1]"), 1, "shape"},
      {tensor("\"U8\"", "[0,9223372036854775808]", "[0,0]"), 0, "shape"},
      {tensor("\"U8\"", "[4398046511105]", "[0,1]"), 1, "need 4398046511105 bytes"},
      {tensor("\"F32\"", "[4611686018427387904]", "[0,0]"), 0, "overflow"},
      {tensor("\"U8\"", "[4294967296,4294967296]", "[0,0]"), 0, "overflow"},
      {tensor("\"U8\"", "[4294967296,4294967296,0]", "[0,0]"), 0, "overflow"},
      {tensor("\"U8\"", "[4294967296,2147483648]", "[0,0]"), 0, "overflow"},
      {tensor("\"F32\"", "[2]", "[0,4]"), 4, "need 8 bytes, data_offsets give 4"},
      {tensor("\"U8\"", "[1]", "[0]"), 1, "data_offsets"},
      {tensor("\"U8\"", "[1]", "[0,1,2]"), 1, "data_offsets"},
      {tensor("\"U8\"", "[1]", "[-1,0]"), 1, "data_offsets"},
      {tensor("\"U8\"", "[1]", "[0,1.0]"), 1, "data_offsets"},
      {tensor("\"U8\"", "[1]", "[\"0\",\"1\"]"), 1, "data_offsets"},
      {tensor("\"U8\"", "[1]", "{\"0\":0,\"1\":1}"), 1, "data_offsets"},
      {tensor("\"U8\"", "[1]", "[1,0]"), 1, "outside of 1 data bytes"},
      {tensor("\"U8\"", "[1]", "[0,2]"), 1, "outside of 1 data bytes"},
      {tensor("\"U8\"", "[1]", "[1,2]"), 1, "outside of 1 data bytes"},
      {tensor("\"U8\"", "[1]", "[18446744073709551615,0]"), 1, "outside of 1 data bytes"},
      {tensor("\"U8\"", "[1]", "[0,18446744073709551615]"), 1, "outside of 1 data bytes"},
      {tensor("\"U8\"", "[1]", "[1,2]"), 2, "gap"},
      {tensor("\"U8\"", "[1]", "[0,1]"), 2, "cover 1 of 2 data bytes"},
      {"{}", 1, "cover 0 of 1 data bytes"},
  };
  for (const auto& bad : cases) ExpectRefused(bad.json, bad.num_data_bytes, bad.expected);
  const auto named = SafetensorsFile::Open(WriteFile("t", tensor("\"U8\"", "[1]", "[0,2]"), 1));
  EXPECT_TRUE(absl::StrContains(named.status().message(), "tensor \"x.weight\""));
}

TEST_F(SafetensorsTest, RefusesOverlapsGapsAndDuplicates) {
  const auto two = [](const char* first, const char* second) {
    return absl::StrCat(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)", first,
                        R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)", second, "}}");
  };
  ASSERT_TRUE(SafetensorsFile::Open(WriteFile("t", two("[4,8]", "[0,4]"), 8)).ok());
  ExpectRefused(two("[0,4]", "[3,7]"), 7, "tensor \"b\": overlaps");
  ExpectRefused(two("[0,4]", "[0,4]"), 4, "overlaps");
  ExpectRefused(two("[0,4]", "[5,9]"), 9, "tensor \"b\": leaves a gap");
  const std::string duplicate = absl::StrReplaceAll(two("[0,4]", "[4,8]"), {{"\"b\"", "\"a\""}});
  ExpectRefused(duplicate, 8, "duplicate key \"a\"");
  ExpectRefused(R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1,
                "duplicate key \"dtype\"");
}

TEST_F(SafetensorsTest, RefusesBadFiles) {
  EXPECT_EQ(SafetensorsFile::Open(Path("absent")).status().code(), absl::StatusCode::kNotFound);
  ExpectError(SafetensorsFile::Open(directory_.path()).status(), directory_.path(), "directory");
  ExpectError(SafetensorsFile::Open(WriteBytes("empty", "")).status(), "empty", "empty");
  ExpectError(SafetensorsFile::Open(WriteBytes("t", "1234567")).status(), "too short", "7 bytes");
  const std::string huge("\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF{}", 10);
  ExpectError(SafetensorsFile::Open(WriteBytes("t", huge)).status(), "header length", "2^64-1");
  const std::string past("\3\0\0\0\0\0\0\0{}", 10);
  ExpectError(SafetensorsFile::Open(WriteBytes("t", past)).status(), "header length 3", "past");

  // Header length over the cap, though the file (sparse) is long enough.
  const std::string sparse = WriteBytes("sparse", std::string("\1\xE1\xF5\5\0\0\0\0{}", 10));
  fs::resize_file(sparse, 200'000'000);
  ExpectError(SafetensorsFile::Open(sparse).status(), "header length 100000001", "cap");
}

// A small valid file to damage.
std::string SmallFile() {
  const std::string json =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},)"
      R"("b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}})";
  return std::string(1, static_cast<char>(json.size())) + std::string(7, '\0') + json +
         std::string("01234567abc");
}

TEST_F(SafetensorsTest, EveryTruncationIsAnError) {
  const std::string whole = SmallFile();
  ASSERT_TRUE(SafetensorsFile::Open(WriteBytes("t", whole)).ok());
  for (size_t length = 0; length < whole.size(); ++length) {
    const auto file = SafetensorsFile::Open(WriteBytes("t", whole.substr(0, length)));
    ExpectError(file.status(), "", absl::StrCat("length ", length));
  }
  ExpectError(SafetensorsFile::Open(WriteBytes("t", whole + "x")).status(), "cover", "longer");
}

TEST_F(SafetensorsTest, EveryByteChangeIsAnErrorOrAValidFile) {
  const std::string whole = SmallFile();
  int num_errors = 0;
  for (size_t i = 0; i < whole.size(); ++i) {
    for (const uint8_t change : {1, 2, 4, 8, 16, 32, 64, 128, 255}) {
      std::string bytes = whole;
      bytes[i] = static_cast<char>(bytes[i] ^ change);
      const auto file = SafetensorsFile::Open(WriteBytes("t", bytes));
      num_errors += !file.ok();
      if (file.ok()) {
        Sum(*file);
      } else {
        ExpectError(file.status(), "", absl::StrCat("byte ", i, " ^ ", change));
      }
    }
  }
  EXPECT_GT(num_errors, 800);
}

TEST_F(SafetensorsTest, RandomDamageIsAnErrorOrAValidFile) {
  const std::string whole = SmallFile();
  const std::vector<std::string> words = {"[",  "]",    "{",    "}",      ",",     ":",  "\"",
                                          "-1", "1e30", "null", "\"U8\"", "0",     "\\", "[[",
                                          "8",  "true", "\xFF", "3.5",    "\"a\"", "",   "11"};
  std::mt19937 random(2);
  for (int round = 0; round < 1000; ++round) {
    std::string json = whole.substr(8, whole.size() - 8 - 11);
    for (int edits = 1 + random() % 4; edits > 0; --edits) {
      const size_t at = random() % json.size();
      json.replace(at, random() % 4, words[random() % words.size()]);
    }
    const auto file = SafetensorsFile::Open(WriteFile("t", json, 11));
    if (file.ok()) Sum(*file);
  }
}

TEST_F(SafetensorsTest, WriterChecksEntriesAndAmounts) {
  const std::string path = Path("w");
  const auto create = [&](std::vector<SafetensorsWriter::Entry> entries) {
    return SafetensorsWriter::Create(path, entries).status();
  };
  ExpectError(create({{"a", DType::kU8, {1}}, {"a", DType::kU8, {1}}}), "\"a\"", "twice");
  ExpectError(create({{"a", DType::kU8, {-1}}}), "\"a\"", "negative");
  ExpectError(create({{"a", DType::kF32, {int64_t{1} << 62}}}), "\"a\"", "overflow");
  const int64_t half = (int64_t{1} << 62) + 1;
  ExpectError(create({{"a", DType::kU8, {half}},
                      {"b", DType::kU8, {half}},
                      {"c", DType::kU8, {half}},
                      {"d", DType::kU8, {half}}}),
              "\"d\"", "overflowing sum");
  ExpectError(create({{"__metadata__", DType::kU8, {1}}}), "__metadata__", "reserved");
  ExpectError(create({{"a\xFF", DType::kU8, {1}}}), "UTF-8", "not UTF-8");
  EXPECT_FALSE(SafetensorsWriter::Create(Path("no/such/folder"), {}).ok());

  auto short_of = SafetensorsWriter::Create(path, {{"a", DType::kU8, {3}}});
  ASSERT_TRUE(short_of.ok());
  ASSERT_TRUE(short_of->Append(AsBytes("12")).ok());
  ExpectError(short_of->Append(AsBytes("34")), "more data", "too much");
  ExpectError(short_of->Finish(), "2 of the 3 bytes", "too little");
  EXPECT_FALSE(fs::exists(path));
  ASSERT_TRUE(short_of->Append(AsBytes("3")).ok());
  ASSERT_TRUE(short_of->Finish().ok());
  EXPECT_TRUE(SafetensorsFile::Open(path).ok());
}

constexpr char kOneByte[] = R"({"NAME":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";

class TensorStoreTest : public SafetensorsTest {
 protected:
  void WriteTensor(const std::string& file, const std::string& tensor) const {
    WriteFile(file, absl::StrReplaceAll(kOneByte, {{"NAME", tensor}}), 1);
  }
  void WriteIndex(const std::string& weight_map) const {
    WriteBytes("model.safetensors.index.json",
               absl::StrCat(R"({"metadata":{"total_size":2},"weight_map":)", weight_map, "}"));
  }
  void ExpectStoreRefused(const std::string& weight_map, const std::string& expected) const {
    WriteIndex(weight_map);
    ExpectError(TensorStore::Open(directory_.path()).status(), expected, weight_map);
  }
};

TEST_F(TensorStoreTest, OpensASingleFile) {
  WriteTensor("model.safetensors", "a");
  auto opened = TensorStore::Open(directory_.path());
  ASSERT_TRUE(opened.ok()) << opened.status();
  const TensorStore store = *std::move(opened);  // views survive the move
  ASSERT_NE(store.Find("a"), nullptr);
  EXPECT_EQ(store.Find("a")->data[0], 0);
  EXPECT_EQ(store.Find("b"), nullptr);
  EXPECT_TRUE(store.Get("a").ok());
  EXPECT_EQ(store.Get("b").status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(absl::StrContains(store.Get("b").status().message(), "\"b\""));
  EXPECT_EQ(store.Names(), std::vector<std::string>{"a"});
}

TEST_F(TensorStoreTest, OpensShards) {
  for (int i = 0; i < 9; ++i) WriteTensor(absl::StrCat("s", i), absl::StrCat("t", i));
  WriteIndex(
      R"({"t0":"s0","t8":"s8","t1":"s1","t2":"s2","t3":"s3","t4":"s4","t5":"s5","t6":"s6"})");
  const auto store = TensorStore::Open(directory_.path());
  ASSERT_TRUE(store.ok()) << store.status();
  EXPECT_EQ(store->Names().size(), 8u);
  for (const std::string& name : store->Names()) EXPECT_EQ(store->Find(name)->data.size(), 1u);
}

TEST_F(TensorStoreTest, RefusesBadDirectories) {
  EXPECT_EQ(TensorStore::Open(directory_.path()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(TensorStore::Open(Path("absent")).status().code(), absl::StatusCode::kNotFound);
  WriteTensor("one", "a");
  WriteTensor("two", "b");
  WriteTensor("two-again", "b");
  ExpectStoreRefused(R"({"a":"one","c":"two"})", "tensor \"c\" is not in two");
  ExpectStoreRefused(R"({"a":"two","b":"two"})", "tensor \"a\" is not in two");
  ExpectStoreRefused(R"({"a":"two","b":"one"})", "tensor \"a\" is not in two");
  ExpectStoreRefused(R"({"b":"two","a":"two-again"})", "tensor \"b\" is in two-again and in two");
  ExpectStoreRefused(R"({"a":"one","a":"two"})", "duplicate key \"a\"");
  for (const char* name : {"../one", "./one", "/etc/passwd", "..", ".", "", "one/", "a\\\\b"}) {
    ExpectStoreRefused(absl::StrCat("{\"a\":\"", name, "\"}"), "tensor \"a\" is not a plain file");
  }
  ExpectStoreRefused(R"({"a":"one\u0000"})", "not a plain file name");
  ExpectStoreRefused(R"({"a":3})", "not a plain file name");
  ExpectStoreRefused("[]", "weight_map");
  WriteBytes("model.safetensors.index.json", "{}");
  ExpectError(TensorStore::Open(directory_.path()).status(), "weight_map", "no map");
  WriteIndex(R"({"a":"one","b":"missing"})");
  EXPECT_EQ(TensorStore::Open(directory_.path()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(
      absl::StrContains(TensorStore::Open(directory_.path()).status().message(), "missing"));
  fs::create_directory(Path("folder"));
  ExpectStoreRefused(R"({"a":"one","b":"folder"})", "folder");
  fs::create_directory(Path("model.safetensors"));
  ExpectError(TensorStore::Open(directory_.path()).status(), "model.safetensors", "a directory");
}

}  // namespace
}  // namespace ternion::runtime

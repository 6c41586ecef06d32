#include "runtime/strict_json.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"

namespace ternion::runtime {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxDepth = 64;
constexpr size_t kMaxValues = size_t{16} << 20;

// Builds the document; every handler returns false to stop the parser at once.
class Builder final : public nlohmann::json_sax<Json> {
 public:
  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t value, const string_t&) override { return Add(value); }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool binary(binary_t&) override { return Fail("binary value"); }
  bool start_object(size_t) override { return Open(Json::object()); }
  bool start_array(size_t) override { return Open(Json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& name) override {
    const auto [place, is_new] = open_.back()->get_ref<Json::object_t&>().emplace(name, nullptr);
    if (!is_new) return Fail(absl::StrCat("duplicate key \"", name.substr(0, 200), "\""));
    member_ = &place->second;
    return true;
  }

  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& error) override {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    const std::string text = error.what();
    const size_t prefix = text.find("] ");
    return Fail(text.substr(prefix == std::string::npos ? 0 : prefix + 2, 300));
  }

  Json TakeDocument() { return std::move(document_); }
  const std::string& error() const { return error_; }

 private:
  bool Fail(std::string error) {
    std::replace_if(
        error.begin(), error.end(), [](unsigned char c) { return c < 0x20; }, ' ');
    error_ = std::move(error);
    return false;
  }

  template <typename T>
  Json* Place(T&& value) {
    if (open_.empty()) return &(document_ = std::forward<T>(value));
    if (open_.back()->is_object()) return &(*member_ = std::forward<T>(value));
    return &open_.back()->get_ref<Json::array_t&>().emplace_back(std::forward<T>(value));
  }

  template <typename T>
  bool Add(T&& value) {
    if (++num_values_ > kMaxValues) return Fail("too many values");
    Place(std::forward<T>(value));
    return true;
  }

  bool Open(Json container) {
    if (++num_values_ > kMaxValues) return Fail("too many values");
    if (open_.size() >= kMaxDepth) return Fail("nested too deeply");
    open_.push_back(Place(std::move(container)));
    return true;
  }

  bool Close() {
    open_.pop_back();
    return true;
  }

  Json document_;
  // Ancestors of the next value. They stay where they are while open: only the innermost grows.
  std::vector<Json*> open_;
  Json* member_ = nullptr;  // where the next value of the innermost object goes
  size_t num_values_ = 0;
  std::string error_;
};

}  // namespace

absl::StatusOr<nlohmann::json> ParseJson(absl::string_view text) {
  Builder builder;
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) {
    return absl::InvalidArgumentError(builder.error());
  }
  return builder.TakeDocument();
}

const nlohmann::json* FindMember(const nlohmann::json& json, const char* key) {
  if (!json.is_object()) return nullptr;
  const auto found = json.find(key);
  return found == json.end() ? nullptr : &*found;
}

}  // namespace ternion::runtime

// A fresh folder for files that a test writes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <system_error>

#include "base/check.h"

namespace ternion::test {

// Removed with everything in it when it goes out of scope.
class TempDir {
 public:
  TempDir() {
    path_ = (std::filesystem::temp_directory_path() / "ternion-test-XXXXXX").string();
    TERNION_CHECK(mkdtemp(path_.data()) != nullptr);
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }
  std::string path(const std::string& name) const { return path_ + "/" + name; }
  // Files and folders in it.
  int64_t num_entries() const {
    return std::distance(std::filesystem::directory_iterator(path_), {});
  }

  // Returns the path of the new file.
  std::string Write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path(name), std::ios::binary) << bytes;
    return path(name);
  }

 private:
  std::string path_;
};

}  // namespace ternion::test

// A fresh folder for files that a test writes.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "base/check.h"

namespace ternion::test {

// Removed with everything in it when it goes out of scope.
class TempDir {
 public:
  TempDir() {
    path_ = (std::filesystem::temp_directory_path() / "ternion-test-XXXXXX").string();
    TERNION_CHECK(mkdtemp(path_.data()) != nullptr);
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }

  // Returns the path of the new file.
  std::string Write(const std::string& name, const std::string& bytes) const {
    const std::string path = path_ + "/" + name;
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }

 private:
  std::string path_;
};

}  // namespace ternion::test

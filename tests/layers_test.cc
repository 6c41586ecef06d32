// The order of the folders: a file includes from its own folder and from those to its left.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace ternion {
namespace {

namespace fs = std::filesystem;

const std::vector<std::string> kFolders = {"base",    "kernels", "comm",
                                           "experts", "runtime", "launcher"};

// Place of the folder that `path` ("comm/wire.h") starts with.
std::optional<size_t> FolderOf(const std::string& path) {
  const std::string folder = path.substr(0, path.find('/'));
  const auto found = std::find(kFolders.begin(), kFolders.end(), folder);
  if (path.find('/') == std::string::npos || found == kFolders.end()) return std::nullopt;
  return found - kFolders.begin();
}

// What the #include on `line` names, or nothing.
std::string IncludeOf(const std::string& line) {
  const size_t hash = line.find_first_not_of(" \t");
  if (hash == std::string::npos || line[hash] != '#') return "";
  const size_t word = line.find_first_not_of(" \t", hash + 1);
  if (word == std::string::npos || line.compare(word, 7, "include") != 0) return "";
  const size_t open = line.find_first_of("<\"", word + 7);
  if (open == std::string::npos) return "";
  return line.substr(open + 1, line.find_first_of(">\"", open + 1) - open - 1);
}

std::vector<std::string> IncludesOf(const fs::path& file) {
  std::vector<std::string> includes;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (std::string name = IncludeOf(line); !name.empty()) includes.push_back(std::move(name));
  }
  return includes;
}

// All sources of the layered folders, relative to the root.
std::vector<std::string> Sources() {
  std::vector<std::string> sources;
  const fs::path root = TERNION_SOURCE_DIR;
  for (const std::string& folder : kFolders) {
    for (const auto& entry : fs::recursive_directory_iterator(root / folder)) {
      const std::string extension = entry.path().extension().string();
      if (extension == ".h" || extension == ".cc" || extension == ".cu" || extension == ".cuh") {
        sources.push_back(fs::relative(entry.path(), root).string());
      }
    }
  }
  return sources;
}

bool StartsWith(const std::string& text, const std::string& prefix) {
  return text.compare(0, prefix.size(), prefix) == 0;
}

// Everything that `file` includes, also by way of our own headers.
void AddReachable(const std::string& file, std::set<std::string>& reached) {
  for (const std::string& name : IncludesOf(fs::path(TERNION_SOURCE_DIR) / file)) {
    if (reached.insert(name).second && FolderOf(name)) AddReachable(name, reached);
  }
}

TEST(Layers, IncludesAreRead) {
  EXPECT_EQ(IncludeOf("#include \"comm/wire.h\"  // why"), "comm/wire.h");
  EXPECT_EQ(IncludeOf("  #  include <absl/status/status.h>"), "absl/status/status.h");
  EXPECT_EQ(IncludeOf("// #include \"comm/wire.h\""), "");
  EXPECT_EQ(IncludeOf("#pragma once"), "");
  EXPECT_EQ(FolderOf("runtime/x/y.h"), 4u);
  EXPECT_EQ(FolderOf("runtime.h"), std::nullopt);
}

TEST(Layers, NoFileIncludesFromTheRight) {
  std::set<std::string> folders;
  for (const std::string& source : Sources()) {
    folders.insert(source.substr(0, source.find('/')));
    for (const std::string& name : IncludesOf(fs::path(TERNION_SOURCE_DIR) / source)) {
      EXPECT_FALSE(FolderOf(name) && *FolderOf(name) > *FolderOf(source))
          << source << " includes " << name;
      EXPECT_FALSE(StartsWith(name, "tests/")) << source << " includes " << name;
      EXPECT_FALSE(StartsWith(name, "..")) << source << " includes " << name;
    }
  }
  EXPECT_EQ(folders.size(), kFolders.size());
}

// Kernels also compile with nvcc: neither they nor what they include may need Abseil or JSON.
TEST(Layers, KernelsStayPlain) {
  for (const std::string& source : Sources()) {
    if (!StartsWith(source, "kernels/")) continue;
    std::set<std::string> reached;
    AddReachable(source, reached);
    for (const std::string& name : reached) {
      EXPECT_FALSE(StartsWith(name, "absl/") || StartsWith(name, "nlohmann/"))
          << source << " comes to include " << name;
    }
  }
}

}  // namespace
}  // namespace ternion

#include "base/file.h"

#include <sys/stat.h>

#include <filesystem>

#include "gtest/gtest.h"
#include "tests/testing/temp_dir.h"

namespace ternion::base {
namespace {

namespace fs = std::filesystem;

class FileTest : public testing::Test {
 protected:
  std::string Path(const std::string& name) const { return directory_.path(name); }
  int64_t NumFiles() const { return directory_.num_entries(); }

  const test::TempDir directory_;
};

TEST_F(FileTest, WritesAndReadsBack) {
  const std::string content("one\0two\n", 8);
  ASSERT_TRUE(WriteFileAtomically(Path("a"), content).ok());
  EXPECT_EQ(ReadFile(Path("a")).value(), content);
  EXPECT_EQ(NumFiles(), 1);
  ASSERT_TRUE(WriteFileAtomically(Path("a"), "").ok());
  EXPECT_EQ(ReadFile(Path("a")).value(), "");
}

TEST_F(FileTest, OthersMayReadWhatWasWritten) {
  ASSERT_TRUE(WriteFileAtomically(Path("a"), "x").ok());
  struct stat info;
  ASSERT_EQ(stat(Path("a").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0644u);
}

TEST_F(FileTest, AnUncommittedFileLeavesNothing) {
  {
    AtomicFile file = AtomicFile::Create(Path("a")).value();
    ASSERT_TRUE(file.Write("half of it").ok());
    AtomicFile moved = std::move(file);
    ASSERT_TRUE(moved.Write("more").ok());
    EXPECT_FALSE(fs::exists(Path("a")));
  }
  EXPECT_EQ(NumFiles(), 0);
}

TEST_F(FileTest, AnUncommittedFileLeavesTheOldContent) {
  ASSERT_TRUE(WriteFileAtomically(Path("a"), "old").ok());
  {
    AtomicFile file = AtomicFile::Create(Path("a")).value();
    ASSERT_TRUE(file.Write("new").ok());
    EXPECT_EQ(ReadFile(Path("a")).value(), "old");
  }
  EXPECT_EQ(ReadFile(Path("a")).value(), "old");
  EXPECT_EQ(NumFiles(), 1);
}

TEST_F(FileTest, AFailedCommitLeavesNothing) {
  ASSERT_TRUE(fs::create_directory(Path("a")));  // a file cannot take a directory's name
  const absl::Status status = WriteFileAtomically(Path("a"), "content");
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.message().find(Path("a")), absl::string_view::npos) << status;
  EXPECT_EQ(NumFiles(), 1);
}

TEST_F(FileTest, CreateInAMissingDirectoryNamesThePath) {
  const absl::Status status = WriteFileAtomically(Path("missing/a"), "content");
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_NE(status.message().find(Path("missing/a")), absl::string_view::npos) << status;
}

TEST_F(FileTest, ReadRefusesWhatItCannotRead) {
  EXPECT_EQ(ReadFile(Path("missing")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadFile(directory_.path()).status().code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(WriteFileAtomically(Path("a"), "12345").ok());
  EXPECT_TRUE(ReadFile(Path("a"), 5).ok());
  const absl::Status too_large = ReadFile(Path("a"), 4).status();
  EXPECT_EQ(too_large.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(too_large.message().find(Path("a")), absl::string_view::npos) << too_large;
}

TEST_F(FileTest, MapsAFile) {
  const std::string content(10000, 'x');
  ASSERT_TRUE(WriteFileAtomically(Path("a"), content).ok());
  MappedFile first = MappedFile::Open(Path("a")).value();
  MappedFile file = std::move(first);
  fs::remove(Path("a"));  // the map stays
  ASSERT_EQ(file.bytes().size(), content.size());
  file.Release(0, 10000);
  EXPECT_EQ(std::string(file.bytes().begin(), file.bytes().end()), content);
}

TEST_F(FileTest, MapRefusesWhatItCannotMap) {
  ASSERT_TRUE(WriteFileAtomically(Path("empty"), "").ok());
  EXPECT_EQ(MappedFile::Open(Path("missing")).status().code(), absl::StatusCode::kNotFound);
  for (const std::string& path : {directory_.path(), Path("empty")}) {
    const absl::Status status = MappedFile::Open(path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(path), absl::string_view::npos) << status;
  }
}

}  // namespace
}  // namespace ternion::base

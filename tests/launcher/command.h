// Runs the built `ternion` command, alone or under mpirun, as its users do.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "nlohmann/json.hpp"
#include "tests/testing/temp_dir.h"

namespace ternion::launcher {

using Json = nlohmann::ordered_json;
using Strings = std::vector<std::string>;

// A process that takes longer than this hangs, as far as a test is concerned.
inline constexpr std::chrono::seconds kTimeLimit{90};

struct CommandResult {
  int exit_code = -1;      // 128 + signal for a process that a signal ended
  bool timed_out = false;  // it was killed after the time limit, with all its descendants
  double seconds = 0;
  std::string out;
  std::string err;
};

struct CommandOptions {
  std::map<std::string, std::string> environment = {};  // beside this process's own
  std::string input = "";                               // stdin
  bool close_output = false;                            // nobody reads stdout
  std::chrono::seconds time_limit = kTimeLimit;
};

// A child process. One that still runs is killed at the end, with its descendants.
class Child {
 public:
  Child(const Strings& command, const CommandOptions& options = {});
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  // Waits until stdout holds `bytes` bytes. False if it ended before or the time is up.
  bool WaitForOutput(size_t bytes);
  // Waits for its end and for the end of its output.
  CommandResult Wait();

 private:
  bool ReadSome();
  void KillAll();

  const std::chrono::steady_clock::time_point start_;
  const std::chrono::seconds time_limit_;
  pid_t pid_ = -1;
  int out_fd_ = -1;
  int err_fd_ = -1;
  CommandResult result_;
};

// `ternion arguments...` on `ranks` ranks; 0: without mpirun.
Strings Ternion(int ranks, const Strings& arguments);
CommandResult RunCommand(const Strings& command, const CommandOptions& options = {});
inline CommandResult RunTernion(int ranks, const Strings& arguments,
                                const CommandOptions& options = {}) {
  return RunCommand(Ternion(ranks, arguments), options);
}

// Processes below `root`, children first.
std::vector<pid_t> DescendantsOf(pid_t root);
// The value of `name` in the environment of `pid`, empty if there is none.
std::string EnvironmentOf(pid_t pid, const std::string& name);

using test::TempDir;

std::string SourcePath(const std::string& relative);
std::string ReadText(const std::string& path);
void WriteText(const std::string& path, std::string_view text);
Json ReadJson(const std::string& path);

// Lines of `text` that start with `prefix`.
Strings LinesThatStartWith(const std::string& text, const std::string& prefix);

}  // namespace ternion::launcher

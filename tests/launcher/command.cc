#include "tests/launcher/command.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>

#include "base/check.h"

namespace ternion::launcher {
namespace {

// mpirun as root, and with more ranks than cores, on any machine.
const std::pair<const char*, const char*> kEnvironment[] = {
    {"OMPI_ALLOW_RUN_AS_ROOT", "1"},
    {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
    {"OMPI_MCA_rmaps_base_oversubscribe", "1"},
    {"ASAN_OPTIONS", "detect_leaks=0"},  // Open MPI keeps its own memory until exit
};

// Between fork and exec.
[[noreturn]] void BecomeCommand(const Strings& command, const CommandOptions& options, int input,
                                int out, int err) {
  setpgid(0, 0);
  dup2(input, STDIN_FILENO);
  dup2(out, STDOUT_FILENO);
  dup2(err, STDERR_FILENO);
  signal(SIGPIPE, SIG_DFL);
  for (const auto& [name, value] : kEnvironment) setenv(name, value, 1);
  for (const auto& [name, value] : options.environment) setenv(name.c_str(), value.c_str(), 1);
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  std::perror(argv[0]);
  _exit(127);
}

// An unlinked file that holds `text`.
int OpenInput(const std::string& text) {
  std::FILE* file = std::tmpfile();
  TERNION_CHECK(file != nullptr);
  std::fwrite(text.data(), 1, text.size(), file);
  std::rewind(file);
  const int fd = fcntl(fileno(file), F_DUPFD_CLOEXEC, 0);
  std::fclose(file);
  return fd;
}

// Appends what `fd` has; closes it at its end.
void Drain(int& fd, std::string& text) {
  char piece[1 << 16];
  const ssize_t bytes = read(fd, piece, sizeof(piece));
  if (bytes > 0) {
    text.append(piece, bytes);
  } else if (bytes == 0 || errno != EINTR) {
    close(fd);
    fd = -1;
  }
}

pid_t ParentOf(pid_t pid) {
  const std::string stat = ReadText("/proc/" + std::to_string(pid) + "/stat");
  const size_t name_end = stat.rfind(')');  // "pid (name) state parent ..."
  if (name_end == std::string::npos) return -1;
  char state;
  int parent = -1;
  std::sscanf(stat.c_str() + name_end + 1, " %c %d", &state, &parent);
  return parent;
}

}  // namespace

Child::Child(const Strings& command, const CommandOptions& options)
    : start_(std::chrono::steady_clock::now()), time_limit_(options.time_limit) {
  int out[2], err[2];
  TERNION_CHECK(pipe2(out, O_CLOEXEC) == 0 && pipe2(err, O_CLOEXEC) == 0);
  const int input = OpenInput(options.input);
  pid_ = fork();
  TERNION_CHECK(pid_ >= 0);
  if (pid_ == 0) {
    BecomeCommand(command, options, input, out[1], err[1]);
  }
  close(input);
  close(out[1]);
  close(err[1]);
  out_fd_ = out[0];
  err_fd_ = err[0];
  if (!options.close_output) return;
  close(out_fd_);
  out_fd_ = -1;
}

Child::~Child() {
  if (pid_ > 0) KillAll();
  if (out_fd_ >= 0) close(out_fd_);
  if (err_fd_ >= 0) close(err_fd_);
}

// Waits for output. False when there will be no more, or the time is up.
bool Child::ReadSome() {
  if (out_fd_ < 0 && err_fd_ < 0) return false;
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
      start_ + time_limit_ - std::chrono::steady_clock::now());
  pollfd fds[] = {{out_fd_, POLLIN, 0}, {err_fd_, POLLIN, 0}};  // a negative fd is ignored
  if (left.count() <= 0 || poll(fds, 2, static_cast<int>(left.count())) == 0) {
    result_.timed_out = true;
    return false;
  }
  if (fds[0].revents != 0) Drain(out_fd_, result_.out);
  if (fds[1].revents != 0) Drain(err_fd_, result_.err);
  return true;
}

bool Child::WaitForOutput(size_t bytes) {
  while (result_.out.size() < bytes) {
    if (!ReadSome()) return false;
  }
  return true;
}

CommandResult Child::Wait() {
  while (ReadSome()) {
  }
  if (result_.timed_out) {
    KillAll();
    return result_;
  }
  int status = 0;
  waitpid(pid_, &status, 0);
  pid_ = -1;
  result_.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result_.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  return result_;
}

// mpirun gives each rank a process group of its own, so the group of the child is not enough.
void Child::KillAll() {
  for (pid_t pid : DescendantsOf(pid_)) kill(pid, SIGKILL);
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

Strings Ternion(int ranks, const Strings& arguments) {
  Strings command;
  if (ranks > 0) command = {"mpirun", "-n", std::to_string(ranks)};
  command.push_back(TERNION_COMMAND);
  command.insert(command.end(), arguments.begin(), arguments.end());
  return command;
}

CommandResult RunCommand(const Strings& command, const CommandOptions& options) {
  return Child(command, options).Wait();
}

std::vector<pid_t> DescendantsOf(pid_t root) {
  std::multimap<pid_t, pid_t> children;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const pid_t pid = std::atoi(entry.path().filename().c_str());
    if (pid > 0) children.emplace(ParentOf(pid), pid);
  }
  std::vector<pid_t> found = {root};
  for (size_t i = 0; i < found.size(); ++i) {
    const auto [begin, end] = children.equal_range(found[i]);
    for (auto child = begin; child != end; ++child) found.push_back(child->second);
  }
  found.erase(found.begin());
  return {found.rbegin(), found.rend()};
}

std::string EnvironmentOf(pid_t pid, const std::string& name) {
  std::istringstream variables(ReadText("/proc/" + std::to_string(pid) + "/environ"));
  for (std::string variable; std::getline(variables, variable, '\0');) {
    if (variable.starts_with(name + "=")) return variable.substr(name.size() + 1);
  }
  return "";
}

std::string SourcePath(const std::string& relative) {
  return std::string(TERNION_SOURCE_DIR) + "/" + relative;
}

std::string ReadText(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

void WriteText(const std::string& path, std::string_view text) {
  std::ofstream stream(path, std::ios::binary);
  stream << text;
  TERNION_CHECK(stream.good());
}

Json ReadJson(const std::string& path) {
  return Json::parse(ReadText(path), nullptr, /*allow_exceptions=*/false);
}

Strings LinesThatStartWith(const std::string& text, const std::string& prefix) {
  Strings lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    if (line.starts_with(prefix)) lines.push_back(line);
  }
  return lines;
}

}  // namespace ternion::launcher

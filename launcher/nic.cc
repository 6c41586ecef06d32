#include "launcher/nic.h"

#include <algorithm>
#include <filesystem>
#include <fstream>

namespace ternion::launcher {
namespace {

constexpr char kRoot[] = "/sys/class/net/";

int64_t ReadCounter(const std::string& interface, const char* name) {
  std::ifstream file(kRoot + interface + "/statistics/" + name);
  int64_t value = 0;
  return file >> value ? value : 0;
}

}  // namespace

std::vector<std::string> NetworkInterfaces() {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(kRoot, error)) {
    if (entry.path().filename() != "lo") names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

NicCount CountNic(const std::vector<std::string>& interfaces) {
  NicCount sum;
  for (const std::string& interface : interfaces) {
    sum.sent_bytes += ReadCounter(interface, "tx_bytes");
    sum.received_bytes += ReadCounter(interface, "rx_bytes");
  }
  return sum;
}

}  // namespace ternion::launcher

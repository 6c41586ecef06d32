// What this host's network interfaces have counted.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ternion::launcher {

struct NicCount {
  int64_t sent_bytes = 0;
  int64_t received_bytes = 0;
};

// Interfaces of this host but the loopback, by name: those that /sys/class/net shows, which inside
// a network namespace are its own.
std::vector<std::string> NetworkInterfaces();

// The sum over these interfaces' counters (/sys/class/net/NAME/statistics): frames with their
// headers, acknowledgements and all that others on the host send. An interface that is gone counts
// as 0.
NicCount CountNic(const std::vector<std::string>& interfaces);

}  // namespace ternion::launcher

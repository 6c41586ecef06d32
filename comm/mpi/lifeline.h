// Lifelines: an idle TCP connection between every two ranks, by which each learns that the other is
// gone.
//
// MPI over TCP waits for ever when packets merely stop coming (a cut cable, a host without power).
// The kernel keeps a lifeline alive by probes of its own, so a rank may compute for minutes without
// being taken for dead, and a host that answers none of them is gone after 3 to 4 seconds. A
// process that dies closes its lifelines at once.
#pragma once

#include <netinet/in.h>
#include <poll.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace ternion::comm {

// A file descriptor that closes itself.
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  ~Fd() { Close(); }
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept;

  int get() const { return fd_; }
  bool open() const { return fd_ >= 0; }
  void Close();

 private:
  int fd_;
};

// What a rank tells all others, so that they find it. Sent as it lies in memory.
struct LifelineContact {
  // What the ranks of a job show each other; rank 0's counts. It keeps out strangers who find the
  // port, not those who read the network.
  using Token = std::array<uint8_t, 16>;
  static constexpr int kMaxAddresses = 16;

  Token token;
  std::array<char, 64> host;  // ends in 0
  in_port_t port;             // 0: it cannot be called. In network order, as are the addresses
  uint16_t num_addresses;
  std::array<in_addr, kMaxAddresses> addresses;  // IPv4, without loopback
};

class Lifelines {
 public:
  // Every rank gives `mine` (`bytes`, as many on each), all get all, in the order of ranks.
  using AllGather = std::function<absl::Status(const void* mine, size_t bytes, void* all)>;

  Lifelines() = default;

  // Connects this rank with all others; all ranks call it at a time. node_of: [size], equal numbers
  // for ranks of one host. Two ranks that do not reach each other within 3 seconds (there are
  // firewalls) go without; rank 0 warns of that. The errors are those of `all_gather`.
  static absl::StatusOr<Lifelines> Connect(int rank, std::span<const int> node_of,
                                           const AllGather& all_gather);

  // Unavailable, naming rank and host, once any rank is gone that did not say goodbye. Cheap: it
  // looks at the connections at most every 100 ms.
  absl::Status Check();

  // Tells all others that this rank ends by its own will.
  void SayGoodbye();

  // Ranks that have a lifeline to this one.
  int num_connected() const;

 private:
  void Hear(int rank);

  std::vector<Fd> fds_;             // [size] closed: none
  std::vector<pollfd> polls_;       // [size]
  std::vector<std::string> hosts_;  // [size]
  std::vector<bool> leaving_;       // [size] said goodbye
  absl::Status lost_;
  std::chrono::steady_clock::time_point next_look_;
};

}  // namespace ternion::comm

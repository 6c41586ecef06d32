#include "comm/mpi/lifeline.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/logging.h"
#include "base/status.h"

namespace ternion::comm {

Fd& Fd::operator=(Fd&& other) noexcept {
  std::swap(fd_, other.fd_);
  other.Close();
  return *this;
}

void Fd::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kMeetingTime{3};  // for all ranks to connect
constexpr std::chrono::seconds kCallTime{1};     // for one address to answer
constexpr std::chrono::milliseconds kLookInterval{100};
constexpr char kGoodbye = 'g';

struct Greeting {
  LifelineContact::Token token;
  int32_t rank;
  int32_t call;  // the caller's count of its calls to this peer, from 1; the answer repeats it
};

// A connection to a peer; closed: there is none, and `call` is 0.
struct Met {
  Fd fd;
  uint8_t call = 0;
};

void SetOption(const Fd& fd, int level, int name, int value) {
  setsockopt(fd.get(), level, name, &value, sizeof(value));
}

// The kernel asks after a second of silence, then every second; four seconds after the last answer
// the connection has ended.
void KeepAlive(const Fd& fd) {
  SetOption(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPIDLE, 1);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPINTVL, 1);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
  SetOption(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 4000);  // also for a goodbye that nobody confirms
}

Fd MakeSocket() { return Fd(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)); }

// Listens on all addresses, at a port that the kernel picks and *port tells.
Fd MakeListener(in_port_t* port) {
  Fd fd = MakeSocket();
  sockaddr_in address{};
  address.sin_family = AF_INET;
  socklen_t size = sizeof(address);
  const auto generic = reinterpret_cast<sockaddr*>(&address);
  if (!fd.open() || bind(fd.get(), generic, size) != 0 || listen(fd.get(), SOMAXCONN) != 0 ||
      getsockname(fd.get(), generic, &size) != 0) {
    return Fd();
  }
  *port = address.sin_port;
  return fd;
}

// IPv4 addresses of this host's running interfaces, without loopback.
std::vector<in_addr> OwnAddresses() {
  std::vector<in_addr> addresses;
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return addresses;
  for (const ifaddrs* one = all; one != nullptr; one = one->ifa_next) {
    const bool usable = (one->ifa_flags & IFF_UP) && !(one->ifa_flags & IFF_LOOPBACK);
    if (!usable || one->ifa_addr == nullptr || one->ifa_addr->sa_family != AF_INET) continue;
    addresses.push_back(reinterpret_cast<const sockaddr_in*>(one->ifa_addr)->sin_addr);
  }
  freeifaddrs(all);
  return addresses;
}

LifelineContact MakeContact(in_port_t port, const std::vector<in_addr>& addresses) {
  LifelineContact contact{};
  TERNION_CHECK(getentropy(contact.token.data(), contact.token.size()) == 0);
  gethostname(contact.host.data(), contact.host.size() - 1);
  contact.port = port;
  contact.num_addresses = std::min<size_t>(addresses.size(), LifelineContact::kMaxAddresses);
  std::copy_n(addresses.begin(), contact.num_addresses, contact.addresses.begin());
  return contact;
}

// Leading bits that two addresses share.
int CommonBits(in_addr a, in_addr b) { return std::countl_zero(ntohl(a.s_addr ^ b.s_addr)); }

// Where to call a rank of another host, the likeliest last: the one that shares the most bits with
// an address of ours. One that we have ourselves (a container bridge's) would lead back to us.
std::vector<in_addr> AddressesToTry(const LifelineContact& contact,
                                    const std::vector<in_addr>& own) {
  std::vector<std::pair<int, in_addr>> ranked;
  const size_t count = std::min<size_t>(contact.num_addresses, contact.addresses.size());
  for (in_addr address : std::span(contact.addresses).first(count)) {
    int common = 0;
    for (in_addr mine : own) common = std::max(common, CommonBits(address, mine));
    if (common < 32) ranked.emplace_back(common, address);
  }
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<in_addr> addresses;
  for (const auto& [common, address] : ranked) addresses.push_back(address);
  return addresses;
}

// A connection on which a rank and another tell who they are: the caller first.
struct Talk {
  Fd fd;
  int peer = -1;                   // whom we call; -1: somebody calls us
  bool connecting = false;         // a call that is not through yet
  std::vector<in_addr> addresses;  // to call next, from the back
  uint8_t call = 0;                // as in the greeting
  Clock::time_point deadline;      // of a call to one address
  Greeting heard{};
  size_t heard_bytes = 0;
};

// The ranks find each other: each calls those below it.
class Meeting {
 public:
  Meeting(int rank, std::span<const int> node_of, std::span<const LifelineContact> contacts,
          std::vector<in_addr> own_addresses, Fd listener);

  // [size]
  std::vector<Met> Run();

 private:
  void CallNext(Talk& talk);
  void Accept();
  void Continue(Talk& talk);
  bool Greet(const Talk& talk);
  void Judge(Talk& talk);
  void GiveUp(Talk& talk);
  bool IsWaiting() const;

  const int rank_;
  const std::span<const LifelineContact> contacts_;
  const Fd listener_;
  std::vector<Met> met_;     // [size]
  std::vector<Talk> talks_;  // under way
};

Meeting::Meeting(int rank, std::span<const int> node_of, std::span<const LifelineContact> contacts,
                 std::vector<in_addr> own_addresses, Fd listener)
    : rank_(rank), contacts_(contacts), listener_(std::move(listener)), met_(contacts.size()) {
  for (int peer = 0; peer < rank; ++peer) {
    if (contacts[peer].port == 0) continue;
    Talk talk;
    talk.peer = peer;
    talk.addresses = node_of[peer] == node_of[rank] ? std::vector{in_addr{htonl(INADDR_LOOPBACK)}}
                                                    : AddressesToTry(contacts[peer], own_addresses);
    CallNext(talk);
    if (talk.fd.open()) talks_.push_back(std::move(talk));
  }
}

// Calls the peer's next address; without one left the talk is over.
void Meeting::CallNext(Talk& talk) {
  while (!talk.addresses.empty()) {
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = contacts_[talk.peer].port;
    to.sin_addr = talk.addresses.back();
    talk.addresses.pop_back();
    talk.fd = MakeSocket();
    talk.connecting = true;
    talk.heard_bytes = 0;
    ++talk.call;
    talk.deadline = talk.addresses.empty() ? Clock::time_point::max() : Clock::now() + kCallTime;
    const int failed = connect(talk.fd.get(), reinterpret_cast<sockaddr*>(&to), sizeof(to));
    if (failed == 0 || errno == EINPROGRESS) return;
  }
  talk.fd.Close();
}

// Of this connection; a peer may have more addresses.
void Meeting::GiveUp(Talk& talk) {
  if (talk.peer >= 0) {
    CallNext(talk);
  } else {
    talk.fd.Close();
  }
}

void Meeting::Accept() {
  while (true) {
    Talk guest;
    guest.fd = Fd(accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!guest.fd.open()) return;
    guest.deadline = Clock::time_point::max();
    talks_.push_back(std::move(guest));
  }
}

// A greeting is far smaller than any socket's buffer: it goes out whole or not at all.
bool Meeting::Greet(const Talk& talk) {
  const Greeting greeting{contacts_[0].token, rank_, talk.call};
  return send(talk.fd.get(), &greeting, sizeof(greeting), MSG_NOSIGNAL) == sizeof(greeting);
}

// Something has come on the connection of `talk`.
void Meeting::Continue(Talk& talk) {
  if (talk.connecting) {
    talk.connecting = false;
    int error = 0;
    socklen_t size = sizeof(error);
    getsockopt(talk.fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0 || !Greet(talk)) GiveUp(talk);
    return;
  }
  const ssize_t bytes = recv(talk.fd.get(), reinterpret_cast<char*>(&talk.heard) + talk.heard_bytes,
                             sizeof(talk.heard) - talk.heard_bytes, 0);
  if (bytes < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (bytes <= 0) return GiveUp(talk);
  talk.heard_bytes += bytes;
  if (talk.heard_bytes < sizeof(talk.heard)) return;
  Judge(talk);
  if (talk.fd.open()) GiveUp(talk);
}

// Keeps the connection of one who greeted as it should.
void Meeting::Judge(Talk& talk) {
  const int rank = talk.heard.rank;
  const bool called = talk.peer >= 0;
  const bool right_rank =
      called ? rank == talk.peer : rank > rank_ && rank < static_cast<int>(met_.size());
  if (!right_rank || talk.heard.token != contacts_[0].token) return;
  if (!called) {
    talk.call = static_cast<uint8_t>(talk.heard.call);
    if (!Greet(talk)) return;
  }
  met_[rank] = {std::move(talk.fd), talk.call};
}

// Whether a rank may still come: one below that is being called, or one above that has not called.
bool Meeting::IsWaiting() const {
  const auto is_call = [](const Talk& talk) { return talk.peer >= 0; };
  const auto is_met = [](const Met& met) { return met.fd.open(); };
  return std::any_of(talks_.begin(), talks_.end(), is_call) ||
         !std::all_of(met_.begin() + rank_ + 1, met_.end(), is_met);
}

std::vector<Met> Meeting::Run() {
  const Clock::time_point end = Clock::now() + kMeetingTime;
  while (IsWaiting() && Clock::now() < end) {
    std::vector<pollfd> polls = {{listener_.get(), POLLIN, 0}};
    for (const Talk& talk : talks_) {
      const short events = talk.connecting ? POLLOUT : POLLIN;
      polls.push_back({talk.fd.get(), events, 0});
    }
    poll(polls.data(), polls.size(), 50);
    for (size_t i = 0; i < talks_.size(); ++i) {
      if (polls[i + 1].revents != 0) {
        Continue(talks_[i]);
      } else if (Clock::now() >= talks_[i].deadline) {
        GiveUp(talks_[i]);
      }
    }
    std::erase_if(talks_, [](const Talk& talk) { return !talk.fd.open(); });
    if (polls[0].revents != 0) Accept();
  }
  return std::move(met_);
}

// calls: [size, size] the call by which the row's rank is connected to the column's, 0: none. Both
// ends must mean the same one: the caller may have given up one that the callee still believes in.
bool AreConnected(std::span<const uint8_t> calls, size_t size, size_t a, size_t b) {
  return calls[a * size + b] != 0 && calls[a * size + b] == calls[b * size + a];
}

void WarnOfMissing(std::span<const uint8_t> calls, std::span<const std::string> hosts) {
  const size_t size = hosts.size();
  int missing = 0;
  std::string example;
  for (size_t a = 0; a < size; ++a) {
    for (size_t b = a + 1; b < size; ++b) {
      if (AreConnected(calls, size, a, b)) continue;
      if (missing++ > 0) continue;
      example =
          absl::StrCat("rank ", a, " (host ", hosts[a], ") and rank ", b, " (host ", hosts[b], ")");
    }
  }
  if (missing == 0) return;
  spdlog::warn(
      "{} of {} pairs of ranks cannot connect to each other over TCP, such as {}: one may not "
      "notice that the other's host is lost",
      missing, size * (size - 1) / 2, example);
}

std::string CauseOf(ssize_t received, int error) {
  if (received == 0) return "was closed";
  if (error == ECONNRESET || error == EPIPE) return "was reset";
  const bool silence = error == ETIMEDOUT || error == EHOSTUNREACH || error == ENETUNREACH;
  return silence ? "timed out" : absl::StrCat("failed: ", strerror(error));
}

}  // namespace

absl::StatusOr<Lifelines> Lifelines::Connect(int rank, std::span<const int> node_of,
                                             const AllGather& all_gather) {
  const size_t size = node_of.size();
  in_port_t port = 0;
  Fd listener = MakeListener(&port);
  const std::vector<in_addr> own_addresses = OwnAddresses();
  const LifelineContact mine = MakeContact(port, own_addresses);
  std::vector<LifelineContact> contacts(size);
  TERNION_RETURN_IF_ERROR(all_gather(&mine, sizeof(mine), contacts.data()));

  Lifelines lifelines;
  std::vector<Met> met = Meeting(rank, node_of, contacts, own_addresses, std::move(listener)).Run();
  for (LifelineContact& contact : contacts) {
    contact.host.back() = 0;
    lifelines.hosts_.push_back(contact.host.data());
  }
  std::vector<uint8_t> calls(size), all_calls(size * size);
  for (size_t peer = 0; peer < size; ++peer) calls[peer] = met[peer].call;
  TERNION_RETURN_IF_ERROR(all_gather(calls.data(), size, all_calls.data()));
  for (size_t peer = 0; peer < size; ++peer) {
    Fd fd = AreConnected(all_calls, size, rank, peer) ? std::move(met[peer].fd) : Fd();
    if (fd.open()) KeepAlive(fd);
    lifelines.polls_.push_back({fd.get(), POLLIN, 0});
    lifelines.fds_.push_back(std::move(fd));
  }
  lifelines.leaving_.resize(size);
  if (rank == 0) WarnOfMissing(all_calls, lifelines.hosts_);
  return lifelines;
}

absl::Status Lifelines::Check() {
  if (!lost_.ok() || Clock::now() < next_look_) return lost_;
  next_look_ = Clock::now() + kLookInterval;
  if (poll(polls_.data(), polls_.size(), 0) <= 0) return lost_;
  for (size_t rank = 0; rank < polls_.size(); ++rank) {
    if (polls_[rank].revents != 0) Hear(static_cast<int>(rank));
  }
  return lost_;
}

// A goodbye, or the end of the connection.
void Lifelines::Hear(int rank) {
  char word = 0;
  ssize_t bytes = 0;
  while ((bytes = recv(fds_[rank].get(), &word, 1, MSG_DONTWAIT)) > 0) {
    leaving_[rank] = leaving_[rank] || word == kGoodbye;
  }
  const int error = errno;
  if (bytes < 0 && (error == EAGAIN || error == EINTR)) return;
  fds_[rank].Close();
  polls_[rank].fd = -1;  // poll skips it
  // A peer that ends before it has read our goodbye resets the connection.
  const bool in_order = leaving_[rank] && (bytes == 0 || error == ECONNRESET || error == EPIPE);
  if (in_order || !lost_.ok()) return;
  lost_ = absl::UnavailableError(absl::StrCat("rank ", rank, " (host ", hosts_[rank],
                                              ") is gone: its connection ", CauseOf(bytes, error)));
}

void Lifelines::SayGoodbye() {
  for (const Fd& fd : fds_) {
    if (fd.open()) send(fd.get(), &kGoodbye, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
  }
}

int Lifelines::num_connected() const {
  return std::count_if(fds_.begin(), fds_.end(), [](const Fd& fd) { return fd.open(); });
}

}  // namespace ternion::comm

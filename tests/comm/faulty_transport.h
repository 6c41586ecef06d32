// A transport that does what networks do, on demand: damages messages and changes their order.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "comm/transport.h"

namespace ternion::comm {

class FaultyTransport : public Transport {
 public:
  explicit FaultyTransport(Transport* inner)
      : Transport(std::make_shared<MessagePool>()), inner_(*inner) {}

  // Called with every message before it leaves.
  std::function<void(RankId to, Phase phase, Message& message)> on_send;
  // Messages of this phase overtake others that are there.
  std::optional<Phase> first;

  RankId rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  int NodeOf(RankId rank) const override { return inner_.NodeOf(rank); }

  absl::Status Send(RankId to, Phase phase, Message message) override {
    if (on_send) on_send(to, phase, message);
    return inner_.Send(to, phase, std::move(message));
  }
  absl::StatusOr<Arrival> Receive(std::span<const Awaited> awaited) override {
    std::vector<Awaited> preferred;
    for (const Awaited& what : awaited) {
      if (what.phase == first) preferred.push_back(what);
    }
    absl::StatusOr<std::optional<Arrival>> arrival = inner_.TryReceive(preferred);
    if (!arrival.ok()) return arrival.status();
    if (*arrival) return **std::move(arrival);
    return inner_.Receive(awaited);
  }
  absl::StatusOr<std::optional<Arrival>> TryReceive(std::span<const Awaited> awaited) override {
    return inner_.TryReceive(awaited);
  }
  void Abort(const absl::Status& status) override { inner_.Abort(status); }

 private:
  Transport& inner_;
};

}  // namespace ternion::comm

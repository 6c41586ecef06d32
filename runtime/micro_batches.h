// Chooses, step by step, whether rows go through the layers as one batch or as two micro-batches
// of which one travels while the other is worked on (Batch::micro_batches).
#pragma once

#include <array>
#include <cstdint>

namespace ternion::runtime {

// Two micro-batches hide the wire and cost compute: weights are read twice. Which weighs more
// depends on the model, the links and the number of rows, so it is tried: where a good part of a
// step is waiting, some steps go in two, and from then on the faster way is taken, with a look at
// the other one now and then. Results do not depend on it. Lives on rank 0; plain logic.
class MicroBatchChooser {
 public:
  // 1 or 2, for a step of `rows` rows in all.
  int Choose(int64_t rows);

  // What a step took on rank 0, and how much of that was waiting for messages.
  void Record(int64_t rows, int micro_batches, double seconds, double wait_seconds);

  static constexpr int64_t kMinRows = 16;        // halves of fewer rows are not worth a message
  static constexpr double kMinWaitShare = 0.2;   // of a step in one batch, for two to be tried
  static constexpr int kTrials = 4;              // steps of a way before it is judged
  static constexpr int kStepsBetweenLooks = 64;  // at the slower way

 private:
  struct Way {
    int steps = 0;          // seen, up to kTrials
    double seconds = 0;     // per row, recent steps weigh more
    double wait_share = 0;  // of the time

    void Add(double new_seconds, double new_wait_share);
  };
  // Steps of about as many rows, by powers of two, and how they went.
  struct Size {
    std::array<Way, 2> ways;  // [micro_batches - 1]
    int steps_since_look = 0;
  };
  Size& SizeOf(int64_t rows);

  std::array<Size, 64> sizes_;
};

}  // namespace ternion::runtime

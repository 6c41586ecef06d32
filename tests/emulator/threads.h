// What the parts of the emulator share about the block that runs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

#include "tests/emulator/async.h"

namespace ternion::emulator {

[[noreturn]] void Fail(const char* what);

// Runs `body` as each thread of each block, one block after the other. `early`: the kernel may
// start before ops that come first are done, so that each thread must wait for them.
void RunGrid(dim3 grid, dim3 threads, bool early, const std::function<void()>& body);

Async& AsyncOfThread();
// How often the block's threads have met.
uint64_t RoundOfBlock();
// Whether all threads have called ShowSharedToProducts since they met the last time but one.
bool AllShown();

// The shared memory that has an address's lower 18 bits, which is all that descriptors have.
const uint8_t* SharedMemoryAt(int64_t address);

}  // namespace ternion::emulator

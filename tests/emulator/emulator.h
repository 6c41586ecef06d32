// How the emulated device is watched.
//
// Work of a stream is done when somebody waits for it and not before, so that a host which reads
// too early, or writes what a kernel has yet to read, gets it wrong every time. Device memory
// cannot be touched from the host meanwhile (a signal), and a kernel that is handed an address of
// plain host memory ends the process with a message.
#pragma once

#include <cuda_runtime.h>

#include <functional>

namespace ternion::emulator {

// On (the default) or, for tests of single ops over plain vectors, off: kernels run where they are
// launched, and any memory will do.
void SetStrict(bool strict);

// Whether the device multiplies by warpgroups (the default), as sm_90a, or by warps alone.
void SetWarpgroups(bool has);

// How many devices there seem to be; all have the same memory.
void SetDeviceCount(int count);

// From now on launches are refused, as by a device that there is no code for.
void RefuseLaunches();

// For libraries that emulate others (nccl.cc). Copies between memories that devices reach, at once.
void CopyNow(void* to, const void* from, size_t bytes);
// Work that is on `stream` from now on and done when `is_done` says so, which may help it along.
void AddToStream(cudaStream_t stream, std::function<bool()> is_done);

}  // namespace ternion::emulator

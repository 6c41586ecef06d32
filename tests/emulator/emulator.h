// How the emulated device is watched.
//
// Work of a stream is done when somebody waits for it and not before, so that a host which reads
// too early, or writes what a kernel has yet to read, gets it wrong every time. Device memory
// cannot be touched from the host meanwhile (a signal), and a kernel that is handed an address of
// plain host memory ends the process with a message.
#pragma once

namespace ternion::emulator {

// On (the default) or, for tests of single ops over plain vectors, off: kernels run where they are
// launched, and any memory will do.
void SetStrict(bool strict);

// Whether the device multiplies by warpgroups (the default), as sm_90a, or by warps alone.
void SetWarpgroups(bool has);

}  // namespace ternion::emulator

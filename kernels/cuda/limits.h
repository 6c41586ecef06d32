// What a device can do, measured now, so that a figure can stand beside its limit.
#pragma once

#include <string>

#include "kernels/kernels.h"

namespace ternion::kernels {

struct DeviceLimits {
  std::string name;                    // of the device
  double copied_bytes_per_second = 0;  // copying within its memory; a byte read and written is two
  double macs_per_second = 0;          // of 8-bit integers on its matrix units, from registers
};

// Of the device that SelectCudaKernels set the executor up for; takes a fraction of a second, and
// half a gigabyte of its memory. Zeros when the device failed, which Kernels::wait then says.
DeviceLimits MeasureDeviceLimits(Executor& executor);

}  // namespace ternion::kernels

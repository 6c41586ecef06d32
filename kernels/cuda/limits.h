// What a device can do, measured now, so that a figure can stand beside its limit.
#pragma once

#include <string>

#include "kernels/kernels.h"

namespace ternion::kernels {

// Bytes per second of copying within the memory of the device that SelectCudaKernels set the
// executor up for, a byte read and written counted as two. Takes a tenth of a second, and half a
// gigabyte of that memory. Means nothing when Kernels::wait says that the device failed.
double DeviceCopyBandwidth(Executor& executor);

struct DeviceLimits {
  std::string name;                    // of the device
  double copied_bytes_per_second = 0;  // DeviceCopyBandwidth
  double macs_per_second = 0;          // of 8-bit integers on its matrix units, from registers
};

// Of the device that SelectCudaKernels set the executor up for; takes a fraction of a second, and
// half a gigabyte of its memory. Means nothing when Kernels::wait says that the device failed.
DeviceLimits MeasureDeviceLimits(Executor& executor);

}  // namespace ternion::kernels

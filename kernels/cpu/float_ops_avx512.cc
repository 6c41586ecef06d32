#include "kernels/cpu/float_ops.inc.h"
#include "kernels/cpu/variants.h"

namespace ternion::kernels::avx512vnni {

constinit const Kernels kFloatOps = kThisVariant;

}  // namespace ternion::kernels::avx512vnni

// Built with -mavx2 -mfma -mf16c.
#include "backward.h"

namespace linearize {
extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {forward_scratch, forward_unit, backward_scratch, backward_unit};
}  // namespace linearize

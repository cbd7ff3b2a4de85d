// Built with -mavx2 -mfma -mf16c.
#include "backward.h"
#include "decode.h"

namespace linearize {
extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {forward_scratch, forward_unit, backward_scratch, backward_unit,
                             step_scratch,    step_unit,    tree_scratch,     tree_unit};
}  // namespace linearize

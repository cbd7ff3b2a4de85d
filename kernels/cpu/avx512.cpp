// Built with -mavx512f and what every AVX512 server has besides.
#include "backward.h"
#include "decode.h"

namespace linearize {
extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {forward_scratch, forward_unit, backward_scratch, backward_unit,
                             step_scratch,    step_unit,    tree_scratch,     tree_unit};
}  // namespace linearize

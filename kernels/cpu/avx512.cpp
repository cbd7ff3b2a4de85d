// Built with -mavx512f and what every AVX512 server has besides.
#include "backward.h"

namespace linearize {
extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {forward_scratch, forward_unit, backward_scratch, backward_unit};
}  // namespace linearize

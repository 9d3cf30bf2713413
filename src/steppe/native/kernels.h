// The table of kernels of each target.
#pragma once

#include "steppe_native.h"

namespace steppe {

#if defined(STEPPE_X86)
#if defined(STEPPE_AMX)
namespace avx512_amx {
extern const steppe_kernels kernels;
}
#endif
namespace avx512_bf16 {
extern const steppe_kernels kernels;
}
namespace avx512_vnni {
extern const steppe_kernels kernels;
}
namespace avx512 {
extern const steppe_kernels kernels;
}
#if defined(STEPPE_AVX_VNNI)
namespace avx2_vnni {
extern const steppe_kernels kernels;
}
#endif
namespace avx2 {
extern const steppe_kernels kernels;
}
#endif
namespace portable {
extern const steppe_kernels kernels;
}

}  // namespace steppe

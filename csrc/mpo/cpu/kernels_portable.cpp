// The CPU kernels in 16-byte vectors, which every compiler target can lower. CMakeLists.txt sets the compiler's target
// for this file.
#define MPO_VECTOR_BYTES 16
#define MPO_KERNEL_TABLE kPortableKernels
#include "mpo/cpu/kernels.inl"

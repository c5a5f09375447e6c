// The CPU kernels in 32-byte vectors. CMakeLists.txt sets the compiler's target for this file.
#define MPO_VECTOR_BYTES 32
#define MPO_KERNEL_TABLE kAvx2Kernels
#include "mpo/cpu/kernels.inl"

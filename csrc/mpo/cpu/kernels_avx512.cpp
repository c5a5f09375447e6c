// The CPU kernels in 64-byte vectors. CMakeLists.txt sets the compiler's target for this file.
#define MPO_VECTOR_BYTES 64
#define MPO_KERNEL_TABLE kAvx512Kernels
#include "mpo/cpu/kernels.inl"

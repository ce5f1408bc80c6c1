// The GPU back-end, compiled for the host.
#include "cuda_runtime.h"

namespace dbeta {
namespace {
int32_t shared[kHostShared / 4];  // a block's dynamic shared memory
}
}  // namespace dbeta

#include "../../csrc/decode.cu"

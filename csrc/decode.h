// Decoding of whole signal files: check once, then decode on the CPU (decode.cpp) or in batches on a GPU (decode.cu).
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "wfdb.h"

namespace dbeta {

// Throws std::invalid_argument, naming the record, unless the format is known and the file is exactly as long as its
// header says (a last group of packed samples may be whole or cut after its last sample), gains are finite and not 0, and
// skews and window lie within the record.
void check(const Source& source, const Filter& filter, const Window& window, const std::string& record);

// Output samples of the whole record.
int64_t samples_out(const Source& source, const Filter& filter);

// [leads, window.length], C order. mV = float32((code - baseline) / gain) in float64, then the filter, if any.
void decode(const Source& source, const Filter& filter, const Window& window, float* out);
// Codes as they are; "no sample" and padding are the lowest value of the type. int16 holds formats of up to 16 bits
// except 8 (whose sums may be larger).
void decode(const Source& source, const Window& window, int16_t* out);
void decode(const Source& source, const Window& window, int32_t* out);
bool fits_int16(int format);
template <class T>
constexpr T kNone = std::numeric_limits<T>::min();

// One record of a GPU batch: `source.bytes`, `filter.table` and `out` point to device memory.
template <class T>
struct Task {
  Source source;
  Filter filter;
  Window window;
  T* out;
};

#ifdef DBETA_CUDA
// Enqueues the batch on `stream` (a cudaStream_t); throws std::runtime_error on a CUDA error.
void decode_batch(const std::vector<Task<float>>& tasks, void* stream);
void decode_batch(const std::vector<Task<int16_t>>& tasks, void* stream);
void decode_batch(const std::vector<Task<int32_t>>& tasks, void* stream);
#endif

}  // namespace dbeta

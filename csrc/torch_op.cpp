// torch.ops.dbeta.wfdb_decode: the bytes of one signal file to a tensor [leads, length], where they lie (CPU or GPU).
// Written against PyTorch's stable ABI (2.11 and later), so the library need not be rebuilt for another PyTorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "decode.h"

#ifdef DBETA_CUDA
// Lives in libtorch_cuda: absent, and never called, under a CPU-only PyTorch.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kSchema =
    "wfdb_decode(Tensor data, int format, int leads, int samples, *, Tensor? gain=None, Tensor? baseline=None, "
    "Tensor? skew=None, Tensor? initial=None, int offset=0, bool planar=False, Tensor? table=None, int down=1, "
    "int first=0, int start=0, int? length=None, float? invalid=None, ScalarType? dtype=None, str record=\"\") -> "
    "Tensor";

void require(bool holds, const std::string& record, const std::string& message) {
  if (!holds) throw std::invalid_argument("record " + (record.empty() ? "(unnamed)" : record) + ": " + message);
}

template <class T, class To>
void per_lead(const std::optional<Tensor>& values, ScalarType dtype, const char* name, int64_t leads, T otherwise,
              const std::string& record, To* to) {
  std::fill(to, to + dbeta::kMaxLeads, static_cast<To>(otherwise));
  if (!values) return;
  require(values->is_cpu() && values->is_contiguous() && values->scalar_type() == dtype && values->numel() == leads,
          record, std::string(name) + " has to be a contiguous CPU tensor with one value per lead (float64 gain, else int32)");
  const T* from = static_cast<const T*>(values->data_ptr());
  std::copy(from, from + leads, to);
}

Tensor wfdb_decode(const Tensor& data, int64_t format, int64_t leads, int64_t samples, std::optional<Tensor> gain,
                   std::optional<Tensor> baseline, std::optional<Tensor> skew, std::optional<Tensor> initial,
                   int64_t offset, bool planar, std::optional<Tensor> table, int64_t down, int64_t first, int64_t start,
                   std::optional<int64_t> length, std::optional<double> invalid, std::optional<ScalarType> dtype,
                   std::string record) {
  constexpr auto kInt = std::numeric_limits<int32_t>::max();
  require(data.scalar_type() == ScalarType::Byte && data.is_contiguous(), record, "data has to be contiguous uint8");
  require(leads >= 1 && leads <= dbeta::kMaxLeads && format >= 0 && format < kInt && down >= 1 && down < kInt &&
              first > -kInt && first < kInt, record, "leads, format, down or first is out of range");
  dbeta::Source source{};
  source.bytes = static_cast<const uint8_t*>(data.data_ptr());
  source.size = data.numel();
  source.offset = offset;
  source.samples = samples;
  source.format = static_cast<int32_t>(format);
  source.leads = static_cast<int32_t>(leads);
  source.planar = planar;
  per_lead<double>(gain, ScalarType::Double, "gain", leads, 1.0, record, source.gain);
  per_lead<int32_t>(baseline, ScalarType::Int, "baseline", leads, 0, record, source.baseline);
  per_lead<int32_t>(skew, ScalarType::Int, "skew", leads, 0, record, source.skew);
  per_lead<int32_t>(initial, ScalarType::Int, "initial", leads, 0, record, source.initial);

  dbeta::Filter filter;
  if (table) {
    require(table->dim() == 2 && table->scalar_type() == ScalarType::Float && table->is_contiguous() &&
                table->device() == data.device() && table->numel() < kInt, record,
            "table has to be contiguous float32 [up, taps] on the device of data");
    filter = {static_cast<const float*>(table->data_ptr()), static_cast<int32_t>(table->size(0)),
              static_cast<int32_t>(down), static_cast<int32_t>(table->size(1)), static_cast<int32_t>(first)};
  }
  const ScalarType type = dtype.value_or(ScalarType::Float);
  require(type == ScalarType::Float || (!table && (type == ScalarType::Int || (type == ScalarType::Short &&
              dbeta::fits_int16(source.format)))), record,
          "dtype is float32 (mV), int32 (codes) or, for formats of up to 16 bits but 8, int16; codes are not resampled");
  dbeta::Window window{start, length.value_or(0),
                       static_cast<float>(invalid.value_or(std::numeric_limits<double>::quiet_NaN()))};
  dbeta::check(source, filter, window, record);
  if (!length) window.length = std::max<int64_t>(0, dbeta::samples_out(source, filter) - start);
  const int64_t shape[] = {leads, window.length};
  Tensor out = torch::stable::empty(shape, type, std::nullopt, data.device());

  const auto run = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
#ifdef DBETA_CUDA
    if (data.is_cuda()) {
      void* stream = nullptr;
      if (aoti_torch_get_current_cuda_stream(data.get_device_index(), &stream) != 0) {
        throw std::runtime_error("PyTorch has no current CUDA stream");
      }
      return dbeta::decode_batch({dbeta::Task<T>{source, filter, window, to}}, stream);
    }
#endif
    if constexpr (std::is_same_v<T, float>) dbeta::decode(source, filter, window, to);
    else dbeta::decode(source, window, to);
  };
  if (type == ScalarType::Float) run(static_cast<float*>(out.data_ptr()));
  else if (type == ScalarType::Int) run(static_cast<int32_t*>(out.data_ptr()));
  else run(static_cast<int16_t*>(out.data_ptr()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dbeta, library) { library.def(kSchema); }
STABLE_TORCH_LIBRARY_IMPL(dbeta, CPU, library) { library.impl("wfdb_decode", TORCH_BOX(&wfdb_decode)); }
#ifdef DBETA_CUDA
STABLE_TORCH_LIBRARY_IMPL(dbeta, CUDA, library) { library.impl("wfdb_decode", TORCH_BOX(&wfdb_decode)); }
#endif

// fn.wfdb_decode: the bytes of signal files, or of corpus members, to [leads, length]; CPU and GPU back-ends.
// It keeps no state, so pipelines with it can be checkpointed. Built for one exact version of DALI (its symbols are
// versioned); the loader of another version refuses it.
#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "dali/core/static_switch.h"
#include "dali/pipeline/operator/arg_helper.h"
#include "dali/pipeline/operator/checkpointing/stateless_operator.h"
#include "dali/pipeline/operator/operator.h"
#include "decode.h"

namespace {

using dali::AccessOrder;
using dali::ArgValue;
using dali::CPUBackend;
using dali::GPUBackend;
using dali::OpSpec;
using dali::OutputDesc;
using dali::Workspace;

template <class Backend>
class WfdbDecode : public dali::StatelessOperator<Backend> {
 public:
  explicit WfdbDecode(const OpSpec& spec)
      : dali::StatelessOperator<Backend>(spec),
        leads_(spec.GetArgument<int>("leads")),
        planar_(spec.GetArgument<bool>("planar")),
        dtype_(spec.GetArgument<dali::DALIDataType>("dtype")),
        window_{spec.GetArgument<int>("start"), spec.GetArgument<int>("length"), spec.GetArgument<float>("invalid")},
        weights_(spec.GetRepeatedArgument<float>("filter_weights")) {
    DALI_ENFORCE(leads_ >= 1 && leads_ <= dbeta::kMaxLeads, "wfdb_decode: leads has to be 1 to 32");
    DALI_ENFORCE(dtype_ == DALI_FLOAT || dtype_ == DALI_INT16 || dtype_ == DALI_INT32,
                 "wfdb_decode: dtype is FLOAT (mV), INT16 or INT32 (codes)");
    const auto shapes = spec.GetRepeatedArgument<int>("filters");
    DALI_ENFORCE(shapes.size() % 4 == 0, "wfdb_decode: filters holds up, down, taps, first of each filter");
    size_t at = 0;
    for (size_t i = 0; i < shapes.size(); i += 4) {
      offsets_.push_back(at);
      filters_.push_back({nullptr, shapes[i], shapes[i + 1], shapes[i + 2], shapes[i + 3]});
      DALI_ENFORCE(shapes[i] > 0 && shapes[i + 2] > 0, "wfdb_decode: a filter needs up > 0 and taps > 0");
      at += static_cast<size_t>(shapes[i]) * static_cast<size_t>(shapes[i + 2]);
    }
    DALI_ENFORCE(at == weights_.size(), "wfdb_decode: filter_weights does not hold up x taps numbers of each filter");
  }

 protected:
  bool SetupImpl(std::vector<OutputDesc>& outputs, const Workspace& ws) override {
    const auto& data = ws.Input<Backend>(0);
    DALI_ENFORCE(data.type() == DALI_UINT8 && data.sample_dim() == 1, "wfdb_decode: data has to be uint8 [bytes]");
    const int count = data.num_samples();
    const auto& spec = this->spec_;
    for (auto* scalar : {&format_, &samples_, &offset_, &filter_}) scalar->Acquire(spec, ws, count);
    if (record_.HasExplicitValue()) record_.Acquire(spec, ws, count);
    const dali::TensorShape<1> per_lead{leads_};
    for (auto* vector : {&skew_, &initial_}) vector->Acquire(spec, ws, count, per_lead);
    const bool scaled = ws.NumInput() == 3;
    if (scaled) {
      const auto &gain = ws.Input<CPUBackend>(1), &baseline = ws.Input<CPUBackend>(2);
      const dali::TensorListShape<> shape = dali::uniform_list_shape(count, {leads_});
      DALI_ENFORCE(gain.type() == DALI_FLOAT64 && gain.shape() == shape &&
                   baseline.type() == DALI_INT32 && baseline.shape() == shape,
                   "wfdb_decode: gain has to be float64 [leads] and baseline int32 [leads]");
    }
    sources_.assign(count, {});
    windows_.assign(count, window_);
    dali::TensorListShape<> shape(count, 2);
    for (int i = 0; i < count; ++i) {
      dbeta::Source& s = sources_[i];
      s.bytes = static_cast<const uint8_t*>(data.raw_tensor(i));
      s.size = data.tensor_shape(i).num_elements();
      s.offset = *offset_[i].data;
      s.samples = *samples_[i].data;
      s.format = *format_[i].data;
      s.leads = leads_;
      s.planar = planar_;
      std::copy_n(skew_[i].data, leads_, s.skew);
      std::copy_n(initial_[i].data, leads_, s.initial);
      std::fill_n(s.gain, leads_, 1.0);
      if (scaled) {
        std::copy_n(ws.Input<CPUBackend>(1).template tensor<double>(i), leads_, s.gain);
        std::copy_n(ws.Input<CPUBackend>(2).template tensor<int32_t>(i), leads_, s.baseline);
      }
      const dbeta::Filter filter = this->filter(i, weights_.data());
      const std::string name = record_.HasExplicitValue() ? std::to_string(*record_[i].data) : "";
      dbeta::Window& window = windows_[i];
      window.length = std::max<int64_t>(window.length, 0);
      dbeta::check(s, filter, window, name);
      DALI_ENFORCE(dtype_ == DALI_FLOAT || !filter.table, "wfdb_decode: codes are not resampled; ask for FLOAT");
      DALI_ENFORCE(dtype_ != DALI_INT16 || dbeta::fits_int16(s.format),
                   "wfdb_decode: codes of this format do not fit INT16; ask for INT32");
      if (window_.length < 0) window.length = std::max<int64_t>(0, dbeta::samples_out(s, filter) - window.start);
      shape.set_tensor_shape(i, dali::TensorShape<2>{leads_, window.length});
    }
    outputs = {{shape, dtype_}};
    return true;
  }

  void RunImpl(Workspace& ws) override {
    if (dtype_ == DALI_FLOAT) run<float>(ws);
    else if (dtype_ == DALI_INT16) run<int16_t>(ws);
    else run<int32_t>(ws);
  }

 private:
  dbeta::Filter filter(int sample, const float* weights) const {
    const int index = *filter_[sample].data;
    DALI_ENFORCE(index < static_cast<int>(filters_.size()), "wfdb_decode: there is no filter " + std::to_string(index));
    if (index < 0) return {};
    dbeta::Filter result = filters_[index];
    result.table = weights + offsets_[index];
    return result;
  }

  template <class T>
  void run(Workspace& ws) {
    auto& output = ws.Output<Backend>(0);
    const int count = static_cast<int>(sources_.size());
    if constexpr (std::is_same_v<Backend, CPUBackend>) {
      auto& pool = ws.GetThreadPool();
      for (int i = 0; i < count; ++i) {
        T* out = output.template mutable_tensor<T>(i);
        pool.AddWork([this, i, out](int) {
          if constexpr (std::is_same_v<T, float>) {
            dbeta::decode(sources_[i], filter(i, weights_.data()), windows_[i], out);
          } else {
            dbeta::decode(sources_[i], windows_[i], out);
          }
        }, sources_[i].size);
      }
      pool.RunAll();
    } else {
#ifdef DBETA_CUDA
      if (!weights_.empty() && !device_weights_.has_data()) device_weights_.Copy(weights_, AccessOrder(ws.stream()));
      const auto* weights = weights_.empty() ? nullptr : device_weights_.template data<float>();
      std::vector<dbeta::Task<T>> tasks;
      for (int i = 0; i < count; ++i) {
        tasks.push_back({sources_[i], filter(i, weights), windows_[i], output.template mutable_tensor<T>(i)});
      }
      dbeta::decode_batch(tasks, ws.stream());
#endif
    }
  }

  const int leads_;
  const bool planar_;
  const dali::DALIDataType dtype_;
  const dbeta::Window window_;
  const std::vector<float> weights_;
  std::vector<dbeta::Filter> filters_;  // table is filled in by filter()
  std::vector<size_t> offsets_;         // of each table in weights_
  ArgValue<int> format_{"format", this->spec_}, samples_{"samples", this->spec_}, offset_{"offset", this->spec_},
      filter_{"filter", this->spec_};
  ArgValue<int64_t> record_{"record", this->spec_};
  ArgValue<int, 1> skew_{"skew", this->spec_}, initial_{"initial", this->spec_};
  std::vector<dbeta::Source> sources_;  // of the batch in hand
  std::vector<dbeta::Window> windows_;
  dali::Tensor<GPUBackend> device_weights_;
};

}  // namespace

// Defines the schema and registers both back-ends under the Python name fn.wfdb_decode.
namespace dali {

DALI_SCHEMA(WfdbDecode)
    .DocStr("Decodes WFDB signal files to [leads, length]: float32 mV = (code - baseline) / gain, resampled on request, or "
            "codes.")
    .NumInput(1, 3)
    .NumOutput(1)
    .InputDox(0, "data", "uint8 [bytes]", "a whole signal file")
    .InputDox(1, "gain", "float64 [leads]", "codes per mV (default 1)")
    .InputDox(2, "baseline", "int32 [leads]", "the code of 0 mV (default 0)")
    .InputDevice(1, 3, dali::InputDevice::CPU)
    .AddArg("format", "8, 16, 24, 32, 61, 80, 160, 212, 310 or 311", DALI_INT32, true)
    .AddArg("leads", "leads in the file", DALI_INT32)
    .AddArg("samples", "samples of each lead", DALI_INT32, true)
    .AddOptionalArg("offset", "bytes before the first sample", 0, true)
    .AddOptionalArg("planar", "all samples of a lead lie together, as in a corpus; else WFDB's frames", false)
    .AddOptionalArg("skew", "samples by which each lead is late", std::vector<int>{0}, true)
    .AddOptionalArg("initial", "format 8: the code before the first difference", std::vector<int>{0}, true)
    .AddOptionalArg("filter", "index of the resampling filter; -1 keeps the rate", -1, true)
    .AddOptionalArg("filters", "up, down, taps, first of each filter", std::vector<int>{})
    .AddOptionalArg("filter_weights", "the tables [up, taps] of all filters, one after the other", std::vector<float>{})
    .AddOptionalArg("start", "first output sample", 0)
    .AddOptionalArg("length", "output samples, padded; -1: as many as there are", -1)
    .AddOptionalArg("invalid", "mV of samples that do not exist", 0.0f)
    .AddOptionalTypeArg("dtype", "FLOAT: mV; INT16, INT32: codes", DALI_FLOAT)
    .AddOptionalArg("record", "number of the record, for error messages", DALI_INT64, nullptr, true);

DALI_REGISTER_OPERATOR(WfdbDecode, ::WfdbDecode<CPUBackend>, CPU);
#ifdef DBETA_CUDA
DALI_REGISTER_OPERATOR(WfdbDecode, ::WfdbDecode<GPUBackend>, GPU);
#endif

}  // namespace dali

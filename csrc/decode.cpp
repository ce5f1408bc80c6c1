#include "decode.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <sstream>
#include <stdexcept>

// The filter runs several times faster on wide vectors: one binary carries each form and the loader picks. Sanitised
// builds have one form, since the picking runs before the sanitiser is ready.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define DBETA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DBETA_CLONES
#endif

namespace dbeta {
namespace {

static_assert(std::endian::native == std::endian::little, "WFDB readers copy little-endian integers");

constexpr int64_t kMost = int64_t{1} << 40;  // samples, bytes: products with leads and rates stay below 2^63
constexpr int32_t kMaxFilter = 1 << 16;
constexpr const char* kFormats = "8, 16, 24, 32, 61, 80, 160, 212, 310, 311";

template <class... Parts>
[[noreturn]] void refuse(const std::string& record, const Parts&... parts) {
  std::ostringstream message;
  message << "record " << (record.empty() ? "(unnamed)" : record) << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Calls put(t, code) for every sample of [begin, end).
template <class F, class Put>
void each_code(const Source& s, int lead, int64_t begin, int64_t end, Put put) {
  const uint8_t* bytes = s.bytes + s.offset;
  const int64_t origin = position(s, lead, 0), stride = s.planar ? 1 : s.leads, skew = s.skew[lead];
  const int64_t stored = std::clamp(s.samples - skew, begin, end);
  if constexpr (F::differences) {
    uint32_t sum = static_cast<uint32_t>(s.initial[lead]);  // wraps, as wfdb's int32 does
    for (int64_t t = 0; t < std::min(stored + skew, s.samples); ++t) {
      sum += static_cast<uint32_t>(F::at(bytes, origin + t * stride));
      if (t - skew >= begin) put(t - skew, static_cast<int32_t>(sum));
    }
  } else {
    for (int64_t t = begin; t < stored; ++t) put(t, valid<F>(F::at(bytes, origin + (t + skew) * stride)));
  }
  for (int64_t t = stored; t < end; ++t) put(t, kInvalid);
}

// Outputs [begin, end) whose inputs all exist, one at a time: for filters with more phases than there is to share.
// `x` is the record's first sample.
DBETA_CLONES void filter_singly(const Filter& f, const float* x, int64_t begin, int64_t end, float* out) {
  const int taps = f.taps;
  for (int64_t n = begin; n < end; ++n) {
    const float* in = x + f.base(n);
    const float* weights = f.weights(n);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int k = 0; k < taps; ++k) sum += weights[k] * in[k];
    out[n - begin] = sum;
  }
}

// The same, many at a time: outputs n, n + up, n + 2 up ... have the same weights, and their inputs lie `down` apart:
// with the inputs split into `down` rows a weight meets kLanes neighbours at once. `count`: how many inputs x holds.
constexpr int kLanes = 32;

DBETA_CLONES void filter_by_phase(const Filter& f, const float* x, int64_t count, int64_t begin, int64_t end,
                                  float* out) {
  using Lanes __attribute__((vector_size(4 * kLanes / 2))) = float;  // half; the compiler cuts it to what the CPU has
  const int64_t width = count / f.down + 1 + kLanes;
  std::vector<float> rows(static_cast<size_t>(f.down * width));
  for (int64_t i = 0, r = 0, c = 0; i < count; ++i) {
    rows[r * width + c] = x[i];
    if (++r == f.down) r = 0, ++c;
  }
  std::vector<const float*> in(static_cast<size_t>(f.taps));
  for (int64_t n = begin; n < std::min(end, begin + f.up); ++n) {
    const float* weights = f.weights(n);
    for (int64_t k = 0, i = f.base(n); k < f.taps; ++k, ++i) in[k] = rows.data() + i % f.down * width + i / f.down;
    const int64_t outputs = (end - n + f.up - 1) / f.up;
    for (int64_t j = 0; j < outputs; j += kLanes) {
      Lanes low{}, high{};
      for (int k = 0; k < f.taps; ++k) {
        Lanes a, b;
        std::memcpy(&a, in[k] + j, sizeof a);
        std::memcpy(&b, in[k] + j + kLanes / 2, sizeof b);
        low += weights[k] * a;
        high += weights[k] * b;
      }
      for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, outputs - j); ++lane) {
        out[n - begin + (j + lane) * f.up] = lane < kLanes / 2 ? low[lane] : high[lane - kLanes / 2];
      }
    }
  }
}

float filter_at_edge(const Filter& f, const float* x, int64_t samples, int64_t n) {
  const int64_t base = f.base(n);
  const float* weights = f.weights(n);
  double sum = 0, total = 0;
  for (int64_t k = std::max<int64_t>(0, -base); k < std::min<int64_t>(f.taps, samples - base); ++k) {
    sum += static_cast<double>(weights[k]) * x[base + k];
    total += weights[k];
  }
  return static_cast<float>(sum / total);
}

// x holds the `count` inputs that outputs [begin, end) read; `samples` is the length of the whole record.
void filter_range(const Filter& f, const float* x, int64_t count, int64_t samples, int64_t begin, int64_t end,
                  float* out) {
  int64_t n = begin;
  for (; n < end && f.base(n) < 0; ++n) *out++ = filter_at_edge(f, x, samples, n);
  int64_t inside = end;
  while (inside > n && f.base(inside - 1) + f.taps > samples) --inside;
  if ((inside - n) / f.up >= kLanes / 2) filter_by_phase(f, x, count, n, inside, out);
  else filter_singly(f, x, n, inside, out);
  out += inside - n;
  for (n = inside; n < end; ++n) *out++ = filter_at_edge(f, x, samples, n);
}

template <class T>
void decode_codes(const Source& s, const Window& window, T* out) {
  const int64_t begin = window.start, end = std::clamp(s.samples, begin, begin + window.length);
  for (int lead = 0; lead < s.leads; ++lead, out += window.length) {
    with_format(s.format, [&](auto format) {
      using F = decltype(format);
      each_code<F>(s, lead, begin, end, [&](int64_t t, int32_t code) {
        out[t - begin] = code == kInvalid ? kNone<T> : static_cast<T>(code);
      });
    });
    std::fill(out + (end - begin), out + window.length, kNone<T>);
  }
}

}  // namespace

bool fits_int16(int format) { return format != 8 && format != 24 && format != 32; }

int64_t samples_out(const Source& source, const Filter& filter) {
  return filter.table ? filter.resampled(source.samples) : source.samples;
}

void check(const Source& s, const Filter& filter, const Window& window, const std::string& record) {
  if (s.leads < 1 || s.leads > kMaxLeads) refuse(record, s.leads, " leads; 1 to ", kMaxLeads, " are read");
  if (s.samples < 0 || s.samples > kMost) refuse(record, s.samples, " samples per lead; 0 to 2^40 are read");
  if (s.offset < 0 || s.offset > kMost) refuse(record, "byte offset ", s.offset, "; 0 to 2^40 are read");
  const int64_t count = s.leads * s.samples;
  int64_t least = 0, most = 0;
  const bool known = with_format(s.format, [&](auto format) {
    using F = decltype(format);
    least = count / F::group * F::bytes + F::cut(count % F::group);
    most = (count + F::group - 1) / F::group * F::bytes;
  });
  if (!known) refuse(record, "format ", s.format, " is not read; accepted: ", kFormats);
  if (s.size - s.offset < least || s.size - s.offset > most) {
    std::ostringstream need;
    need << least + s.offset;
    if (most != least) need << " to " << most + s.offset;
    refuse(record, "format ", s.format, ", ", s.leads, " leads x ", s.samples, " samples from byte ", s.offset,
           " need ", need.str(), " bytes, given ", s.size, s.size - s.offset < least ? " (truncated)" : " (oversized)");
  }
  for (int lead = 0; lead < s.leads; ++lead) {
    if (!std::isfinite(s.gain[lead]) || s.gain[lead] == 0) {
      refuse(record, "lead ", lead, " has gain ", s.gain[lead],
             "; a finite number of codes per mV other than 0 is needed");
    }
    if (s.skew[lead] < 0 || s.skew[lead] > s.samples) {
      refuse(record, "lead ", lead, " has skew ", s.skew[lead], "; 0 to ", s.samples, " samples are accepted");
    }
  }
  if (filter.table && (filter.up < 1 || filter.up > kMaxFilter || filter.down < 1 ||
                       filter.down > kMaxFilter || filter.taps > kMaxFilter || filter.first > 0 ||
                       filter.first + filter.taps < 1)) {
    refuse(record, "a filter of ", filter.up, "/", filter.down, " with ", filter.taps, " taps from ", filter.first,
           " does not reach its own sample");
  }
  if (window.start < 0 || window.length < 0 || window.start > kMost || window.length > kMost) {
    refuse(record, "window [", window.start, ", +", window.length, ") is not accepted; start and length are 0 or more");
  }
}

void decode(const Source& s, const Window& window, int16_t* out) {
  if (s.format == 16 && s.planar && std::all_of(s.skew, s.skew + s.leads, [](int32_t skew) { return skew == 0; })) {
    // A corpus record at 500 Hz: its code for "no sample" is already the lowest int16, so rows are copied.
    const int64_t count = std::clamp<int64_t>(s.samples - window.start, 0, window.length);
    for (int lead = 0; lead < s.leads; ++lead, out += window.length) {
      const uint8_t* row = s.bytes + s.offset + 2 * position(s, lead, std::min(window.start, s.samples));
      if (count > 0) std::memcpy(out, row, 2 * static_cast<size_t>(count));
      std::fill(out + count, out + window.length, kNone<int16_t>);
    }
    return;
  }
  if (!fits_int16(s.format)) throw std::invalid_argument("codes of this format do not fit int16; ask for int32");
  decode_codes(s, window, out);
}

void decode(const Source& s, const Window& window, int32_t* out) { decode_codes(s, window, out); }

void decode(const Source& s, const Filter& filter, const Window& window, float* out) {
  const int64_t begin = window.start, end = std::clamp(samples_out(s, filter), begin, begin + window.length);
  const bool resample = filter.table != nullptr;
  // With a filter: the inputs [0, last) that the window reads; without: the window itself.
  const int64_t first = resample ? 0 : begin;
  const int64_t last = !resample ? end : end == begin ? 0 : std::min(s.samples, filter.base(end - 1) + filter.taps);
  std::vector<float> lead_mv(resample ? static_cast<size_t>(last) : 0);
  for (int lead = 0; lead < s.leads; ++lead, out += window.length) {
    float* to = resample ? lead_mv.data() : out;
    const double gain = s.gain[lead];
    const int32_t baseline = s.baseline[lead];
    with_format(s.format, [&](auto format) {
      using F = decltype(format);
      each_code<F>(s, lead, first, last, [&](int64_t t, int32_t code) {
        to[t - first] = millivolts(code, gain, baseline, window.invalid);
      });
    });
    if (resample) filter_range(filter, lead_mv.data(), last, s.samples, begin, end, out);
    std::fill(out + (end - begin), out + window.length, window.invalid);
  }
}

}  // namespace dbeta

// Fuzz target of the decoder: any header over any bytes either is refused or decodes within bounds, and the GPU back-end
// (on the host) gives what the CPU gives. LLVMFuzzerTestOneInput is libFuzzer's entry; fuzz_driver.cpp runs it without.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "decode.h"

namespace {

struct Reader {
  const uint8_t* data;
  size_t size;
  template <class T>
  T take() {
    T value{};
    const size_t count = std::min(size, sizeof(T));
    std::memcpy(&value, data, count);
    data += count;
    size -= count;
    return value;
  }
};

constexpr int kFormats[] = {8, 16, 24, 32, 61, 80, 160, 212, 310, 311, 0, 508};

// Bytes that the samples need, so that most inputs get past the length check.
int64_t needed(const dbeta::Source& s) {
  int64_t bytes = 0;
  dbeta::with_format(s.format, [&](auto format) {
    using F = decltype(format);
    const int64_t count = s.leads * s.samples;
    bytes = count / F::group * F::bytes + F::cut(count % F::group);
  });
  return s.offset + bytes;
}

// The largest sample: sums of at most 32 products with weights up to 1/16 differ by a few ulps of it.
float largest(dbeta::Source s) {
  std::vector<float> mv(static_cast<size_t>(s.leads * s.samples));
  dbeta::decode(s, {}, {0, s.samples, 0}, mv.data());
  float most = 0;
  for (const float value : mv) most = std::max(most, std::fabs(value));
  return most;
}

template <class T>
bool same(T a, T b, float tolerance) {
  if constexpr (std::is_same_v<T, float>) {
    const bool finite = std::isfinite(a) && std::isfinite(b);
    // Filtered, values near the largest float may overflow in one order of adding and not in the other.
    return finite ? std::fabs(a - b) <= tolerance : tolerance > 0 || std::isfinite(a) == std::isfinite(b);
  } else {
    return a == b;
  }
}

template <class T>
void compare(const dbeta::Source& s, const dbeta::Filter& filter, const dbeta::Window& window) {
  const size_t count = static_cast<size_t>(s.leads) * static_cast<size_t>(window.length);
  const std::unique_ptr<T[]> cpu(new T[count]), gpu(new T[count]);
  if constexpr (std::is_same_v<T, float>) dbeta::decode(s, filter, window, cpu.get());
  else dbeta::decode(s, window, cpu.get());
  dbeta::decode_batch({dbeta::Task<T>{s, filter, window, gpu.get()}}, nullptr);
  const float tolerance = filter.table ? 1e-5f * largest(s) : 0;
  for (size_t i = 0; i < count; ++i) {
    if (!same(cpu[i], gpu[i], tolerance)) {
      std::fprintf(stderr, "format %d, sample %zu of %zu: CPU %g, GPU %g\n", s.format, i, count,
                   static_cast<double>(cpu[i]), static_cast<double>(gpu[i]));
      std::abort();
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Reader in{data, size};
  dbeta::Source s{};
  s.format = kFormats[in.take<uint8_t>() % std::size(kFormats)];
  s.leads = in.take<uint8_t>() % (dbeta::kMaxLeads + 2);
  s.samples = in.take<uint8_t>() % 8 ? in.take<uint8_t>() * 5 : in.take<int64_t>();
  s.offset = in.take<uint8_t>() % 8 ? in.take<uint8_t>() % 30 : in.take<int64_t>();
  const uint8_t flags = in.take<uint8_t>();
  s.planar = flags & 1;
  for (int i = 0; i < std::min(s.leads, dbeta::kMaxLeads); ++i) {
    s.gain[i] = flags & 2 ? in.take<double>() : 1 + in.take<uint8_t>();
    s.baseline[i] = in.take<int32_t>();
    s.skew[i] = flags & 4 ? in.take<uint8_t>() % 16 : 0;
    s.initial[i] = in.take<int32_t>();
  }
  dbeta::Window window{in.take<uint8_t>(), in.take<uint16_t>() % 2048, flags & 8 ? 0.0f : NAN};
  dbeta::Filter filter;
  std::unique_ptr<float[]> table;
  if (flags & 16) {
    filter = {nullptr, in.take<uint8_t>() % 6, in.take<uint8_t>() % 6, in.take<uint8_t>() % 33, -(in.take<int8_t>() % 33)};
    const size_t weights = static_cast<size_t>(filter.up) * static_cast<size_t>(filter.taps);
    table.reset(new float[weights + 1]);
    for (size_t i = 0; i < weights; ++i) table[i] = static_cast<float>(1 + in.take<uint8_t>()) / 4096;
    filter.table = table.get();
  }
  // An allocation of exactly this size: one byte too far is seen.
  const bool plausible = s.leads > 0 && s.leads <= dbeta::kMaxLeads && s.samples >= 0 && s.samples < 2000 &&
                         s.offset >= 0 && s.offset < 100;
  s.size = plausible && !(flags & 32) ? needed(s) : static_cast<int64_t>(in.size);
  const std::unique_ptr<uint8_t[]> bytes(new uint8_t[static_cast<size_t>(s.size)]);
  for (int64_t i = 0; i < s.size; ++i) bytes[i] = in.size ? in.data[static_cast<size_t>(i) % in.size] : 0;
  s.bytes = bytes.get();
  try {
    dbeta::check(s, filter, window, "fuzz");
  } catch (const std::invalid_argument&) {
    return 0;
  }
  if (filter.table || flags & 64) compare<float>(s, filter, window);
  else if (flags & 128 && dbeta::fits_int16(s.format)) compare<int16_t>(s, filter, window);
  else compare<int32_t>(s, filter, window);
  return 0;
}

// Unit tests of the decoder in C++: bytes laid out by hand from the format definitions, refusals, and the GPU back-end
// (run on the host) against the CPU's at the size of real records, where the work is cut into tiles.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "decode.h"

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);        \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

namespace {

using Bytes = std::vector<uint8_t>;
constexpr int32_t kNo = dbeta::kInvalid;

dbeta::Source source(const Bytes& bytes, int format, int leads, int64_t samples, int64_t offset = 0) {
  dbeta::Source s{};
  s.bytes = bytes.data();
  s.size = static_cast<int64_t>(bytes.size());
  s.offset = offset;
  s.samples = samples;
  s.format = format;
  s.leads = leads;
  for (double& gain : s.gain) gain = 1;
  return s;
}

std::vector<int32_t> codes(const dbeta::Source& s) {
  const dbeta::Window window{0, s.samples, 0};
  dbeta::check(s, {}, window, "unit");
  std::vector<int32_t> out(static_cast<size_t>(s.leads * s.samples));
  dbeta::decode(s, window, out.data());
  return out;
}

void formats() {
  using Codes = std::vector<int32_t>;
  CHECK(codes(source({0x01, 0x80, 0xFF, 0x7F}, 16, 1, 2)) == (Codes{-32767, 32767}));
  CHECK(codes(source({0x80, 0x01, 0x80, 0x00}, 61, 1, 2)) == (Codes{-32767, kNo}));
  CHECK(codes(source({0x00, 0x00, 0xFF, 0xFF, 0x00, 0x80}, 160, 1, 3)) == (Codes{kNo, 32767, 0}));
  CHECK(codes(source({0x00, 0x01, 0x80, 0xFF}, 80, 1, 4)) == (Codes{kNo, -127, 0, 127}));
  CHECK(codes(source({0x01, 0x00, 0x80, 0x00, 0x00, 0x80}, 24, 1, 2)) == (Codes{-8388607, kNo}));
  CHECK(codes(source({0xFE, 0xFF, 0xFF, 0xFF, 0x00, 0x00, 0x00, 0x80}, 32, 1, 2)) == (Codes{-2, kNo}));
  // 12 bits: 0x123, then 0xFFF = -1; a third sample of its own, cut after two bytes: 0x800 is "no sample".
  CHECK(codes(source({0x23, 0xF1, 0xFF, 0x00, 0x08}, 212, 1, 3)) == (Codes{0x123, -1, kNo}));
  // 10 bits in bits 1-10 of two words, the third in their upper five: 1, -1, and 0b0000100010 = 34.
  CHECK(codes(source({0x02, 0x10, 0xFE, 0x0F}, 310, 1, 3)) == (Codes{1, -1, 34}));
  // 10 bits in bits 0-9, 10-19, 20-29: 1, -2, 511.
  CHECK(codes(source({0x01, 0xF8, 0xFF, 0x1F}, 311, 1, 3)) == (Codes{1, -2, 511}));
  // Differences from 100, two leads by frames.
  const Bytes differences{0x01, 0xFF, 0x02, 0xFE};
  dbeta::Source eight = source(differences, 8, 2, 2);
  eight.initial[0] = 100;
  CHECK(codes(eight) == (Codes{101, 103, -1, -3}));
  // Frames to leads, at an odd offset.
  CHECK(codes(source({9, 1, 0, 2, 0, 3, 0, 4, 0}, 16, 2, 2, 1)) == (Codes{1, 3, 2, 4}));
}

std::string refusal(const dbeta::Source& s) {
  try {
    dbeta::check(s, {}, {0, 1, 0}, "r7");
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void refusals() {
  CHECK(refusal(source(Bytes(11), 16, 2, 3)) ==
        "record r7: format 16, 2 leads x 3 samples from byte 0 need 12 bytes, given 11 (truncated)");
  CHECK(refusal(source(Bytes(9), 212, 1, 3, 2)) ==
        "record r7: format 212, 1 leads x 3 samples from byte 2 need 7 to 8 bytes, given 9 (oversized)");
  CHECK(refusal(source(Bytes(4), 16, 1, 2)).empty());
  // A product of leads and samples, or a size less an offset, that overflowed would look as if it fitted.
  CHECK(!refusal(source(Bytes(4), 16, 32, int64_t{1} << 60)).empty());
  CHECK(!refusal(source(Bytes(4), 16, 1, 2, INT64_MAX)).empty());
  CHECK(!refusal(source(Bytes(4), 16, 1, 2, INT64_MIN)).empty());
}

void gpu_equals_cpu() {
  constexpr int kLeads = 12, kSamples = 9000;
  uint32_t state = 1;
  std::vector<float> table(7 * 40);
  for (int row = 0; row < 7; ++row) {
    for (int k = 0; k < 40; ++k) table[row * 40 + k] = static_cast<float>(1 + (row * k) % 5) / 120;
  }
  for (const int format : {8, 16, 24, 32, 61, 80, 160, 212, 310, 311}) {
    Bytes bytes(4 * kLeads * kSamples + 3);
    for (auto& byte : bytes) byte = static_cast<uint8_t>((state = state * 1664525u + 1013904223u) >> 24);
    for (const bool planar : {false, true}) {
      for (const dbeta::Filter filter : {dbeta::Filter{}, dbeta::Filter{table.data(), 7, 12, 40, -19}}) {
        dbeta::Source s = source(bytes, format, kLeads, kSamples, 3);
        s.planar = planar;
        for (int lead = 0; lead < kLeads; ++lead) s.gain[lead] = 1e5, s.baseline[lead] = -lead, s.skew[lead] = lead % 3;
        const dbeta::Window window{37, 5300, 0};
        std::vector<float> cpu(kLeads * 5300), gpu(kLeads * 5300);
        dbeta::decode(s, filter, window, cpu.data());
        dbeta::decode_batch({dbeta::Task<float>{s, filter, window, gpu.data()}}, nullptr);
        float largest = 0;
        for (const float value : cpu) largest = std::max(largest, std::fabs(value));
        CHECK(largest > 0);
        for (size_t i = 0; i < cpu.size(); ++i) {
          CHECK(filter.table ? std::fabs(cpu[i] - gpu[i]) <= 1e-5f * largest : cpu[i] == gpu[i]);
        }
      }
    }
  }
}

}  // namespace

int main() {
  formats();
  refusals();
  gpu_equals_cpu();
  std::puts("decoder: all checks hold");
}

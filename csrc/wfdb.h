// WFDB signal formats, one sample at a time, for host and device.
//
// A signal file holds leads x samples integers ("codes"), by frames (all leads of one instant, then the next: WFDB's
// order) or planar (all samples of one lead, then the next: the corpus's order). No reader goes through a pointer
// wider than a byte, so any offset, however odd, is safe, and none touches a byte that its sample does not own.
// Definitions: PhysioNet, WFDB Applications Guide, signal(5).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DBETA_HD __host__ __device__ __forceinline__
#else
#define DBETA_HD inline
#endif

namespace dbeta {

constexpr int kMaxLeads = 32;             // per signal file
constexpr int32_t kInvalid = -2147483647 - 1;  // "no sample here", whatever the format's own code for it

// Format<F>: `group` samples share `bytes` bytes; `bits` per sample; at(p, i) is sample i of the packed stream at p.
// Formats with a code for "no sample" use the most negative value of their bits. Format 8 has none, and its at() is a
// difference: the code is the lead's initial value plus all differences so far.
template <int F>
struct Format;

template <int Bits, int Group, int Bytes>
struct Packing {
  static constexpr int bits = Bits, group = Group, bytes = Bytes;
  static constexpr bool differences = false;
  // Bytes that the first `rest` samples of a group reach into.
  DBETA_HD static constexpr int64_t cut(int64_t rest) { return (rest * Bits + 7) / 8; }
  DBETA_HD static int32_t sign(uint32_t word) { return static_cast<int32_t>(word << (32 - Bits)) >> (32 - Bits); }
};

template <>
struct Format<8> : Packing<8, 1, 1> {
  static constexpr bool differences = true;
  DBETA_HD static int32_t at(const uint8_t* p, int64_t i) { return static_cast<int8_t>(p[i]); }
};
template <>
struct Format<16> : Packing<16, 1, 2> {
  DBETA_HD static int32_t at(const uint8_t* p, int64_t i) {
    int16_t value;
    memcpy(&value, p + 2 * i, sizeof value);  // a copy may be unaligned; hosts and GPUs are little-endian
    return value;
  }
};
template <>
struct Format<24> : Packing<24, 1, 3> {
  DBETA_HD static int32_t at(const uint8_t* p, int64_t i) {
    return sign(p[3 * i] | uint32_t{p[3 * i + 1]} << 8 | uint32_t{p[3 * i + 2]} << 16);
  }
};
template <>
struct Format<32> : Packing<32, 1, 4> {
  DBETA_HD static int32_t at(const uint8_t* p, int64_t i) {
    int32_t value;
    memcpy(&value, p + 4 * i, sizeof value);
    return value;
  }
};
template <>
struct Format<61> : Packing<16, 1, 2> {  // 16, high byte first
  DBETA_HD static int32_t at(const uint8_t* p, int64_t i) { return sign(p[2 * i + 1] | uint32_t{p[2 * i]} << 8); }
};
template <>
struct Format<80> : Packing<8, 1, 1> {  // offset binary
  DBETA_HD static int32_t at(const uint8_t* p, int64_t i) { return int32_t{p[i]} - 128; }
};
template <>
struct Format<160> : Packing<16, 1, 2> {  // offset binary
  DBETA_HD static int32_t at(const uint8_t* p, int64_t i) {
    return static_cast<int32_t>(p[2 * i] | uint32_t{p[2 * i + 1]} << 8) - 32768;
  }
};
template <>
struct Format<212> : Packing<12, 2, 3> {  // low byte, both high nibbles, low byte
  DBETA_HD static int32_t at(const uint8_t* p, int64_t i) {
    p += i / 2 * 3;
    return i % 2 ? sign(p[2] | (p[1] & 0xF0u) << 4) : sign(p[0] | (p[1] & 0x0Fu) << 8);
  }
};
template <>
struct Format<310> : Packing<10, 3, 4> {  // two words of a spare bit, a sample, and 5 bits of the third sample
  DBETA_HD static constexpr int64_t cut(int64_t rest) { return rest * 2; }
  DBETA_HD static int32_t at(const uint8_t* p, int64_t i) {
    p += i / 3 * 4;
    if (i % 3 == 2) return sign(p[1] >> 3 | (p[3] & 0xF8u) << 2);
    p += i % 3 * 2;
    return sign(p[0] >> 1 | (p[1] & 0x07u) << 7);
  }
};
template <>
struct Format<311> : Packing<10, 3, 4> {  // three samples in the low 30 bits of a word
  DBETA_HD static int32_t at(const uint8_t* p, int64_t i) {
    p += i / 3 * 4;
    if (i % 3 == 0) return sign(p[0] | (p[1] & 0x03u) << 8);
    if (i % 3 == 1) return sign(p[1] >> 2 | (p[2] & 0x0Fu) << 6);
    return sign(p[2] >> 4 | (p[3] & 0x3Fu) << 4);
  }
};

// Calls f(Format<F>{}) for the format known at run time; returns false when it is none of the above.
template <class Function>
DBETA_HD bool with_format(int format, Function f) {
  switch (format) {
    case 8: f(Format<8>{}); return true;
    case 16: f(Format<16>{}); return true;
    case 24: f(Format<24>{}); return true;
    case 32: f(Format<32>{}); return true;
    case 61: f(Format<61>{}); return true;
    case 80: f(Format<80>{}); return true;
    case 160: f(Format<160>{}); return true;
    case 212: f(Format<212>{}); return true;
    case 310: f(Format<310>{}); return true;
    case 311: f(Format<311>{}); return true;
    default: return false;
  }
}

// One signal file in memory (or the .adc member of a corpus) and how its header says to read it.
struct Source {
  const uint8_t* bytes;
  int64_t size;    // bytes given
  int64_t offset;  // bytes before the first sample (.mat v4: 24)
  int64_t samples;
  int32_t format;
  int32_t leads;
  bool planar;
  double gain[kMaxLeads];  // codes per mV
  int32_t baseline[kMaxLeads];
  int32_t skew[kMaxLeads];     // samples by which the lead was written late
  int32_t initial[kMaxLeads];  // format 8: the code before the first difference
};

// Where sample t of a lead lies in the packed stream.
DBETA_HD int64_t position(const Source& s, int lead, int64_t t) {
  return s.planar ? lead * s.samples + t : t * s.leads + lead;
}

// A stored value, or kInvalid where it is the format's code for "no sample".
template <class F>
DBETA_HD int32_t valid(int32_t value) {
  constexpr int32_t lowest = static_cast<int32_t>(0xFFFFFFFFu << (F::bits - 1));
  return value == lowest ? kInvalid : value;
}

DBETA_HD float millivolts(int32_t code, double gain, int32_t baseline, float invalid) {
  return code == kInvalid ? invalid : static_cast<float>((static_cast<double>(code) - baseline) / gain);
}

// Rational resampling by a polyphase filter: output n lies at input n * down / up; its weights are row (n * down) % up
// of `table` [up, taps], over the inputs from floor(n * down / up) + first on. Rows sum to 1. Near the ends only
// the inputs that exist count, and their weights are scaled to sum to 1. dbeta/data/resample.py defines the table.
struct Filter {
  const float* table = nullptr;  // null: the rate is kept
  int32_t up = 1, down = 1, taps = 0, first = 0;

  DBETA_HD int64_t resampled(int64_t samples) const { return (samples * up + down - 1) / down; }
  DBETA_HD int64_t base(int64_t n) const { return n * down / up + first; }
  DBETA_HD const float* weights(int64_t n) const { return table + n * down % up * taps; }
};

// Which output samples are wanted: [start, start + length); past the record's end they are `invalid`.
struct Window {
  int64_t start, length;
  float invalid;  // mV of a sample that does not exist
};

}  // namespace dbeta

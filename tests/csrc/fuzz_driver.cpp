// Runs the fuzz target for a while without libFuzzer: random inputs, and mutations of earlier ones. A failing input is
// named by its seed. Usage: fuzz SECONDS [SEED]
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 1;
  uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  const auto start = std::chrono::steady_clock::now();
  std::vector<uint8_t> input;
  int64_t runs = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    std::mt19937_64 random(seed++);
    if (random() % 3 || input.empty()) {
      input.resize(1 + random() % 1500);
      for (auto& byte : input) byte = static_cast<uint8_t>(random());
    } else {
      for (uint64_t i = random() % 8 + 1; i-- > 0;) input[random() % input.size()] = static_cast<uint8_t>(random());
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
    ++runs;
  }
  std::printf("%lld inputs, last seed %llu\n", static_cast<long long>(runs), static_cast<unsigned long long>(seed - 1));
}

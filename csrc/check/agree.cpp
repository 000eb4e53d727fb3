// Every variant that this processor runs against the scalar one, to the last bit, without Python: for processors under
// emulation and for sanitizers. Prints a line a variant; exit code 1 where one differs.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../isa.h"
#include "../linear.h"
#include "../pack.h"

using namespace bitwright;

namespace {

struct Case {
  Geometry g;
  int64_t tokens;
};

uint8_t* aligned(std::vector<uint8_t>& memory) {
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

std::vector<float> run(const Kernels& kernels, const Case& c, unsigned seed, int threads) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const Geometry& g = c.g;
  std::vector<uint8_t> codes(2 * g.rows * ((g.normal() + 7) / 8));
  std::vector<uint16_t> scales(g.rows * g.groups()), outlier_scales(g.rows);
  std::vector<int8_t> levels(g.rows * g.groups() * 4), outliers(g.rows * g.outliers + 1);
  for (auto& byte : codes) byte = static_cast<uint8_t>(random());
  for (auto& half : scales) half = static_cast<uint16_t>(0x2000 + random() % 0x1000);
  for (auto& half : outlier_scales) half = static_cast<uint16_t>(0x2000 + random() % 0x1000);
  for (auto& level : levels) level = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
  for (auto& level : outliers) level = static_cast<int8_t>(random() % 256);
  std::vector<uint8_t> memory(packed_bytes(g) + 64);
  pack(Neutral{codes.data(), scales.data(), levels.data(), nullptr, outliers.data(), outlier_scales.data()}, g,
       aligned(memory), threads);
  std::vector<float> x(c.tokens * g.columns), bias(g.rows), y(c.tokens * g.rows, NAN);
  for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) {
    x[i] = normal(random) * 3 + (i / g.columns % 3 == 1 ? 40.0f : 0.0f);  // some tokens with a clamped zero point
  }
  for (auto& value : bias) value = normal(random);
  std::vector<int32_t> order(g.columns);
  for (int64_t i = 0; i < g.columns; ++i) order[i] = static_cast<int32_t>(g.columns - 1 - i);
  site_linear(kernels, x.data(), c.tokens, aligned(memory), g, Quantizer{order.data(), 0.01f, 4, 0.0f}, bias.data(),
              y.data(), threads);
  return y;
}

}  // namespace

int main() {
  const Case cases[] = {{{33, 300, 17, 64}, 1},   {{33, 300, 17, 64}, 5},  {{64, 256, 0, 128}, 13},
                        {{1, 41, 3, 24}, 2},      {{100, 520, 8, 256}, 98}, {{7, 9, 8, 8}, 9},
                        {{128, 1000, 100, 128}, 1}};
  const Kernels& scalar = find_variant("scalar")->kernels;
  int count, wrong = 0;
  const Variant* all = variants(&count);
  for (int i = 0; i < count; ++i) {
    if (!all[i].runs || &all[i].kernels == &scalar) continue;
    int different = 0;
    for (unsigned seed = 0; seed < sizeof(cases) / sizeof(cases[0]); ++seed) {
      const std::vector<float> expected = run(scalar, cases[seed], seed, 1);
      const std::vector<float> found = run(all[i].kernels, cases[seed], seed, 1 + static_cast<int>(seed) % 3);
      different += std::memcmp(expected.data(), found.data(), expected.size() * sizeof(float)) != 0;
    }
    std::printf("%s: %d of %zu cases differ\n", all[i].kernels.name, different, sizeof(cases) / sizeof(cases[0]));
    wrong += different;
  }
  return wrong ? 1 : 0;
}

#include "bind_blocks.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "address.h"

namespace nb = nanobind;

namespace bitwright {

namespace {

// Addresses are those of tensors that the caller keeps alive for as long as this.
struct Blocks {
  std::vector<DecoderBlock> blocks;
  Norm final;
};

}  // namespace

void bind_blocks(nb::module_& m, AllKernels (*kernels)()) {
  nb::class_<Norm>(m, "Norm").def("__init__", [](Norm* self, uintptr_t weight, float eps) {
    new (self) Norm{at<const float>(weight), eps};
  });
  nb::class_<Site>(m, "Site").def("__init__", [](Site* self, uintptr_t packed, int64_t rows, int64_t columns,
                                                 int64_t outliers, int64_t group, uintptr_t order, uintptr_t bias,
                                                 float cut, float share, int balance, int64_t hadamard,
                                                 int64_t normal) {
    new (self) Site{at<const uint8_t>(packed), Geometry{rows, columns, outliers, group}, at<const int32_t>(order),
                    at<const float>(bias),     cut,                                      share,
                    balance,                   hadamard,                                 normal};
  });
  nb::class_<Blocks>(m, "Blocks")
      .def("__init__", [](Blocks* self, const Norm& final) { new (self) Blocks{{}, final}; })
      .def("add",
           [](Blocks& self, const Norm& input, const Norm& mlp, const Norm& query, const Norm& key, const Site& attn_in,
              const Site& attn_out, const Site& mlp_in, const Site& mlp_out, int64_t query_heads, int64_t key_heads,
              int64_t head_dim, int64_t key_at, int64_t value_at, int64_t up_at, int64_t gated, int64_t window,
              float scale) {
             self.blocks.push_back(DecoderBlock{input, mlp, query, key, attn_in, attn_out, mlp_in, mlp_out, query_heads,
                                         key_heads, head_dim, key_at, value_at, up_at, gated, window, scale});
           })
      .def("scratch",
           [](const Blocks& self, int64_t tokens) {
             int64_t most = 0;
             for (const DecoderBlock& block : self.blocks) {
               const int64_t floats = block_scratch(block, tokens);
               most = floats > most ? floats : most;
             }
             return most;
           })
      .def("run", [kernels](const Blocks& self, int64_t first, int64_t last, uintptr_t x, uintptr_t normed,
                            int64_t tokens, uintptr_t cos, uintptr_t sin,
                            const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t, float>>& caches, int bits,
                            int64_t position, uintptr_t scratch, int threads) {
        nb::gil_scoped_release free;
        std::vector<BlockCache> records;
        for (const auto& [keys, values, capacity, cut] : caches) {
          records.push_back({at<uint8_t>(keys), at<uint8_t>(values), capacity, cut});
        }
        run_blocks(kernels(), self.blocks.data(), first, last, static_cast<int64_t>(self.blocks.size()), self.final,
                   at<float>(x), at<float>(normed), tokens, at<const float>(cos), at<const float>(sin), records.data(),
                   bits, position, at<float>(scratch), threads);
      });
}

}  // namespace bitwright

#include "bind_decoder.h"

#include "address.h"

namespace nb = nanobind;

namespace bitwright {

void bind_decoder(nb::module_& m, DecoderKernels (*kernels)()) {
  m.def("kv_append", [kernels](uintptr_t states, int64_t head_stride, int64_t token_stride, int64_t tokens,
                               int64_t position, uintptr_t records, int64_t heads, int64_t capacity, int64_t head_dim,
                               int bits, float cut, int threads) {
    nb::gil_scoped_release free;
    kv_append(kernels(), at<const float>(states), head_stride, token_stride, tokens, position,
              Records{heads, capacity, head_dim, bits}, cut, at<uint8_t>(records), threads);
  });
  m.def("kv_attention", [kernels](uintptr_t queries, int64_t head_stride, int64_t token_stride, uintptr_t keys,
                                  uintptr_t values, int64_t heads, int64_t capacity, int64_t head_dim, int bits,
                                  int64_t group, int64_t tokens, int64_t length, int64_t window, float scale,
                                  uintptr_t y, int threads) {
    nb::gil_scoped_release free;
    const Attention a{Records{heads, capacity, head_dim, bits}, at<const uint8_t>(keys), at<const uint8_t>(values),
                      at<const float>(queries), head_stride, token_stride, group, tokens, length, window, scale};
    kv_attention(kernels(), a, at<float>(y), threads);
  });
  m.def("hadamard", [kernels](uintptr_t x, uintptr_t y, int64_t blocks, int64_t size, float factor, int threads) {
    nb::gil_scoped_release free;
    hadamard(kernels(), at<const float>(x), at<float>(y), blocks, size, factor, threads);
  });
  m.def("site_hadamard", [kernels](uintptr_t x, uintptr_t order, uintptr_t y, int64_t tokens, int64_t columns,
                                   int64_t normal, int64_t size, int threads) {
    nb::gil_scoped_release free;
    site_hadamard(kernels(), at<const float>(x), at<const int32_t>(order), at<float>(y), tokens, columns, normal, size,
                  threads);
  });
  m.def("signed_sums", [kernels](uintptr_t values, int64_t count, int64_t order, int64_t inner, uintptr_t signs,
                                 int threads) {
    nb::gil_scoped_release free;
    signed_sums(kernels(), at<float>(values), count, order, inner, at<const uint8_t>(signs), threads);
  });
  m.def("gated", [kernels](uintptr_t x, int64_t tokens, int64_t columns, int64_t up, int64_t size, uintptr_t y,
                           int threads) {
    nb::gil_scoped_release free;
    gated(kernels(), at<const float>(x), tokens, columns, up, size, at<float>(y), threads);
  });
  m.def("attention_step", [kernels](uintptr_t x, int64_t tokens, int64_t columns, int64_t query_heads, int64_t key,
                                    int64_t value, uintptr_t cos, uintptr_t sin, uintptr_t keys, uintptr_t values,
                                    int64_t heads, int64_t capacity, int64_t head_dim, int bits, int64_t position,
                                    float cut, int64_t window, float scale, uintptr_t y, int threads) {
    nb::gil_scoped_release free;
    const Projections p{at<const float>(x), tokens, columns, query_heads, key, value, at<const float>(cos),
                        at<const float>(sin)};
    attention_step(kernels(), p, Records{heads, capacity, head_dim, bits}, at<uint8_t>(keys), at<uint8_t>(values),
                   position, cut, window, scale, at<float>(y), threads);
  });
  m.def("rms_norm", [](uintptr_t x, uintptr_t add, uintptr_t weight, float eps, uintptr_t sum, uintptr_t y,
                       int64_t rows, int64_t width, int threads) {
    nb::gil_scoped_release free;
    rms_norm(at<const float>(x), at<const float>(add), at<const float>(weight), eps, at<float>(sum), at<float>(y), rows,
             width, threads);
  });
  m.def("rope", [](uintptr_t x, int64_t token_stride, int64_t head_stride, uintptr_t cos, uintptr_t sin, uintptr_t y,
                   int64_t tokens, int64_t heads, int64_t dim, int threads) {
    nb::gil_scoped_release free;
    rope(at<const float>(x), token_stride, head_stride, at<const float>(cos), at<const float>(sin), at<float>(y),
         tokens, heads, dim, threads);
  });
}

}  // namespace bitwright

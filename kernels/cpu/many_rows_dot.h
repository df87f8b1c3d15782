// Many rows of bfloat16 x: tiles of the weight are dequantized into the cache and multiplied by all rows of x.

#ifdef HAS_BF16_DOT
namespace {

constexpr int NR = 4, MR = 6;  // a block of NR weight rows and MR rows of x has its sums in registers

// Four vectors to their four sums.
INLINE __m128 sums4(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd(bits_of<__m512d>(ab), bits_of<__m512d>(cd));
    __m512d high = _mm512_unpackhi_pd(bits_of<__m512d>(ab), bits_of<__m512d>(cd));
    __m512 all = _mm512_add_ps(bits_of<__m512>(low), bits_of<__m512>(high));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int M>
INLINE void block_dot(const uint16_t* w, const uint16_t* x, int64_t columns, int64_t w_stride, int64_t x_stride,
                      int64_t m0, int64_t n0, int64_t rows, const Output& out) {
    __m512 acc[NR][M];
    for (int r = 0; r < NR; r++)
        for (int m = 0; m < M; m++) acc[r][m] = _mm512_setzero_ps();
    for (int64_t k = 0; k < columns; k += 32) {
        __m512i v[NR];
        for (int r = 0; r < NR; r++) v[r] = _mm512_loadu_si512(w + r * w_stride + k);
        for (int m = 0; m < M; m++) {
            __m512i a = _mm512_loadu_si512(x + m * x_stride + k);
            for (int r = 0; r < NR; r++) acc[r][m] = dot(acc[r][m], v[r], a);
        }
    }
    for (int m = 0; m < M; m++) {
        float total[NR];
        _mm_storeu_ps(total, sums4(acc[0][m], acc[1][m], acc[2][m], acc[3][m]));
        for (int64_t r = 0; r < std::min<int64_t>(NR, rows); r++) out.write(m0 + m, n0 + r, total[r]);
    }
}

// `x` has rows of x_stride, readable up to whole vectors; what is behind `columns` is zero there or in the weight.
void many_rows_dot(const Weight& w, const uint16_t* x, int64_t x_rows, int64_t x_stride, const Output& out,
                   int64_t tile, int threads) {
    const int64_t stride = (w.columns + 31) / 32 * 32;
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        uint16_t* tile_data = scratch.get<uint16_t>(tile * stride);
        std::memset(tile_data, 0, tile * stride * 2);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < w.rows; first += tile) {
            const int64_t last = std::min(first + tile, w.rows);
            dequantize_rows<BF16>(w, first, last, tile_data, stride);
            for (int64_t m = 0; m < x_rows; m += MR)
                for (int64_t n = first; n < last; n += NR) {
                    const uint16_t *a = tile_data + (n - first) * stride, *b = x + m * x_stride;
                    auto run = [&](auto count) {
                        block_dot<decltype(count)::value>(a, b, stride, stride, x_stride, m, n, last - n, out);
                    };
                    switch (std::min<int64_t>(MR, x_rows - m)) {
                        case 1: run(std::integral_constant<int, 1>()); break;
                        case 2: run(std::integral_constant<int, 2>()); break;
                        case 3: run(std::integral_constant<int, 3>()); break;
                        case 4: run(std::integral_constant<int, 4>()); break;
                        case 5: run(std::integral_constant<int, 5>()); break;
                        default: run(std::integral_constant<int, 6>());
                    }
                }
        }
    }
}

}  // namespace
#endif

extern "C" int many_rows(WEIGHT_ARGUMENTS, const void* x, int64_t x_rows, int64_t x_stride, int kind, void* y,
                         const void* bias, int bias_kind, int threads, int64_t tile) {
#ifdef HAS_BF16_DOT
    const Weight w = WEIGHT;
    const Output out = {y, bias, rows, kind, bias_kind};
    if (kind == BF16) {
        if (columns % 32 == 0) {many_rows_dot(w, (const uint16_t*)x, x_rows, x_stride, out, tile, threads);
        return 1;}
    }
#endif
    return 0;
}

// A few rows of bfloat16 x with the bfloat16 dot instruction of AVX512.
//
// A code below 128 becomes a bfloat16 by putting 0x43 in front of it: that is 128 + code, exactly. So unpacking to
// bfloat16 is one byte interleave, and the sums of (128 + code) * x are put right once a group, together with the zero
// point, by the sum of x over the group. Codes of eight bits go as two halves: 2048 + 16 * high and 128 + low.

#ifdef HAS_BF16_DOT
namespace {

constexpr float MAGIC = BITS == 8 ? 2048 + 128 : 128;

INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, bits_of<__m512bh>(a), bits_of<__m512bh>(b));
}

// Four vectors to their four sums.
INLINE __m128 sums4(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd(bits_of<__m512d>(ab), bits_of<__m512d>(cd));
    __m512d high = _mm512_unpackhi_pd(bits_of<__m512d>(ab), bits_of<__m512d>(cd));
    __m512 all = _mm512_add_ps(bits_of<__m512>(low), bits_of<__m512>(high));
    __m256d upper = _mm512_extractf64x4_pd(bits_of<__m512d>(all), 1);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), bits_of<__m256>(upper));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// x in the order that the interleave gives, padded with zeros to whole units, and its sums over each group.
struct Dotted {
    const uint16_t* x;
    const float* sums;
    int64_t stride, groups;  // groups rounded up to sixteen

    INLINE __m512i at(int64_t m, int64_t unit, int half) const {
        return _mm512_load_si512(x + m * stride + unit * UNIT + half * 32);
    }
};

template <int R, int M, bool LAST>
INLINE void add_unit(__m512 (&sums)[R][M], const Row* row, int64_t unit, int64_t columns, const Dotted& x, int64_t m0) {
    const __m512i front = _mm512_set1_epi8(0x43), high_front = _mm512_set1_epi8(0x45);
    __m512i x0[M], x1[M];
    for (int m = 0; m < M; m++) x0[m] = x.at(m0 + m, unit, 0), x1[m] = x.at(m0 + m, unit, 1);
    for (int r = 0; r < R; r++) {
        __m512i codes = codes64<LAST>(row[r], unit, columns);
        row[r].prefetch(unit * 4);
        if (BITS == 8) {
            const __m512i nibble = _mm512_set1_epi8(15);
            __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
            __m512i w0 = _mm512_unpacklo_epi8(high, high_front), w1 = _mm512_unpackhi_epi8(high, high_front);
            for (int m = 0; m < M; m++) sums[r][m] = dot(dot(sums[r][m], w0, x0[m]), w1, x1[m]);
            codes = _mm512_and_si512(codes, nibble);
        }
        __m512i w0 = _mm512_unpacklo_epi8(codes, front), w1 = _mm512_unpackhi_epi8(codes, front);
        for (int m = 0; m < M; m++) sums[r][m] = dot(dot(sums[r][m], w0, x0[m]), w1, x1[m]);
    }
}

// R rows of the weight times M rows of x. LANEWISE: groups that are no multiple of 64, `scale` has one a block of 16.
template <int R, int M, bool LANEWISE>
void few_rows_dot(const Weight& w, int64_t n, const Dotted& x, int64_t m0, const float* scale,
                         const float* shift, int64_t stride, const Output& out) {
    Row row[R];
    for (int r = 0; r < R; r++) row[r] = w.row(n + r);
    __m512 total[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) total[r][m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < x.groups; g += LANES)
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++)
                total[r][m] = _mm512_fnmadd_ps(_mm512_load_ps(shift + r * stride + g),
                                               _mm512_load_ps(x.sums + (m0 + m) * x.groups + g), total[r][m]);
    const int64_t units = whole(w.columns, UNIT) / UNIT, full = w.columns / UNIT;
    const int64_t per_group = LANEWISE ? 1 : w.group >= w.columns ? units : w.group / UNIT;
    for (int64_t g = 0, first = 0; first < units; g++, first += per_group) {
        __m512 sums[R][M];
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) sums[r][m] = _mm512_setzero_ps();
        const int64_t last = std::min(first + per_group, full);
        for (int64_t u = first; u < last; u++) add_unit<R, M, false>(sums, row, u, w.columns, x, m0);
        if (last < first + per_group) add_unit<R, M, true>(sums, row, full, w.columns, x, m0);
        for (int r = 0; r < R; r++) {
            __m512 s;
            if (LANEWISE) {
                const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
                s = _mm512_castps128_ps512(_mm_load_ps(scale + r * stride + g * 4));
                s = _mm512_permutexvar_ps(spread, s);
            } else {
                s = _mm512_set1_ps(scale[r * stride + g]);
            }
            for (int m = 0; m < M; m++) total[r][m] = _mm512_fmadd_ps(sums[r][m], s, total[r][m]);
        }
    }
    for (int m = 0; m < M; m++) {
        __m512 each[4];
        for (int r = 0; r < 4; r++) each[r] = r < R ? total[r < R ? r : 0][m] : _mm512_setzero_ps();
        out.write(m0 + m, n, R, bits_of<f32x16>(_mm512_zextps128_ps512(sums4(each[0], each[1], each[2], each[3]))));
    }
}

template <int R, bool LANEWISE>
INLINE void few_rows_dot(const Weight& w, int64_t n, const Dotted& x, int64_t rows, const float* scale,
                         const float* shift, int64_t stride, const Output& out) {
    int64_t m = 0;
    auto in_halves = [&](auto count) {  // more sums do not fit into registers
        constexpr int M = decltype(count)::value, H = R / 2;
        few_rows_dot<H, M, LANEWISE>(w, n, x, m, scale, shift, stride, out);
        few_rows_dot<H, M, LANEWISE>(w, n + H, x, m, scale + H * stride, shift + H * stride, stride, out);
    };
    for (; m + 4 <= rows; m += 4) in_halves(Count<4>());
    if (rows - m == 3) return in_halves(Count<3>());
    if (rows - m == 2) return few_rows_dot<R, 2, LANEWISE>(w, n, x, m, scale, shift, stride, out);
    if (rows - m) few_rows_dot<R, 1, LANEWISE>(w, n, x, m, scale, shift, stride, out);
}

template <bool LANEWISE>
void few_rows_dot(const Weight& w, const Dotted& x, int64_t rows, const Output& out, int threads) {
    constexpr int R = 4;
    const int64_t groups = w.groups(), units = whole(w.columns, UNIT) / UNIT;
    const int64_t stride = whole(std::max(groups, LANEWISE ? units * 4 : 0));
    const int64_t step = std::max<int64_t>(1, std::min<int64_t>(16, w.rows / (4 * R * threads))) * R;
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        float* scale = scratch.get<float>(2 * R * stride);
        float* shift = scale + R * stride;
        std::fill(scale, scale + 2 * R * stride, 0.0f);
        // shift = scale * (zero + MAGIC), and the scales spread over their blocks where they need to be.
        auto prepare = [&](int64_t n, int r) {
            float *s = scale + r * stride, *z = shift + r * stride;
            w.sides(s, z, n);
            for (int64_t g = 0; g < groups; g += LANES)
                store(z + g, (load<f32x16>(z + g) + MAGIC) * load<f32x16>(s + g));
            if (LANEWISE)
                for (int64_t g = groups - 1, per_group = w.group / LANES; g >= 0; g--)
                    std::fill(s + g * per_group, s + (g + 1) * per_group, s[g]);
        };
        const bool varies = w.scale_stride || w.zero_stride;
        if (!varies)
            for (int r = 0; r < R; r++) prepare(0, r);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < w.rows; first += step) {
            const int64_t last = std::min(first + step, w.rows);
            int64_t n = first;
            for (; n + R <= last; n += R) {
                for (int r = 0; r < R && varies; r++) prepare(n + r, r);
                few_rows_dot<R, LANEWISE>(w, n, x, rows, scale, shift, stride, out);
            }
            for (; n < last; n++) {
                if (varies) prepare(n, 0);
                for (int64_t m = 0; m < rows; m++)
                    few_rows_dot<1, 1, LANEWISE>(w, n, x, m, scale, shift, stride, out);
            }
        }
    }
}

void few_rows_dot(const Weight& w, const void* x, int64_t rows, int64_t x_stride, const Output& out, int threads) {
    static thread_local Scratch x_scratch, sum_scratch;
    const int64_t units = whole(w.columns, UNIT) / UNIT, stride = units * UNIT;
    const int64_t groups = whole(w.groups());
    uint16_t* to = x_scratch.get<uint16_t>(rows * stride);
    float* sums = sum_scratch.get<float>(rows * groups);
    std::fill(sums, sums + rows * groups, 0.0f);
    for (int64_t m = 0; m < rows; m++) {
        const uint16_t* from = (const uint16_t*)x + m * x_stride;
        for (int64_t u = 0; u < units; u++) {
            const uint64_t mask = _bzhi_u64(~0ull, std::min(UNIT, w.columns - u * UNIT));
            __m512i a = _mm512_maskz_loadu_epi16(mask, from + u * UNIT);
            __m512i b = _mm512_maskz_loadu_epi16(mask >> 32, from + u * UNIT + 32);
            const __m512i low = _mm512_set_epi64(13, 12, 9, 8, 5, 4, 1, 0);
            const __m512i high = _mm512_set_epi64(15, 14, 11, 10, 7, 6, 3, 2);
            _mm512_store_si512(to + m * stride + u * UNIT, _mm512_permutex2var_epi64(a, low, b));
            _mm512_store_si512(to + m * stride + u * UNIT + 32, _mm512_permutex2var_epi64(a, high, b));
        }
        for (int64_t g = 0; g < w.groups(); g++) {
            f32x16 total{};
            int64_t k = g * w.group, end = k + w.group;
            for (; k + LANES <= end; k += LANES) total = total + load16(from, k, BF16);
            if (k < end) total = total + load_some(from, k, end - k, BF16);
            sums[m * groups + g] = sum(total);
        }
    }
    const Dotted dotted = {to, sums, stride, groups};
    const bool lanewise = w.group % UNIT && w.group < w.columns;
    (lanewise ? few_rows_dot<true> : few_rows_dot<false>)(w, dotted, rows, out, threads);
}

}  // namespace
#endif

// A few rows of bfloat16 x with the bfloat16 dot instruction of AVX512.
//
// A code below 128 becomes a bfloat16 by putting 0x43 in front of it: that is 128 + code, exactly. So unpacking to
// bfloat16 is one byte interleave, and the sums of (128 + code) * x are put right once a group, together with the zero
// point, by the sum of x over the group. Codes of eight bits go as two halves: 2048 + 16 * high and 128 + low.

#ifdef HAS_BF16_DOT
namespace {

#ifndef SCHED
#define SCHED schedule(dynamic)
#endif
#ifndef PF
#define PF 8192
#endif
constexpr int64_t UNIT = 64;  // codes in one vector of bytes
constexpr float MAGIC = BITS == 8 ? 2048 + 128 : 128;

// Codes 64 * unit … 64 * unit + 63, one a byte; of the last unit of a row only what is there is read.
template <bool LAST> INLINE __m512i codes64(const Row& row, int64_t unit, int64_t columns) {
    __m512i codes = _mm512_setzero_si512();
    for (int p = 0; p < PLANES; p++) {
        const int width = width_of(p), low = low_of(p);
        const uint8_t* at = row.plane[p] + unit * 8 * width / 16 * 16;
        const int64_t left = row.plane[p] + plane_bytes(p, columns) - at;
        __m512i v;
        if (width == 8) return LAST ? _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, left), at) : _mm512_loadu_si512(at);
        if (width == 4) {
            __m256i half = LAST ? _mm256_maskz_loadu_epi8(_bzhi_u32(~0u, left), at) : load<__m256i>(at);
            v = _mm512_castsi256_si512(half);
            v = _mm512_shuffle_i64x2(v, v, 0x50);
        } else {
            v = _mm512_broadcast_i32x4(load<__m128i>(at));
        }
        // Lane i holds block i of the unit: its bits are turned to where they belong in the code.
        const int phase = width == 1 ? 4 * (unit & 1) : 0, fields = 8 / width;
        auto turn = [&](int lane) { return ((phase + lane) % fields * width - low) & 31; };
        const __m512i turns = _mm512_inserti32x4(
            _mm512_inserti32x4(_mm512_inserti32x4(_mm512_set1_epi32(turn(0)), _mm_set1_epi32(turn(1)), 1),
                               _mm_set1_epi32(turn(2)), 2), _mm_set1_epi32(turn(3)), 3);
        const __m512i mask = _mm512_set1_epi8(((1 << width) - 1) << low);
        v = _mm512_and_si512(_mm512_rorv_epi32(v, turns), mask);
        codes = p ? _mm512_or_si512(codes, v) : v;
    }
    return codes;
}

INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, bits_of<__m512bh>(a), bits_of<__m512bh>(b));
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
        __builtin_prefetch(row[r].plane[0] + unit * 8 * BITS + PF, 0, 3);
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
INLINE void few_rows_dot(const Weight& w, int64_t n, const Dotted& x, int64_t m0, const float* scale,
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
    const int64_t units = (w.columns + UNIT - 1) / UNIT, whole = w.columns / UNIT;
    const int64_t per_group = LANEWISE ? 1 : w.group >= w.columns ? units : w.group / UNIT;
    for (int64_t g = 0, first = 0; first < units; g++, first += per_group) {
        __m512 sums[R][M];
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) sums[r][m] = _mm512_setzero_ps();
        const int64_t last = std::min(first + per_group, whole);
        for (int64_t u = first; u < last; u++) add_unit<R, M, false>(sums, row, u, w.columns, x, m0);
        if (last < first + per_group) add_unit<R, M, true>(sums, row, whole, w.columns, x, m0);
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
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) out.write(m0 + m, n + r, _mm512_reduce_add_ps(total[r][m]));
}

template <int R, bool LANEWISE>
INLINE void few_rows_dot(const Weight& w, int64_t n, const Dotted& x, int64_t rows, const float* scale,
                         const float* shift, int64_t stride, const Output& out) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) {
        few_rows_dot<R / 2, 4, LANEWISE>(w, n, x, m, scale, shift, stride, out);
        few_rows_dot<R / 2, 4, LANEWISE>(w, n + R / 2, x, m, scale + R / 2 * stride, shift + R / 2 * stride, stride, out);
    }
    if (rows - m >= 2) few_rows_dot<R, 2, LANEWISE>(w, n, x, m, scale, shift, stride, out), m += 2;
    if (rows - m) few_rows_dot<R, 1, LANEWISE>(w, n, x, m, scale, shift, stride, out);
}

template <bool LANEWISE>
void few_rows_dot(const Weight& w, const Dotted& x, int64_t rows, const Output& out, int threads) {
#ifndef RR
#define RR 4
#endif
    constexpr int R = RR;
    const int64_t groups = w.groups(), units = (w.columns + UNIT - 1) / UNIT;
    const int64_t stride = (std::max(groups, LANEWISE ? units * 4 : 0) + LANES - 1) / LANES * LANES;
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
            w.scales(s, n);
            w.zeros(z, n);
            for (int64_t g = 0; g < groups; g += LANES)
                store(z + g, (load<f32x16>(z + g) + MAGIC) * load<f32x16>(s + g));
            if (LANEWISE)
                for (int64_t g = groups - 1, per_group = w.group / LANES; g >= 0; g--)
                    std::fill(s + g * per_group, s + (g + 1) * per_group, s[g]);
        };
        const bool varies = w.scale_stride || w.zero_stride;
        if (!varies)
            for (int r = 0; r < R; r++) prepare(0, r);
#pragma omp for SCHED
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
    const int64_t units = (w.columns + UNIT - 1) / UNIT, stride = units * UNIT;
    const int64_t groups = (w.groups() + LANES - 1) / LANES * LANES;
    uint16_t* to = x_scratch.get<uint16_t>(rows * stride);
    float* sums = sum_scratch.get<float>(rows * groups);
    std::fill(sums, sums + rows * groups, 0.0f);
    for (int64_t m = 0; m < rows; m++) {
        const uint16_t* from = (const uint16_t*)x + m * x_stride;
        for (int64_t u = 0; u < units; u++) {
            alignas(64) uint16_t part[UNIT] = {};
            std::memcpy(part, from + u * UNIT, std::min(UNIT, w.columns - u * UNIT) * 2);
            __m512i a = _mm512_load_si512(part), b = _mm512_load_si512(part + 32);
            const __m512i low = _mm512_set_epi64(13, 12, 9, 8, 5, 4, 1, 0);
            const __m512i high = _mm512_set_epi64(15, 14, 11, 10, 7, 6, 3, 2);
            _mm512_store_si512(to + m * stride + u * UNIT, _mm512_permutex2var_epi64(a, low, b));
            _mm512_store_si512(to + m * stride + u * UNIT + 32, _mm512_permutex2var_epi64(a, high, b));
        }
        for (int64_t g = 0; g < w.groups(); g++) {
            f32x16 total{};
            float last[16] = {};
            int64_t k = g * w.group, end = k + w.group;
            for (; k + LANES <= end; k += LANES) total += load16(from, k, BF16);
            if (k < end) to_floats(last, from + k, end - k, BF16);
            sums[m * groups + g] = sum(total + load<f32x16>(last));
        }
    }
    const Dotted dotted = {to, sums, stride, groups};
    const bool lanewise = w.group % UNIT && w.group < w.columns;
    (lanewise ? few_rows_dot<true> : few_rows_dot<false>)(w, dotted, rows, out, threads);
}

}  // namespace
#endif

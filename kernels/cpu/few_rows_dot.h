// A few rows of bfloat16 x with the bfloat16 dot instruction of AVX512.
//
// A code below 128 becomes a bfloat16 by putting 0x43 in front of it: that is 128 + code, exactly. So 64 bytes of codes
// become bfloat16 numbers with a mask and two interleaves for each 64 of them, where they lie, and x is brought into
// their order instead. The sums of (128 + code) * x are put right once a group, together with the zero point, by the sum of x
// over the group. Codes of eight bits go as two halves: 2048 + 16 * high and 128 + low.

#ifdef HAS_BF16_DOT
namespace {

constexpr float MAGIC = BITS == 8 ? 2048 + 128 : 128;
constexpr int FIELDS = 8 / width_of(0);              // blocks of sixteen codes in sixteen bytes of the first plane
constexpr int64_t STEP = 4 * LANES * FIELDS;         // codes in a vector of that plane
constexpr int X_VECTORS = 2 * FIELDS;                // vectors of x for them: of each block the first and the last eight
constexpr int W_VECTORS = BITS == 8 ? 4 : X_VECTORS;
constexpr int64_t STEP_BYTES = STEP * BITS / 8;
// The hardware reads ahead too timidly. Into the second cache: there are too few places to wait for the first one. ms of
// one thread and one row of x, u4/g64 16384 × 2048, Zen 4: 2.2 without, 1.8 into the first cache, 1.0 so.
constexpr int64_t AHEAD = 8192;

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

// x in the order of the codes, padded with zeros to whole steps, and its sums over each group.
struct Dotted {
    const uint16_t* x;
    const float* sums;
    int64_t stride, groups;  // groups rounded up to sixteen

    INLINE __m512i at(int64_t m, int64_t step, int i) const {
        return _mm512_load_si512(x + m * stride + step * STEP + i * 32);
    }
};

// Sixteen bytes of the first plane are a lane; of another plane, each lane gets the bytes that hold its codes' bits,
// turned so that they begin at bit 0.
template <bool LAST> INLINE __m512i lanes_of(int p, const Row& row, int64_t step, int64_t columns) {
    const int64_t size = 64 * width_of(p) / width_of(0), at = step * size;
    const int64_t left = LAST ? plane_bytes(p, columns) - at : size;
    const uint8_t* from = row.plane[p] + at;
    if (size == 64) return LAST ? _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, left), from) : _mm512_loadu_si512(from);
    auto turn = [&](int lane) { return lane * FIELDS % (8 / width_of(p)) * width_of(p); };
    const __m512i turns = _mm512_set_epi32(turn(3), turn(3), turn(3), turn(3), turn(2), turn(2), turn(2), turn(2),
                                           turn(1), turn(1), turn(1), turn(1), turn(0), turn(0), turn(0), turn(0));
    __m512i v;
    if (size == 32) {
        v = _mm512_castsi256_si512(LAST ? _mm256_maskz_loadu_epi8(_bzhi_u32(~0u, left), from) : load<__m256i>(from));
        v = _mm512_shuffle_i64x2(v, v, 0x50);
    } else {
        v = _mm512_broadcast_i32x4(load<__m128i>(from));
    }
    return _mm512_srlv_epi32(v, turns);
}

// One step of one row of the weight, as bfloat16: of each block of its lanes the first eight codes, and the others.
template <bool LAST>
INLINE void unpack_step(__m512i (&w)[W_VECTORS], const Row& row, int64_t step, int64_t columns) {
    __m512i v[PLANES];
    for (int p = 0; p < PLANES; p++) v[p] = lanes_of<LAST>(p, row, step, columns);
    // Nothing shifts bytes: words are shifted, and what crosses over is masked.
    auto bits = [](__m512i plane, int shift, int mask) __attribute__((always_inline)) {
        const __m512i moved = shift > 0   ? _mm512_srli_epi16(plane, shift)
                              : shift < 0 ? _mm512_slli_epi16(plane, -shift)
                                          : plane;
        return _mm512_and_si512(moved, _mm512_set1_epi8(mask));
    };
    auto write = [&](int i, __m512i codes, int front) __attribute__((always_inline)) {
        w[i] = _mm512_unpacklo_epi8(codes, _mm512_set1_epi8(front));
        w[i + 1] = _mm512_unpackhi_epi8(codes, _mm512_set1_epi8(front));
    };
    if (BITS == 8) {
        write(0, bits(v[0], 0, 15), 0x43);
        write(W_VECTORS - 2, bits(v[0], 4, 15), 0x45);
        return;
    }
#pragma GCC unroll 8
    for (int field = 0; field < FIELDS; field++) {
        __m512i codes = _mm512_setzero_si512();
        for (int p = 0; p < PLANES; p++) {
            const int width = width_of(p), low = low_of(p);
            const __m512i part = bits(v[p], field * width - low, ((1 << width) - 1) << low);
            codes = p ? _mm512_or_si512(codes, part) : part;
        }
        write(2 * field, codes, 0x43);
    }
}

// Which scales a step needs: lane by lane, SPLIT of them for the codes of a lane; one after the other in memory.
struct Scales {
    int64_t stride, per_step, steps_of_one;  // per_step scales to a step, or one scale for several steps
    __m512i place[4];

    INLINE __m512 of(const float* row, int64_t step, int part) const {
        const float* from = row + (steps_of_one ? step / steps_of_one : step * per_step);
        return _mm512_permutexvar_ps(place[part], _mm512_loadu_ps(from));
    }
};

template <int R, int M, int SPLIT, bool LAST>
INLINE void add_step(__m512 (&total)[R][M], const Row* row, int64_t step, int64_t columns, const Dotted& x, int64_t m0,
                     const Scales& scales, const float* scale_rows) {
    // Two at a time: reading 64 bytes of x takes longer than multiplying them.
    constexpr int PAIR = R == 1 ? 1 : 2;
    for (int r = 0; r < R; r += PAIR) {
        __m512i w[PAIR][W_VECTORS];
        for (int i = 0; i < PAIR; i++) {
            unpack_step<LAST>(w[i], row[r + i], step, columns);
            for (int64_t line = 0; line < STEP_BYTES; line += 64)
                __builtin_prefetch(row[r + i].plane[0] + step * STEP_BYTES + line + AHEAD, 0, 2);
        }
        for (int part = 0; part < SPLIT; part++) {
            __m512 scale[PAIR];
            for (int i = 0; i < PAIR; i++) scale[i] = scales.of(scale_rows + (r + i) * scales.stride, step, part);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                __m512 sum[PAIR];
                for (int i = 0; i < PAIR; i++) sum[i] = _mm512_setzero_ps();
#pragma GCC unroll 16
                for (int v = part * W_VECTORS / SPLIT; v < (part + 1) * W_VECTORS / SPLIT; v++) {
                    const __m512i mine = x.at(m0 + m, step, v % X_VECTORS);
                    for (int i = 0; i < PAIR; i++) sum[i] = dot(sum[i], w[i][v], mine);
                }
                for (int i = 0; i < PAIR; i++) total[r + i][m] = _mm512_fmadd_ps(sum[i], scale[i], total[r + i][m]);
            }
        }
    }
}

// R rows of the weight times M rows of x.
template <int R, int M, int SPLIT>
void few_rows_dot(const Weight& w, int64_t n, const Dotted& x, int64_t m0, const Scales& scales, const float* scale,
                  const Output& out) {
    const float* shift = scale + 4 * scales.stride;
    Row row[R];
    for (int r = 0; r < R; r++) row[r] = w.row(n + r);
    __m512 total[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) total[r][m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < x.groups; g += LANES)
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++)
                total[r][m] = _mm512_fnmadd_ps(_mm512_load_ps(shift + r * scales.stride + g),
                                               _mm512_load_ps(x.sums + (m0 + m) * x.groups + g), total[r][m]);
    const int64_t full = w.columns / STEP;
    for (int64_t s = 0; s < full; s++) add_step<R, M, SPLIT, false>(total, row, s, w.columns, x, m0, scales, scale);
    if (full * STEP < w.columns) add_step<R, M, SPLIT, true>(total, row, full, w.columns, x, m0, scales, scale);
    for (int m = 0; m < M; m++) {
        __m512 each[4];
        for (int r = 0; r < 4; r++) each[r] = r < R ? total[r < R ? r : 0][m] : _mm512_setzero_ps();
        out.write(m0 + m, n, R, bits_of<f32x16>(_mm512_zextps128_ps512(sums4(each[0], each[1], each[2], each[3]))));
    }
}

// Four rows of the weight times all rows of x, as many at a time as there are registers for sums.
template <int SPLIT>
INLINE void four_rows_dot(const Weight& w, int64_t n, const Dotted& x, int64_t rows, const Scales& scales,
                          const float* scale, const Output& out) {
    const int64_t parts = (rows + 7) / 8;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t m = rows * part / parts, count = rows * (part + 1) / parts - m;
        auto run = [&](auto height, auto most) __attribute__((always_inline)) {
            constexpr int R = decltype(height)::value, M = decltype(most)::value;
            for (int r = 0; r < 4; r += R)
                few_rows_dot<R, M, SPLIT>(w, n + r, x, m, scales, scale + r * scales.stride, out);
        };
        switch (count) {
            case 1: run(Count<4>(), Count<1>()); break;
            case 2: run(Count<4>(), Count<2>()); break;
            case 3: run(Count<4>(), Count<3>()); break;
            case 4: run(Count<4>(), Count<4>()); break;
            case 5: run(Count<2>(), Count<5>()); break;
            case 6: run(Count<2>(), Count<6>()); break;
            case 7: run(Count<2>(), Count<7>()); break;
            default: run(Count<2>(), Count<8>());
        }
    }
}

template <int SPLIT>
void few_rows_dot(const Weight& w, const Dotted& x, int64_t rows, const Output& out, int threads) {
    constexpr int R = 4;
    const int64_t groups = w.groups(), stride = whole(groups) + LANES;  // a vector behind the last is read
    const int64_t step = std::max<int64_t>(1, std::min<int64_t>(16, w.rows / (4 * R * threads))) * R;
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        // Those of four rows and, ahead of their time, of the next four: what was just stored is slow to read elsewhere.
        float* const sides = scratch.get<float>(4 * R * stride);
        std::fill(sides, sides + 4 * R * stride, 0.0f);
        Scales scales = {stride, std::max<int64_t>(STEP / w.group, 1), 0, {}};
        if (w.group > STEP) scales.steps_of_one = w.group >= w.columns ? 1ll << 62 : w.group / STEP;
        for (int part = 0; part < SPLIT; part++) {
            int32_t place[16];
            for (int i = 0; i < 16; i++)
                place[i] = w.group > STEP ? 0 : (i / 4 * STEP / 4 + part * STEP / 4 / SPLIT) / w.group;
            scales.place[part] = _mm512_loadu_si512(place);
        }
        const bool varies = w.scale_stride || w.zero_stride;
        auto side = [&](int64_t n) { return sides + (varies ? n / R % 2 * 2 * R * stride : 0); };
        // shift = scale * (zero + MAGIC), behind the scales
        auto prepare = [&](int64_t n, int64_t count) {
            for (int64_t r = 0; r < count; r++) {
                float *s = side(n) + r * stride, *z = s + R * stride;
                w.each_sides(n + r, [&](int64_t g, f32x16 scale, f32x16 zero) __attribute__((always_inline)) {
                    store(s + g, scale);
                    store(z + g, (zero + MAGIC) * scale);
                });
                w.prefetch_sides(n + r + 4 * R);
            }
        };
        if (!varies) prepare(0, std::min<int64_t>(R, w.rows));
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < w.rows; first += step) {
            const int64_t last = std::min(first + step, w.rows);
            if (varies) prepare(first, std::min<int64_t>(R, last - first));
            for (int64_t n = first; n < last; n += R) {
                if (varies && n + R < last) prepare(n + R, std::min<int64_t>(R, last - n - R));
                const float* scale = side(n);
                if (n + R <= last) {
                    four_rows_dot<SPLIT>(w, n, x, rows, scales, scale, out);
                    continue;
                }
                for (int64_t r = 0; n + r < last; r++, scale += stride)
                    for (int64_t m = 0; m < rows; m++) few_rows_dot<1, 1, SPLIT>(w, n + r, x, m, scales, scale, out);
            }
        }
    }
}

// Into how many groups the codes of a lane fall; 0 where groups and lanes do not fit.
INLINE int64_t groups_of_lane(int64_t columns, int64_t group) {
    constexpr int64_t LANE = STEP / 4;
    if (group >= columns || group % STEP == 0) return 1;
    if (STEP % group) return 0;
    return group >= LANE ? 1 : LANE / group <= 4 ? LANE / group : 0;
}

void few_rows_dot(const Weight& w, const void* x, int64_t rows, int64_t x_stride, const Output& out, int threads) {
    static thread_local Scratch x_scratch, sum_scratch;
    const int64_t stride = whole(w.columns, STEP) + 32, groups = whole(w.groups());
    uint16_t* to = x_scratch.get<uint16_t>(rows * stride);
    float* sums = sum_scratch.get<float>(rows * groups);
    std::fill(sums, sums + rows * groups, 0.0f);
    for (int64_t m = 0; m < rows; m++) {
        const uint16_t* from = (const uint16_t*)x + m * x_stride;
        for (int64_t k = 0; k < whole(w.columns, STEP); k += LANES) {
            const __mmask16 there = _bzhi_u32(0xffff, std::max<int64_t>(0, std::min(LANES, w.columns - k)));
            const __m256i v = _mm256_maskz_loadu_epi16(there, from + k);
            const int64_t lane = k % STEP / (LANES * FIELDS), field = k / LANES % FIELDS;
            uint16_t* at = to + m * stride + k / STEP * STEP + field * 64 + lane * 8;
            _mm_store_si128((__m128i*)at, _mm256_castsi256_si128(v));
            _mm_store_si128((__m128i*)(at + 32), _mm256_extracti128_si256(v, 1));
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
    switch (groups_of_lane(w.columns, w.group)) {
        case 1: return few_rows_dot<1>(w, dotted, rows, out, threads);
        case 2: return few_rows_dot<FIELDS >= 2 ? 2 : 1>(w, dotted, rows, out, threads);
        default: return few_rows_dot<FIELDS >= 4 ? 4 : 1>(w, dotted, rows, out, threads);
    }
}

}  // namespace
#endif

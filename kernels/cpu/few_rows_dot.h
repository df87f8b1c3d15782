// A few rows of x of 16 bits, as fixed point (fixed_rows.h), by the instruction of AVX512 that multiplies bytes.
//
// Both bytes of x are multiplied by the codes as they lie in 64 bytes of memory, after a mask or a shift, and summed up
// exactly; x is brought into their order instead. What the zero points take off is the sum of x over a group.

#ifdef HAS_VNNI
namespace {

// The hardware reads ahead too timidly. Into the second cache: there are too few places to wait for the first one. ms of
// one thread and one row of x, u4/g64 16384 × 2048, Zen 4: 2.2 without, 1.8 into the first cache, 1.0 so. At least
// four rows ahead, since as many are read side by side: 2048 × 8192, two threads, Zen 5: 286 µs, 244 so. In the order in
// which they lie, not in that in which they are read: 8192 × 2048, two threads, Zen 5: 218 to 233 µs, 194 to 217 so.
constexpr int64_t AHEAD = 8192;

// Where a step of some rows of x and of the weight lies: of each the first row, and how far the next one is. gcc would
// compute all of it anew from more numbers than there are registers for.
struct At {
    const int8_t* x;
    const float *x_scale, *scale;
    const uint8_t *plane[PLANES], *later;
    int64_t steps, stride, scale_stride;

    INLINE __m512i x_of(int64_t m, int plane, int field) const {
        return _mm512_load_si512(x + m * steps * (128 * FIELDS) + (plane * FIELDS + field) * 64);
    }
    INLINE __m512 x_scale_of(int64_t m) const { return _mm512_load_ps(x_scale + m * steps * LANES); }
    INLINE const uint8_t* codes(int p, int64_t r) const { return plane[p] + r * stride; }
    INLINE void prefetch(int64_t r) const {
        for (int64_t line = 0; line < STEP_BYTES; line += 64) __builtin_prefetch(later + r * STEP_BYTES + line, 0, 2);
    }
    template <bool LAST> INLINE void read(__m512i (&v)[PLANES], int64_t r, int64_t columns) const {
        for (int p = 0; p < PLANES; p++) {
            v[p] = lanes_of<LAST>(p, codes(p, r), columns);
            asm("" : "+v"(v[p]));  // else gcc reads it once for each use
        }
    }
    // The scales of a step's parts: no more bytes than they can be, since those of two lines take twice as long.
    template <int SPLIT> INLINE __m512 scales(int64_t r) const {
        const float* from = scale + r * scale_stride;
        if (SPLIT == 1) return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
        if (SPLIT == 2) return _mm512_broadcast_f32x8(_mm256_loadu_ps(from));
        return _mm512_loadu_ps(from);
    }
    INLINE void advance(int64_t rows) {
        x += 128 * FIELDS, x_scale += LANES, later += rows * STEP_BYTES;
        for (int p = 0; p < PLANES; p++) plane[p] += 64 * width_of(p) / width_of(0);
    }
};

// Rows of scales, and behind them shift = scale * zero. A step begins at the scale `first[step]` of a row and needs
// them lane by lane, SPLIT of them for the codes of a lane.
struct Scales {
    const float *scale, *shift;
    int64_t stride;
    const int32_t* first;
    __m512i place[4];
};

// R rows of the weight and one of x: a field at a time, so that all are summed up side by side in registers.
template <int R, int SPLIT, bool LAST>
INLINE void add_step(__m512 (&total)[R][1], const At& at, int64_t columns, const __m512i (&place)[SPLIT]) {
    __m512i v[R][PLANES];
    __m512 sum[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        at.read<LAST>(v[r], r, columns);
        at.prefetch(r);
    }
#pragma GCC unroll 4
    for (int part = 0; part < SPLIT; part++) {
        __m512i high[R], low[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) high[r] = low[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int field = part * FIELDS / SPLIT; field < (part + 1) * FIELDS / SPLIT; field++) {
            __m512i x_high = at.x_of(0, 0, field), x_low = at.x_of(0, 1, field);
            asm("" : "+v"(x_high), "+v"(x_low));
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const __m512i codes = field_by_matrix(v[r], field);
                high[r] = _mm512_dpbusd_epi32(high[r], codes, x_high);
                low[r] = _mm512_dpbusd_epi32(low[r], codes, x_low);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const __m512 scale = _mm512_permutexvar_ps(place[part], at.scales<SPLIT>(r));
            const __m512 all = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]));
            sum[r] = part ? _mm512_fmadd_ps(all, scale, sum[r]) : _mm512_mul_ps(all, scale);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) total[r][0] = _mm512_fmadd_ps(sum[r], at.x_scale_of(0), total[r][0]);
}

// M rows of x.
template <int R, int M, int SPLIT, bool LAST>
INLINE void add_step(__m512 (&total)[R][M], const At& at, int64_t columns, const __m512i (&place)[SPLIT]) {
    // Several at a time, as many as there are registers for: reading 64 bytes of x takes as long as multiplying them.
    constexpr int SIDE = R * FIELDS <= 8 ? R : R > 1 ? 2 : 1;
    for (int r = 0; r < R; r += SIDE) {
        __m512i w[SIDE][FIELDS];
        for (int i = 0; i < SIDE; i++) {
            __m512i v[PLANES];
            at.read<LAST>(v, r + i, columns);
            at.prefetch(r + i);
#pragma GCC unroll 8
            for (int field = 0; field < FIELDS; field++) w[i][field] = field_of(v, field);
        }
        for (int part = 0; part < SPLIT; part++) {
            __m512 scale[SIDE];
            for (int i = 0; i < SIDE; i++) scale[i] = _mm512_permutexvar_ps(place[part], at.scales<SPLIT>(r + i));
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                __m512i sum[SIDE];
                for (int i = 0; i < SIDE; i++) sum[i] = _mm512_setzero_si512();
                auto add = [&](int plane) __attribute__((always_inline)) {
#pragma GCC unroll 8
                    for (int field = part * FIELDS / SPLIT; field < (part + 1) * FIELDS / SPLIT; field++) {
                        __m512i mine = at.x_of(m, plane, field);
                        if (SIDE > 1) asm("" : "+v"(mine));
                        for (int i = 0; i < SIDE; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], w[i][field], mine);
                    }
                };
                add(0);
                for (int i = 0; i < SIDE; i++) sum[i] = _mm512_slli_epi32(sum[i], 8);
                add(1);
                const __m512 mine = at.x_scale_of(m);
                for (int i = 0; i < SIDE; i++)
                    total[r + i][m] =
                        _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]), _mm512_mul_ps(scale[i], mine), total[r + i][m]);
            }
        }
    }
}

// R rows of the weight times M rows of x.
template <int R, int M, int SPLIT>
void few_rows_dot(const Weight& w, int64_t n, const Fixed& x, int64_t m0, const Scales& scales, int64_t r0,
                  const Output& out) {
    __m512 total[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) total[r][m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < x.groups; g += LANES) {
        const __mmask16 there = _bzhi_u32(0xffff, std::min(LANES, w.groups() - g));
        for (int r = 0; r < R; r++) {
            const __m512 shift = _mm512_maskz_loadu_ps(there, scales.shift + (r0 + r) * scales.stride + g);
            for (int m = 0; m < M; m++)
                total[r][m] = _mm512_fnmadd_ps(shift, _mm512_loadu_ps(x.sums + (m0 + m) * x.groups + g), total[r][m]);
        }
    }
    const Row row = w.row(n);
    At at = {x.x + m0 * x.steps * (128 * FIELDS), x.scales + m0 * x.steps * LANES, nullptr, {}, nullptr, x.steps,
             w.data_stride, scales.stride};
    std::copy_n(row.plane, PLANES, at.plane);
    at.later = row.plane[0] + std::max(AHEAD, 4 * w.data_stride);
    __m512i place[SPLIT];
    std::copy_n(scales.place, SPLIT, place);
    const float* scale = scales.scale + r0 * scales.stride;
    auto add = [&](int64_t step, auto last) __attribute__((always_inline)) {
        at.scale = scale + scales.first[step];
        if constexpr (M == 1) add_step<R, SPLIT, last()>(total, at, w.columns, place);
        else add_step<R, M, SPLIT, last()>(total, at, w.columns, place);
    };
    const int64_t full = w.columns / STEP;
    for (int64_t s = 0; s < full; s++, at.advance(R)) add(s, std::false_type());
    if (full * STEP < w.columns) add(full, std::true_type());
    for (int m = 0; m < M; m++) {
        __m512 each[4];
        for (int r = 0; r < 4; r++) each[r] = r < R ? total[r < R ? r : 0][m] : _mm512_setzero_ps();
        out.write(m0 + m, n, R, bits_of<f32x16>(_mm512_zextps128_ps512(sums4(each[0], each[1], each[2], each[3]))));
    }
}

// Four rows of the weight times all rows of x, as many at a time as there are registers for sums; only four of them where
// x does not stay in the first cache, or codes are unpacked again at once: then twice as much is done with each part of x
// that is read. 8 rows of 8192 inputs in 4 bits, Zen 5: 1.3 times as fast.
template <int SPLIT>
INLINE void four_rows_dot(const Weight& w, int64_t n, const Fixed& x, int64_t rows, const Scales& scales,
                          int64_t r0, const Output& out) {
    const int64_t most = FIELDS <= 2 || rows * w.columns > 1 << 14 ? 4 : 8, parts = (rows + most - 1) / most;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t m = rows * part / parts, count = rows * (part + 1) / parts - m;
        auto run = [&](auto height, auto most) __attribute__((always_inline)) {
            constexpr int R = decltype(height)::value, M = decltype(most)::value;
            for (int r = 0; r < 4; r += R) few_rows_dot<R, M, SPLIT>(w, n + r, x, m, scales, r0 + r, out);
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
void few_rows_dot(const Weight& w, const Fixed& x, int64_t rows, const Output& out, Shares& shares) {
    constexpr int64_t R = 4, SIDES = 2048;  // so many scales are prepared at once, and still in the cache when read
    const int64_t groups = w.groups(), block = std::max<int64_t>(1, std::min<int64_t>(16, SIDES / groups / R)) * R;
    const bool varies = w.scale_stride || w.zero_stride;
    static thread_local Scratch scratch;
    const int64_t size = (varies ? block : 1) * groups + LANES;  // a vector behind the last is written, and read
    float* scale = scratch.get<float>(2 * size + x.steps);
    float* shift = scale + size;
    int32_t* first_scale = (int32_t*)(shift + size);
    Scales scales = {scale, shift, varies ? groups : 0, first_scale, {}};
    std::fill(scale, shift + size, 0.0f);
    for (int64_t s = 0; s < x.steps; s++) first_scale[s] = w.group >= w.columns ? 0 : s * STEP / w.group;
    for (int part = 0; part < SPLIT; part++) {
        int32_t place[16];
        for (int i = 0; i < 16; i++)
            place[i] = w.group > STEP || groups == 1 ? 0 : (i / 4 * STEP / 4 + part * STEP / 4 / SPLIT) / w.group;
        scales.place[part] = _mm512_loadu_si512(place);
    }
    auto prepare = [&](int64_t n, int64_t count) {
        w.each_sides(n, count, [&](int64_t i, f32x16 s, f32x16 z) __attribute__((always_inline)) {
            store(scale + i, s);
            store(shift + i, z * s);
        });
    };
    if (!varies) prepare(0, 1);
    for (int64_t first, last; shares.take(omp_get_thread_num(), first, last);)
        for (int64_t begin = first; begin < last; begin += block) {
            const int64_t end = std::min(begin + block, last);
            if (varies) {
                prepare(begin, end - begin);
                w.prefetch_sides(end, block);
            }
            for (int64_t n = begin; n < end; n += R) {
                if (n + R <= end) {
                    four_rows_dot<SPLIT>(w, n, x, rows, scales, n - begin, out);
                    continue;
                }
                for (int64_t r = 0; n + r < end; r++)
                    for (int64_t m = 0; m < rows; m++)
                        few_rows_dot<1, 1, SPLIT>(w, n + r, x, m, scales, n + r - begin, out);
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

void few_rows_dot(const Weight& w, const void* x, int64_t rows, int64_t x_stride, const Output& out, Shares& shares) {
    static thread_local Scratch scratch;
    const int64_t steps = whole(w.columns, STEP) / STEP, groups = whole(w.groups());
    float* sums = scratch.get<float>(rows * (groups + steps * (LANES + 32 * FIELDS)));
    float* scales = sums + rows * groups;
    int8_t* to = (int8_t*)(scales + rows * steps * LANES);
    std::fill(sums, sums + rows * groups, 0.0f);
    for (int64_t m = 0; m < rows; m++)
        fix_row(w, (const char*)x + m * x_stride * size_of(out.kind), out.kind, to + m * steps * 128 * FIELDS,
                scales + m * steps * LANES, sums + m * groups);
    const Fixed fixed = {to, scales, sums, steps, groups};
    switch (groups_of_lane(w.columns, w.group)) {
        case 1: return few_rows_dot<1>(w, fixed, rows, out, shares);
        case 2: return few_rows_dot<FIELDS >= 2 ? 2 : 1>(w, fixed, rows, out, shares);
        default: return few_rows_dot<FIELDS >= 4 ? 4 : 1>(w, fixed, rows, out, shares);
    }
}

}  // namespace
#endif

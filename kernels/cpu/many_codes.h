// Many rows of x by the weight's codes: tiles of codes are transposed into the cache, and multiplied by all rows of x. Of
// TILE outputs times a block of rows of x, the inputs that share a scale are summed up in registers; scaled, they are added
// to sums in the cache. What the zero points take off is the sum of x over these inputs.
//
// x is signed codes of eight bits (Bytes), or bfloat16 (Pairs), which holds codes of up to five bits exactly as well.

#ifdef HAS_AVX512
namespace {

// The steps first … last - 1 share a scale, that of `group`, and lie in one panel.
struct Run {
    int32_t first, last, group;
};

template <typename Way> struct Runs {
    std::vector<Run> runs;
    std::vector<int64_t> first_of_panel;

    explicit Runs(const Weight& w) {
        constexpr int64_t PANEL = Way::PANEL_CODES, STEP = Way::STEP_CODES;
        for (int64_t k = 0; k < w.columns;) {
            if (k % PANEL == 0) first_of_panel.push_back(runs.size());
            const int64_t group = k / w.group;
            const int64_t end = std::min({(group + 1) * w.group, (k / PANEL + 1) * PANEL, w.columns});
            runs.push_back({(int32_t)(k / STEP), (int32_t)(whole(end, 4) / STEP), (int32_t)group});
            k = end;
        }
        first_of_panel.push_back(runs.size());
    }
    int64_t panels() const { return first_of_panel.size() - 1; }
};

// Codes from input `first` on, at most a panel of them, of sixteen rows of the weight: vectors of four neighbouring codes
// of each row, as write(codes).
template <typename Write>
INLINE void each_codes(const Weight& w, int64_t n, int64_t first, int64_t most, Write write) {
    Row row[16];
    for (int r = 0; r < 16; r++) row[r] = w.row(std::min(n + r, w.rows - 1));
    for (int64_t k = first; k < std::min(first + most, w.columns); k += UNIT) {
        __m512i v[16];
        for (int r = 0; r < 16; r++) {
            __builtin_prefetch(row[r].plane[0] + k * width_of(0) / 8 + 16 * w.data_stride, 0, 2);
            v[r] = k + UNIT <= w.columns ? codes64<false>(row[r], k / UNIT, w.columns)
                                         : codes64<true>(row[r], k / UNIT, w.columns);
        }
        transpose16(v);
        for (int j = 0; j < 16; j++) write(v[j]);
    }
}

#ifdef HAS_VNNI
// A step is four neighbouring inputs, a word of the codes of each output and each row of x.
struct Bytes {
    using Sum = __m512i;
    static constexpr int64_t STEP_CODES = 4;
    // Inputs of a panel, which products of bytes cannot carry beyond 32 bits.
    static constexpr int64_t PANEL_CODES = 1024;
    const int8_t* x;
    int64_t stride;

    static INLINE Sum zero() { return _mm512_setzero_si512(); }
    // An instruction of ours: gcc would give the registers to the float sums, and take these through memory.
    static INLINE void add(Sum& sum, __m512i w, __m512i x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }
    static INLINE void add_x(Sum& sum, __m512i x) { sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), x); }
    static INLINE __m512 number(Sum sum) { return _mm512_cvtepi32_ps(sum); }

    static INLINE void fill(const Weight& w, int64_t n, int64_t first, uint32_t* to) {
        each_codes(w, n, first, PANEL_CODES, [&](__m512i codes) __attribute__((always_inline)) {
            _mm512_store_si512(to, codes);
            to += TILE;
        });
    }
    void pack(int64_t m, int64_t rows, int64_t columns, uint32_t* to) const {
        for (int64_t k = 0; k < columns; k += UNIT) {
            const uint64_t there = _bzhi_u64(~0ull, std::min(UNIT, columns - k));
            __m512i v[16] = {};
            for (int64_t r = 0; r < rows; r++) v[r] = _mm512_maskz_loadu_epi8(there, x + (m + r) * stride + k);
            transpose16(v);
            for (int j = 0; j < 16; j++, to += rows) _mm512_mask_storeu_epi32(to, (1 << rows) - 1, v[j]);
        }
    }
};
#endif

#ifdef HAS_BF16_DOT
struct SmallNumbers {
    uint16_t bf16[32] = {};
    constexpr SmallNumbers() {
        for (int i = 0; i < 32; i++) bf16[i] = __builtin_bit_cast(uint32_t, (float)i) >> 16;
    }
};
alignas(64) constexpr SmallNumbers SMALL_NUMBERS;

// A step is a pair of inputs in bfloat16: codes 0 and 2, or 1 and 3, of each four, as pack_rows packs them.
struct Pairs {
    using Sum = __m512;
    static constexpr int64_t STEP_CODES = 2, PANEL_CODES = 256;
    const void* x;
    int64_t stride;

    static INLINE Sum zero() { return _mm512_setzero_ps(); }
    static INLINE void add(Sum& sum, __m512i w, __m512i x) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }
    static INLINE void add_x(Sum& sum, __m512i x) { add(sum, _mm512_set1_epi16(0x3f80), x); }
    static INLINE __m512 number(Sum sum) { return sum; }

    // Words of 16 bits as bfloat16.
    static INLINE __m512i numbers_of(__m512i codes) {
        return _mm512_permutexvar_epi16(codes, _mm512_load_si512(&SMALL_NUMBERS));
    }
    static INLINE void fill(const Weight& w, int64_t n, int64_t first, uint32_t* to) {
        each_codes(w, n, first, PANEL_CODES, [&](__m512i codes) __attribute__((always_inline)) {
            _mm512_store_si512(to, numbers_of(_mm512_and_si512(codes, _mm512_set1_epi16(255))));
            _mm512_store_si512(to + TILE, numbers_of(_mm512_srli_epi16(codes, 8)));
            to += 2 * TILE;
        });
    }
    void pack(int64_t m, int64_t rows, int64_t columns, uint32_t* to) const {
        const char* from = (const char*)x + m * stride * size_of(BF16);
        pack_rows<true>(from, stride, BF16, rows, columns, whole(columns, UNIT) / STEP_CODES, to);
    }
};

// More rows are faster where each weight is scaled, and not each sum; and all are where codes become numbers by more than
// one instruction. µs of one thread of Zen 5, u4/g64 2048 × 8192, Pairs | many_rows: 13 rows 1775 | 1992, 16 rows
// 1972 | 2207, 33 rows 3490 | 3721, 64 rows 5890 | 5810.
constexpr int64_t MOST_ROWS_OF_PAIRS = 40;
INLINE bool has_pairs(const Weight& w, int64_t x_rows) {
    return BITS <= 5 && !IS_FLOAT && x_rows <= MOST_ROWS_OF_PAIRS &&
           (w.group >= w.columns || (w.group >= 32 && w.group % 4 == 0));
}
#endif

// Of a block of rows of x, their sums over each run.
template <typename Way>
void sum_runs(const uint32_t* packed, int64_t rows, const std::vector<Run>& runs, float* sums) {
    const __mmask16 all = (1 << rows) - 1;
    for (const Run& run : runs) {
        typename Way::Sum sum = Way::zero();
        for (int64_t s = run.first; s < run.last; s++) Way::add_x(sum, _mm512_maskz_loadu_epi32(all, packed + s * rows));
        _mm512_mask_storeu_ps(sums, all, Way::number(sum));
        sums += rows;
    }
}

// scale and shift have a row of TILE for each group; a number is code * scale - shift.
struct Sides {
    float *scale, *shift;

    // Of sixteen rows of the weight, into columns from `column` on. `room` has 32 rows of scales.
    void fill(const Weight& w, int64_t n, int64_t column, float* room) const {
        const int64_t groups = whole(w.groups());
        for (int r = 0; r < 16; r++) w.sides(room + r * groups, room + (16 + r) * groups, std::min(n + r, w.rows - 1));
        for (int64_t g = 0; g < groups; g += LANES) {
            __m512i scales[16], shifts[16];
            for (int r = 0; r < 16; r++) {
                const __m512 s = _mm512_loadu_ps(room + r * groups + g);
                scales[r] = bits_of<__m512i>(s);
                shifts[r] = bits_of<__m512i>(_mm512_mul_ps(s, _mm512_loadu_ps(room + (16 + r) * groups + g)));
            }
            transpose16(scales), transpose16(shifts);
            for (int64_t j = 0; j < 16; j++) {
                _mm512_store_si512(scale + (g + j) * TILE + column, scales[j]);
                _mm512_store_si512(shift + (g + j) * TILE + column, shifts[j]);
            }
        }
    }
};

template <typename Way, int V, int M>
void multiply_runs(const uint32_t* panel, const uint32_t* x, const Run* run, const Run* behind, const float* x_sums,
                   Sides sides, float* sums) {
    for (; run < behind; run++, x_sums += M) {
        asm("" ::: "memory");  // else gcc gives the registers to the float sums, and takes these through memory
        typename Way::Sum acc[M][V];
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) acc[m][v] = Way::zero();
        for (int64_t s = run->first; s < run->last; s++, x += M, panel += TILE) {
            __m512i w[V];
            for (int v = 0; v < V; v++) w[v] = _mm512_load_si512(panel + v * LANES);
            for (int m = 0; m < M; m++) {
                const __m512i a = _mm512_set1_epi32(x[m]);
                for (int v = 0; v < V; v++) Way::add(acc[m][v], w[v], a);
            }
        }
        for (int v = 0; v < V; v++) {
            const int64_t side = run->group * TILE + v * LANES;
            const __m512 scale = _mm512_load_ps(sides.scale + side), shift = _mm512_load_ps(sides.shift + side);
            for (int m = 0; m < M; m++) {
                float* at = sums + m * TILE + v * LANES;
                const __m512 total = _mm512_fmadd_ps(Way::number(acc[m][v]), scale, _mm512_load_ps(at));
                _mm512_store_ps(at, _mm512_fnmadd_ps(shift, _mm512_set1_ps(x_sums[m]), total));
            }
        }
    }
}

template <typename Way, int V> INLINE auto multiply_runs(int rows) {
    switch (rows) {
        case 1: return multiply_runs<Way, V, 1>;
        case 2: return multiply_runs<Way, V, 2>;
        case 3: return multiply_runs<Way, V, 3>;
        case 4: return multiply_runs<Way, V, 4>;
        case 5: return multiply_runs<Way, V, 5>;
        case 6: return multiply_runs<Way, V, 6>;
        case 7: return multiply_runs<Way, V, 7>;
        case 8: return multiply_runs<Way, V, 8>;
        default: return multiply_runs<Way, V, MOST_ROWS>;
    }
}

// Results are multiplied by what each row of x is in steps of, where there are such.
template <typename Way>
void many_codes(const Weight& w, const Way& x, const float* steps_of_x, int64_t x_rows, const Output& out, int threads) {
    constexpr int64_t PANEL_STEPS = Way::PANEL_CODES / Way::STEP_CODES;
    const Runs<Way> runs(w);
    const int64_t steps = whole(w.columns, UNIT) / Way::STEP_CODES, count_of_runs = runs.runs.size();
    const int64_t groups = whole(w.groups()), tiles = whole(w.rows, TILE) / TILE;
    // Rows of x are parted where there are more threads than tiles, and so that the sums stay in the cache.
    const int64_t parts = std::max((x_rows + 511) / 512, std::min((2 * threads + tiles - 1) / tiles, x_rows / 64));
    const RowBlocks row_blocks = {x_rows};
    const int64_t of_part = (row_blocks.count + parts - 1) / std::max<int64_t>(parts, 1);  // blocks
    Scratch x_scratch;
    uint32_t* packed = x_scratch.get<uint32_t>(x_rows * (steps + count_of_runs));
    float* x_sums = (float*)(packed + x_rows * steps);
#pragma omp parallel for num_threads(threads) if (x_rows * steps > 1 << 16)  // waiting for threads has its price
    for (int64_t i = 0; i < row_blocks.count; i++) {
        const int64_t m = row_blocks.first_of(i), rows = row_blocks.first_of(i + 1) - m;
        x.pack(m, rows, w.columns, packed + m * steps);
        sum_runs<Way>(packed + m * steps, rows, runs.runs, x_sums + m * count_of_runs);
    }
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        const int64_t part = of_part * MOST_ROWS;
        float* sums = scratch.get<float>((part + PANEL_STEPS + 2 * groups) * TILE + 32 * groups);
        uint32_t* panel = (uint32_t*)(sums + part * TILE);
        const Sides sides = {(float*)(panel + PANEL_STEPS * TILE), (float*)(panel + (PANEL_STEPS + groups) * TILE)};
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t first = 0; first < w.rows; first += TILE)
            for (int64_t i0 = 0; i0 < row_blocks.count; i0 += of_part) {
                const int64_t i1 = std::min(i0 + of_part, row_blocks.count), count = std::min(TILE, w.rows - first);
                const int64_t m0 = row_blocks.first_of(i0), m1 = row_blocks.first_of(i1);
                const int vectors = (count + LANES - 1) / LANES;
                for (int v = 0; v < vectors; v++)
                    sides.fill(w, first + v * LANES, v * LANES, sides.shift + groups * TILE);
                std::memset(sums, 0, (m1 - m0) * TILE * sizeof(float));
                for (int64_t p = 0; p < runs.panels(); p++) {
                    for (int v = 0; v < vectors; v++)
                        Way::fill(w, first + v * LANES, p * Way::PANEL_CODES, panel + v * LANES);
                    const int64_t begin = runs.first_of_panel[p], end = runs.first_of_panel[p + 1];
                    for (int64_t i = i0; i < i1; i++) {
                        const int64_t m = row_blocks.first_of(i);
                        const int rows = row_blocks.first_of(i + 1) - m;
                        const auto multiply = vectors == 1   ? multiply_runs<Way, 1>(rows)
                                              : vectors == 2 ? multiply_runs<Way, 2>(rows)
                                                             : multiply_runs<Way, 3>(rows);
                        multiply(panel, packed + m * steps + p * PANEL_STEPS * rows, &runs.runs[begin],
                                 &runs.runs[0] + end, x_sums + m * count_of_runs + begin * rows, sides,
                                 sums + (m - m0) * TILE);
                    }
                }
                for (int64_t m = m0; m < m1; m++)
                    for (int64_t n = 0; n < count; n += LANES) {
                        const f32x16 all = load<f32x16>(sums + (m - m0) * TILE + n);
                        out.write(m, first + n, std::min(LANES, count - n), steps_of_x ? all * steps_of_x[m] : all);
                    }
            }
    }
}

}  // namespace
#endif

// Are many rows of codes multiplied as they are?
extern "C" int has_many_codes() {
#ifdef HAS_VNNI
    return !IS_FLOAT;
#else
    return 0;
#endif
}

// x has `x_rows` dense rows of codes, and a scale for each.
extern "C" void many_codes(WEIGHT_ARGUMENTS, const int8_t* x, const float* x_scales, int64_t x_rows, int kind, void* y,
                           const void* bias, int bias_kind, int threads) {
#ifdef HAS_VNNI
    const Weight w = WEIGHT;
    many_codes<Bytes>(w, {x, columns}, x_scales, x_rows, {y, bias, rows, kind, bias_kind}, threads);
#endif
}

// Many rows of x as signed codes of eight bits, by the instruction of AVX512 that multiplies bytes: tiles of the weight's
// codes are transposed into the cache, and multiplied by all rows of x. Of TILE outputs times a block of rows of x, the
// inputs that share a scale are summed up exactly, in registers; scaled, they are added to sums in the cache. What the zero
// points take off is the sum of x over these inputs.
//
// A step is four neighbouring inputs, a word of the codes of each output and each row of x.

#ifdef HAS_VNNI
namespace {

constexpr int64_t STEP_CODES = 4;
// Inputs of a panel, which products of bytes cannot carry beyond 32 bits.
constexpr int64_t PANEL_CODES = 1024, PANEL_STEPS = PANEL_CODES / STEP_CODES;

// The steps first … last - 1 share a scale, that of `group`, and lie in one panel.
struct Run {
    int32_t first, last, group;
};

struct Runs {
    std::vector<Run> runs;
    std::vector<int64_t> first_of_panel;

    explicit Runs(const Weight& w) {
        for (int64_t k = 0; k < w.columns;) {
            if (k % PANEL_CODES == 0) first_of_panel.push_back(runs.size());
            const int64_t group = k / w.group;
            const int64_t end = std::min({(group + 1) * w.group, (k / PANEL_CODES + 1) * PANEL_CODES, w.columns});
            runs.push_back({(int32_t)(k / STEP_CODES), (int32_t)(whole(end, STEP_CODES) / STEP_CODES), (int32_t)group});
            k = end;
        }
        first_of_panel.push_back(runs.size());
    }
    int64_t panels() const { return first_of_panel.size() - 1; }
};

// A block of rows of x, step by step, and their sums over each run.
void pack_codes(const int8_t* x, int64_t rows, int64_t columns, const std::vector<Run>& runs, uint32_t* to,
                float* sums) {
    uint32_t* at = to;
    for (int64_t k = 0; k < columns; k += UNIT) {
        const uint64_t there = _bzhi_u64(~0ull, std::min(UNIT, columns - k));
        __m512i v[16] = {};
        for (int64_t m = 0; m < rows; m++) v[m] = _mm512_maskz_loadu_epi8(there, x + m * columns + k);
        transpose16(v);
        for (int j = 0; j < 16; j++, at += rows) _mm512_mask_storeu_epi32(at, (1 << rows) - 1, v[j]);
    }
    const __mmask16 all = (1 << rows) - 1;
    for (const Run& run : runs) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t s = run.first; s < run.last; s++)
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi32(all, to + s * rows));
        _mm512_mask_storeu_ps(sums, all, _mm512_cvtepi32_ps(sum));
        sums += rows;
    }
}

// Codes from input `first` on, at most a panel of them, of sixteen rows of the weight.
void fill_codes(const Weight& w, int64_t n, int64_t first, uint32_t* to) {
    Row row[16];
    for (int r = 0; r < 16; r++) row[r] = w.row(std::min(n + r, w.rows - 1));
    for (int64_t k = first; k < std::min(first + PANEL_CODES, w.columns); k += UNIT) {
        __m512i v[16];
        for (int r = 0; r < 16; r++) {
            __builtin_prefetch(row[r].plane[0] + k * width_of(0) / 8 + 16 * w.data_stride, 0, 2);
            v[r] = k + UNIT <= w.columns ? codes64<false>(row[r], k / UNIT, w.columns)
                                         : codes64<true>(row[r], k / UNIT, w.columns);
        }
        transpose16(v);
        for (int j = 0; j < 16; j++, to += TILE) _mm512_store_si512(to, v[j]);
    }
}

template <int V, int M>
void multiply_runs(const uint32_t* panel, const uint32_t* x, const Run* run, const Run* behind, const float* x_sums,
                   Sides sides, float* sums) {
    for (; run < behind; run++, x_sums += M) {
        asm("" ::: "memory");  // else gcc gives the registers to the float sums, and takes these through memory
        __m512i acc[M][V];
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) acc[m][v] = _mm512_setzero_si512();
        for (int64_t s = run->first; s < run->last; s++, x += M, panel += TILE) {
            __m512i w[V];
            for (int v = 0; v < V; v++) w[v] = _mm512_load_si512(panel + v * LANES);
            for (int m = 0; m < M; m++) {
                const __m512i a = _mm512_set1_epi32(x[m]);
                for (int v = 0; v < V; v++) asm("vpdpbusd %2, %1, %0" : "+v"(acc[m][v]) : "v"(w[v]), "v"(a));
            }
        }
        for (int v = 0; v < V; v++) {
            const int64_t side = run->group * TILE + v * LANES;
            const __m512 scale = _mm512_load_ps(sides.scale + side), shift = _mm512_load_ps(sides.shift + side);
            for (int m = 0; m < M; m++) {
                float* at = sums + m * TILE + v * LANES;
                const __m512 total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[m][v]), scale, _mm512_load_ps(at));
                _mm512_store_ps(at, _mm512_fnmadd_ps(shift, _mm512_set1_ps(x_sums[m]), total));
            }
        }
    }
}

template <int V> INLINE auto multiply_runs(int rows) {
    switch (rows) {
        case 1: return multiply_runs<V, 1>;
        case 2: return multiply_runs<V, 2>;
        case 3: return multiply_runs<V, 3>;
        case 4: return multiply_runs<V, 4>;
        case 5: return multiply_runs<V, 5>;
        case 6: return multiply_runs<V, 6>;
        case 7: return multiply_runs<V, 7>;
        case 8: return multiply_runs<V, 8>;
        default: return multiply_runs<V, MOST_ROWS>;
    }
}

void many_codes(const Weight& w, const int8_t* x, const float* steps_of_x, int64_t x_rows, const Output& out,
                int threads) {
    const Runs runs(w);
    const int64_t steps = whole(w.columns, UNIT) / STEP_CODES, count_of_runs = runs.runs.size();
    const int64_t groups = whole(w.groups()), tiles = whole(w.rows, TILE) / TILE;
    // Rows of x are parted where there are more threads than tiles, and so that the sums stay in the cache.
    const int64_t parts = std::max((x_rows + 511) / 512, std::min((2 * threads + tiles - 1) / tiles, x_rows / 64));
    const RowBlocks row_blocks = {x_rows};
    const int64_t of_part = (row_blocks.count + parts - 1) / std::max<int64_t>(parts, 1);  // blocks
    const int64_t part = of_part * MOST_ROWS;
    Scratch x_scratch;
    uint32_t* packed = x_scratch.get<uint32_t>(x_rows * (steps + count_of_runs));
    float* x_sums = (float*)(packed + x_rows * steps);
#pragma omp parallel for num_threads(threads) if (x_rows * steps > 1 << 16)  // waiting for threads has its price
    for (int64_t i = 0; i < row_blocks.count; i++) {
        const int64_t m = row_blocks.first_of(i);
        pack_codes(x + m * w.columns, row_blocks.first_of(i + 1) - m, w.columns, runs.runs, packed + m * steps,
                   x_sums + m * count_of_runs);
    }
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
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
                        fill_codes(w, first + v * LANES, p * PANEL_CODES, panel + v * LANES);
                    const int64_t begin = runs.first_of_panel[p], end = runs.first_of_panel[p + 1];
                    for (int64_t i = i0; i < i1; i++) {
                        const int64_t m = row_blocks.first_of(i);
                        const int rows = row_blocks.first_of(i + 1) - m;
                        const auto multiply = vectors == 1   ? multiply_runs<1>(rows)
                                              : vectors == 2 ? multiply_runs<2>(rows)
                                                             : multiply_runs<3>(rows);
                        multiply(panel, packed + m * steps + p * PANEL_STEPS * rows, &runs.runs[begin],
                                 &runs.runs[0] + end, x_sums + m * count_of_runs + begin * rows, sides,
                                 sums + (m - m0) * TILE);
                    }
                }
                for (int64_t m = m0; m < m1; m++)
                    for (int64_t n = 0; n < count; n += LANES)
                        out.write(m, first + n, std::min(LANES, count - n),
                                  load<f32x16>(sums + (m - m0) * TILE + n) * steps_of_x[m]);
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
    many_codes(WEIGHT, x, x_scales, x_rows, {y, bias, rows, kind, bias_kind}, threads);
#endif
}

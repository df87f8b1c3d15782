// Many rows of x: tiles of the weight are dequantized into the cache, transposed for outer products, and multiplied by
// all rows of x. The sums of TILE outputs times a block of rows of x stay in registers. Some rows in bfloat16 are left
// to many_rows_dot.h.
//
// A step is one float32 input, or a pair of bfloat16 inputs where the processor multiplies pairs.

#ifdef HAS_AVX512
namespace {

// Blocks first … last - 1 of sixteen rows of the weight, as steps of sixteen outputs, written `stride` apart; the first
// block begins a unit. The codes are transposed, four to a word; then each vector has a code of every row, and the
// values are computed. Pairs are codes 0 and 2, 1 and 3 of each four.
template <bool PAIRS>
void fill_panel(const Weight& w, int64_t n, int64_t first, int64_t last, Sides sides, uint32_t* to, int64_t stride) {
    const int64_t blocks = w.blocks(), per_group = w.group >= w.columns ? blocks : w.group / LANES;
    Row row[16];
    for (int r = 0; r < 16; r++) row[r] = w.row(std::min(n + r, w.rows - 1));
    const __m512i each = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i twice = _mm512_mullo_epi32(each, _mm512_set1_epi32(0x10001)), byte = _mm512_set1_epi32(255);
    const __m512i mix = _mm512_add_epi32(twice, _mm512_set1_epi32(16 << 16));  // words 0, 16, 1, 17 …
    __m512 scale{}, shift{};
    int64_t next = first;  // the block at which the scales change
    auto value = [&](__m512i codes) __attribute__((always_inline)) {
        return _mm512_fmsub_ps(bits_of<__m512>(numbers(bits_of<i32x16>(codes))), scale, shift);
    };
    auto write = [&](__m512i v) __attribute__((always_inline)) {
        _mm512_store_si512(to, v);
        to += stride;
    };
    for (int64_t unit = first * LANES / UNIT; unit * UNIT < last * LANES; unit++) {
        // The next sixteen rows: 9.8 ms against 8.0 for 16 rows of x, u4/g64 16384 × 2048, one thread of Zen 4.
        for (int r = 0; r < 16; r++)
            __builtin_prefetch(row[r].plane[0] + unit * 8 * width_of(0) + 16 * w.data_stride, 0, 2);
        __m512i v[16];
        for (int r = 0; r < 16; r++)
            v[r] = (unit + 1) * UNIT <= w.columns ? codes64<false>(row[r], unit, w.columns)
                                                  : codes64<true>(row[r], unit, w.columns);
        transpose16(v);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int64_t b = unit * 4 + i;
            if (b >= last) break;
            if (b == next && b < blocks) {
                const int64_t g = b / per_group;
                next = (g + 1) * per_group;
                scale = _mm512_load_ps(sides.scale + g * TILE);
                shift = _mm512_load_ps(sides.shift + g * TILE);
            }
            for (int q = 4 * i; q < 4 * i + 4; q++) {
                const __m512 code0 = value(_mm512_and_si512(v[q], byte));
                const __m512 code1 = value(_mm512_and_si512(_mm512_srli_epi32(v[q], 8), byte));
                const __m512 code2 = value(_mm512_and_si512(_mm512_srli_epi32(v[q], 16), byte));
                const __m512 code3 = value(_mm512_srli_epi32(v[q], 24));
#ifdef HAS_BF16_DOT
                if (PAIRS) {
                    write(_mm512_permutexvar_epi16(mix, bits_of<__m512i>(_mm512_cvtne2ps_pbh(code2, code0))));
                    write(_mm512_permutexvar_epi16(mix, bits_of<__m512i>(_mm512_cvtne2ps_pbh(code3, code1))));
                    continue;
                }
#endif
                write(bits_of<__m512i>(code0));
                write(bits_of<__m512i>(code1));
                write(bits_of<__m512i>(code2));
                write(bits_of<__m512i>(code3));
            }
        }
    }
}

template <bool PAIRS, int V, int M>
void multiply_block(const uint32_t* panel, const uint32_t* x, int64_t steps, float* sums) {
    __m512 acc[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) acc[m][v] = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; s++, x += M, panel += TILE) {
        __m512i w[V];
        for (int v = 0; v < V; v++) w[v] = _mm512_load_si512(panel + v * LANES);
        for (int m = 0; m < M; m++) {
            const __m512i a = _mm512_set1_epi32(x[m]);
            for (int v = 0; v < V; v++) acc[m][v] = multiply_step<PAIRS>(acc[m][v], w[v], a);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) {
            float* at = sums + m * TILE + v * LANES;
            _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), acc[m][v]));
        }
}

template <bool PAIRS, int V>
INLINE void multiply_block(int m, const uint32_t* panel, const uint32_t* x, int64_t steps, float* sums) {
    switch (m) {
        case 1: return multiply_block<PAIRS, V, 1>(panel, x, steps, sums);
        case 2: return multiply_block<PAIRS, V, 2>(panel, x, steps, sums);
        case 3: return multiply_block<PAIRS, V, 3>(panel, x, steps, sums);
        case 4: return multiply_block<PAIRS, V, 4>(panel, x, steps, sums);
        case 5: return multiply_block<PAIRS, V, 5>(panel, x, steps, sums);
        case 6: return multiply_block<PAIRS, V, 6>(panel, x, steps, sums);
        case 7: return multiply_block<PAIRS, V, 7>(panel, x, steps, sums);
        case 8: return multiply_block<PAIRS, V, 8>(panel, x, steps, sums);
        default: return multiply_block<PAIRS, V, MOST_ROWS>(panel, x, steps, sums);
    }
}

// A block of rows of x, step by step, so that the inner loop reads on and on.
template <bool PAIRS>
void pack_rows(const void* x, int64_t x_stride, int kind, int64_t rows, int64_t columns, int64_t steps, uint32_t* to) {
    const int64_t at_once = PAIRS ? 2 * LANES : LANES;
    for (int64_t s = 0; s < steps; s += LANES) {
        const int64_t k = PAIRS ? 2 * s : s, count = std::max<int64_t>(0, std::min(at_once, columns - k));
        __m512i v[16] = {};
        for (int64_t m = 0; m < rows; m++) {
            const char* from = (const char*)x + (m * x_stride + k) * size_of(kind);
            if (count == at_once) {
                v[m] = PAIRS ? _mm512_loadu_si512(from) : bits_of<__m512i>(load16(from, 0, kind));
            } else {
                v[m] = PAIRS ? _mm512_maskz_loadu_epi16((1ull << count) - 1, from)
                             : bits_of<__m512i>(load_some(from, 0, count, kind));
            }
        }
        if (PAIRS)  // 0 and 2, 1 and 3 of each four, as in fill_panel
            for (int64_t m = 0; m < rows; m++) v[m] = _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(v[m], 0xd8), 0xd8);
        transpose16(v);
        for (int j = 0; j < 16; j++) _mm512_mask_storeu_epi32(to + (s + j) * rows, (1 << rows) - 1, v[j]);
    }
}

template <bool PAIRS>
void many_rows(const Weight& w, const void* x, int64_t x_rows, int64_t x_stride, const Output& out, int threads) {
    constexpr int64_t DEPTH = PAIRS ? 512 : 256;              // steps that are worked on, and summed up, at a time
    constexpr int64_t PER_BLOCK = PAIRS ? LANES / 2 : LANES;  // steps in a block of sixteen inputs
    const int64_t blocks = PAIRS ? (w.blocks() + 1) / 2 * 2 : w.blocks(), steps = blocks * PER_BLOCK;
    const int64_t groups = whole(w.groups());
    const int64_t tiles = whole(w.rows, TILE) / TILE;
    // Rows of x are parted where there are more threads than tiles, and so that the sums stay in the cache.
    const int64_t parts = std::max((x_rows + 511) / 512, std::min((2 * threads + tiles - 1) / tiles, x_rows / 64));
    const RowBlocks row_blocks = {x_rows};
    const int64_t of_part = (row_blocks.count + parts - 1) / std::max<int64_t>(parts, 1);  // blocks
    Scratch x_scratch;
    uint32_t* packed = x_scratch.get<uint32_t>(x_rows * steps);
#pragma omp parallel for num_threads(threads) if (x_rows * steps > 1 << 16)  // waiting for threads has its price
    for (int64_t i = 0; i < row_blocks.count; i++) {
        const int64_t m = row_blocks.first_of(i);
        pack_rows<PAIRS>((const char*)x + m * x_stride * size_of(out.kind), x_stride, out.kind,
                         row_blocks.first_of(i + 1) - m, w.columns, steps, packed + m * steps);
    }
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        const int64_t panel_size = DEPTH * TILE;
        float* sums = scratch.get<float>((of_part * MOST_ROWS + DEPTH + 2 * groups) * TILE + 32 * groups);
        uint32_t* panel = (uint32_t*)(sums + of_part * MOST_ROWS * TILE);
        const Sides sides = {(float*)(panel + panel_size), (float*)(panel + panel_size + groups * TILE)};
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t first = 0; first < w.rows; first += TILE)
            for (int64_t i0 = 0; i0 < row_blocks.count; i0 += of_part) {
                const int64_t i1 = std::min(i0 + of_part, row_blocks.count), count = std::min(TILE, w.rows - first);
                const int64_t m0 = row_blocks.first_of(i0), m1 = row_blocks.first_of(i1);
                const int vectors = (count + LANES - 1) / LANES;
                for (int v = 0; v < vectors; v++)
                    sides.fill(w, first + v * LANES, v * LANES, sides.shift + groups * TILE);
                std::memset(sums, 0, (m1 - m0) * TILE * sizeof(float));
                for (int64_t b = 0; b < blocks; b += DEPTH / PER_BLOCK) {
                    const int64_t last = std::min(b + DEPTH / PER_BLOCK, blocks), depth = (last - b) * PER_BLOCK;
                    for (int v = 0; v < vectors; v++)
                        fill_panel<PAIRS>(w, first + v * LANES, b, last,
                                          {sides.scale + v * LANES, sides.shift + v * LANES}, panel + v * LANES, TILE);
                    for (int64_t i = i0; i < i1; i++) {
                        const int64_t m = row_blocks.first_of(i);
                        const int rows = row_blocks.first_of(i + 1) - m;
                        const uint32_t* from = packed + m * steps + b * PER_BLOCK * rows;
                        float* to = sums + (m - m0) * TILE;
                        if (vectors == 1) multiply_block<PAIRS, 1>(rows, panel, from, depth, to);
                        else if (vectors == 2) multiply_block<PAIRS, 2>(rows, panel, from, depth, to);
                        else multiply_block<PAIRS, 3>(rows, panel, from, depth, to);
                    }
                }
                for (int64_t m = m0; m < m1; m++)
                    for (int64_t n = 0; n < count; n += LANES)
                        out.write(m, first + n, std::min(LANES, count - n), load<f32x16>(sums + (m - m0) * TILE + n));
            }
    }
}

}  // namespace
#endif

extern "C" int has_many_rows() {
#ifdef HAS_AVX512
    return 1;
#else
    return 0;
#endif
}

// Are some rows in bfloat16 multiplied as many_rows_dot.h does?
extern "C" int has_many_rows_dot() {
#ifdef HAS_BF16_DOT
    return paired::MOST_ROWS_OF_X > 0;
#else
    return 0;
#endif
}

extern "C" void many_rows(WEIGHT_ARGUMENTS, const void* x, int64_t x_rows, int64_t x_stride, int kind, void* y,
                          const void* bias, int bias_kind, int threads) {
#ifdef HAS_AVX512
    const Weight w = WEIGHT;
    const Output out = {y, bias, rows, kind, bias_kind};
#ifdef HAS_BF16_DOT
    if (kind == BF16) {
        if (x_rows > paired::MOST_ROWS_OF_X) return many_rows<true>(w, x, x_rows, x_stride, out, threads);
        return with_way(w, [&](auto way) {
            paired::many_rows<decltype(way)>(w, (const uint16_t*)x, x_rows, x_stride, out, threads);
        });
    }
#endif
    many_rows<false>(w, x, x_rows, x_stride, out, threads);
#endif
}

// Some ten to a hundred rows of x in bfloat16, by the instruction of AVX512 that multiplies pairs. A tile of outputs is
// dequantized into the first cache as its codes lie, without transposing them, and multiplied by all rows of x, whose
// inputs are brought into the same order. Each sum is a vector in a register, and added up at the end of a panel of
// inputs: of more rows that takes longer than transposing does (many_rows.h).

#ifdef HAS_BF16_DOT
namespace {
namespace paired {

// More rows are left to many_rows.h, and codes of two planes, which are no faster so. µs of two threads of Zen 5, here |
// there: u4/g64 2048 × 8192, 128 rows 5309 | 5428; 8192 × 2048, 256 rows 10425 | 9977; u8/g64 8192 × 2048, 33 rows 1859 |
// 1946, 64 rows 3216 | 3179, 256 rows 10968 | 10345.
constexpr int64_t MOST_ROWS_OF_X = PLANES > 1 ? 0 : FEW_VALUES ? 128 : 64;

constexpr int64_t R = 8, MOST_ROWS = 3;  // 24 sums in registers, three vectors of x and one of the weight
constexpr int64_t OUTPUTS = 4 * R;       // that a thread takes at a time
constexpr int64_t UNITS = 16;            // of inputs in a panel: then the first cache has a tile and two blocks of x

// Codes of four bits are looked up as they lie, two units at a time: a vector of bytes is four steps, of the low and
// high halves of the even bytes, and of those of the odd ones.
template <typename Way> constexpr bool AS_THEY_LIE = BITS == 4 && Way::BY_TABLE && Way::WHOLE;

// The codes of 128 inputs: `codes` of two units, with the first scales and zero points of each, as steps `apart`.
INLINE void dequantize_nibbles(__m512i codes, const float* scale, const float* zero, int64_t group, int64_t next_group,
                               __m512i* to, int64_t apart) {
    const __m512 first = first_values(scale[group], zero[group]);
    const __m512i table = bits_of<__m512i>(_mm512_cvtne2ps_pbh(first_values(scale[next_group], zero[next_group]), first));
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    auto write = [&](int step, __m512i codes) __attribute__((always_inline)) {
        const __m512i low = _mm512_set1_epi16(15), place = _mm512_ternarylogic_epi32(codes, low, second, 0xea);  // & |
        _mm512_store_si512(to + step * apart, _mm512_permutexvar_epi16(place, table));
    };
    write(0, codes), write(1, _mm512_srli_epi16(codes, 4));
    write(2, _mm512_srli_epi16(codes, 8)), write(3, _mm512_srli_epi16(codes, 12));
}

struct NibbleOrder {
    alignas(64) uint16_t at[2 * LANES] = {};
    constexpr NibbleOrder() {
        for (int i = 0; i < 2 * LANES; i++) at[i] = 2 * (i % 8) + i / 8 % 2 * 16 + i / 16;
    }
};
constexpr NibbleOrder NIBBLE_ORDER;

// Inputs from k on of a row of x in the order of these steps, zeros behind the last of its `columns`.
INLINE void order_nibbles(const uint16_t* x, int64_t k, int64_t columns, __m512i* to, int64_t apart) {
    __m512i v[4], t[4];
    for (int i = 0; i < 4; i++) {
        const uint32_t there = _bzhi_u32(~0u, std::clamp<int64_t>(columns - k - 32 * i, 0, 32));
        const __m512i inputs = _mm512_maskz_loadu_epi16(there, x + k + 32 * i);
        v[i] = _mm512_permutexvar_epi16(_mm512_load_si512(NIBBLE_ORDER.at), inputs);
    }
    t[0] = _mm512_shuffle_i32x4(v[0], v[1], 0x44), t[1] = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
    t[2] = _mm512_shuffle_i32x4(v[0], v[1], 0xee), t[3] = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    for (int i = 0; i < 4; i++)
        _mm512_store_si512(to + i * apart, i % 2 ? _mm512_shuffle_i32x4(t[i - 1], t[i], 0xdd)
                                                 : _mm512_shuffle_i32x4(t[i], t[i + 1], 0x88));
}

// Panels of inputs, and of each the blocks of rows one behind the other, step by step.
struct Packed {
    __m512i* at;
    int64_t rows, units;

    int64_t units_from(int64_t unit) const { return std::min(UNITS, units - unit); }
    __m512i* block(int64_t first_row, int64_t unit) const {
        return at + 2 * (unit * rows + first_row * units_from(unit));
    }
    template <typename Way>
    void fill(const uint16_t* x, int64_t x_stride, int64_t columns, int64_t first, int64_t count) const {
        for (int64_t u = 0; u < units; u += 1 + AS_THEY_LIE<Way>) {
            __m512i* to = block(first, u / UNITS * UNITS) + u % UNITS * 2 * count;
            for (int64_t m = 0; m < count; m++) {
                const uint16_t* row = x + (first + m) * x_stride;
                if (AS_THEY_LIE<Way>) order_nibbles(row, u * UNIT, columns, to + m, count);
                else order_unit<Way::BY_TABLE>(row, u * UNIT, columns, to[m], to[count + m]);
            }
        }
    }
};

// `count` outputs from n on, at most R, and `units` of inputs from `first` on.
template <typename Way>
void fill_tile(const Weight& w, const Place* places, int64_t n, int64_t count, const float* scales, const float* zeros,
               int64_t first, int64_t units, __m512i* to) {
    for (int64_t r = 0; r < count; r++, scales += w.groups(), zeros += w.groups()) {
        const Row row = w.row(n + r);
        __m512i* at = to + r;
        const int64_t last = first + units, of_vector = 1 + AS_THEY_LIE<Way>;
        const int64_t whole = std::min(last, w.columns / (of_vector * UNIT) * of_vector);
        auto write = [&](int64_t u, auto is_last) __attribute__((always_inline)) {
            constexpr bool LAST = is_last();
            if constexpr (AS_THEY_LIE<Way>) {
                const uint8_t* codes = row.plane[0] + u * UNIT / 2;
                const int64_t left = LAST ? plane_bytes(0, w.columns) - u * UNIT / 2 : 64;
                const uint64_t there = LAST ? _bzhi_u64(~0ull, left) : ~0ull;
                dequantize_nibbles(_mm512_maskz_loadu_epi8(there, codes), scales, zeros, places[u].half[0],
                                   places[u + 1].half[0], at, R);
            } else {
                dequantize_unit<Way>(codes64<LAST>(row, u, w.columns), scales, zeros, places[u], at, at + R);
            }
            at += 2 * R * of_vector;
        };
        for (int64_t u = first; u < whole; u += of_vector) write(u, std::false_type());
        if (whole < last) write(whole, std::true_type());
    }
}

// Fetches one of the `parts` of a tile, between products: all of it at once would wait for the memory.
void fetch_tile(const Weight& w, int64_t n, int64_t first, int64_t units, int64_t part, int64_t parts) {
    const int64_t bytes = units * UNIT * BITS / 8;
    for (int64_t r = R * part / parts; r < R * (part + 1) / parts; r++) {
        const uint8_t* at = w.data + (n + r) * w.data_stride + first * UNIT * BITS / 8;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    }
}

// Sums of M rows of x by R outputs, OUTPUTS apart. The block behind that of x is fetched.
template <int M> void multiply_tile(const __m512i* tile, const __m512i* x, int64_t steps, bool first, float* sums) {
    __m512 sum[M][R];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sum[m][r] = _mm512_setzero_ps();
    const int64_t ahead = steps * M;
    for (int64_t s = 0; s < steps; s++, x += M, tile += R) {
        __m512i a[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            __builtin_prefetch(x + ahead + m, 0, 3);
            a[m] = _mm512_load_si512(x + m);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __m512i w = _mm512_load_si512(tile + r);
            asm("" : "+v"(w));  // else gcc reads it once for each use
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
                sum[m][r] = _mm512_dpbf16_ps(sum[m][r], bits_of<__m512bh>(w), bits_of<__m512bh>(a[m]));
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r += 4) {
            float* to = sums + m * OUTPUTS + r;
            const __m128 all = sums4(sum[m][r], sum[m][r + 1], sum[m][r + 2], sum[m][r + 3]);
            _mm_store_ps(to, first ? all : _mm_add_ps(all, _mm_load_ps(to)));
        }
}

template <typename Way>
void many_rows(const Weight& w, const uint16_t* x, int64_t x_rows, int64_t x_stride, const Output& out, int threads) {
    const int64_t units = whole(w.columns, UNIT * (1 + AS_THEY_LIE<Way>)) / UNIT, groups = w.groups();
    const int64_t pieces = (w.rows + OUTPUTS - 1) / OUTPUTS;
    const RowBlocks blocks = {x_rows, MOST_ROWS};
    // Rows of x are parted where there are more threads than pieces.
    const int64_t parts = std::max<int64_t>(1, std::min((2 * threads + pieces - 1) / pieces, x_rows / 64));
    const int64_t of_part = (blocks.count + parts - 1) / parts;  // blocks
    std::vector<Place> places = places_of(w);
    places.push_back(places.back());  // behind an odd last unit
    Scratch x_scratch;
    const Packed packed = {x_scratch.get<__m512i>(x_rows * 2 * units), x_rows, units};
#pragma omp parallel for num_threads(threads) if (x_rows * w.columns > 1 << 17)  // waiting for threads has its price
    for (int64_t i = 0; i < blocks.count; i++) {
        const int64_t m = blocks.first_of(i);
        packed.fill<Way>(x, x_stride, w.columns, m, blocks.first_of(i + 1) - m);
    }
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        constexpr int64_t TILE_SIZE = R * UNITS * UNIT / 2;  // in floats
        const int64_t size = whole(OUTPUTS * groups) + LANES;  // a vector behind the last is written, and read
        float* sums = scratch.get<float>(TILE_SIZE + OUTPUTS * of_part * MOST_ROWS + 2 * size);
        __m512i* tile = (__m512i*)(sums + OUTPUTS * of_part * MOST_ROWS);
        float *scales = (float*)tile + TILE_SIZE, *zeros = scales + size;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t n = 0; n < w.rows; n += OUTPUTS)
            for (int64_t i0 = 0; i0 < blocks.count; i0 += of_part) {
                const int64_t i1 = std::min(i0 + of_part, blocks.count), m0 = blocks.first_of(i0);
                const int64_t count = std::min(OUTPUTS, w.rows - n), tiles = (count + R - 1) / R;
                w.each_sides(n, count, [&](int64_t i, f32x16 s, f32x16 z) __attribute__((always_inline)) {
                    store(scales + i, s);
                    store(zeros + i, z);
                });
                for (int64_t u = 0; u < units; u += UNITS)
                    for (int64_t t = 0; t < tiles; t++) {
                        const int64_t depth = packed.units_from(u), first = n + t * R;
                        fill_tile<Way>(w, places.data(), first, std::min(R, w.rows - first), scales + t * R * groups,
                                       zeros + t * R * groups, u, depth, tile);
                        for (int64_t i = i0; i < i1; i++) {
                            if (u + UNITS < units) fetch_tile(w, first, u + UNITS, UNITS, i - i0, i1 - i0);
                            else fetch_tile(w, first + OUTPUTS, 0, UNITS, i - i0, i1 - i0);
                            const int64_t m = blocks.first_of(i), rows = blocks.first_of(i + 1) - m;
                            const auto multiply = rows == 1   ? multiply_tile<1>
                                                  : rows == 2 ? multiply_tile<2>
                                                              : multiply_tile<MOST_ROWS>;
                            multiply(tile, packed.block(m, u), 2 * depth, u == 0, sums + (m - m0) * OUTPUTS + t * R);
                        }
                    }
                for (int64_t m = m0; m < blocks.first_of(i1); m++)
                    for (int64_t i = 0; i < count; i += LANES)
                        out.write(m, n + i, std::min(LANES, count - i), load<f32x16>(sums + (m - m0) * OUTPUTS + i));
            }
    }
}

}  // namespace paired
}  // namespace
#endif

// Many rows of x as signed codes of eight bits by the processor's matrix instructions (tiles.h): a tile of x times a
// tile of the weight's codes, transposed. The inputs that share a scale are summed up exactly, in a tile; scaled, they
// are added to sums in registers. What the zero points take off is the sum of x over these inputs.

#ifdef HAS_TILES
namespace {
namespace tiled {

constexpr int64_t UNITS_OF_CODES = 16;  // inputs of a panel, in units of 64, each a product's
constexpr int64_t WIDE = 4, WIDTH_OF_CODES = WIDE * SIDE;  // outputs of a panel, in tiles and one by one

// Units of inputs that lie in one panel and share the scale of `group`.
struct Stretch {
    int32_t units, group;
};

std::vector<Stretch> stretches_of(const Weight& w) {
    std::vector<Stretch> found;
    for (int64_t k = 0; k < w.columns; k += UNIT) {
        const int32_t group = std::min(k / w.group, w.groups() - 1);
        if (k % (UNITS_OF_CODES * UNIT) && found.back().group == group) found.back().units++;
        else found.push_back({1, group});
    }
    return found;
}

// x's tile `m` of `x_tiles`: sixteen rows (or the few that are left, and zeros), panel after panel, and their sums over
// each stretch.
void pack_codes(const int8_t* x, int64_t rows, int64_t columns, const std::vector<Stretch>& stretches, int64_t m,
                int64_t x_tiles, Tile* packed, float* sums) {
    const int64_t units = (columns + UNIT - 1) / UNIT;
    int64_t k = 0;
    for (const Stretch& stretch : stretches) {
        __m512i sum[16] = {};
        for (int32_t u = 0; u < stretch.units; u++, k += UNIT) {
            const int64_t unit = k / UNIT, before = unit / UNITS_OF_CODES * UNITS_OF_CODES;
            Tile& tile = packed[before * x_tiles + m * std::min(UNITS_OF_CODES, units - before) + unit - before];
            const uint64_t there = _bzhi_u64(~0ull, std::min(UNIT, columns - k));
            for (int64_t r = 0; r < SIDE; r++) {
                const __m512i codes = r < rows ? _mm512_maskz_loadu_epi8(there, x + r * columns + k) : __m512i{};
                _mm512_store_si512(tile.row[r], codes);
                sum[r] = _mm512_dpbusd_epi32(sum[r], _mm512_set1_epi8(1), codes);
            }
        }
        transpose16(sum);
        for (int i = 1; i < 16; i++) sum[0] = _mm512_add_epi32(sum[0], sum[i]);
        _mm512_store_ps(sums, _mm512_cvtepi32_ps(sum[0]));
        sums += SIDE;
    }
}

// Sixteen rows of the weight, from unit `first` on.
void fill_codes(const Weight& w, int64_t n, int64_t first, int64_t units, Tile* to) {
    Row row[16];
    for (int r = 0; r < 16; r++) row[r] = w.row(std::min(n + r, w.rows - 1));
    for (int64_t u = first; u < first + units; u++, to++) {
        __m512i v[16];
        for (int r = 0; r < 16; r++) {
            __builtin_prefetch(row[r].plane[0] + u * 8 * width_of(0) + WIDTH_OF_CODES * w.data_stride, 0, 2);
            v[r] = (u + 1) * UNIT <= w.columns ? codes64<false>(row[r], u, w.columns)
                                               : codes64<true>(row[r], u, w.columns);
        }
        transpose16(v);
        for (int i = 0; i < 16; i++) _mm512_store_si512(to->row[i], v[i]);
    }
}

// Of sixteen rows from n on: a row of sixteen for each group, `apart`; a number is code * scale - shift.
void transpose_sides(const Weight& w, int64_t n, float* memory, float* scale, float* shift, int64_t apart) {
    const int64_t groups = whole(w.groups());
    float* zeros = memory + SIDE * groups;
    for (int64_t r = 0; r < SIDE; r++)
        w.sides(memory + r * groups, zeros + r * groups, std::min(n + r, w.rows - 1));
    for (int64_t g = 0; g < w.groups(); g += LANES) {
        __m512i s[16], z[16];
        for (int r = 0; r < 16; r++) {
            const __m512 of_row = _mm512_load_ps(memory + r * groups + g);
            s[r] = bits_of<__m512i>(of_row);
            z[r] = bits_of<__m512i>(_mm512_mul_ps(of_row, _mm512_load_ps(zeros + r * groups + g)));
        }
        transpose16(s);
        transpose16(z);
        for (int64_t i = 0; i < std::min(LANES, w.groups() - g); i++) {
            _mm512_store_si512(scale + (g + i) * apart, s[i]);
            _mm512_store_si512(shift + (g + i) * apart, z[i]);
        }
    }
}

// A tile of x times one of a panel's: sixteen rows of sums, a panel's width apart. The products of a stretch are on
// their way while those of the one before it are scaled.
void multiply_stretches(const Tile* x, const Tile* panel, const Stretch* stretch, int64_t count, const float* x_sums,
                        const float* scale, const float* shift, bool first, float* sums) {
    Tile products[2];
    __m512 total[SIDE];  // in registers, where all loops over it are unrolled
#pragma GCC unroll 16
    for (int m = 0; m < SIDE; m++)
        total[m] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + m * WIDTH_OF_CODES);
    auto add = [&](int64_t i) __attribute__((always_inline)) {
        const __m512 s = _mm512_load_ps(scale + stretch[i].group * WIDTH_OF_CODES);
        const __m512 t = _mm512_load_ps(shift + stretch[i].group * WIDTH_OF_CODES);
#pragma GCC unroll 16
        for (int m = 0; m < SIDE; m++) {
            const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(products[i % 2].row[m]));
            total[m] = _mm512_fmadd_ps(product, s, total[m]);
            total[m] = _mm512_fnmadd_ps(t, _mm512_set1_ps(x_sums[i * SIDE + m]), total[m]);
        }
    };
    for (int64_t i = 0; i < count; i++) {
        zero_tile<0>();
        for (int32_t u = 0; u < stretch[i].units; u++) {
            load_tile<1>(x++), load_tile<2>(panel++);
            multiply_fours<0, 1, 2>();
        }
        store_tile<0>(&products[i % 2]);
        if (i) add(i - 1);
    }
    add(count - 1);
#pragma GCC unroll 16
    for (int m = 0; m < SIDE; m++) _mm512_store_ps(sums + m * WIDTH_OF_CODES, total[m]);
}

// What a thread does at a time: some panels of outputs, and rows of x, by all inputs.
struct BlockOfCodes {
    const Weight& w;
    const std::vector<Stretch>& stretches;
    const Tile* packed;
    const float *x_sums, *steps_of_x;
    int64_t x_rows;
    const Output& out;

    int64_t units() const { return (w.columns + UNIT - 1) / UNIT; }

    static int64_t bytes(int64_t panels, int64_t x_tiles, int64_t groups) {
        return WIDE * UNITS_OF_CODES * sizeof(Tile) +
               (panels * WIDTH_OF_CODES * (x_tiles * SIDE + 2 * groups) + 2 * SIDE * groups) * sizeof(float);
    }

    // Outputs from n on, and x's tiles first … last - 1.
    void run(int64_t n, int64_t panels, int64_t first, int64_t last, Tile* panel) const {
        const int64_t groups = whole(w.groups()), x_tiles = whole(x_rows, SIDE) / SIDE;
        float* sums = (float*)(panel + WIDE * UNITS_OF_CODES);
        const int64_t of_panel = (last - first) * SIDE * WIDTH_OF_CODES, sides_of_panel = groups * WIDTH_OF_CODES;
        float *scale = sums + panels * of_panel, *shift = scale + panels * sides_of_panel;
        for (int64_t v = 0; v < panels * WIDE && n + v * SIDE < w.rows; v++) {
            const int64_t at = v / WIDE * sides_of_panel + v % WIDE * SIDE;
            transpose_sides(w, n + v * SIDE, shift + panels * sides_of_panel, scale + at, shift + at, WIDTH_OF_CODES);
        }
        for (int64_t u = 0, begin = 0; u < units(); u += UNITS_OF_CODES) {
            const int64_t count = std::min(UNITS_OF_CODES, units() - u);
            int64_t end = begin;
            for (int64_t there = 0; there < count; end++) there += stretches[end].units;
            for (int64_t p = 0; p < panels; p++) {
                const int64_t tiles = std::min(WIDE, (w.rows - n - p * WIDTH_OF_CODES + SIDE - 1) / SIDE);
                for (int64_t v = 0; v < tiles; v++)
                    fill_codes(w, n + p * WIDTH_OF_CODES + v * SIDE, u, count, panel + v * count);
                for (int64_t m = first; m < last; m++)
                    for (int64_t v = 0; v < tiles; v++) {
                        const int64_t side = p * sides_of_panel + v * SIDE;
                        multiply_stretches(packed + u * x_tiles + m * count, panel + v * count, &stretches[begin],
                                           end - begin, x_sums + (m * (int64_t)stretches.size() + begin) * SIDE,
                                           scale + side, shift + side, u == 0,
                                           sums + p * of_panel + (m - first) * SIDE * WIDTH_OF_CODES + v * SIDE);
                    }
            }
            begin = end;
        }
        for (int64_t p = 0; p < panels; p++)
            for (int64_t m = first * SIDE; m < std::min(last * SIDE, x_rows); m++) {
                const float* from = sums + p * of_panel + (m - first * SIDE) * WIDTH_OF_CODES;
                const int64_t at = n + p * WIDTH_OF_CODES, width = std::min(WIDTH_OF_CODES, w.rows - at);
                for (int64_t i = 0; i < width; i += LANES)
                    out.write(m, at + i, std::min(LANES, width - i), load<f32x16>(from + i) * steps_of_x[m]);
            }
    }
};

void many_codes(const Weight& w, const int8_t* x, const float* steps_of_x, int64_t x_rows, const Output& out,
                int threads) {
    const std::vector<Stretch> stretches = stretches_of(w);
    const int64_t units = (w.columns + UNIT - 1) / UNIT, x_tiles = whole(x_rows, SIDE) / SIDE;
    const int64_t all_panels = whole(w.rows, WIDTH_OF_CODES) / WIDTH_OF_CODES;
    const int64_t parts = parts_of(x_tiles, all_panels, threads);
    const int64_t part = (x_tiles + parts - 1) / parts;
    const int64_t panels = std::max<int64_t>(1, std::min(MOST_PANELS / 2, all_panels * parts / (4 * threads)));
    Scratch x_scratch;
    Tile* packed = (Tile*)x_scratch.get<char>(x_tiles * (units * sizeof(Tile) + stretches.size() * 64));
    float* x_sums = (float*)(packed + x_tiles * units);
    const BlockOfCodes block{w, stretches, packed, x_sums, steps_of_x, x_rows, out};
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        Tile* memory = (Tile*)scratch.get<char>(block.bytes(panels, part, whole(w.groups())));
#pragma omp for
        for (int64_t m = 0; m < x_tiles; m++)
            pack_codes(x + m * SIDE * w.columns, std::min(SIDE, x_rows - m * SIDE), w.columns, stretches, m, x_tiles,
                       packed, x_sums + m * stretches.size() * SIDE);
        const Tiles tiles;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t p = 0; p < all_panels; p += panels)
            for (int64_t m = 0; m < x_tiles; m += part)
                block.run(p * WIDTH_OF_CODES, std::min(panels, all_panels - p), m, std::min(m + part, x_tiles), memory);
    }
}

}  // namespace tiled
}  // namespace
#endif

// Can tiles multiply codes whose scales `group` of `columns` inputs share?
extern "C" int has_many_codes_tiles(int64_t columns, int64_t group) {
    return has_tiles() && !IS_FLOAT && (group % 64 == 0 || group == columns);
}

// As many_codes.
extern "C" void many_codes_tiles(WEIGHT_ARGUMENTS, const int8_t* x, const float* x_scales, int64_t x_rows, int kind,
                                 void* y, const void* bias, int bias_kind, int threads) {
#ifdef HAS_TILES
    tiled::many_codes(WEIGHT, x, x_scales, x_rows, {y, bias, rows, kind, bias_kind}, threads);
#endif
}

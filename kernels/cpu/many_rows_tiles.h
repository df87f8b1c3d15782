// Many rows of x in bfloat16 by the processor's matrix instructions (tiles.h): two tiles of the weight's outputs, as
// they are dequantized, times two of x, transposed. While a panel of the weight is multiplied, the next one is
// dequantized: products of tiles leave the vector units alone.

#ifdef HAS_TILES
namespace {
namespace tiled {

constexpr int64_t HEIGHT = 2 * SIDE;                 // outputs of a panel
constexpr int64_t STEP = 32;                         // inputs of a product
constexpr int64_t DEPTH = 1024;                      // inputs of a panel
constexpr int64_t STEPS = DEPTH / STEP, UNITS = DEPTH / UNIT;
constexpr int64_t MOST_ROWS = 512, MOST_PANELS = 8;  // that share x and sums in the cache

// Inputs from `first` on, at most `units` of 64, of sixteen rows of x (or the few that are left, and zeros).
template <bool BY_TABLE>
void pack_rows(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t columns, int64_t first, int64_t units,
               Tile* to) {
    for (int64_t k = first; k < first + units * UNIT; k += UNIT, to += 2) {
        __m512i a[16] = {}, b[16] = {};
        for (int64_t m = 0; m < rows; m++) order_unit<BY_TABLE>(x + m * x_stride, k, columns, a[m], b[m]);
        transpose16(a);
        transpose16(b);
        for (int i = 0; i < 16; i++) {
            _mm512_store_si512(to[0].row[i], a[i]);
            _mm512_store_si512(to[1].row[i], b[i]);
        }
    }
}

// Dequantizes a panel, output by output, some units at a time between products.
template <typename Way> struct Filler {
    const Weight& w;
    const Place* places;
    int64_t groups;  // how far the scales of outputs lie apart, and their zero points
    const float *scales = nullptr, *zeros = nullptr;
    int64_t output = HEIGHT, unit = 0, first = 0, units = 0;  // the next ones, and those of a panel
    Tile* to = nullptr;
    Row row[HEIGHT] = {};

    // Outputs from n on and inputs from `begin` on.
    void start(int64_t n, const float* scales, const float* zeros, int64_t begin, int64_t units, Tile* to) {
        for (int64_t r = 0; r < HEIGHT; r++) row[r] = w.row(std::min(n + r, w.rows - 1));
        this->scales = scales, this->zeros = zeros, this->to = to;
        output = unit = 0, first = begin / UNIT, this->units = units;
    }

    int64_t left() const { return (HEIGHT - output) * units - unit; }

    INLINE void some(int64_t count) {
        while (count > 0 && output < HEIGHT) {
            const int64_t end = std::min(unit + count, units);
            count -= end - unit;
            fill(output, unit, end);
            unit = end;
            if (unit == units) unit = 0, output++;
        }
    }

    INLINE void fill(int64_t r, int64_t from, int64_t end) const {
        const Row row = this->row[r];
        const float *scales = this->scales + r * groups, *zeros = this->zeros + r * groups;
        const Place* places = this->places;
        const int64_t columns = w.columns, ahead = HEIGHT * w.data_stride, first = this->first;
        char* at = to[r / SIDE * 2 * units + 2 * from].row[r % SIDE];
        auto one = [&](int64_t u, auto last) __attribute__((always_inline)) {
            __builtin_prefetch(row.plane[0] + u * 8 * width_of(0) + ahead, 0, 2);
            dequantize_unit<Way>(codes64<last()>(row, u, columns), scales, zeros, places[u], at, at + sizeof(Tile));
            at += 2 * sizeof(Tile);
        };
        const int64_t whole_units = std::min(first + end, columns / UNIT);
        int64_t u = first + from;
        for (; u < whole_units; u++) one(u, std::false_type());
        if (u < first + end) one(u, std::true_type());
    }
};

// A panel times one or two tiles of x's rows; sums of an output's tiles lie side by side, those of the others `apart`.
template <int WIDTH, typename Way>
void multiply_panel(const Tile* panel, const Tile* x, int64_t steps, bool first, Tile* sums, int64_t apart,
                    Filler<Way>& filler, int64_t pieces) {
    if (first) {
        zero_tile<0>(), zero_tile<1>();
        if (WIDTH == 2) zero_tile<2>(), zero_tile<3>();
    } else {
        load_tile<0>(sums), load_tile<1>(sums + apart);
        if (WIDTH == 2) load_tile<2>(sums + 1), load_tile<3>(sums + apart + 1);
    }
    for (int64_t s = 0; s < steps; s++) {
        load_tile<4>(panel + s), load_tile<6>(x + s);
        multiply_pairs<0, 4, 6>();
        load_tile<5>(panel + steps + s);
        multiply_pairs<1, 5, 6>();
        if (WIDTH == 2) {
            load_tile<7>(x + steps + s);
            multiply_pairs<2, 4, 7>();
            multiply_pairs<3, 5, 7>();
        }
        filler.some(pieces);
    }
    store_tile<0>(sums), store_tile<1>(sums + apart);
    if (WIDTH == 2) store_tile<2>(sums + 1), store_tile<3>(sums + apart + 1);
}

// What a thread does at a time: some panels of outputs, and rows of x, by all inputs.
template <typename Way> struct Block {
    const Weight& w;
    const std::vector<Place>& places;
    const Tile* packed;
    int64_t x_rows;
    const Output& out;

    int64_t units() const { return (w.columns + UNIT - 1) / UNIT; }
    int64_t x_tiles() const { return whole(x_rows, SIDE) / SIDE; }

    static int64_t bytes(int64_t panels, int64_t x_tiles, int64_t groups) {
        return (2 * 2 * STEPS + 2 * panels * x_tiles) * sizeof(Tile) +
               (2 * panels * HEIGHT * groups + LANES) * sizeof(float);
    }

    // Outputs from n on, and x's tiles first … last - 1.
    void run(int64_t n, int64_t panels, int64_t first, int64_t last, Tile* memory) const {
        const int64_t groups = whole(w.groups()), width = last - first, jobs = (units() + UNITS - 1) / UNITS * panels;
        Tile *panel = memory, *sums = memory + 2 * 2 * STEPS;
        float *scales = (float*)(sums + 2 * panels * width), *zeros = scales + panels * HEIGHT * groups;
        for (int64_t r = 0; r < panels * HEIGHT; r++)
            w.sides(scales + r * groups, zeros + r * groups, std::min(n + r, w.rows - 1));
        auto units_of = [&](int64_t job) { return std::min(UNITS, units() - job / panels * UNITS); };
        Filler<Way> filler{w, places.data(), groups};
        auto begin = [&](int64_t job) {
            const int64_t r = job % panels * HEIGHT;
            filler.start(n + r, scales + r * groups, zeros + r * groups, job / panels * DEPTH, units_of(job),
                         panel + job % 2 * 2 * STEPS);
        };
        begin(0);
        for (int64_t job = 0; job < jobs; job++) {
            filler.some(filler.left());
            if (job + 1 < jobs) begin(job + 1);
            const int64_t steps = 2 * units_of(job), products = (width + 1) / 2 * steps;
            const int64_t pieces = (filler.left() + products - 1) / products;
            const Tile *from = panel + job % 2 * 2 * STEPS, *x = packed + job / panels * STEPS * x_tiles();
            Tile* to = sums + job % panels * 2 * width;
            for (int64_t m = 0; m < width; m += 2) {
                const auto multiply = m + 1 < width ? multiply_panel<2, Way> : multiply_panel<1, Way>;
                multiply(from, x + (first + m) * steps, steps, job < panels, to + m, width, filler, pieces);
            }
        }
        for (int64_t v = 0; v < 2 * panels && n + v * SIDE < w.rows; v++)
            for (int64_t m = first; m < last; m++) write(n + v * SIDE, m * SIDE, sums[v * width + m - first]);
    }

    void write(int64_t n, int64_t m, const Tile& sums) const {
        __m512i v[16];
        for (int i = 0; i < 16; i++) v[i] = _mm512_load_si512(sums.row[i]);
        transpose16(v);
        for (int64_t i = 0; i < std::min(SIDE, x_rows - m); i++)
            out.write(m + i, n, std::min(SIDE, w.rows - n), bits_of<f32x16>(v[i]));
    }
};

// Into how many parts x's tiles are dealt out: where there are more threads than panels, and so that the sums of one
// stay in the cache.
int64_t parts_of(int64_t x_tiles, int64_t panels, int64_t threads) {
    constexpr int64_t MOST = MOST_ROWS / SIDE;
    return std::max((x_tiles + MOST - 1) / MOST, std::min((2 * threads + panels - 1) / panels, (x_tiles + 3) / 4));
}

template <typename Way>
void many_rows(const Weight& w, const uint16_t* x, int64_t x_rows, int64_t x_stride, const Output& out, int threads) {
    const int64_t units = (w.columns + UNIT - 1) / UNIT, x_tiles = whole(x_rows, SIDE) / SIDE;
    const int64_t all_panels = whole(w.rows, HEIGHT) / HEIGHT, parts = parts_of(x_tiles, all_panels, threads);
    const int64_t part = whole((x_tiles + parts - 1) / parts, 2);
    const int64_t panels = std::max<int64_t>(1, std::min(MOST_PANELS, all_panels * parts / (4 * threads)));
    const std::vector<Place> places = places_of(w);
    Scratch x_scratch;
    Tile* packed = x_scratch.get<Tile>(x_tiles * 2 * units);
    const Block<Way> block{w, places, packed, x_rows, out};
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        Tile* memory = (Tile*)scratch.get<char>(block.bytes(panels, part, whole(w.groups())));
#pragma omp for collapse(2)
        for (int64_t m = 0; m < x_tiles; m++)
            for (int64_t u = 0; u < units; u += UNITS) {
                const int64_t count = std::min(UNITS, units - u);
                pack_rows<Way::BY_TABLE>(x + m * SIDE * x_stride, x_stride, std::min(SIDE, x_rows - m * SIDE),
                                         w.columns, u * UNIT, count, packed + 2 * (u * x_tiles + m * count));
            }
        const Tiles tiles;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t p = 0; p < all_panels; p += panels)
            for (int64_t m = 0; m < x_tiles; m += part)
                block.run(p * HEIGHT, std::min(panels, all_panels - p), m, std::min(m + part, x_tiles), memory);
    }
}

}  // namespace tiled
}  // namespace
#endif

// x in bfloat16
extern "C" void many_rows_tiles(WEIGHT_ARGUMENTS, const void* x, int64_t x_rows, int64_t x_stride, int kind, void* y,
                                const void* bias, int bias_kind, int threads) {
#ifdef HAS_TILES
    const Weight w = WEIGHT;
    const Output out = {y, bias, rows, kind, bias_kind};
    with_way(w, [&](auto way) {
        tiled::many_rows<decltype(way)>(w, (const uint16_t*)x, x_rows, x_stride, out, threads);
    });
#endif
}

// A few rows of x: every weight is read once, unpacked into registers and multiplied by all rows of x.

namespace {

// ---- float32 ----

template <int M>
void few_rows_f32(const Weight& w, int64_t n, const float* x, int64_t x_stride, int64_t m0, const float* scale,
                         const float* shift, const Output& out) {
    const Row row = w.row(n);
    const int64_t blocks = w.blocks(), per_group = w.group >= w.columns ? blocks : w.group / LANES;
    constexpr int CHAINS = M <= 2 ? 2 : 1;  // sums of their own for odd and even blocks: adding takes four cycles
    f32x16 total[M][CHAINS] = {};
    for (int64_t g = 0, first = 0; first < blocks; g++, first += per_group) {
        const f32x16 s = splat(scale[g]), z = splat(shift[g]);
        const int64_t last = first + per_group;
        auto add = [&](int64_t b, int phase, int i) __attribute__((always_inline)) {
            const f32x16 value = multiply_add(numbers(row.words(b, phase)), s, z);
            for (int m = 0; m < M; m++) {
                f32x16& to = total[m][i % CHAINS];
                to = multiply_add(value, load<f32x16>(x + m * x_stride + b * LANES), to);
            }
        };
        // Known phases make the shifts constants. Eight are taken in two steps, since groups of 64 begin at both.
        constexpr int STEP = PERIOD == 2 ? 2 : 4;
        int64_t b = first;
        if (first % STEP == 0)
            for (; b + STEP <= last; b += STEP) {
                row.prefetch(b);
                const int phase = b % PERIOD;
#pragma GCC unroll 4
                for (int i = 0; i < STEP; i++) add(b + i, PERIOD > STEP ? phase + i : i % PERIOD, i);
            }
        for (; b < last; b++) add(b, b % PERIOD, 0);
    }
    for (int m = 0; m < M; m++) {
        const f32x16 all = CHAINS == 1 ? total[m][0] : total[m][0] + total[m][CHAINS - 1];
        out.write(m0 + m, n, 1, splat(sum(all)));
    }
}

// As many of the rows that are left as fit into registers; gives their number.
INLINE int64_t few_rows_f32(const Weight& w, int64_t n, const float* x, int64_t stride, int64_t m, int64_t left,
                            const float* scale, const float* shift, const Output& out) {
    auto run = [&](auto rows) __attribute__((always_inline)) {
        few_rows_f32<decltype(rows)::value>(w, n, x + m * stride, stride, m, scale, shift, out);
        return decltype(rows)::value;
    };
    return left >= 4 ? run(Count<4>()) : left == 3 ? run(Count<3>()) : left == 2 ? run(Count<2>()) : run(Count<1>());
}

void few_rows_f32(const Weight& w, const float* x, int64_t rows, const Output& out, Shares& shares) {
    const int64_t stride = whole(w.columns, 64);
    static thread_local Scratch scratch;
    float* scale = scratch.get<float>(2 * whole(w.groups()));
    float* shift = scale + whole(w.groups());
    auto prepare = [&](int64_t n) {  // value = code * scale + shift
        w.sides(scale, shift, n);
        for (int64_t g = 0; g < w.groups(); g += LANES)
            store(shift + g, f32x16{} - load<f32x16>(shift + g) * load<f32x16>(scale + g));
    };
    prepare(0);
    for (int64_t first, last; shares.take(omp_get_thread_num(), first, last);)
        for (int64_t n = first; n < last; n++) {
            if (w.scale_stride || w.zero_stride) prepare(n);
            for (int64_t m = 0; m < rows;) m += few_rows_f32(w, n, x, stride, m, rows - m, scale, shift, out);
        }
}

// x to float32, rows padded with zeros to a multiple of 64.
const float* floats(const void* x, int64_t rows, int64_t columns, int64_t x_stride, int kind) {
    static thread_local Scratch scratch;
    const int64_t stride = whole(columns, 64);
    float* to = scratch.get<float>(rows * stride);
    std::fill(to, to + rows * stride, 0.0f);
    for (int64_t m = 0; m < rows; m++)
        to_floats(to + m * stride, (const char*)x + m * x_stride * size_of(kind), columns, kind);
    return to;
}

}  // namespace

// Does few_rows multiply numbers of 16 bits as integers?
extern "C" int has_dot(int64_t columns, int64_t group) {
#ifdef HAS_VNNI
    return !IS_FLOAT && groups_of_lane(columns, group);
#else
    return 0;
#endif
}

// What one thread of a team does of it. What they share is ready, and nobody waits for the others here.
extern "C" void share_few_rows(WEIGHT_ARGUMENTS, const void* x, int64_t x_rows, int64_t x_stride, int kind, void* y,
                               const void* bias, int bias_kind, const void* residual, Shares* shares) {
    const Weight w = WEIGHT;
    const Output out = {y, bias, rows, kind, bias_kind, residual};
#ifdef HAS_VNNI
    if (kind != F32 && has_dot(columns, group)) return few_rows_dot(w, x, x_rows, x_stride, out, *shares);
#endif
    few_rows_f32(w, floats(x, x_rows, columns, x_stride, kind), x_rows, out, *shares);
}

extern "C" void few_rows(WEIGHT_ARGUMENTS, const void* x, int64_t x_rows, int64_t x_stride, int kind, void* y,
                         const void* bias, int bias_kind, int threads) {
    static thread_local Scratch scratch;
    Shares shares;
    char* memory = scratch.get<char>(Shares::bytes(threads));
    auto begin = [&](int64_t n) { shares.begin(memory, n, rows, rows_of_piece(rows, columns, n)); };
    as_team(threads, begin, [&](int64_t, Meeting&) {
        share_few_rows(data, scale, zero, rows, columns, group, height, data_stride, scale_stride, zero_stride,
                       scale_kind, zero_kind, offset, x, x_rows, x_stride, kind, y, bias, bias_kind, nullptr, &shares);
    });
}

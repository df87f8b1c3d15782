// A few rows of x: every weight is read once, unpacked into registers and multiplied by all rows of x.

namespace {

// ---- float32 ----

template <int M>
INLINE void few_rows_f32(const Weight& w, int64_t n, const float* x, int64_t x_stride, int64_t m0, const float* scale,
                         const float* zero, const Output& out) {
    const Row row = w.row(n);
    const int64_t blocks = w.blocks(), per_group = w.group >= w.columns ? blocks : w.group / LANES;
    f32x16 total[M] = {};
    for (int64_t g = 0, first = 0; first < blocks; g++, first += per_group) {
        const f32x16 s = splat(scale[g]), shift = splat(-zero[g] * scale[g]);
        const int64_t last = first + per_group;
        auto add = [&](int64_t b, int phase) __attribute__((always_inline)) {
            const f32x16 value = to_floats(row.block(b, phase)) * s + shift;
            for (int m = 0; m < M; m++) total[m] += value * load<f32x16>(x + m * x_stride + b * LANES);
        };
        int64_t b = first;
        if (first % PERIOD == 0)
            for (; b + PERIOD <= last; b += PERIOD) {
#pragma GCC unroll 8
                for (int i = 0; i < PERIOD; i++) add(b + i, i);
            }
        for (; b < last; b++) add(b, b % PERIOD);
    }
    for (int m = 0; m < M; m++) out.write(m0 + m, n, sum(total[m]));
}

void few_rows_f32(const Weight& w, const float* x, int64_t rows, const Output& out, int threads) {
    const int64_t stride = w.blocks() * LANES;
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        float* scale = scratch.get<float>(2 * w.groups());
        float* zero = scale + w.groups();
        const int64_t step = std::max<int64_t>(1, std::min<int64_t>(64, w.rows / (4 * threads)));
        w.scales(scale, 0);
        w.zeros(zero, 0);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < w.rows; first += step)
            for (int64_t n = first; n < std::min(first + step, w.rows); n++) {
                if (w.scale_stride) w.scales(scale, n);
                if (w.zero_stride) w.zeros(zero, n);
                int64_t m = 0;
                for (; m + 4 <= rows; m += 4) few_rows_f32<4>(w, n, x + m * stride, stride, m, scale, zero, out);
                for (; m + 2 <= rows; m += 2) few_rows_f32<2>(w, n, x + m * stride, stride, m, scale, zero, out);
                for (; m < rows; m++) few_rows_f32<1>(w, n, x + m * stride, stride, m, scale, zero, out);
            }
    }
}

// x to float32, rows padded with zeros to whole blocks.
const float* floats(const void* x, int64_t rows, int64_t columns, int64_t x_stride, int kind) {
    static thread_local Scratch scratch;
    const int64_t stride = (columns + LANES - 1) / LANES * LANES;
    float* to = scratch.get<float>(rows * stride);
    for (int64_t m = 0; m < rows; m++) {
        to_floats(to + m * stride, (const char*)x + m * x_stride * size_of(kind), columns, kind);
        std::fill(to + m * stride + columns, to + (m + 1) * stride, 0.0f);
    }
    return to;
}

}  // namespace

extern "C" void few_rows(WEIGHT_ARGUMENTS, const void* x, int64_t x_rows, int64_t x_stride, int kind, void* y,
                         const void* bias, int bias_kind, int threads) {
    const Weight w = WEIGHT;
    const Output out = {y, bias, rows, kind, bias_kind};
#ifdef HAS_BF16_DOT
    if (kind == BF16) return few_rows_dot(w, x, x_rows, x_stride, out, threads);
#endif
    few_rows_f32(w, floats(x, x_rows, columns, x_stride, kind), x_rows, out, threads);
}

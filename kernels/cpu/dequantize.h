// (code - zero) * scale, written row after row in float32, bfloat16 or float16: bit for bit what the meaning gives,
// except where the zero point is added after scaling.

namespace {

#ifdef HAS_AVX512
// Up to four bits have at most sixteen values a group: those are computed, and each code looks its own up.
constexpr bool FEW_VALUES = BITS <= 4;
constexpr i32x16 FIRST_CODES = {{{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}}};
#endif

// What the codes of a group stand for.
template <int KIND> struct Values {
    f32x16 scale, zero;
#ifdef HAS_AVX512
    __m256i table;
#endif

    INLINE Values(float s, float z) : scale(splat(s)), zero(splat(z)) {
#ifdef HAS_AVX512
        if (FEW_VALUES && KIND != F32) store16(&table, 0, KIND, (numbers(FIRST_CODES) - zero) * scale);
#endif
    }

    INLINE void write(void* out, int64_t index, const Row& row, int64_t block, int phase) const {
#ifdef HAS_AVX512
        if (FEW_VALUES && KIND != F32) {
            const __m256i places = _mm256_cvtepu8_epi16(bits_of<__m128i>(row.bytes(block, phase)));
            return store((char*)out + index * size_of(KIND), _mm256_permutexvar_epi16(places, table));
        }
#endif
        store16(out, index, KIND, (numbers(row.words(block, phase)) - zero) * scale);
    }
};

template <int KIND>
INLINE void dequantize_row(const Weight& w, int64_t n, void* out, const float* scale, const float* zero) {
    const Row row = w.row(n);
    const int64_t blocks = w.columns / LANES, per_group = std::max<int64_t>(w.group / LANES, 1);
    for (int64_t g = 0, first = 0; first < blocks; g++, first += per_group) {
        const int64_t last = std::min(first + per_group, blocks);
        const Values<KIND> values(scale[g], zero[g]);
        int64_t b = first;
        if (first % PERIOD == 0)
            for (; b + PERIOD <= last; b += PERIOD) {
#pragma GCC unroll 8
                for (int i = 0; i < PERIOD; i++) values.write(out, (b + i) * LANES, row, b + i, i);
            }
        for (; b < last; b++) values.write(out, b * LANES, row, b, b % PERIOD);
    }
    if (const int64_t rest = w.columns % LANES) {
        char raw[64];
        const int64_t last = w.groups() - 1;
        Values<KIND>(scale[last], zero[last]).write(raw, 0, row, blocks, blocks % PERIOD);
        std::memcpy((char*)out + blocks * LANES * size_of(KIND), raw, rest * size_of(KIND));
    }
}

template <int KIND> void dequantize(const Weight& w, void* out, int threads) {
    const int64_t step = std::max<int64_t>(1, std::min<int64_t>(64, w.rows / (4 * threads)));
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        float* scale = scratch.get<float>(2 * whole(w.groups()));
        float* zero = scale + whole(w.groups());
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < w.rows; first += step)
            for (int64_t n = first; n < std::min(first + step, w.rows); n++) {
                w.sides(scale, zero, n);
                dequantize_row<KIND>(w, n, (char*)out + n * w.columns * size_of(KIND), scale, zero);
            }
    }
}

}  // namespace

extern "C" void dequantize(WEIGHT_ARGUMENTS, void* out, int kind, int threads) {
    const Weight w = WEIGHT;
    if (kind == F32) dequantize<F32>(w, out, threads);
    else if (kind == BF16) dequantize<BF16>(w, out, threads);
    else dequantize<F16>(w, out, threads);
}

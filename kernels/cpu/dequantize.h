// (code - zero) * scale, written row after row in float32, bfloat16 or float16. Bit for bit what the meaning gives.

namespace {

template <int KIND> struct Values {
    f32x16 scale, zero;
#ifdef HAS_AVX512
    __m512i table;
#endif

    Values() = default;
    INLINE Values(float s, float z) : scale(splat(s)), zero(splat(z)) {
#ifdef HAS_AVX512
        if (TABLE && KIND != F32) {
            char words[64];
            store16(words, 0, KIND, (FIRST_CODES - zero) * scale);
            table = _mm512_broadcast_i64x4(load<__m256i>(words));
        }
#endif
    }

    INLINE void write(void* out, int64_t index, u8x16 codes) const {
#ifdef HAS_AVX512
        if (TABLE && KIND != F32) {
            __m256i places = _mm256_cvtepu8_epi16(bits_of<__m128i>(codes));
            __m256i words = _mm256_permutexvar_epi16(places, _mm512_castsi512_si256(table));
            return store((char*)out + index * 2, words);
        }
#endif
        store16(out, index, KIND, (to_floats(codes) - zero) * scale);
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
                for (int i = 0; i < PERIOD; i++) values.write(out, (b + i) * LANES, row.block(b + i, i));
            }
        for (; b < last; b++) values.write(out, b * LANES, row.block(b, b % PERIOD));
    }
    if (const int64_t rest = w.columns % LANES) {
        char raw[64];
        const int64_t last = w.groups() - 1;
        Values<KIND>(scale[last], zero[last]).write(raw, 0, row.block(blocks, blocks % PERIOD));
        std::memcpy((char*)out + blocks * LANES * size_of(KIND), raw, rest * size_of(KIND));
    }
}

template <int KIND> void dequantize_rows(const Weight& w, int64_t first, int64_t last, void* out, int64_t stride) {
    static thread_local Scratch scratch;
    float* scale = scratch.get<float>(2 * whole(w.groups()));
    float* zero = scale + whole(w.groups());
    for (int64_t n = first; n < last; n++) {
        if (n == first || w.scale_stride) w.scales(scale, n);
        if (n == first || w.zero_stride) w.zeros(zero, n);
        dequantize_row<KIND>(w, n, (char*)out + (n - first) * stride * size_of(KIND), scale, zero);
    }
}

void dequantize_any(const Weight& w, int64_t first, int64_t last, void* out, int64_t stride, int kind) {
    if (kind == F32) dequantize_rows<F32>(w, first, last, out, stride);
    else if (kind == BF16) dequantize_rows<BF16>(w, first, last, out, stride);
    else dequantize_rows<F16>(w, first, last, out, stride);
}

}  // namespace

// Rows first … first + rows of the packed weight, which `data`, `scale` and `zero` already point to.
extern "C" void dequantize(WEIGHT_ARGUMENTS, void* out, int kind, int threads) {
    const Weight w = WEIGHT;
    const int64_t step = std::max<int64_t>(1, std::min<int64_t>(64, rows / (4 * threads)));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t first = 0; first < rows; first += step)
        dequantize_any(w, first, std::min(first + step, rows), (char*)out + first * columns * size_of(kind), columns,
                       kind);
}

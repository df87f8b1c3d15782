// attend_cpu of attention_cpu.py and attend_prompt of attention_prompt_cpu.py, called by torch without Python in between.

#include <stdexcept>

namespace {

constexpr int64_t WORK_OF_A_THREAD = 1 << 19;  // products

void set_strides(int64_t* to, const Tensor& t, int count) {
    for (int i = 0; i < count; i++) to[i] = t.size(i) == 1 ? 0 : t.stride(i);
}

Attention attention_of(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                       double scale, std::optional<double> softcap, const std::optional<Tensor>& key_scale = {},
                       const std::optional<Tensor>& value_scale = {}) {
    auto floats = [](auto& scale) { return scale ? (const float*)scale->data_ptr() : nullptr; };
    Attention a = {query.data_ptr(), key.data_ptr(), value.data_ptr(), mask ? mask->data_ptr() : nullptr,
                   floats(key_scale), floats(value_scale), nullptr,
                   query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3)};
    a.scale = scale;
    a.softcap = softcap.value_or(0);
    set_strides(a.query_strides, query, 3);
    set_strides(a.key_strides, key, 3);
    set_strides(a.value_strides, value, 3);
    if (mask) {
        set_strides(a.mask_strides, *mask, 4);
        a.mask_kind = mask->scalar_type() == ScalarType::Bool ? U8 : kind_of(*mask);
    }
    if (key_scale) set_strides(a.scale_strides[0], *key_scale, 3);
    if (value_scale) set_strides(a.scale_strides[1], *value_scale, 3);
    a.kind = kind_of(query), a.cache_kind = kind_of_rows(key, a.key_scale);
    if (a.kind < 0 || a.kind == U8 || a.cache_kind < 0 || a.cache_kind != kind_of_rows(value, a.value_scale) ||
        (!key_scale && a.kind != a.cache_kind) || (mask && a.mask_kind < 0))
        throw std::runtime_error("attention: float32, bfloat16, float16, codes and masks of floats or bool are handled");
    return a;
}

int64_t threads_for(const Attention& a) {
    return std::min<int64_t>(torch::stable::get_num_threads(), 1 + a.work() / WORK_OF_A_THREAD);
}

Tensor attend_cpu(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask, double scale,
                  std::optional<double> softcap, std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
    Attention a = attention_of(query, key, value, mask, scale, softcap, key_scale, value_scale);
    const int64_t shape[] = {a.batch, a.heads, a.length, a.value_width};
    Tensor out = empty(query, shape, 4);
    if (out.numel() == 0) return out;
    a.out = out.data_ptr();
    static thread_local Scratch scratch;
    const int64_t threads = threads_for(a);
    char* memory = scratch.get<char>(a.bytes(threads));
    auto run = [&](int64_t thread, Meeting& meeting) { a.run(thread, meeting); };
    as_team(threads, [&](int64_t n) { a.begin(memory, n); }, run);
    return out;
}

#ifdef HAS_AVX512
// (batch, length, heads, value width)
Tensor attend_prompt(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask, bool is_causal, double scale,
                     std::optional<double> softcap) {
    Attention a = attention_of(query, key, value, mask, scale, softcap);
    a.is_causal = is_causal;
    const int64_t shape[] = {a.batch, a.length, a.heads, a.value_width};
    Tensor out = empty(query, shape, 4);
    if (out.numel() == 0) return out;
    a.out = out.data_ptr();
    static thread_local Scratch scratch;
    const int64_t threads = threads_for(a);
    char* memory = scratch.get<char>(Shares::bytes(threads));
    Shares shares;
    int64_t positions;
    auto begin = [&](int64_t n) {
        positions = positions_of_piece(a, n);
        shares.begin(memory, n, a.batch * a.kv_heads * ((a.length + positions - 1) / positions), 1);
    };
    as_team(threads, begin, [&](int64_t thread, Meeting&) { attend_pieces(a, shares, positions, thread); });
    return out;
}
#endif

}  // namespace

extern "C" int has_prompts() {
#ifdef HAS_AVX512
    return 1;
#else
    return 0;
#endif
}

STABLE_TORCH_LIBRARY_IMPL(qcompile_kernels, CPU, m) {
    m.impl("attend_cpu", TORCH_BOX(&attend_cpu));
#ifdef HAS_AVX512
    m.impl("attend_prompt", TORCH_BOX(&attend_prompt));
#endif
}

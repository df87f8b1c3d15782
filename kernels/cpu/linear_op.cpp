// linear_packed, and fused_packed of a few rows, called by torch without Python in between, which takes longer than a
// small layer does.
//
// Ordinary arguments are a Linear. All others, more rows of fused_packed and what is wrong go to linear_anyhow and
// fused_anyhow, the same in Python (linear_cpu.py, fused_linear_cpu.py).

#include <array>

namespace {

using torch::stable::detail::from;

// The op of this name in Python.
template <typename... Arguments> Tensor in_python(const char* name, const Arguments&... arguments) {
    std::array<StableIValue, sizeof...(arguments)> stack = {from(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor empty_with(const Tensor& x, int64_t dims, int64_t outputs) {
    int64_t shape[16];
    for (int64_t i = 0; i < dims; i++) shape[i] = x.size(i);
    shape[dims - 1] = outputs;
    return empty(x, shape, dims);
}

bool take_x(Linear& linear, const Tensor& x) {
    const int64_t dims = x.dim();
    return dims && dims <= 16 && x.is_contiguous() &&
           linear.take_x(x.data_ptr(), kind_of(x), x.numel(), x.size(dims - 1));
}

void run_alone(Linear& linear) {
    static thread_local Scratch scratch;
    const int64_t threads = threads_for(linear.work());
    char* memory = scratch.get<char>(linear.bytes(threads));
    auto run = [&](int64_t thread, Meeting& meeting) { linear.run(thread, meeting); };
    as_team(threads, [&](int64_t n) { linear.begin(memory, n); }, run);
}

Tensor linear_packed(Tensor x, Tensor data, Tensor scale, std::optional<Tensor> zero, std::optional<Tensor> bias,
                     std::string spec) {
    Linear linear;
    if (!take_x(linear, x) || !linear.take_weight(spec, data, scale, zero, bias, true))
        return in_python("qcompile_kernels::linear_anyhow", x, data, scale, zero, bias, spec);
    Tensor y = empty_with(x, x.dim(), linear.outputs);
    linear.y = y.data_ptr();
    if (linear.outputs && linear.rows > linear.reader.most[linear.kind]) linear.run_many(threads_for(linear.work()));
    else if (linear.outputs) run_alone(linear);
    return y;
}

Tensor fused_packed(Tensor x, std::optional<Tensor> norm_weight, std::optional<double> eps, double weight_offset,
                    Tensor data, Tensor scale, std::optional<Tensor> zero, std::optional<Tensor> bias,
                    std::optional<Tensor> residual, std::string spec, std::optional<std::string> activation,
                    bool gated, std::optional<std::string> rounding) {
    Linear linear;
    if (!take_x(linear, x) || !linear.take_weight(spec, data, scale, zero, bias) || !linear.outputs ||
        !linear.take_norm(norm_weight, eps, weight_offset) || !linear.take_activation(activation, gated) ||
        !linear.take_rounding(rounding) ||
        (residual && (!residual->is_contiguous() || residual->numel() != linear.rows * linear.width() ||
                      kind_of(*residual) != linear.kind)))
        return in_python("qcompile_kernels::fused_anyhow", x, norm_weight, eps, weight_offset, data, scale, zero, bias,
                         residual, spec, activation, gated, rounding);
    Tensor y = empty_with(x, x.dim(), linear.width());
    linear.y = y.data_ptr();
    if (residual) linear.residual = residual->data_ptr();
    run_alone(linear);
    return y;
}

}  // namespace

extern "C" void know(const char* spec, int64_t columns, void* few_rows, void* many_rows, const int64_t* most,
                     const int64_t* many, int64_t group, int64_t groups, int64_t height, int64_t bytes, int by_row,
                     int added, float offset) {
    std::unique_lock<std::shared_mutex> writing(lock);
    readers[{spec, columns}] = {(ShareFewRows)few_rows, (ManyRows)many_rows, {most[0], most[1], most[2]},
                                {many[0], many[1], many[2]}, group, groups, height, bytes, by_row, added, offset};
    readers_known++;
}

extern "C" void forget() {
    std::unique_lock<std::shared_mutex> writing(lock);
    readers.clear();
    readers_known++;
}

STABLE_TORCH_LIBRARY_IMPL(qcompile_kernels, CPU, m) {
    m.impl("linear_packed", TORCH_BOX(&linear_packed));
    m.impl("fused_packed", TORCH_BOX(&fused_packed));
}

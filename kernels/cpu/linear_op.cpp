// linear_packed and fused_packed of a few rows, called by torch without Python in between, which takes longer than a
// small layer does.
//
// Ordinary arguments go straight to few_rows of the library that was compiled for the weight's codes. All others, more
// rows and what is wrong go to linear_anyhow and fused_anyhow, the same in Python (linear_cpu.py, fused_linear_cpu.py).

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>

namespace {

using torch::stable::detail::from;

// WEIGHT_ARGUMENTS in codes.h; x, its rows, stride and kind; y; bias and its kind; threads.
using FewRows = void (*)(const void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int, int, float, const void*, int64_t, int64_t, int, void*, const void*, int, int);

// What linear_cpu.py knows of a spec with so many columns; `most` rows of float32, bfloat16 and float16.
struct Reader {
    FewRows few_rows;
    int64_t most[3], group, groups, height, bytes;
    int by_row, added;
    float offset;
};

std::map<std::pair<std::string, int64_t>, Reader> readers;
std::shared_mutex lock;

std::optional<Reader> find(const std::string& spec, int64_t columns) {
    std::shared_lock<std::shared_mutex> reading(lock);
    const auto found = readers.find({spec, columns});
    return found == readers.end() ? std::nullopt : std::optional<Reader>(found->second);
}

bool has_rows(const Tensor& t, int64_t rows, int64_t columns) {
    return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && (columns == 1 || t.stride(1) == 1);
}

bool fits(const Reader& reader, const Tensor& x, int64_t rows, const Tensor& data, const Tensor& scale,
          const std::optional<Tensor>& zero, const std::optional<Tensor>& bias) {
    const int kind = kind_of(x);
    if (kind < 0 || kind > 2 || rows < 1 || rows > reader.most[kind] || !x.is_contiguous()) return false;
    const int64_t outputs = data.size(0);
    const int64_t sides = reader.by_row ? (outputs + reader.height - 1) / reader.height : 1;
    return has_rows(data, outputs, reader.bytes) && has_rows(scale, sides, reader.groups) && kind_of(scale) >= 0 &&
           (!zero || (has_rows(*zero, sides, reader.groups) && kind_of(*zero) >= 0)) &&
           (!bias || (bias->is_contiguous() && bias->numel() == outputs && kind_of(*bias) >= 0));
}

// Dense x (rows, columns) times the weight, to dense y.
void multiply(const Reader& reader, const void* x, int64_t rows, int64_t columns, int kind, const Tensor& data,
              const Tensor& scale, const std::optional<Tensor>& zero, const std::optional<Tensor>& bias, void* y) {
    const int64_t outputs = data.size(0), work = rows * outputs * columns;
    if (!outputs) return;
    reader.few_rows(data.data_ptr(), scale.data_ptr(), zero ? zero->data_ptr() : nullptr, outputs, columns,
                    reader.group, reader.height, data.stride(0), reader.by_row ? scale.stride(0) : 0,
                    zero && reader.by_row ? zero->stride(0) : 0, kind_of(scale),
                    zero ? kind_of(*zero) | reader.added : 0, reader.offset, x, rows, columns, kind, y,
                    bias ? bias->data_ptr() : nullptr, bias ? kind_of(*bias) : 0,
                    std::min<int64_t>(torch::stable::get_num_threads(), 1 + work / WORK_OF_A_THREAD));
}

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

Tensor linear_packed(Tensor x, Tensor data, Tensor scale, std::optional<Tensor> zero, std::optional<Tensor> bias,
                     std::string spec) {
    const int64_t dims = x.dim(), columns = dims ? x.size(dims - 1) : 0, rows = columns ? x.numel() / columns : 0;
    const std::optional<Reader> reader = find(spec, columns);
    if (!reader || dims > 16 || data.dim() != 2 || !fits(*reader, x, rows, data, scale, zero, bias))
        return in_python("qcompile_kernels::linear_anyhow", x, data, scale, zero, bias, spec);
    Tensor y = empty_with(x, dims, data.size(0));
    multiply(*reader, x.data_ptr(), rows, columns, kind_of(x), data, scale, zero, bias, y.data_ptr());
    return y;
}

Tensor fused_packed(Tensor x, std::optional<Tensor> norm_weight, std::optional<double> eps, double weight_offset,
                    Tensor data, Tensor scale, std::optional<Tensor> zero, std::optional<Tensor> bias,
                    std::optional<Tensor> residual, std::string spec, std::optional<std::string> activation,
                    bool gated) {
    const int64_t dims = x.dim(), columns = dims ? x.size(dims - 1) : 0, rows = columns ? x.numel() / columns : 0;
    const int kind = kind_of(x);
    const std::optional<Reader> reader = find(spec, columns);
    const auto known = activation ? activation_of(*activation) : std::nullopt;
    const bool fitting = reader && dims <= 16 && data.dim() == 2 && fits(*reader, x, rows, data, scale, zero, bias);
    const int64_t outputs = fitting ? data.size(0) : 0, width = gated ? outputs / 2 : outputs;
    auto has = [](const std::optional<Tensor>& t, int64_t count) {
        return !t || (t->is_contiguous() && t->numel() == count);
    };
    if (!fitting || !outputs || (activation && !known) || (gated && (!known || outputs % 2)) ||
        !has(norm_weight, columns) || (norm_weight && kind_of(*norm_weight) < 0) ||
        !has(residual, rows * width) || (residual && kind_of(*residual) != kind))
        return in_python("qcompile_kernels::fused_anyhow", x, norm_weight, eps, weight_offset, data, scale, zero, bias,
                         residual, spec, activation, gated);
    static thread_local Scratch for_norm, for_gate;
    const int64_t size = size_of(kind);
    auto row = [&](const void* at, int64_t m, int64_t columns) { return (char*)at + m * columns * size; };
    const void* from = x.data_ptr();
    if (eps) {
        void* to = for_norm.get<char>(rows * columns * size);
        for (int64_t m = 0; m < rows; m++)
            norm_row(row(from, m, columns), row(to, m, columns), columns, kind,
                     norm_weight ? norm_weight->data_ptr() : nullptr, norm_weight ? kind_of(*norm_weight) : 0, *eps,
                     weight_offset);
        from = to;
    }
    Tensor out = empty_with(x, dims, width);
    void *y = out.data_ptr(), *wide = gated ? for_gate.get<char>(rows * outputs * size) : y;
    multiply(*reader, from, rows, columns, kind, data, scale, zero, bias, wide);
    for (int64_t m = 0; m < rows; m++) {
        const char* gate = row(wide, m, outputs);
        if (known) activate_row(gate, gated ? gate + width * size : nullptr, row(y, m, width), width, kind, *known);
        if (residual) add_row(row(y, m, width), row(residual->data_ptr(), m, width), width, kind);
    }
    return out;
}

}  // namespace

extern "C" void know(const char* spec, int64_t columns, void* few_rows, int64_t float32, int64_t bfloat16,
                     int64_t float16, int64_t group, int64_t groups, int64_t height, int64_t bytes, int by_row,
                     int added, float offset) {
    std::unique_lock<std::shared_mutex> writing(lock);
    readers[{spec, columns}] = {(FewRows)few_rows, {float32, bfloat16, float16}, group, groups, height, bytes, by_row,
                                added, offset};
}

extern "C" void forget() {
    std::unique_lock<std::shared_mutex> writing(lock);
    readers.clear();
}

STABLE_TORCH_LIBRARY_IMPL(qcompile_kernels, CPU, m) {
    m.impl("linear_packed", TORCH_BOX(&linear_packed));
    m.impl("fused_packed", TORCH_BOX(&fused_packed));
}

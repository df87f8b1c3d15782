// linear_packed of a few rows, called by torch without Python in between, which takes longer than a small layer does.
//
// Ordinary arguments go straight to few_rows of the library that was compiled for the weight's codes. All others, more
// rows and what is wrong go to linear_anyhow, which is the same in Python (linear_cpu.py).

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

Tensor linear_packed(Tensor x, Tensor data, Tensor scale, std::optional<Tensor> zero, std::optional<Tensor> bias,
                     std::string spec) {
    const int64_t dims = x.dim(), columns = dims ? x.size(dims - 1) : 0, rows = columns ? x.numel() / columns : 0;
    const std::optional<Reader> reader = find(spec, columns);
    if (!reader || dims > 16 || data.dim() != 2 || !fits(*reader, x, rows, data, scale, zero, bias)) {
        std::array<StableIValue, 6> stack = {from(x), from(data), from(scale), from(zero), from(bias), from(spec)};
        STABLE_TORCH_ERROR_CODE_CHECK(
            torch_call_dispatcher("qcompile_kernels::linear_anyhow", "", stack.data(), TORCH_ABI_VERSION));
        return torch::stable::detail::to<Tensor>(stack[0]);
    }
    int64_t shape[16];
    for (int64_t i = 0; i < dims; i++) shape[i] = x.size(i);
    const int64_t outputs = shape[dims - 1] = data.size(0);
    Tensor y = empty(x, shape, dims);
    if (!outputs) return y;
    const int64_t work = rows * outputs * columns;
    reader->few_rows(data.data_ptr(), scale.data_ptr(), zero ? zero->data_ptr() : nullptr, outputs, columns,
                     reader->group, reader->height, data.stride(0), reader->by_row ? scale.stride(0) : 0,
                     zero && reader->by_row ? zero->stride(0) : 0, kind_of(scale),
                     zero ? kind_of(*zero) | reader->added : 0, reader->offset, x.data_ptr(), rows, columns,
                     kind_of(x), y.data_ptr(), bias ? bias->data_ptr() : nullptr, bias ? kind_of(*bias) : 0,
                     std::min<int64_t>(torch::stable::get_num_threads(), 1 + work / WORK_OF_A_THREAD));
    return y;
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

STABLE_TORCH_LIBRARY_IMPL(qcompile_kernels, CPU, m) { m.impl("linear_packed", TORCH_BOX(&linear_packed)); }

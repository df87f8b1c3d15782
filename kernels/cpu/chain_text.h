// The text of a chain's steps, taken apart once. Without streams: where the compiler links a static libstdc++ into this,
// they crash, or read zeros, beside the libstdc++ that torch has brought.

#include <locale.h>
#ifdef __APPLE__
#include <xlocale.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr int64_t MOST_DIMS = 8;

// See Step in qcompile/ops/chain.py.
struct Argument {
    enum { NONE, GIVEN, CACHE, RESULT, WORD } type = NONE;
    int64_t index = 0, offset = 0, dims = 0, sizes[MOST_DIMS] = {}, strides[MOST_DIMS] = {};
    std::string word;
    double number = 0;
};
struct Call {
    std::string op;
    std::vector<Argument> arguments;
};
using Arguments = std::vector<std::vector<const Argument*>>;  // some of each call
struct Text {
    std::vector<Call> calls;
    Arguments given;  // those that are tensors
};

// use(part) with each part of `text`; nothing stands behind the last end.
template <typename Use> void each_part(const std::string& text, char end, Use use) {
    for (size_t from = 0, to; from < text.size(); from = to + 1) {
        to = std::min(text.find(end, from), text.size());
        use(text.substr(from, to - from));
    }
}

int64_t numbers_of(const std::string& words, int64_t* to) {
    int64_t count = 0;
    each_part(words, ',', [&](const std::string& each) {
        if (count < MOST_DIMS) to[count++] = std::stoll(each);
    });
    return count;
}

Argument argument_of(const std::string& word) {
    Argument a;
    a.word = word;
    if (word == "none") return a;
    a.type = Argument::WORD;
    if (word[0] == '&') a.type = Argument::CACHE, a.index = std::stoll(word.substr(1));
    if (word[0] == '%') a.type = Argument::GIVEN, a.index = std::stoll(word.substr(1));
    if (word[0] == '#') {
        const size_t at = word.find('@'), sizes = word.find(':'), strides = word.find(':', sizes + 1);
        a.type = Argument::RESULT, a.index = std::stoll(word.substr(1)), a.offset = std::stoll(word.substr(at + 1));
        a.dims = numbers_of(word.substr(sizes + 1, strides - sizes - 1), a.sizes);
        numbers_of(word.substr(strides + 1), a.strides);
    }
    static const locale_t plain = newlocale(LC_ALL_MASK, "C", nullptr);  // whatever the process calls a decimal point
    a.number = strtod_l(word.c_str(), nullptr, plain);                   // 0 where there is none
    return a;
}

std::shared_ptr<const Text> text_of(const std::string& steps) {
    static std::unordered_map<std::string, std::shared_ptr<const Text>> known;
    static std::shared_mutex lock;
    {
        std::shared_lock<std::shared_mutex> reading(lock);
        if (const auto found = known.find(steps); found != known.end()) return found->second;
    }
    auto text = std::make_shared<Text>();
    each_part(steps, '\n', [&](const std::string& line) {
        Call call;
        each_part(line, ' ', [&](const std::string& word) {
            if (call.op.empty()) call.op = word;
            else call.arguments.push_back(argument_of(word));
        });
        text->calls.push_back(call);
    });
    for (const Call& call : text->calls) {
        auto& given = text->given.emplace_back();
        for (const Argument& a : call.arguments)
            if (a.type == Argument::GIVEN || a.type == Argument::CACHE) given.push_back(&a);
    }
    std::unique_lock<std::shared_mutex> writing(lock);
    return known.emplace(steps, text).first->second;  // another thread's, if that was first
}

}  // namespace

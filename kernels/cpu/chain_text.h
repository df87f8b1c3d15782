// The text of a chain's steps, taken apart once.

#include <locale>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <sstream>
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

int64_t numbers_of(const std::string& words, int64_t* to) {
    std::istringstream in(words);
    int64_t count = 0;
    for (std::string each; count < MOST_DIMS && std::getline(in, each, ',');) to[count++] = std::stoll(each);
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
    std::istringstream number(word);
    number.imbue(std::locale::classic());  // whatever the process calls a decimal point
    if (!(number >> a.number)) a.number = 0;
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
    std::istringstream lines(steps);
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        Call call;
        words >> call.op;
        for (std::string word; words >> word;) call.arguments.push_back(argument_of(word));
        text->calls.push_back(call);
    }
    for (const Call& call : text->calls) {
        auto& given = text->given.emplace_back();
        for (const Argument& a : call.arguments)
            if (a.type == Argument::GIVEN || a.type == Argument::CACHE) given.push_back(&a);
    }
    std::unique_lock<std::shared_mutex> writing(lock);
    return known.emplace(steps, text).first->second;  // another thread's, if that was first
}

}  // namespace

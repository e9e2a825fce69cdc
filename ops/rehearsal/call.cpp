// The checks' sentences, the graph's inputs by name, and conversions.
#include "call.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <mutex>

namespace rehearsal {

namespace {

std::mutex guard;
std::string sentence_kept;
std::map<std::string, std::vector<int32_t>> table;
bool running = false, boosted = false;

}  // namespace

int refuse(const std::string& sentence) {
    const std::lock_guard<std::mutex> lock(guard);
    sentence_kept = sentence;
    std::fprintf(stderr, "colora rehearsal: %s\n", sentence.c_str());
    return 1;
}

const std::vector<int32_t>* lengths(const std::string& name) {
    const std::lock_guard<std::mutex> lock(guard);
    const auto found = table.find(name);
    return found == table.end() ? nullptr : &found->second;
}

bool started() { return running; }

bool infer_boost() { return boosted; }

Type Call::type(int i) const {
    static const std::pair<const char*, Type> known[] = {
        {"bfloat16", Type::bf16}, {"float16", Type::half}, {"float32", Type::f32}, {"float64", Type::f64},
        {"uint8", Type::u8},      {"int8", Type::i8},      {"int32", Type::i32},   {"int64", Type::i64}};
    for (const auto& [text, type] : known) {
        if (std::strstr(dtypes[i], text)) return type;
    }
    return Type::other;
}

size_t Call::width() const {
    switch (type(0)) {
        case Type::half:
        case Type::bf16: return 2;
        case Type::i8:
        case Type::u8: return 1;
        case Type::i64:
        case Type::f64: return 8;
        default: return 4;
    }
}

std::string Call::shape(int i) const {
    std::string text = "(";
    for (int k = 0; k < ranks[i]; ++k) text += (k ? ", " : "") + std::to_string(shapes[i][k]);
    return text + ")";
}

void Call::read(int i, int64_t at, int64_t n, float* to) const {
    switch (type(i)) {
        case Type::half: {
            const _Float16* from = static_cast<const _Float16*>(data[i]) + at;
            for (int64_t k = 0; k < n; ++k) to[k] = float(from[k]);
            return;
        }
        case Type::bf16: {
            const uint16_t* from = static_cast<const uint16_t*>(data[i]) + at;
            for (int64_t k = 0; k < n; ++k) to[k] = from_bf16(from[k]);
            return;
        }
        case Type::i8: {
            const int8_t* from = static_cast<const int8_t*>(data[i]) + at;
            for (int64_t k = 0; k < n; ++k) to[k] = float(from[k]);
            return;
        }
        case Type::u8: {
            const uint8_t* from = static_cast<const uint8_t*>(data[i]) + at;
            for (int64_t k = 0; k < n; ++k) to[k] = float(from[k]);
            return;
        }
        default: std::memcpy(to, static_cast<const float*>(data[i]) + at, size_t(n) * 4);
    }
}

std::vector<float> Call::all(int i) const {
    std::vector<float> values(static_cast<size_t>(elements(i)));
    read(i, 0, elements(i), values.data());
    return values;
}

void Call::write(int i, int64_t at, int64_t n, const float* from) const {
    switch (type(i)) {
        case Type::half: {
            _Float16* to = static_cast<_Float16*>(data[i]) + at;
            for (int64_t k = 0; k < n; ++k) to[k] = _Float16(from[k]);
            return;
        }
        case Type::bf16: {
            uint16_t* to = static_cast<uint16_t*>(data[i]) + at;
            for (int64_t k = 0; k < n; ++k) to[k] = to_bf16(from[k]);
            return;
        }
        default: std::memcpy(static_cast<float*>(data[i]) + at, from, size_t(n) * 4);
    }
}

void Call::poison(int i) const {
    const std::vector<float> none(static_cast<size_t>(elements(i)), std::numeric_limits<float>::quiet_NaN());
    write(i, 0, elements(i), none.data());
}

void product(const float* x, const float* weight, float* y, int64_t rows, int64_t in, int64_t out) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t o = 0; o < out; ++o) {
            const float *a = x + r * in, *b = weight + o * in;
            float sum = 0;
#pragma GCC ivdep
            for (int64_t k = 0; k < in; ++k) sum += a[k] * b[k];
            y[r * out + o] = sum;
        }
    }
}

}  // namespace rehearsal

EXPORT const char* colora_rehearsal_error() {
    static thread_local std::string copy;
    const std::lock_guard<std::mutex> lock(rehearsal::guard);
    copy = rehearsal::sentence_kept;
    return copy.c_str();
}

// A graph starts: the inputs of the one before are forgotten. The names follow by colora_rehearsal_input.
EXPORT void colora_rehearsal_start(int infer_boost) {
    const std::lock_guard<std::mutex> lock(rehearsal::guard);
    rehearsal::table.clear();
    rehearsal::sentence_kept.clear();
    rehearsal::running = true;
    rehearsal::boosted = infer_boost != 0;
}

EXPORT void colora_rehearsal_input(const char* name, const int32_t* values, int64_t count) {
    const std::lock_guard<std::mutex> lock(rehearsal::guard);
    rehearsal::table[name].assign(values, values + count);
}

EXPORT void colora_rehearsal_end() {
    const std::lock_guard<std::mutex> lock(rehearsal::guard);
    rehearsal::table.clear();
    rehearsal::running = false;
}

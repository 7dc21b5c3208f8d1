// check.hpp - all there is of a test framework: named cases, and checks that say what was seen.
//
// TEST("group.name") { ... } defines a case; CMake reads the names from the source, so that each is
// a CTest test of its own. A program run with names runs these cases; with none it runs all.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Case {
    const char* name;
    void (*run)();
};
inline std::vector<Case>& cases() {
    static std::vector<Case> all;
    return all;
}
struct Add {
    Add(const char* name, void (*run)()) { cases().push_back({name, run}); }
};
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct Skip : std::runtime_error {  // what the case needs is not on this machine
    using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}
template <class A, class B>
void equal(const A& got, const B& want, const char* file, int line, const char* expression) {
    if (got == want) return;
    std::ostringstream out;
    out << expression << "\n  got:  " << got << "\n  want: " << want;
    fail(file, line, out.str());
}

// Runs the cases named in argv. 0: all passed, 1: one failed, 77: one was skipped, none failed.
inline int main(int argc, char** argv) {
    int failed = 0, skipped = 0, ran = 0;
    for (const Case& c : cases()) {
        bool wanted = argc < 2;
        for (int i = 1; i < argc; i++) wanted |= strcmp(argv[i], c.name) == 0;
        if (!wanted) continue;
        ran++;
        try {
            c.run();
            printf("ok %s\n", c.name);
        } catch (const Skip& e) {
            skipped++;
            printf("skipped %s: %s\n", c.name, e.what());
        } catch (const std::exception& e) {
            failed++;
            printf("FAILED %s: %s\n", c.name, e.what());
        }
        fflush(stdout);
    }
    if (!ran) printf("no case of that name\n");
    return failed || !ran ? 1 : skipped ? 77 : 0;
}

}  // namespace check

#define CHECK_JOIN2(a, b) a##b
#define CHECK_JOIN(a, b) CHECK_JOIN2(a, b)
#define TEST(name)                                                                         \
    static void CHECK_JOIN(case_, __LINE__)();                                             \
    static const check::Add CHECK_JOIN(add_, __LINE__)(name, CHECK_JOIN(case_, __LINE__)); \
    static void CHECK_JOIN(case_, __LINE__)()
#define CHECK(condition)                                               \
    do {                                                               \
        if (!(condition)) check::fail(__FILE__, __LINE__, #condition); \
    } while (0)
#define CHECK_EQ(got, want) check::equal((got), (want), __FILE__, __LINE__, #got)
#define CHECK_WHY(condition, why)                                                                \
    do {                                                                                         \
        if (!(condition)) check::fail(__FILE__, __LINE__, std::string(#condition ": ") + (why)); \
    } while (0)

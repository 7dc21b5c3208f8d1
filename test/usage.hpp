// usage.hpp - what a process uses, as /proc tells.
#pragma once

#include <dirent.h>

#include "program.hpp"

namespace test {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool memory_counts = false;  // theirs is not the program's; and all is slow
#else
constexpr bool memory_counts = true;
#endif

// Threads that may be there for a moment when nothing is asked: each opens the next connection. No
// thread stays because a query needed one before.
constexpr int spare = 2;

struct Usage {
    int threads, files;
    long kilobytes;
};

inline Usage usage_of(pid_t pid) {
    const std::string proc = "/proc/" + std::to_string(pid), status = contents(proc + "/status");
    const auto number = [&](const char* key) {
        const size_t at = status.find(key);
        CHECK_WHY(at != status.npos, std::string(key) + " the process is gone");
        return atol(&status[at + strlen(key)]);
    };
    Usage u{int(number("Threads:")), -2, number("VmRSS:")};  // "." and ".."
    DIR* files = opendir((proc + "/fd").c_str());
    CHECK(files);
    while (readdir(files)) u.files++;
    closedir(files);
    return u;
}

inline double cpu_seconds(pid_t pid) {  // user and system
    const std::string stat = contents("/proc/" + std::to_string(pid) + "/stat");
    std::istringstream fields(stat.substr(stat.rfind(')') + 2));  // from the third on
    std::string word;
    double ticks = 0;
    for (int field = 3; field <= 15 && fields >> word; field++)
        if (field >= 14) ticks += atof(word.c_str());
    return ticks / double(sysconf(_SC_CLK_TCK));
}

}  // namespace test

// pipe.hpp - something else in place of the file that the program under test writes to.
#pragma once

#include "program.hpp"

namespace test {

// While it lives the program writes to that file, by a script in its place.
class Redirected {
public:
    explicit Redirected(const std::string& to) {
        const std::string script = dir_.path + "/script";
        std::ofstream(script) << "#!/bin/sh\nexec " << before_ << " \"$@\" >" << to << "\n";
        chmod(script.c_str(), 0700);
        setenv("PROXY", script.c_str(), 1);
    }
    Redirected(const Redirected&) = delete;
    ~Redirected() { setenv("PROXY", before_.c_str(), 1); }

private:
    const std::string before_ = environment("PROXY");
    TempDir dir_;
};

// A pipe that it writes to.
class Pipe {
public:
    Pipe() : fd(make(path_)), redirected_(path_) {}
    ~Pipe() { close(fd); }
    void fill() {
        const std::string much(4096, '.');
        while (write(fd, much.data(), much.size()) > 0) {
        }
        while (write(fd, ".", 1) > 0) {
        }
    }
    std::string read_some(size_t most) {
        std::string some(most, 0);
        some.resize(size_t(std::max<ssize_t>(0, read(fd, some.data(), most))));
        return some;
    }

private:
    static int make(const std::string& path) {
        CHECK_EQ(mkfifo(path.c_str(), 0600), 0);
        return open(path.c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }
    TempDir dir_;
    const std::string path_ = dir_.path + "/pipe";

public:
    const int fd;

private:
    Redirected redirected_;
};

}  // namespace test

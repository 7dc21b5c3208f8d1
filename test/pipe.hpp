// pipe.hpp - a pipe in place of the file that the program under test writes to.
#pragma once

#include "program.hpp"

namespace test {

// A pipe that the program writes to, by a script in its place.
class Pipe {
public:
    Pipe() {
        CHECK_EQ(mkfifo((dir_.path + "/pipe").c_str(), 0600), 0);
        fd = open((dir_.path + "/pipe").c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC);
        const std::string script = dir_.path + "/piped";
        std::ofstream(script) << "#!/bin/sh\nexec " << before_ << " \"$@\" >" << dir_.path
                              << "/pipe\n";
        chmod(script.c_str(), 0700);
        setenv("PROXY", script.c_str(), 1);
    }
    ~Pipe() {
        setenv("PROXY", before_.c_str(), 1);
        close(fd);
    }
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
    int fd;

private:
    const std::string before_ = environment("PROXY");
    TempDir dir_;
};

}  // namespace test

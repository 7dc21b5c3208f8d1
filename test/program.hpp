// program.hpp - the program under test as a child process, and DNS messages made and read by hand.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "upstream.hpp"

namespace test {

using Clock = std::chrono::steady_clock;
inline double since(Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
}

// Waits for a condition that must come true, however slow the machine is.
inline bool eventually(const std::function<bool()>& condition, double seconds = 20) {
    for (const auto start = Clock::now(); since(start) < seconds; usleep(5000))
        if (condition()) return true;
    return condition();
}

inline std::string environment(const char* name) {
    const char* value = getenv(name);
    if (!value || !*value) throw check::Skip(std::string(name) + " is not set");
    return value;
}

inline bool contains(const std::string& text, const std::string& words) {
    return text.find(words) != std::string::npos;
}

inline std::string contents(const std::string& path) {
    std::ifstream in(path);
    return {std::istreambuf_iterator<char>(in), {}};
}

// A child process; ends with its owner, and with this program.
class Process {
public:
    Process(const std::vector<std::string>& command, const std::string& out,
            const std::string& err) {
        pid_ = fork();
        if (pid_ != 0) return;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        signal(SIGPIPE, SIG_DFL);  // the tests' upstream ignores it; the program must on its own
        dup2(open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), 1);
        dup2(open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), 2);
        std::vector<char*> argv;
        for (auto& word : command) argv.push_back(const_cast<char*>(word.c_str()));
        argv.push_back(nullptr);
        execvp(argv[0], argv.data());
        _exit(127);
    }
    ~Process() {
        if (pid_ > 0) {
            kill(pid_, SIGKILL);
            wait();
        }
    }
    int wait() {  // the exit status; 1000 + the signal that ended it
        int status = 0;
        if (pid_ <= 0 || waitpid(pid_, &status, 0) != pid_) return status_;
        pid_ = 0;
        return status_ = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    }
    int end(int signal = SIGTERM) {
        if (pid_ > 0) kill(pid_, signal);
        return wait();
    }
    bool running() { return pid_ > 0 && waitpid(pid_, nullptr, WNOHANG) == 0; }
    pid_t pid() const { return pid_; }

private:
    pid_t pid_ = -1;
    int status_ = -1;
};

inline int run(const std::string& command, std::string& output) {  // by the shell, with stderr
    FILE* pipe = popen((command + " 2>&1").c_str(), "r");
    char buffer[4096];
    output.clear();
    while (size_t n = fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, n);
    return WEXITSTATUS(pclose(pipe));
}

// A port for UDP and TCP, IPv4 and IPv6, for as long as this program runs. Not one that the system
// gives out by itself: it could give it to another before it is used. That no other test takes it
// shows a socket in the abstract name space: only one program can have the name.
inline int free_port() {
    static std::mt19937 random{std::random_device{}()};
    for (int i = 0; i < 200; i++) {
        const int port = 10000 + int(random() % 10000);
        sockaddr_un name{AF_UNIX, {}};
        const int length =
            snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "dot-proxy test %d", port);
        const int mine = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);  // stays open
        const auto named = socklen_t(offsetof(sockaddr_un, sun_path) + 1 + size_t(length));
        bool good = bind(mine, (sockaddr*)&name, named) == 0;
        sockaddr_in6 any{};
        any.sin6_family = AF_INET6;
        any.sin6_port = htons(uint16_t(port));
        for (int type : {SOCK_DGRAM, SOCK_STREAM}) {
            const int fd = socket(AF_INET6, type, 0);
            good = good && bind(fd, (sockaddr*)&any, sizeof any) == 0;
            close(fd);
        }
        if (good) return port;
        close(mine);
    }
    throw std::runtime_error("no free port");
}

// ---- DNS ---------------------------------------------------------------------------------------

inline int get16(const Octets& m, size_t at) {
    return at + 2 <= m.size() ? m[at] << 8 | m[at + 1] : -1;
}

inline Octets wire_name(const std::string& name) {
    Octets out;
    std::stringstream in(name);
    for (std::string label; std::getline(in, label, '.');) {
        out.push_back(uint8_t(label.size()));
        out.insert(out.end(), label.begin(), label.end());
    }
    out.push_back(0);
    return out;
}
inline void append(Octets& to, const Octets& more) {
    to.insert(to.end(), more.begin(), more.end());
}
inline void append16(Octets& to, int value) { append(to, {uint8_t(value >> 8), uint8_t(value)}); }

struct Edns {
    int size = 1232;
    bool dnssec_ok = false;
    Octets options{};
    int version = 0, z = 0;
};
inline Octets opt_record(const Edns& e) {
    Octets r{0, 0, 41};
    append16(r, e.size);
    append(r, {0, uint8_t(e.version), uint8_t((e.dnssec_ok ? 0x80 : 0) | e.z >> 8), uint8_t(e.z)});
    append16(r, int(e.options.size()));
    append(r, e.options);
    return r;
}
inline Octets make_query(const std::string& name, int type = 1, std::optional<Edns> edns = {},
                         int id = 0x1234, int flags = 0x0100, int klass = 1) {
    Octets q;
    for (int v : {id, flags, 1, 0, 0, edns ? 1 : 0}) append16(q, v);
    append(q, wire_name(name));
    append16(q, type);
    append16(q, klass);
    if (edns) append(q, opt_record(*edns));
    return q;
}

// An answer as this test reads it; it throws if it does not parse to its last octet.
struct Answer {
    explicit Answer(const Octets& m) : octets(m) {
        CHECK(m.size() >= 12);
        size_t at = 12;
        for (int i = 0; i < get16(m, 4); i++) at = skip(at) + 4;
        question_end = at;
        for (int i = 0; i < get16(m, 6) + get16(m, 8) + get16(m, 10); i++) {
            const size_t type_at = skip(at);
            const int type = get16(m, type_at), length = get16(m, type_at + 8);
            CHECK(length >= 0 && type_at + 10 + length <= m.size());
            if (type == 41) {
                CHECK(!has_opt);
                has_opt = true;
                opt_at = type_at - 1;
                opt_flags = get16(m, type_at + 6);
                ext_rcode = m[type_at + 4];
                for (size_t o = type_at + 10; o < type_at + 10 + length; o += 4 + get16(m, o + 2))
                    options[get16(m, o)] =
                        Octets(m.begin() + o + 4, m.begin() + o + 4 + get16(m, o + 2));
            }
            if (type == 1 && length == 4) memcpy(address, &m[type_at + 10], 4);
            at = type_at + 10 + length;
        }
        CHECK_EQ(at, m.size());
    }
    int id() const { return get16(octets, 0); }
    int rcode() const { return octets[3] & 15; }
    bool tc() const { return octets[2] & 2; }
    int count(int section) const { return get16(octets, 4 + 2 * section); }
    size_t skip(size_t at) const {
        for (; at < octets.size(); at += 1 + octets[at]) {
            if (octets[at] == 0) return at + 1;
            if (octets[at] >= 0xc0) return at + 2;
        }
        CHECK(!"a name without end");
        return 0;
    }
    Octets octets;
    size_t question_end = 12, opt_at = 0;
    bool has_opt = false;
    int opt_flags = 0, ext_rcode = 0;
    uint8_t address[4]{};
    std::map<int, Octets> options;
};

// The address that the upstream gives for this name.
inline bool has_address_of(const Answer& a, const Octets& query) {
    uint32_t hash = 2166136261u;
    for (size_t i = 12; i < query.size() && i < a.question_end - 4; i++)
        hash = (hash ^ uint32_t(tolower(query[i]))) * 16777619u;
    const uint8_t want[] = {uint8_t(hash >> 24), uint8_t(hash >> 16), uint8_t(hash >> 8),
                            uint8_t(hash)};
    return memcmp(want, a.address, 4) == 0;
}

// What is wrong with -vv's text for a message: its lines must have all of its octets, in order, and
// nothing that a terminal would obey.
inline std::string fault_of(const std::string& text, const Octets& m) {
    for (uint8_t c : text)
        if (c != '\n' && (c < ' ' || c > '~')) return "has the octet " + std::to_string(c);
    std::stringstream lines(text);
    std::string line;
    std::getline(lines, line);  // it begins with the end of another line
    if (!line.empty()) return "begins with " + line;
    size_t at = 0;
    while (std::getline(lines, line)) {
        char two[4] = "";
        if (at < m.size()) snprintf(two, sizeof two, " %02x", m[at]);
        size_t next = at;
        const size_t star = line.rfind(" * ");  // " 00 * 84"
        if (star != line.npos && line.substr(0, star).ends_with(two)) {
            const std::string digits = line.substr(star + 3);
            const bool is_number = digits.find_first_not_of("0123456789") == digits.npos;
            const size_t size = is_number && digits.size() <= 5 ? size_t(atoi(digits.c_str())) : 0;
            size_t same = at;
            while (same < m.size() && m[same] == m[at]) same++;
            if (size > 16 && size <= same - at) next = at + size;
        }
        const bool is_short = next != at;
        std::string hex;
        for (size_t o = at; !is_short && o < m.size() && hex.size() < line.size(); o++) {
            snprintf(two, sizeof two, " %02x", m[o]);
            hex += two;
            if (line.ends_with(hex)) next = o + 1;  // as many as there are
        }
        if (next == at && line.ends_with("  ")) continue;  // a field without octets
        if (next == at) return "'" + line + "' has not the octets from " + std::to_string(at);
        at = next;
    }
    return at == m.size() ? "" : "ends at " + std::to_string(at);
}

// A client's socket to 127.0.0.1, or another address.
struct Client {
    // `from`: its own address, if not just any.
    Client(int type, int port, const std::string& to = "127.0.0.1", const std::string& from = "")
        : tcp(type == SOCK_STREAM) {
        const bool six = to.find(':') != std::string::npos;
        const socklen_t size = six ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
        fd = socket(six ? AF_INET6 : AF_INET, type | SOCK_CLOEXEC, 0);
        const sockaddr_in6 there = place(to, port), here = place(from, 0);
        if (!from.empty()) CHECK_EQ(bind(fd, (const sockaddr*)&here, size), 0);
        connected = connect(fd, (const sockaddr*)&there, size) == 0;
    }
    static sockaddr_in6 place(const std::string& address, int port) {
        sockaddr_in6 v6{};
        auto& v4 = reinterpret_cast<sockaddr_in&>(v6);
        const bool six = address.find(':') != std::string::npos;
        v6.sin6_family = six ? AF_INET6 : AF_INET;
        v4.sin_port = htons(uint16_t(port));
        inet_pton(v6.sin6_family, address.c_str(), six ? (void*)&v6.sin6_addr : &v4.sin_addr);
        return v6;
    }
    Client(const Client&) = delete;
    ~Client() { close(fd); }
    void raw(const Octets& octets) {
        CHECK_EQ(::send(fd, octets.data(), octets.size(), MSG_NOSIGNAL), ssize_t(octets.size()));
    }
    void send(const Octets& message) {
        Octets out;
        if (tcp) append16(out, int(message.size()));
        append(out, message);
        raw(out);
    }
    bool readable(double seconds) {
        pollfd p{fd, POLLIN, 0};
        return poll(&p, 1, int(seconds * 1000)) == 1;
    }
    bool closed(double seconds) {  // by the other end, within that time
        uint8_t octet;
        const auto start = Clock::now();
        while (since(start) < seconds && readable(seconds - since(start)))
            if (recv(fd, &octet, 1, 0) <= 0) return true;
        return false;
    }
    std::optional<Octets> receive(double seconds = 30) {  // nullopt: nothing came, or it was closed
        Octets m(65537);
        if (!tcp) {
            if (!readable(seconds)) return {};
            const ssize_t n = recv(fd, m.data(), m.size(), 0);
            if (n < 0) return {};
            m.resize(size_t(n));
            return m;
        }
        size_t have = 0;
        while (have < 2 || have < 2u + get16(m, 0)) {
            if (!readable(seconds)) return {};
            const ssize_t n = recv(fd, &m[have], (have < 2 ? 2 : 2u + get16(m, 0)) - have, 0);
            if (n <= 0) return {};
            have += size_t(n);
        }
        return Octets(m.begin() + 2, m.begin() + have);
    }
    int fd;
    bool connected, tcp;
};

// The number of that name in the last TOTALS line; -1: there is none.
inline int number_in_totals(const std::string& out, const std::string& name) {
    const size_t line = out.rfind("TOTALS ");
    const size_t at = out.find(" " + name + "=", line);
    if (line == out.npos || at == out.npos) return -1;
    return atoi(out.c_str() + at + name.size() + 2);
}

// dot-proxy on a free port. What it prints is in out() and err().
class Proxy {
public:
    using Words = std::vector<std::string>;
    // --listen, --upstream and --ca come first; `more` are further options. In all of them {port}
    // stands for the proxy's own.
    Proxy(const Certificates& certificates, const std::vector<std::string>& upstreams,
          const Words& more = {}, const Words& listen = {"127.0.0.1", "::1"}) {
        for (int tries = 0; tries < 20 && !process_; tries++) {
            port = free_port();
            Words command{environment("PROXY")};
            for (auto& one : listen) {
                command.push_back("-l");
                command.push_back(one + "@" + std::to_string(port));
            }
            for (auto& one : upstreams) {
                command.push_back("-u");
                command.push_back(one);
            }
            command.push_back("-c");
            command.push_back(certificates.ca());
            command.insert(command.end(), more.begin(), more.end());
            for (auto& word : command)
                if (const size_t at = word.find("{port}"); at != word.npos)
                    word.replace(at, 6, std::to_string(port));
            process_ = std::make_unique<Process>(command, dir_.path + "/out", dir_.path + "/err");
            const std::string to = listen[0] == "0.0.0.0" ? "127.0.0.1" : listen[0];
            const auto answers = [&] { return Client(SOCK_STREAM, port, to).connected; };
            const bool up = eventually([&] { return !process_->running() || answers(); }, 30);
            if (up && process_->running()) return;
            process_.reset();  // somebody took the port
        }
        throw std::runtime_error("the proxy does not start: " + err());
    }
    // Every test ends with this: exit 0, and nothing on stderr, which is where sanitizers report.
    // What is found here fails the test, as a check in the test itself does. Nothing is checked if
    // the test has failed already, as an exception is on its way then.
    ~Proxy() noexcept(false) {
        if (std::uncaught_exceptions() > exceptions_) {
            fprintf(stderr, "%s", err().c_str());
            return;
        }
        const int status = process_->end();  // that of before if the test itself ended it
        CHECK_EQ(err(), "");
        CHECK_EQ(status, 0);
    }
    std::string out() const { return contents(dir_.path + "/out"); }
    std::string err() const { return contents(dir_.path + "/err"); }
    bool prints(const std::string& words) {
        return eventually([&] { return contains(out(), words); }, 5);
    }
    // A number of the TOTALS line as it is now; 0: it has no such name.
    int total(const std::string& name) {
        const size_t before = out().size();
        kill(pid(), SIGUSR1);
        const auto line = [&] { return out().substr(before); };
        CHECK(eventually([&] { return number_in_totals(line(), "udp") >= 0; }));
        return std::max(0, number_in_totals(line(), name));
    }
    pid_t pid() const { return process_->pid(); }
    Process& process() { return *process_; }

    std::optional<Octets> udp(const Octets& query, double seconds = 30,
                              const std::string& to = "127.0.0.1") {
        Client c(SOCK_DGRAM, port, to);
        c.send(query);
        return c.receive(seconds);
    }
    std::optional<Octets> tcp(const Octets& query, double seconds = 30,
                              const std::string& to = "127.0.0.1") {
        Client c(SOCK_STREAM, port, to);
        c.send(query);
        return c.receive(seconds);
    }
    Answer ask(const Octets& query, bool over_tcp = false) {  // there must be an answer
        const auto a = over_tcp ? tcp(query) : udp(query);
        CHECK_WHY(a, "no answer; it printed: " + out() + err());
        return Answer(*a);
    }
    int port = 0;

private:
    TempDir dir_;
    std::unique_ptr<Process> process_;
    const int exceptions_ = std::uncaught_exceptions();
};

// What most tests need: an upstream, and the program in front of it.
struct Pair {
    explicit Pair(const Options& options = {}, const Proxy::Words& more = {},
                  const Proxy::Words& listen = {"127.0.0.1", "::1"})
        : upstream(certificates, options), proxy(certificates, {upstream.spec()}, more, listen) {}
    Certificates certificates;
    Upstream upstream;
    Proxy proxy;
};

// Many queries at once, each by a client of its own.
struct Burst {
    Burst(Proxy& proxy, int queries, const std::string& name = "a.test") {
        std::vector<std::thread> clients;
        for (int i = 0; i < queries; i++)
            clients.emplace_back([&] {
                const auto start = Clock::now();
                const auto answer = proxy.udp(make_query(name));
                std::lock_guard lock(mutex);
                slowest = std::max(slowest, since(start));
                if (!answer) return;
                answered++;
                good += Answer(*answer).rcode() == 0;
            });
        for (auto& client : clients) client.join();
    }
    std::mutex mutex;
    int answered = 0, good = 0;  // of any kind, and those with NOERROR
    double slowest = 0;          // seconds
};

}  // namespace test

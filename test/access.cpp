// access.cpp - who may ask, how much, and as whom the program runs: the whole program, black box.
//
// Tests that need addresses other than loopback's make a network namespace of their own, as root.
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/resource.h>

#include <algorithm>
#include <thread>

#include "program.hpp"
#include "usage.hpp"

using namespace test;

// A client's socket from one address to another; both of IPv4 or both of IPv6.
struct From : Client {
    From(int type, const std::string& from, const std::string& to, int port)
        : Client(type, port, to, from) {}

    // The answer; nullopt: none within that time, or the connection was closed.
    std::optional<Octets> ask(const Octets& query, double seconds = 20) {
        Octets out, in(65537);
        if (tcp) append16(out, int(query.size()));
        append(out, query);
        if (::send(fd, out.data(), out.size(), MSG_NOSIGNAL) != ssize_t(out.size())) return {};
        pollfd readable{fd, POLLIN, 0};
        if (poll(&readable, 1, int(seconds * 1000)) != 1) return {};
        const ssize_t got = recv(fd, in.data(), in.size(), 0);  // these answers come in one piece
        if (got < (tcp ? 3 : 1)) return {};
        return Octets(in.begin() + (tcp ? 2 : 0), in.begin() + got);
    }
};

// Silence over UDP, a close over TCP.
static bool refused(int port, const std::string& from, const std::string& to) {
    From udp(SOCK_DGRAM, from, to, port), tcp(SOCK_STREAM, from, to, port);
    return !udp.ask(make_query("denied.test"), 0.5) && !tcp.ask(make_query("denied.test"), 5);
}
static bool served(int port, const std::string& from, const std::string& to) {
    From udp(SOCK_DGRAM, from, to, port), tcp(SOCK_STREAM, from, to, port);
    return udp.ask(make_query("a.test")) && tcp.ask(make_query("a.test"));
}

// A network of this process's own, with a loopback that has these addresses too. Needs root.
static void make_network(const std::vector<std::string>& addresses) {
    if (unshare(CLONE_NEWNET) != 0) throw check::Skip("a network namespace needs root");
    const int fd = socket(AF_INET, SOCK_DGRAM, 0);
    int number = 0;
    for (auto& address : addresses) {
        ifreq request{};
        snprintf(request.ifr_name, sizeof request.ifr_name, "lo%s",
                 number ? (":" + std::to_string(number)).c_str() : "");
        number++;
        auto& place = reinterpret_cast<sockaddr_in&>(request.ifr_addr);
        place.sin_family = AF_INET;
        inet_pton(AF_INET, address.c_str(), &place.sin_addr);
        CHECK_EQ(ioctl(fd, SIOCSIFADDR, &request), 0);
        request.ifr_flags = IFF_UP;
        CHECK_EQ(ioctl(fd, SIOCSIFFLAGS, &request), 0);
    }
    close(fd);
}

// Gives the loopback of this process's own network an IPv6 address too.
static void add_ipv6_address(const std::string& address) {
    const int fd = socket(AF_INET6, SOCK_DGRAM, 0);
    struct {  // in6_ifreq of linux/ipv6.h, which redefines what netinet/in.h has
        in6_addr address;
        uint32_t prefix_length;
        int interface;
    } request{};
    inet_pton(AF_INET6, address.c_str(), &request.address);
    request.prefix_length = 128;
    request.interface = int(if_nametoindex("lo"));
    CHECK_EQ(ioctl(fd, SIOCSIFADDR, &request), 0);
    close(fd);
}

TEST("access.allow_and_deny_judge_udp_and_tcp") {  // deny wins
    make_network({"127.0.0.1", "10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4", "192.168.7.7"});
    Pair p({}, {"-a", "10.1.0.0/30", "-d", "10.1.0.2", "-d", "127.0.0.2"});
    for (const char* good : {"10.1.0.1", "10.1.0.3", "127.0.0.1", "127.9.9.9"})  // loopback always
        CHECK_WHY(served(p.proxy.port, good, "127.0.0.1"), good);
    CHECK(served(p.proxy.port, "::1", "::1"));
    // 192.168.7.7 is of a private network, which --allow takes the place of.
    for (const char* bad : {"10.1.0.2", "10.1.0.4", "127.0.0.2", "192.168.7.7"})
        CHECK_WHY(refused(p.proxy.port, bad, "127.0.0.1"), bad);
    CHECK(eventually([&] { return p.proxy.total("denied") == 8; }));
    CHECK_EQ(p.proxy.total("udp"), 5);
    const std::string denied = "denied";  // of those nothing was sent
    for (auto& q : p.upstream.seen().queries)
        CHECK(std::search(q.begin(), q.end(), denied.begin(), denied.end()) == q.end());
}

TEST("access.of_one_family_says_nothing_of_the_other") {
    make_network({"127.0.0.1", "198.51.100.7"});
    add_ipv6_address("2001:db8::7");
    Pair p({}, {"-a", "0.0.0.0/0"});
    CHECK(served(p.proxy.port, "198.51.100.7", "127.0.0.1"));
    CHECK(refused(p.proxy.port, "2001:db8::7", "::1"));
}

TEST("access.a_refused_client_leaves_a_line_that_says_what_would_let_it_in") {  // with -v
    Pair p({}, {"-v", "-d", "127.0.0.2"});
    CHECK(refused(p.proxy.port, "127.0.0.2", "127.0.0.1"));
    CHECK_WHY(p.proxy.prints("DENIED udp 127.0.0.2: --allow 127.0.0.2"), p.proxy.out());
    CHECK_WHY(p.proxy.prints("DENIED tcp 127.0.0.2: --allow 127.0.0.2"), p.proxy.out());
}

TEST("access.default_is_loopback_and_private_networks") {
    make_network({"127.0.0.1", "10.1.2.3", "172.16.0.1", "172.31.255.254", "172.32.0.1",
                  "192.168.7.7", "169.254.1.1", "100.64.0.1", "100.127.255.254", "100.128.0.1",
                  "198.51.100.7", "11.0.0.1"});
    Pair p({}, {}, {"0.0.0.0"});
    for (const char* good : {"127.0.0.1", "10.1.2.3", "172.16.0.1", "172.31.255.254", "192.168.7.7",
                             "169.254.1.1", "100.64.0.1", "100.127.255.254"})
        CHECK_WHY(served(p.proxy.port, good, "127.0.0.1"), good);
    for (const char* bad : {"198.51.100.7", "11.0.0.1", "172.32.0.1", "100.128.0.1"})
        CHECK_WHY(refused(p.proxy.port, bad, "127.0.0.1"), bad);
}

TEST("rate.udp_gets_tc_and_tcp_refused") {
    Pair p({}, {"-r", "5"});
    int good[2] = {}, over[2] = {};
    From udp(SOCK_DGRAM, "127.0.0.1", "127.0.0.1", p.proxy.port);
    From tcp(SOCK_STREAM, "127.0.0.1", "127.0.0.1", p.proxy.port);
    const auto start = Clock::now();
    for (int i = 0; i < 40; i++) {
        From& client = i % 2 ? tcp : udp;
        const Octets q = make_query("a.test");
        const auto octets = client.ask(q);
        CHECK(octets);
        const Answer a(*octets);
        if (a.count(1))
            good[i % 2]++;
        else
            over[i % 2]++;
        if (a.count(1)) continue;
        CHECK(a.octets.size() <= q.size());  // nobody gets more than was sent
        CHECK_EQ(a.rcode(), client.tcp ? 5 : 0);
        CHECK_EQ(a.tc(), !client.tcp);
    }
    const int most = 5 + int(5 * since(start)) + 1;
    for (int i : {0, 1})
        CHECK(good[i] >= 5 && good[i] <= most);  // each transport has its own share
    CHECK(eventually([&] { return p.proxy.total("failure:over_the_rate") == over[0] + over[1]; }));
    usleep(1100000);
    CHECK(Answer(*udp.ask(make_query("a.test"))).count(1) == 1);
}

TEST("rate.one_client_does_not_spend_anothers") {
    Pair p({}, {"-r", "3"});
    From greedy(SOCK_DGRAM, "127.0.0.7", "127.0.0.1", p.proxy.port);
    for (int i = 0; i < 50; i++) greedy.ask(make_query("a.test"));
    CHECK(Answer(*greedy.ask(make_query("a.test"))).tc());
    for (const char* other : {"127.0.0.8", "127.0.0.9"}) {
        From client(SOCK_DGRAM, other, "127.0.0.1", p.proxy.port);
        for (int i = 0; i < 3; i++) CHECK(!Answer(*client.ask(make_query("a.test"))).tc());
    }
}

TEST("rate.what_is_no_query_gets_no_answer_even_over_the_rate") {
    Pair p({}, {"-r", "1"});
    From client(SOCK_DGRAM, "127.0.0.1", "127.0.0.1", p.proxy.port);
    for (int i = 0; i < 5; i++) client.ask(make_query("a.test"));
    CHECK(!client.ask(make_query("a.test", 1, {}, 1, 0x8180), 0.3));
}

TEST("limits.few_open_files") {  // 64: it refuses, does not die, and recovers
    TempDir dir;
    std::ofstream(dir.path + "/few")
        << "#!/bin/sh\nulimit -n 64\nexec " << environment("PROXY") << " \"$@\"\n";
    chmod((dir.path + "/few").c_str(), 0700);
    setenv("PROXY", (dir.path + "/few").c_str(), 1);
    Pair p({}, {"-t", "1000"});
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    std::vector<std::unique_ptr<From>> silent;
    for (int i = 0; i < 100; i++)
        silent.push_back(
            std::make_unique<From>(SOCK_STREAM, "127.0.0.1", "127.0.0.1", p.proxy.port));
    for (int i = 0; i < 20; i++) CHECK(p.proxy.udp(make_query("a" + std::to_string(i) + ".test")));
    silent.clear();
    CHECK(eventually([&] { return p.proxy.ask(make_query("a.test")).rcode() == 0; }, 30));
    CHECK(p.proxy.tcp(make_query("a.test")));
}

TEST("limits.tcp_clients_beyond_the_limit_wait_and_are_served") {  // 256
    Pair p;
    std::vector<std::unique_ptr<From>> silent;
    for (int i = 0; i < 256; i++)
        silent.push_back(std::make_unique<From>(SOCK_STREAM, "127.0.1." + std::to_string(i / 60),
                                                "127.0.0.1", p.proxy.port));
    From late(SOCK_STREAM, "127.0.0.2", "127.0.0.1", p.proxy.port);
    CHECK(!late.ask(make_query("a.test"), 0.5));
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);  // UDP is not held up
    silent.clear();
    pollfd readable{late.fd, POLLIN, 0};
    CHECK_EQ(poll(&readable, 1, 20000), 1);
}

TEST("limits.tcp_clients_of_one_address") {  // 64; others are served, and the limit recovers
    Pair p;
    const char* crowd = "127.0.0.7";
    std::vector<std::unique_ptr<From>> silent;
    for (int i = 0; i < 64; i++)
        silent.push_back(std::make_unique<From>(SOCK_STREAM, crowd, "127.0.0.1", p.proxy.port));
    CHECK(silent.back()->ask(make_query("a.test")));
    CHECK(!From(SOCK_STREAM, crowd, "127.0.0.1", p.proxy.port).ask(make_query("a.test"), 5));
    CHECK(From(SOCK_STREAM, "127.0.0.8", "127.0.0.1", p.proxy.port).ask(make_query("a.test")));
    CHECK(eventually([&] { return p.proxy.total("denied") == 1; }));
    silent.clear();
    CHECK(eventually([&] {
        return From(SOCK_STREAM, crowd, "127.0.0.1", p.proxy.port)
            .ask(make_query("a.test"))
            .has_value();
    }));
}

static std::string status_of(pid_t pid, const std::string& name) {
    const std::string all = contents("/proc/" + std::to_string(pid) + "/status");
    const size_t at = all.find("\n" + name + ":"), from = at + name.size() + 2;
    return at == all.npos ? "" : all.substr(from, all.find('\n', from) - from);
}

TEST("user.privileges_are_dropped_for_good") {
    if (geteuid() != 0) throw check::Skip("needs root");
    std::string root;
    for (const char* user : {"nobody", "65534"}) {
        Pair p({}, {"-U", user});
        CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
        CHECK_EQ(status_of(p.proxy.pid(), "Uid"), "\t65534\t65534\t65534\t65534");
        CHECK_EQ(status_of(p.proxy.pid(), "Gid"), "\t65534\t65534\t65534\t65534");
        CHECK(status_of(p.proxy.pid(), "Groups").find_first_of("0123456789") == std::string::npos);
        for (const char* set : {"CapEff", "CapPrm"})
            CHECK_EQ(status_of(p.proxy.pid(), set), "\t0000000000000000");
        CHECK_EQ(status_of(p.proxy.pid(), "NoNewPrivs"), "\t1");
    }
}

TEST("totals.count_what_happens") {
    Pair p;
    for (int i = 0; i < 3; i++) CHECK_EQ(p.proxy.ask(make_query("a.test"), i == 0).rcode(), 0);
    CHECK_EQ(p.proxy.ask(make_query("a.test", 252)).rcode(), 4);
    CHECK_EQ(p.proxy.ask(make_query("wrongid.test")).rcode(), 2);
    CHECK(p.proxy.prints("no answer to this query"));
    const struct {
        const char* name;
        int number;
    } rows[] = {{"udp", 4},      {"tcp", 1},     {"success", 3},
                {"failure", 2},  {"NOERROR", 3}, {"NOTIMP", 1},
                {"SERVFAIL", 1}, {"denied", 0},  {"failure:AXFR_and_IXFR_are_not_proxied", 1}};
    for (auto& row : rows)  // an answer is counted when it has left
        CHECK_WHY(eventually([&] { return p.proxy.total(row.name) == row.number; }), row.name);
    CHECK(p.proxy.total("dialled") >= 3 && p.proxy.total("resumed") >= 1 &&
          p.proxy.total("ready") >= 1);
    CHECK_EQ(p.proxy.total("no_such_name"), 0);
}

TEST("limits.hosts_that_are_gone_leave_nothing_behind") {
    Pair p;
    const auto visit = [&](int from, int to) {
        for (int i = from; i < to; i++)
            From(SOCK_STREAM,
                 "127.9." + std::to_string(i / 250) + "." + std::to_string(1 + i % 250),
                 "127.0.0.1", p.proxy.port);
        CHECK_EQ(p.proxy.ask(make_query("a.test"), true).rcode(), 0);  // all before are accepted
        return usage_of(p.proxy.pid()).kilobytes;
    };
    const long before = visit(0, 2000), after = visit(2000, memory_counts ? 20000 : 3000);
    if (memory_counts)
        CHECK_WHY(after - before < 1500, std::to_string(after - before) + " kB more");
}

TEST("totals.the_most_in_flight_are_kept") {
    Pair p;
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK_EQ(p.proxy.total("in_flight_most"), 1);
    Client client(SOCK_DGRAM, p.proxy.port);
    for (int id = 1; id <= 5; id++) client.send(make_query("slow1000.test", 1, {}, id));
    for (int id = 1; id <= 5; id++) CHECK(client.receive(10));
    CHECK_EQ(p.proxy.total("in_flight_most"), 5);
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK_EQ(p.proxy.total("in_flight_most"), 5);
}

TEST("totals.a_failing_upstream_is_told_once_and_when_it_answers_again") {
    Pair p({}, {"-k", "0"});
    const Options good, bad{.accept = Options::Close};
    p.upstream.set(bad);
    for (int i = 0; i < 20; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 2);
    p.upstream.set(good);
    CHECK(eventually([&] { return p.proxy.ask(make_query("a.test")).rcode() == 0; }, 30));
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    const std::string out = p.proxy.out();
    std::vector<std::string> told;
    for (size_t at = 0; (at = out.find("UPSTREAM ", at)) != out.npos; at++)
        told.push_back(out.substr(at, out.find('\n', at) - at));
    CHECK_EQ(told.size(), 2u);
    CHECK_WHY(told[0].find("asked last") != std::string::npos, told[0]);
    CHECK_WHY(told[1].find("answers again") != std::string::npos, told[1]);
}

int main(int argc, char** argv) { return check::main(argc, argv); }

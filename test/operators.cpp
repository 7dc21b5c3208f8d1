// operators.cpp - what its operator can do wrong, or must be able to rely on: names to verify,
// lengths, addresses that are not there, routes, signals, and a log that nobody reads.
#include <ifaddrs.h>
#include <openssl/ssl.h>
#include <sys/resource.h>

#include <thread>

#include "links.hpp"
#include "pipe.hpp"
#include "program.hpp"
#include "usage.hpp"

using namespace test;

constexpr double slack = memory_counts ? 4 : 8;  // seconds that a slow machine may take more

// The program with these words, for itself: it may end, or say something on stderr.
struct Started {
    explicit Started(std::vector<std::string> words) : process(command(words), out, err) {}
    static std::vector<std::string> command(std::vector<std::string> words) {
        words.insert(words.begin(), environment("PROXY"));
        return words;
    }
    std::string said() const { return contents(out) + contents(err); }
    TempDir dir;
    const std::string out = dir.path + "/out", err = dir.path + "/err";
    Process process;
};

// It has ended, within that time; how is still to be asked.
static bool ends(Process& process, double seconds) {
    return eventually(
        [&] {
            siginfo_t info{};
            waitid(P_PID, id_t(process.pid()), &info, WEXITED | WNOHANG | WNOWAIT);
            return info.si_pid != 0;
        },
        seconds);
}

// ---- The command line --------------------------------------------------------------------------

// Exit 2, and one line that a person can read.
static void refused(const std::vector<std::string>& words) {
    const std::string what = words[0] + " " + words[1].substr(0, 60);
    std::vector<std::string> all{"-l", "127.0.0.1@" + std::to_string(free_port())};
    all.insert(all.end(), words.begin(), words.end());
    Started s(all);
    CHECK_WHY(ends(s.process, 30), what + ": it serves");
    const int status = s.process.wait();
    CHECK_WHY(status == 2, what + ": exit " + std::to_string(status));
    const std::string err = contents(s.err);
    CHECK_WHY(!err.empty() && err.find('\n') == err.size() - 1, what + ": '" + err + "'");
    CHECK_WHY(err.size() < 2000, what + ": " + std::to_string(err.size()) + " octets");
    CHECK_EQ(contents(s.out), "");
}

TEST("operators.names_to_verify_are_names_of_one_host") {
    const std::string label(60, 'a'), longest = label + "." + label + "." + label + "." + label;
    for (const std::string& name :
         {std::string(".example.com"), std::string("*.example.com"), std::string("a..b"),
          std::string("."), std::string(".."), std::string("example.com.."), std::string(".com"),
          std::string("a.*.com"), std::string("*"), std::string("exa mple.com"), std::string(""),
          std::string(300, 'a'), std::string(64, 'a') + ".com", longest + ".example.com"})
        refused({"-u", "127.0.0.1@853#" + name});
}

TEST("operators.a_leading_dot_trusts_nobody_below_that_name") {
    Certificates c;
    Upstream upstream(c);  // for dot.test
    Started s({"-l", "127.0.0.1@" + std::to_string(free_port()), "-c", c.ca(), "-u",
               "127.0.0.1@" + std::to_string(upstream.port()) + "#.test"});
    CHECK(ends(s.process, 30));
    CHECK_EQ(s.process.wait(), 2);
}

TEST("operators.a_trailing_dot_is_cut") {
    Certificates c;
    Upstream upstream(c);
    Proxy proxy(c, {"127.0.0.1@" + std::to_string(upstream.port()) + "#dot.test."});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK_EQ(upstream.seen().hellos.front().name, "dot.test");
}

TEST("operators.an_ip_address_may_be_the_name_to_verify") {
    Certificates c;
    Upstream upstream(c, {.cert = Cert::IpAddress}), named(c);
    const std::string at = "127.0.0.1@" + std::to_string(upstream.port());
    {
        Proxy proxy(c, {at + "#127.0.0.1"});
        const Octets q = make_query("a.test");
        for (bool tcp : {false, true}) CHECK(has_address_of(proxy.ask(q, tcp), q));
        const Hello hello = upstream.seen().hellos.front();
        CHECK_EQ(hello.name, "");  // RFC 6066 3: no SNI for addresses
        CHECK_EQ(hello.alpn, "dot");
    }
    for (const std::string& bad :
         {at + "#127.0.0.2", at + "#::1", at + "#dot.test", at + "#2001:db8::1",
          "127.0.0.1@" + std::to_string(named.port()) + "#127.0.0.1"}) {
        Proxy proxy(c, {bad}, {"-t", "2000"});
        CHECK_WHY(proxy.ask(make_query("a.test")).rcode() == 2, bad);
    }
    const std::string pin = c.pin(Cert::IpAddress), other = c.pin(Cert::Good);
    Proxy right(c, {at + "#127.0.0.1,pin-sha256=" + pin}, {"-t", "2000"});
    CHECK_EQ(right.ask(make_query("a.test")).rcode(), 0);
    Proxy wrong(c, {at + "#127.0.0.1,pin-sha256=" + other}, {"-t", "2000"});
    CHECK_EQ(wrong.ask(make_query("a.test")).rcode(), 2);
}

TEST("operators.options_of_120000_characters") {
    for (char fill : {'a', '1', '.', '#', ','}) {
        const std::string very_long(120000, fill);
        for (const char* option :
             {"-u", "-l", "-c", "-a", "-d", "-r", "-n", "-t", "-k", "-m", "-U"})
            refused({option, very_long});
    }
    std::string pins, ats;
    for (int i = 0; i < 2000; i++) pins += ",pin-sha256=" + std::string(43, 'A') + "=";
    refused({"-u", "127.0.0.1#dot.test" + pins});
    refused({"-u", "127.0.0.1@853#" + std::string(120000, 'a')});
    refused({"-u", std::string(120000, ' ') + "127.0.0.1#dot.test"});
    refused({"-l", "127.0.0.1@" + std::string(120000, '0') + "53"});
    refused({"-a", "10.0.0.0/" + std::string(120000, '0') + "8"});
    refused({"-t", std::string(120000, '0') + "4000"});
}

// ---- Addresses ---------------------------------------------------------------------------------

static bool answers(const std::string& address, int port) {
    Client client(SOCK_DGRAM, port, address);
    const Octets q = make_query("a.test");
    if (!client.connected || ::send(client.fd, q.data(), q.size(), MSG_NOSIGNAL) < 0) return false;
    const auto m = client.receive(1);
    return m && Answer(*m).rcode() == 0;
}

// It listens on 127.0.0.1 and on an address that is not there yet: it says so, and either serves it
// when it comes, or ends.
static void listens_on_absent(const std::string& address, const std::function<void()>& it_comes) {
    Certificates c;
    Upstream upstream(c);
    const int port = free_port();
    const std::string at = "@" + std::to_string(port);
    Started s({"-c", c.ca(), "-u", upstream.spec(), "-l", "127.0.0.1" + at, "-l", address + at,
               "-a", "0.0.0.0/0", "-a", "::/0"});
    const auto ended = [&] { return ends(s.process, 0); };
    CHECK(eventually([&] { return ended() || answers("127.0.0.1", port); }));
    if (ended()) {
        CHECK_EQ(s.process.wait(), 1);
        CHECK_WHY(contains(contents(s.err), address), s.said());
        return;
    }
    CHECK_WHY(contains(s.said(), address), "not a word: " + s.said());
    it_comes();
    CHECK_WHY(eventually([&] { return answers(address, port); }), s.said());
    CHECK(Client(SOCK_STREAM, port, address).connected);
    CHECK_EQ(s.process.end(), 0);
}

TEST("operators.an_address_that_is_not_this_hosts_is_not_passed_over") {
    if (!own_network()) throw check::Skip("a network namespace needs root");
    listens_on_absent("2001:db8::5", [] { add_address("lo", "2001:db8::5", 128); });
    listens_on_absent("192.0.2.5", [] { add_address("lo", "192.0.2.5", 32); });
}

TEST("operators.a_tentative_address_is_not_passed_over") {
    if (!own_network()) throw check::Skip("a network namespace needs root");
    const int own = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    add_link("c0", "c1", own);
    close(own);
    set_network("ipv6/conf/c0/dad_transmits", "3");  // some 3 s
    for (const char* device : {"c0", "c1"}) set_up(device);
    usleep(200000);
    add_address("c0", "2001:db8::6", 64, true);
    listens_on_absent("2001:db8::6", [] {});
}

// ---- Routes ------------------------------------------------------------------------------------

static sockaddr_in6 link_local_of(const std::string& device) {
    sockaddr_in6 found{};
    ifaddrs* all = nullptr;
    getifaddrs(&all);
    for (ifaddrs* one = all; one; one = one->ifa_next) {
        if (!one->ifa_addr || one->ifa_addr->sa_family != AF_INET6 || device != one->ifa_name)
            continue;
        const auto& place = *reinterpret_cast<const sockaddr_in6*>(one->ifa_addr);
        if (IN6_IS_ADDR_LINKLOCAL(&place.sin6_addr)) found = place;
    }
    freeifaddrs(all);
    return found;
}

// A health check asks where the program listens, from the same address.
TEST("operators.this_host_may_ask_whatever_allow_says") {
    TwoHosts hosts;
    Certificates c;
    Upstream upstream(c);
    hosts.be_first();
    const auto asks = [&](Proxy& proxy, const std::string& from) {
        Client client(SOCK_DGRAM, proxy.port, "10.9.0.1", from);
        client.send(make_query("a.test"));
        return client.receive(3).has_value();
    };
    Proxy proxy(c, {upstream.spec()}, {"-a", "203.0.113.0/24"}, {"10.9.0.1"});
    CHECK(asks(proxy, "10.9.0.1"));
    CHECK(!asks(proxy, "10.9.1.1"));  // This host's, too, but nobody listens there.
    Proxy denied(c, {upstream.spec()}, {"-d", "10.9.0.1"}, {"10.9.0.1"});
    CHECK(!asks(denied, "10.9.0.1"));
}

TEST("operators.the_way_back_is_as_the_routes_say") {
    TwoHosts hosts;
    Certificates c;
    Upstream upstream(c);
    const auto try_it = [&](Proxy& proxy) {
        hosts.be_second();
        const char* ways[][2] = {{"10.9.0.2", "10.9.0.1"},  // back by the link on which it came
                                 {"10.9.7.7", "10.9.0.1"},  // and by the other one
                                 {"10.9.7.7", "10.9.1.1"},  //
                                 {"fd00:9:0::2", "fd00:9:0::1"},   //
                                 {"fd00:9:7::7", "fd00:9:0::1"},   //
                                 {"fd00:9:7::7", "fd00:9:1::1"}};  //
        for (bool tcp : {true, false})
            for (auto& way : ways) {
                Client client(tcp ? SOCK_STREAM : SOCK_DGRAM, proxy.port, way[1], way[0]);
                const Octets q = make_query("a.test");
                client.send(q);
                const auto m = client.receive(5);  // from the address that was asked: connected
                CHECK_WHY(m && has_address_of(Answer(*m), q),
                          std::string(tcp ? "tcp " : "udp ") + way[0] + " asks " + way[1]);
            }
        hosts.be_first();
    };
    hosts.be_first();
    {
        Proxy everywhere(c, {upstream.spec()}, {}, {"0.0.0.0", "::"});
        try_it(everywhere);
    }
    Proxy at_each(c, {upstream.spec()}, {}, {"10.9.0.1", "10.9.1.1", "fd00:9:0::1", "fd00:9:1::1"});
    try_it(at_each);
}

TEST("operators.link_local_clients_are_answered_on_their_link") {
    TwoHosts hosts;
    Certificates c;
    Upstream upstream(c);
    hosts.be_first();
    Proxy proxy(c, {upstream.spec()}, {}, {"127.0.0.1", "::"});
    for (const std::string link : {"0", "1"})
        for (int type : {SOCK_DGRAM, SOCK_STREAM}) {
            hosts.be_first();
            sockaddr_in6 there{};
            CHECK(eventually([&] { return (there = link_local_of("a" + link)).sin6_family; }));
            hosts.be_second();
            CHECK(eventually([&] { return link_local_of("b" + link).sin6_family; }));
            there.sin6_scope_id = if_nametoindex(("b" + link).c_str());
            there.sin6_port = htons(uint16_t(proxy.port));
            Client client(type, 9, "::1");
            close(client.fd);
            client.fd = socket(AF_INET6, type | SOCK_CLOEXEC, 0);
            CHECK_EQ(connect(client.fd, reinterpret_cast<sockaddr*>(&there), sizeof there), 0);
            const Octets q = make_query("a.test");
            client.send(q);
            const auto m = client.receive(5);
            CHECK_WHY(m && has_address_of(Answer(*m), q), "link " + link);
        }
    hosts.be_first();
}

// ---- The log -----------------------------------------------------------------------------------

// However many write at once, and however slowly it is read: what is told of a message stays whole.
TEST("operators.the_octets_of_vv_do_not_mix") {
    Pipe pipe;
    std::string text;
    std::atomic<bool> over{false};
    std::thread reader([&] {
        for (bool last = false; !last; usleep(1000)) {
            last = over;
            for (std::string some; !(some = pipe.read_some(5000)).empty(); usleep(200))
                text += some;
        }
    });
    constexpr int number = 24, size = 35 + 180 * 16;
    {
        Pair p({.delay_ms = 20}, {"-vv"});
        std::vector<std::thread> clients;
        for (int i = 0; i < number; i++)
            clients.emplace_back([&, i] {
                Octets q = make_query("a.test", 1, {}, i), options;
                for (int code = 0xfd00; q.size() + 11 + options.size() + 16 <= size; code++) {
                    append16(options, code);
                    append(options, {0, 12});
                    for (int o = 0; o < 12; o++) options.push_back(uint8_t(code + i + o));
                }
                append(q, opt_record({1232, false, options}));
                q[11] = 1;
                p.proxy.udp(q);
            });
        for (auto& client : clients) client.join();
        usleep(500000);
    }
    over = true;
    reader.join();
    std::istringstream lines(text);
    int queries = 0;
    size_t octets = 0;
    bool inside = false;
    const auto done = [&] {
        if (inside) CHECK_EQ(octets, size_t(size));
        queries += inside;
        inside = false;
    };
    for (std::string line; std::getline(lines, line);) {
        const size_t again = line.find("#", 1);
        CHECK_WHY(again == line.npos || !isdigit(line[again + 1]) || !contains(line, " ms  "),
                  "a line within a line: " + line);
        if (line.compare(0, 8, "        ") != 0) {
            done();
            inside = contains(line, " [1] ") && contains(line, "octets over");
            octets = 0;
        } else if (inside) {  // three columns, of which the last is the octets
            for (size_t at = line.size();
                 at >= 3 && line[at - 3] == ' ' && isxdigit(line[at - 2]) &&
                 isxdigit(line[at - 1]) && at > 8 + 12;
                 at -= 3)
                octets++;
            if (const size_t star = line.rfind(" * "); star != line.npos && star > 20)
                octets += size_t(atoi(&line[star + 3]));
        }
    }
    done();
    CHECK_EQ(queries, number);
}

// Who tells that a resolver has failed waits for the log to be read. The others are answered.
TEST("operators.a_log_that_nobody_reads_stops_only_who_writes") {
    Pipe pipe;
    Certificates c;
    Upstream bad(c, {.cert = Cert::Expired}), good(c);
    Proxy proxy(c, {bad.spec(), good.spec()}, {"-q"});
    pipe.fill();
    Client teller(SOCK_DGRAM, proxy.port);
    teller.send(make_query("a.test"));
    CHECK(!teller.readable(2));
    for (int i = 0; i < 5; i++) {
        const auto m = proxy.udp(make_query("b.test"), 10);
        CHECK(m && Answer(*m).rcode() == 0);
    }
}

// ---- The end -----------------------------------------------------------------------------------

// Sends the signal; the program must end with 0, and in time.
static void ends_well(Process& process, int signal, const std::string& what) {
    const auto start = Clock::now();
    kill(process.pid(), signal);
    const bool ended = ends(process, 4 + slack);
    printf("%s: %s after %.1f s\n", what.c_str(), ended ? "ended" : "not ended", since(start));
    if (!ended) kill(process.pid(), SIGKILL);
    const int status = process.wait();
    CHECK_WHY(ended && status == 0, what + ": " + std::to_string(status));
}

TEST("operators.it_ends_though_nobody_reads_its_log") {
    for (int signal : {SIGTERM, SIGINT, SIGHUP})
        for (const Proxy::Words& more : {Proxy::Words{"-q"}, Proxy::Words{}, {"-vv"}}) {
            Pipe pipe;
            Pair p({}, more);
            CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
            pipe.fill();
            Client client(SOCK_DGRAM, p.proxy.port);
            for (int i = 0; i < 20; i++) client.send(make_query("b.test", 1, {}, i));
            Client other(SOCK_STREAM, p.proxy.port);
            for (int i = 0; i < 5; i++) other.send(make_query("c.test", 1, {}, i));
            usleep(200000);
            ends_well(p.proxy.process(), signal,
                      "signal " + std::to_string(signal) + (more.empty() ? "" : " " + more[0]));
        }
}

TEST("operators.totals_asked_for_in_vain_do_not_keep_it") {  // SIGUSR1, and the pipe is full
    Pipe pipe;
    Pair p({}, {"-q"});
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    pipe.fill();
    for (int i = 0; i < 3; i++) {
        kill(p.proxy.pid(), SIGUSR1);
        usleep(50000);
    }
    CHECK_EQ(p.proxy.ask(make_query("b.test")).rcode(), 0);
    ends_well(p.proxy.process(), SIGTERM, "after SIGUSR1");
}

TEST("operators.it_ends_whatever_resolvers_and_clients_do") {
    const struct {
        const char* what;
        Options options;
    } rows[] = {{"a deaf resolver", {.deaf = true}},
                {"one that hangs", {.accept = Options::Hang}},
                {"one that sends tickets", {.endless = Endless::Tickets}},
                {"one that sends tickets instead of answers",
                 {.endless = Endless::Tickets, .endless_after_query = true}},
                {"one that sends HelloRequests", {.endless = Endless::HelloRequests}},
                {"a good one", {}}};
    for (auto& row : rows) {
        Pair p(row.options, {"-t", "20000"});
        Client udp(SOCK_DGRAM, p.proxy.port);
        std::vector<std::unique_ptr<Client>> tcp;
        for (int i = 0; i < 20; i++) {
            udp.send(make_query("a" + std::to_string(i) + ".test", 1, {}, i));
            tcp.push_back(std::make_unique<Client>(SOCK_STREAM, p.proxy.port));
            if (i % 4 == 0) tcp.back()->raw({0, 50, 1});  // and never the rest
            for (int n = 0; i % 4 == 1 && n < 30; n++)    // and never reads
                tcp.back()->send(make_query("size60000.test", 1, {}, n));
        }
        usleep(400000);
        ends_well(p.proxy.process(), SIGTERM, row.what);
    }
}

TEST("operators.sighup_says_the_totals_and_ends_it") {
    for (int signal : {SIGHUP, SIGINT, SIGTERM}) {
        Pair p;
        Client client(SOCK_DGRAM, p.proxy.port);
        client.send(make_query("slow500.test"));
        CHECK(eventually([&] { return !p.upstream.seen().queries.empty(); }));
        kill(p.proxy.pid(), signal);
        const auto m = client.receive(5);  // what is in flight is finished
        CHECK(m && Answer(*m).rcode() == 0);
        CHECK_WHY(ends(p.proxy.process(), 4 + slack), std::to_string(signal));
        CHECK_EQ(p.proxy.process().wait(), 0);
        CHECK_EQ(number_in_totals(p.proxy.out(), "success"), 1);
    }
}

TEST("operators.with_nohup_it_outlives_its_terminal") {
    signal(SIGHUP, SIG_IGN);  // as nohup(1) does
    Pair p;
    signal(SIGHUP, SIG_DFL);
    kill(p.proxy.pid(), SIGHUP);
    sleep(1);
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
}

// A laptop sleeps, a container is frozen, or somebody presses control-Z: what waits is interrupted.
TEST("operators.when_it_was_stopped_and_goes_on_nobody_is_cut_off") {
    Pair p({.handshake_ms = 500}, {"-k", "0", "-v"});
    Client idle(SOCK_STREAM, p.proxy.port), busy(SOCK_DGRAM, p.proxy.port);
    busy.send(make_query("a.test"));
    usleep(200000);
    kill(p.proxy.pid(), SIGSTOP);
    usleep(100000);
    kill(p.proxy.pid(), SIGCONT);
    CHECK(busy.receive());
    idle.send(make_query("b.test"));
    const auto answer = idle.receive();
    CHECK(answer);
    CHECK_EQ(Answer(*answer).rcode(), 0);
}

// ---- Memory ------------------------------------------------------------------------------------

static void limit_memory(pid_t pid, rlim_t octets) {
    const rlimit limit{octets, RLIM_INFINITY};
    CHECK_EQ(prlimit(pid, RLIMIT_AS, &limit, nullptr), 0);
}

// How many of ten queries, with time between them, find a connection that is ready.
static int ready_of_ten(Proxy& proxy) {
    const int before = proxy.total("ready");
    for (int i = 0; i < 10; i++) {
        CHECK_EQ(proxy.ask(make_query("a" + std::to_string(i) + ".test")).rcode(), 0);
        usleep(100000);
    }
    return proxy.total("ready") - before;
}

// Now and then no thread and no large piece of memory is to be had: when they are again all is as
// before, and no place of a connection that was to be opened ahead is lost.
TEST("operators.ready_connections_come_back_when_memory_does") {
    if (!memory_counts) throw check::Skip("sanitizers need all addresses");
    Pair p({}, {"-k", "4"});
    CHECK(ready_of_ten(p.proxy) >= 8);
    std::mt19937 random{1};
    int lost = 0;
    for (int round = 0; round < 12; round++) {
        Client client(SOCK_DGRAM, p.proxy.port);
        p.upstream.set({.handshake_ms = 60});
        for (int i = 0; i < 60; i++) client.send(make_query("slow60.test", 1, Edns{}, i));
        usleep(useconds_t(20000 + random() % 100000));  // their threads are there
        const std::string status = contents("/proc/" + std::to_string(p.proxy.pid()) + "/status");
        const rlim_t size = rlim_t(atol(&status[status.find("VmSize:") + 7])) * 1024;
        limit_memory(p.proxy.pid(), size + random() % 30 * 4096);
        usleep(200000);
        p.upstream.set({});
        usleep(200000);
        limit_memory(p.proxy.pid(), RLIM_INFINITY);
        for (int i = 0; i < 60; i++) lost += !client.receive(1);
    }
    printf("%d queries without an answer\n", lost);
    sleep(2);
    CHECK(ready_of_ten(p.proxy) >= 8);
}

int main(int argc, char** argv) { return check::main(argc, argv); }

// flood.cpp - what strangers can do to others by asking too much, or by saying nothing.
//
// In a network of its own where that is allowed, else on the host's loopback: the many addresses
// are those of 127.0.0.0/8, which are there without being asked for. usage: PROXY=... [CROWD=10]
// flood
#include <sys/resource.h>

#include <algorithm>
#include <thread>

#include "network.hpp"
#include "program.hpp"
#include "usage.hpp"

using namespace test;

// A client's socket that has its own address; it waits for nothing.
struct Stranger {
    Stranger(int type, int port, const std::string& from)
        : fd(socket(AF_INET, type | SOCK_CLOEXEC, 0)) {
        sockaddr_in a{};
        a.sin_family = AF_INET;
        inet_pton(AF_INET, from.c_str(), &a.sin_addr);
        CHECK(bind(fd, (sockaddr*)&a, sizeof a) == 0);
        a.sin_port = htons(uint16_t(port));
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        fcntl(fd, F_SETFL, O_NONBLOCK);
        (void)!connect(fd, (sockaddr*)&a, sizeof a);  // over TCP it may have to wait
    }
    Stranger(const Stranger&) = delete;
    ~Stranger() { close(fd); }
    bool closed() {  // by the other end
        uint8_t octet;
        const ssize_t n = recv(fd, &octet, 1, MSG_DONTWAIT);
        return n == 0 || (n < 0 && errno != EAGAIN);
    }
    const int fd;
};

static std::string address(int network, int number) {
    return "127." + std::to_string(network) + ".1." + std::to_string(1 + number);
}

// ---- Too many questions ------------------------------------------------------------------------

constexpr double length = 10;                       // seconds
constexpr int want = memory_counts ? 20000 : 2000;  // queries a second; sanitizers are slow
// What all of them together are allowed, 20 a second each, must be less than the machine can do: a
// limit for each address is none for their number. More of them, to see that: CROWD=200.
static const int crowd = getenv("CROWD") ? std::clamp(atoi(getenv("CROWD")), 1, 250)
                         : memory_counts ? 10
                                         : 3;

// Sends until the time is over; how many.
static long flood(int port) {
    std::vector<std::unique_ptr<Stranger>> strangers;
    for (int i = 0; i < crowd; i++)
        strangers.push_back(std::make_unique<Stranger>(SOCK_DGRAM, port, address(1, i)));
    constexpr int batch = 16;
    std::vector<Octets> queries(batch);
    std::vector<iovec> parts(batch);
    std::vector<mmsghdr> messages(batch);
    long sent = 0;
    const auto start = Clock::now();
    for (double now; (now = since(start)) < length;) {
        if (sent > now * want) {
            usleep(500);
            continue;
        }
        for (int i = 0; i < batch; i++) {
            queries[i] = make_query("f" + std::to_string(sent + i) + ".test", 1, {}, i);
            parts[i] = {queries[i].data(), queries[i].size()};
            messages[i] = {};
            messages[i].msg_hdr.msg_iov = &parts[i];
            messages[i].msg_hdr.msg_iovlen = 1;
        }
        const int fd = strangers[size_t(sent / batch) % size_t(crowd)]->fd;
        sent += std::max(0, sendmmsg(fd, messages.data(), batch, 0));
    }
    return sent;
}

struct Honest {
    std::atomic<int> asked{0}, good{0}, bad{0}, again{0}, tcp{0};
};

// As a stub resolver does: UDP, once more after a second or SERVFAIL, and TCP if it is told TC.
static void be_honest(int port, int number, Honest& count) {
    const Octets q = make_query("h" + std::to_string(number) + ".test", 1, {}, number);
    bool tcp = false;
    for (int tries = 0; tries < 5; tries++) {
        count.again += tries > 0;
        Client client(tcp ? SOCK_STREAM : SOCK_DGRAM, port);
        client.send(q);
        auto m = client.receive(tcp ? 5 : 1);
        if (m && !tcp && Answer(*m).tc()) {
            count.tcp++;
            tcp = true;
            Client second(SOCK_STREAM, port);
            second.send(q);
            m = second.receive(5);
        }
        if (m && Answer(*m).rcode() == 0 && has_address_of(Answer(*m), q)) {
            count.good++;
            return;
        }
        if (m) usleep(200000);
    }
    count.bad++;
}

TEST("flood.an_honest_client_is_answered_beside_those_that_ask_too_much") {
    Certificates certificates;
    Upstream upstream(certificates);
    Proxy proxy(certificates, {upstream.spec()}, {"-q", "--rate", "20"});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    std::atomic<bool> over{false};
    long sent = 0;
    std::thread flooder([&] {
        sent = flood(proxy.port);
        over = true;
    });
    Honest honest;
    std::vector<std::thread> clients;
    Usage peak{};
    const auto start = Clock::now();
    for (int i = 0; !over; i++) {
        honest.asked++;
        clients.emplace_back([&, i] {
            try {
                be_honest(proxy.port, i, honest);
            } catch (const std::exception& e) {
                printf("honest client: %s\n", e.what());
                honest.bad++;
            }
        });
        const Usage now = usage_of(proxy.pid());
        peak = {std::max(peak.threads, now.threads), std::max(peak.files, now.files),
                std::max(peak.kilobytes, now.kilobytes)};
        while (!over && since(start) < (i + 1) * 0.1) usleep(2000);
    }
    flooder.join();
    for (auto& one : clients) one.join();
    printf("flood: %.0f queries a second; peak: %d threads, %d open files, %ld kB\n",
           double(sent) / length, peak.threads, peak.files, peak.kilobytes);
    printf("honest: %d asked, %d answered, %d not; %d asked again, %d told to use TCP\n",
           honest.asked.load(), honest.good.load(), honest.bad.load(), honest.again.load(),
           honest.tcp.load());
    sleep(5);
    const double before = cpu_seconds(proxy.pid());
    sleep(2);
    const double idle = (cpu_seconds(proxy.pid()) - before) / 2;
    printf("5 s later: %.1f %% of a core\n", 100 * idle);
    kill(proxy.pid(), SIGUSR1);
    proxy.prints("TOTALS");
    printf("%s", proxy.out().c_str());
    CHECK(sent > 1000);
    CHECK_EQ(honest.bad.load(), 0);
    CHECK_EQ(honest.good.load(), honest.asked.load());
    // 512 queries, 256 clients over TCP; three tries for each query, and the ready connections.
    CHECK(peak.threads <= 512 + 256 + 10 && peak.files <= 512 * 3 + 256 + 64 + 20);
    if (memory_counts) CHECK(peak.kilobytes < 200 * 1024);
    CHECK_WHY(idle < 0.05, std::to_string(idle));
}

// ---- Silence -----------------------------------------------------------------------------------

TEST("flood.550_silent_clients_cost_a_query_nothing_and_are_gone_in_time") {
    rlimit files{};
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = std::min<rlim_t>(files.rlim_max, 4096);
    setrlimit(RLIMIT_NOFILE, &files);
    Certificates certificates;
    Upstream upstream(certificates);
    Proxy proxy(certificates, {upstream.spec()}, {"-q"});
    const auto slowest_of_ten = [&] {
        double slowest = 0;
        for (int i = 0; i < 10; i++) {
            const auto one = Clock::now();
            CHECK_EQ(proxy.ask(make_query("a" + std::to_string(i) + ".test")).rcode(), 0);
            slowest = std::max(slowest, since(one));
        }
        return slowest;
    };
    const double usual = slowest_of_ten();
    const Usage before = usage_of(proxy.pid());
    std::vector<std::unique_ptr<Stranger>> strangers;
    for (int i = 0; i < 550; i++)
        strangers.push_back(
            std::make_unique<Stranger>(SOCK_STREAM, proxy.port, address(2, i % 20)));
    const auto start = Clock::now();
    CHECK(eventually([&] { return usage_of(proxy.pid()).threads >= 250; }));
    const double beside = slowest_of_ten();
    std::thread patient([&] {
        const auto asked = Clock::now();
        const auto m = proxy.tcp(make_query("tcp.test"), 60);
        printf("a query over TCP behind them: %s after %.1f s\n",
               m && Answer(*m).rcode() == 0 ? "answered" : "lost", since(asked));
    });
    size_t gone = 0;
    int most = 0;
    // 256 are served at a time, for 10 s each.
    for (int round = 0; gone < strangers.size() && since(start) < 50; round++) {
        gone = 0;
        for (size_t i = 0; i < strangers.size(); i++) {
            gone += strangers[i]->closed();
            const uint8_t octet = 0;  // of a length, then of a message that never comes to its end
            if (i % 11 == 0 && round % 5 == 0)
                (void)!::send(strangers[i]->fd, round ? &octet : (const uint8_t*)"\1", 1,
                              MSG_NOSIGNAL | MSG_DONTWAIT);
        }
        most = std::max(most, usage_of(proxy.pid()).threads);
        usleep(200000);
    }
    const double took = since(start);
    patient.join();
    printf(
        "slowest of ten over UDP: %.1f ms, beside silent clients %.1f ms; %zu gone after %.1f s; "
        "at most %d threads\n",
        usual * 1000, beside * 1000, gone, took, most);
    CHECK_EQ(gone, strangers.size());
    CHECK_WHY(beside < usual + 1, std::to_string(beside));
    CHECK(took > 9 && most <= 256 + 20);
    strangers.clear();
    CHECK(eventually([&] { return usage_of(proxy.pid()).threads <= before.threads + spare; }));
    CHECK_EQ(proxy.ask(make_query("b.test"), true).rcode(), 0);
}

int main(int argc, char** argv) {
    own_network();  // or else the host's
    return check::main(argc, argv);
}

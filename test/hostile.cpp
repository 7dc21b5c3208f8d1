// hostile.cpp - resolvers and clients that mean harm: what they do to others, and for how long.
#include <openssl/ssl.h>

#include <thread>

#include "program.hpp"
#include "usage.hpp"

using namespace test;

constexpr double slack = memory_counts ? 2 : 6;  // seconds that a slow machine may take more

// In a thread a check that fails would end the program: what it answers, or no answer.
static std::optional<Answer> ask(Proxy& proxy, const std::string& name, bool tcp, double seconds) {
    try {
        const Octets q = make_query(name);
        const auto m = tcp ? proxy.tcp(q, seconds) : proxy.udp(q, seconds);
        if (m) return Answer(*m);
    } catch (const std::exception& e) {
        printf("%s: %s\n", name.c_str(), e.what());
    }
    return {};
}

// ---- Resolvers that go on without end ----------------------------------------------------------

// A connection takes no more than some hundred messages, or an answer's octets. What the kernel's
// buffers take besides is a few MB.
static void check_bounds(const Upstream& hostile, Proxy& proxy) {
    const size_t octets = hostile.seen().most_endless;
    const long kilobytes = usage_of(proxy.pid()).kilobytes;
    printf("at most %zu kB on a connection; the proxy has %ld kB\n", octets / 1000, kilobytes);
    if (!memory_counts) return;
    CHECK_WHY(octets < 40'000'000, std::to_string(octets) + " octets");
    CHECK_WHY(kilobytes < 64 * 1024, std::to_string(kilobytes) + " kB");
}

// It is the only upstream: each query has its SERVFAIL when its time is up, or before.
static void alone(const Options& options) {
    Certificates certificates;
    Upstream hostile(certificates, options);
    Proxy proxy(certificates, {hostile.spec()}, {"-t", "2000"});
    const auto start = Clock::now();
    std::vector<std::thread> clients;
    std::atomic<int> answered{0};
    for (int i = 0; i < 6; i++)
        clients.emplace_back([&, i] {
            const auto a = ask(proxy, "c" + std::to_string(i) + ".test", i % 2, 20);
            answered += a && a->rcode() == 2 && since(start) < 2 + slack;
        });
    for (auto& client : clients) client.join();
    CHECK_EQ(answered.load(), 6);
    for (int i = 0; i < 2; i++) {  // and when connections were opened ahead, if any were
        const auto asked = Clock::now();
        const Answer a = proxy.ask(make_query("d" + std::to_string(i) + ".test"));
        CHECK_WHY(since(asked) < 2 + slack, std::to_string(since(asked)));
        CHECK_EQ(a.rcode(), 2);
    }
    check_bounds(hostile, proxy);
    const auto end = Clock::now();
    CHECK_EQ(proxy.process().end(), 0);
    CHECK_WHY(since(end) < 4 + slack, std::to_string(since(end)));
}

// It is the first of two: the other one answers, well within the time.
static void first_of_two(const Options& options) {
    Certificates certificates;
    Upstream hostile(certificates, options), good(certificates);
    Proxy proxy(certificates, {hostile.spec(), good.spec()});
    for (int round = 0; round < 6; round++) {
        const Octets q = make_query("r" + std::to_string(round) + ".test");
        const auto start = Clock::now();
        const auto m = round % 3 == 2 ? proxy.tcp(q, 20) : proxy.udp(q, 20);
        CHECK_WHY(m, "no answer to query " + std::to_string(round));
        CHECK_WHY(since(start) < 2 + slack, std::to_string(since(start)));
        CHECK(Answer(*m).rcode() == 0 && has_address_of(Answer(*m), q));
        usleep(300000);  // connections are opened ahead, and looked at
    }
    check_bounds(hostile, proxy);
    const auto end = Clock::now();
    CHECK_EQ(proxy.process().end(), 0);
    CHECK_WHY(since(end) < 4 + slack, std::to_string(since(end)));
}

static void both(const Options& options) {
    alone(options);
    first_of_two(options);
}
// What comes under the keys: at once, while the connection waits for a query, or for its answer.
static void at_both_times(Options options) {
    for (bool after_query : {false, true}) {
        options.endless_after_query = after_query;
        both(options);
    }
}

TEST("hostile.hello_requests_before_it_is_authenticated") {
    both({.endless = Endless::HelloRequests});
}
TEST("hostile.warnings_and_hello_requests_before_it_is_authenticated") {
    both({.endless = Endless::WarningsAndRequests});
}
TEST("hostile.warnings_before_it_is_authenticated") { both({.endless = Endless::Warnings}); }
TEST("hostile.empty_records_before_it_is_authenticated") {
    both({.endless = Endless::EmptyRecords});
}
TEST("hostile.few_hello_requests_a_second") {  // each of them ends a wait, none a handshake
    both({.endless = Endless::HelloRequests, .endless_pause_ms = 100});
}
TEST("hostile.server_hello_in_drips") { both({.endless = Endless::DrippedHello}); }
TEST("hostile.record_in_drips") { both({.endless = Endless::DrippedRecord}); }
TEST("hostile.certificate_in_drips") { both({.endless = Endless::DrippedCertificate}); }

TEST("hostile.tickets_without_end") { at_both_times({.endless = Endless::Tickets}); }
TEST("hostile.few_tickets_a_second") {
    at_both_times({.endless = Endless::Tickets, .endless_pause_ms = 100});
}
TEST("hostile.ticket_in_drips") { at_both_times({.endless = Endless::DrippedTicket}); }
TEST("hostile.key_updates_without_end") { at_both_times({.endless = Endless::KeyUpdates}); }
TEST("hostile.key_updates_to_be_answered_without_end") {
    at_both_times({.endless = Endless::KeyUpdatesWithReply});
}
TEST("hostile.empty_data_without_end") { at_both_times({.endless = Endless::EmptyData}); }
TEST("hostile.few_empty_records_a_second") {
    at_both_times({.endless = Endless::EmptyData, .endless_pause_ms = 100});
}
TEST("hostile.sealed_warnings_without_end") {
    for (int version : {TLS1_2_VERSION, TLS1_3_VERSION})
        both({.max_version = version, .endless = Endless::SealedWarnings});
}
TEST("hostile.hello_requests_without_end_in_tls_1_2") {
    at_both_times({.max_version = TLS1_2_VERSION, .endless = Endless::SealedRequests});
}

// Many at once ask while the first of two floods: nobody waits for a lock.
TEST("hostile.a_flood_of_tickets_holds_nobody_up") {
    Certificates certificates;
    Upstream hostile(certificates, {.endless = Endless::Tickets}), good(certificates);
    Proxy proxy(certificates, {hostile.spec(), good.spec()}, {"-q"});
    std::vector<std::thread> clients;
    std::atomic<int> good_ones{0};
    for (int i = 0; i < 10; i++)
        clients.emplace_back([&, i] {
            for (int n = 0; n < 10; n++) {
                const std::string name =
                    "m" + std::to_string(i) + "-" + std::to_string(n) + ".test";
                const auto a = ask(proxy, name, i % 3 == 0, 4 + slack);
                good_ones += a && a->rcode() == 0;
            }
        });
    for (auto& client : clients) client.join();
    CHECK_EQ(good_ones.load(), 100);
    check_bounds(hostile, proxy);
}

// A chain of more than 32 kB costs time and memory before anybody has proved anything.
TEST("hostile.certificates_of_more_than_32_kB_are_refused") {
    Certificates certificates;
    const struct {
        Cert cert;
        bool good;
    } rows[] = {{Cert::Fair28kB, true},
                {Cert::Large77kB, false},
                {Cert::Chain77kB, false},
                {Cert::Huge105kB, false}};
    for (int version : {TLS1_2_VERSION, TLS1_3_VERSION})
        for (auto& row : rows) {
            const std::string what = "certificate " + std::to_string(int(row.cert));
            Upstream large(certificates, {.cert = row.cert, .max_version = version});
            Upstream good(certificates);
            Proxy one(certificates, {large.spec()}, {"-t", "2000"});
            CHECK_WHY(one.ask(make_query("a.test")).rcode() == (row.good ? 0 : 2), what);
            CHECK_EQ(large.seen().queries.empty(), !row.good);
            Proxy two(certificates, {large.spec(), good.spec()});
            CHECK_WHY(two.ask(make_query("b.test")).rcode() == 0, what);
        }
}

// ---- Clients -----------------------------------------------------------------------------------

// Others, who ask 20 queries a second over UDP, and 4 over TCP.
class Others {
public:
    explicit Others(Proxy& proxy) : proxy_(proxy) {
        for (bool tcp : {false, true}) threads_.emplace_back([this, tcp] { ask(tcp); });
    }
    ~Others() { stop(); }
    void stop() {
        over_ = true;
        for (auto& one : threads_) one.join();
        threads_.clear();
    }
    void check() {  // nobody noticed
        stop();
        printf("others: %d asked, %d not answered; the slowest took %.3f s\n", asked_.load(),
               bad_.load(), double(slowest_) / 1000);
        CHECK(asked_ > 10);
        CHECK_EQ(bad_.load(), 0);
        CHECK_WHY(slowest_ < 1000 * slack, std::to_string(slowest_) + " ms");
    }

private:
    void ask(bool tcp) {
        for (int i = 0; !over_; i++) {
            const std::string name = "o" + std::to_string(i) + ".test";
            const auto start = Clock::now();
            const auto a = ::ask(proxy_, name, tcp, 10);
            asked_++;
            bad_ += !a || a->rcode() != 0;
            const int took = int(1000 * since(start));
            for (int was = slowest_; took > was && !slowest_.compare_exchange_weak(was, took);) {
            }
            usleep(tcp ? 250000 : 50000);
        }
    }
    Proxy& proxy_;
    std::atomic<bool> over_{false};
    std::atomic<int> asked_{0}, bad_{0}, slowest_{0};
    std::vector<std::thread> threads_;
};

// A TCP client with a small window, which waits for nothing.
struct Greedy {
    explicit Greedy(int port, int window = 16384) {
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &window, sizeof window);
        const sockaddr_in6 there = Client::place("127.0.0.1", port);
        CHECK_EQ(connect(fd, (const sockaddr*)&there, sizeof(sockaddr_in)), 0);
        fcntl(fd, F_SETFL, O_NONBLOCK);
    }
    Greedy(const Greedy&) = delete;
    ~Greedy() { close(fd); }
    // As many of `left` as the connection takes now, each of this name and a number.
    void ask(const std::string& name, int& left) {
        while (left > 0) {
            if (rest.empty()) {
                const Octets q = make_query(name, 1, {}, ++number & 0xffff);
                append16(rest, int(q.size()));
                append(rest, q);
            }
            const ssize_t n = ::send(fd, rest.data(), rest.size(), MSG_NOSIGNAL);
            if (n < 0 && errno != EAGAIN) ended = true;
            if (n <= 0) return;
            rest.erase(rest.begin(), rest.begin() + n);
            if (rest.empty()) left--;
        }
    }
    // At most so many octets, of those that are there or come soon.
    size_t read(size_t most) {
        size_t have = 0;
        uint8_t buffer[4096];
        pollfd readable{fd, POLLIN, 0};
        while (have < most && poll(&readable, 1, 20) == 1) {
            const ssize_t n = recv(fd, buffer, std::min(sizeof buffer, most - have), 0);
            if (n == 0 || (n < 0 && errno != EAGAIN)) ended = true;
            if (n <= 0) break;
            have += size_t(n);
        }
        return have;
    }
    int fd = -1, number = 0;
    bool ended = false;  // by the other end, as far as was seen
    Octets rest;
};

// Whether the other end has given the connection up, though it was not read from: what is sent is
// met with a reset.
static bool is_given_up(Greedy& one) {
    const uint8_t octet = 0;
    const ssize_t n = ::send(one.fd, &octet, 1, MSG_NOSIGNAL);
    pollfd hung{one.fd, 0, 0};
    poll(&hung, 1, 0);
    return one.ended || (n < 0 && errno != EAGAIN) || (hung.revents & (POLLHUP | POLLERR));
}

constexpr int greed = memory_counts ? 390 : 100;  // queries a second
static const Options a_way_off{.delay_ms = 10};   // as every resolver is

TEST("hostile.a_client_that_reads_slowly_holds_no_more_than_its_share") {
    Pair p(a_way_off, {"-q"});
    Proxy& proxy = p.proxy;
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    Others others(proxy);
    Greedy greedy(proxy.port);
    const auto start = Clock::now();
    int asked = 0;
    for (double next = 0.5; since(start) < 12;) {
        int due = int(greed * since(start)) - asked, left = due;
        if (!greedy.ended) greedy.ask("size65000.test", left);
        asked += due - left;
        if (since(start) > next) {
            if (!greedy.ended) greedy.read(66000);
            next += 0.5;
        }
        usleep(2000);
    }
    printf("the stream has %s\n", greedy.ended ? "ended" : "not ended");
    others.check();
    CHECK(proxy.total("in_flight_most") < 400);
}

// Its stream is full when some MB wait in it, and given up 3 s later. Until then its answers wait,
// but without a permit: none of its queries waits in vain for one.
TEST("hostile.a_client_that_does_not_read_keeps_no_permit") {
    Pair p(a_way_off, {"-q", "-n", "2", "-t", "2000"});
    Greedy greedy(p.proxy.port);
    int left = 200;
    CHECK(eventually(
        [&] {
            greedy.ask("size60000.test", left);
            return greedy.ended || (left == 0 && is_given_up(greedy));
        },
        60));
    CHECK_EQ(p.proxy.total("failure:too_many_queries_in_flight"), 0);
}

TEST("hostile.a_client_that_pipelines_and_never_reads_loses_its_stream") {
    Pair p(a_way_off, {"-q"});
    Proxy& proxy = p.proxy;
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    Others others(proxy);
    Greedy greedy(proxy.port);
    int left = 5000;
    bool given_up = false;
    for (const auto start = Clock::now(); since(start) < 100 && !given_up; usleep(20000)) {
        greedy.ask("size16000.test", left);
        given_up = greedy.ended || (left == 0 && is_given_up(greedy));
    }
    CHECK(given_up);
    others.check();
    CHECK(eventually([&] { return usage_of(proxy.pid()).threads < 40; }));
}

TEST("hostile.a_client_that_reads_an_octet_a_second_loses_its_stream") {
    Pair p(a_way_off, {"-q"});
    Proxy& proxy = p.proxy;
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    Others others(proxy);
    std::vector<std::unique_ptr<Greedy>> all;
    for (int i = 0; i < 4; i++) all.push_back(std::make_unique<Greedy>(proxy.port, 4096));
    std::vector<int> left(all.size(), 400);
    size_t given_up = 0;
    for (const auto start = Clock::now(); since(start) < 100 && given_up < all.size();) {
        for (int pause = 0; pause < 20; pause++, usleep(50000))
            for (size_t i = 0; i < all.size(); i++) all[i]->ask("size60000.test", left[i]);
        given_up = 0;
        for (auto& one : all) {
            one->read(1);
            given_up += is_given_up(*one);
        }
    }
    CHECK_EQ(given_up, all.size());
    others.check();
    CHECK(eventually([&] { return usage_of(proxy.pid()).threads < 40; }));
}

// All of them are over the limits. Under sanitizers 60 would ask for more than such a program can
// do.
TEST("hostile.clients_that_never_read_do_not_stop_others") {
    constexpr int clients = memory_counts ? 60 : 12;
    Pair p(a_way_off, {"-q"});
    Proxy& proxy = p.proxy;
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    std::vector<std::unique_ptr<Greedy>> all;
    for (int i = 0; i < clients; i++) all.push_back(std::make_unique<Greedy>(proxy.port, 4096));
    Others others(proxy);
    for (const auto start = Clock::now(); since(start) < 12; usleep(50000))
        for (auto& one : all) {
            int left = 1;
            if (!one->ended) one->ask("size30000.test", left);
        }
    const Usage u = usage_of(proxy.pid());
    printf("%d threads, %d files, %ld kB\n", u.threads, u.files, u.kilobytes);
    if (memory_counts) CHECK_WHY(u.kilobytes < 128 * 1024, std::to_string(u.kilobytes) + " kB");
    others.check();
}

// A client that pipelines more than its share and reads gets all its answers: the rest waits.
TEST("hostile.nothing_is_lost_of_a_client_that_pipelines_and_reads") {
    Pair p(a_way_off, {"-q"});
    Proxy& proxy = p.proxy;
    constexpr int number = memory_counts ? 2000 : 500;
    Client client(SOCK_STREAM, proxy.port);
    std::thread asks([&] {
        Octets all;
        for (int i = 0; i < number; i++) {
            const Octets q = make_query("p" + std::to_string(i) + ".test", 1, {}, i);
            append16(all, int(q.size()));
            append(all, q);
        }
        for (size_t at = 0; at < all.size();) {
            const ssize_t n = ::send(client.fd, &all[at], all.size() - at, MSG_NOSIGNAL);
            if (n <= 0) return;
            at += size_t(n);
        }
    });
    std::vector<int> answers(number);
    for (int i = 0; i < number; i++) {
        const auto m = client.receive(20);
        if (!m || m->size() < 12 || (*m)[3] & 15) break;
        answers[size_t(get16(*m, 0) % number)]++;
    }
    asks.join();
    for (int i = 0; i < number; i++)
        CHECK_WHY(answers[size_t(i)] == 1, "query " + std::to_string(i));
}

// ---- Memory ------------------------------------------------------------------------------------

static long peak_kilobytes(pid_t pid) {
    const std::string status = contents("/proc/" + std::to_string(pid) + "/status");
    return atol(&status[status.find("VmHWM:") + 6]);
}

static Octets with_empty_options(size_t octets, int id) {
    Octets options(octets - make_query("a.test", 1, Edns{}).size());
    options.resize(options.size() / 4 * 4);
    for (size_t i = 0; i < options.size(); i += 4) options[i] = 0xfd;  // 0xfd00, of no octets
    return make_query("a.test", 1, Edns{1232, false, options}, id);
}
static Octets with_many_records(size_t octets, int id) {
    Octets q = make_query("a.test", 1, {}, id);
    int number = 0;
    for (; q.size() + 11 <= octets; number++) append(q, {0, 0xff, 0, 0, 1, 0, 0, 0, 0, 0, 0});
    q[10] = uint8_t(number >> 8);
    q[11] = uint8_t(number);
    return q;
}

TEST("hostile.udp_queries_of_64_kB_are_not_carried") {
    Pair p({.deaf = true}, {"-q", "-t", "3000"});
    Proxy& proxy = p.proxy;
    for (auto make : {with_empty_options, with_many_records}) {
        const Answer a = proxy.ask(make(65000, 7));
        CHECK(a.tc() && a.count(1) == 0 && a.rcode() == 0);  // it may come over TCP
        CHECK(a.octets.size() <= 1232);
        const Answer b = proxy.ask(make(4200, 8));
        CHECK(b.tc() && b.count(1) == 0);
    }
    std::vector<std::unique_ptr<Client>> clients;
    for (int i = 0; i < 400; i++) {
        if (i % 50 == 0) clients.push_back(std::make_unique<Client>(SOCK_DGRAM, proxy.port));
        clients.back()->send(with_empty_options(65000, i));
        usleep(2000);
    }
    usleep(500000);
    CHECK(p.upstream.seen().queries.empty());
    printf("%ld kB at most\n", peak_kilobytes(proxy.pid()));
    if (memory_counts) CHECK(peak_kilobytes(proxy.pid()) < 128 * 1024);
}

TEST("hostile.what_a_query_costs_does_not_depend_on_its_options_and_records") {  // over TCP
    Pair p({.deaf = true}, {"-q", "-t", "6000"});
    Proxy& proxy = p.proxy;
    std::vector<std::unique_ptr<Client>> clients;
    for (int i = 0; i < 100; i++) {
        if (i % 5 == 0) clients.push_back(std::make_unique<Client>(SOCK_STREAM, proxy.port));
        clients.back()->send(i % 2 ? with_empty_options(65000, i) : with_many_records(65000, i));
    }
    CHECK(eventually([&] { return p.upstream.seen().queries.size() >= 100; }));
    printf("%ld kB at most\n", peak_kilobytes(proxy.pid()));
    if (memory_counts) CHECK(peak_kilobytes(proxy.pid()) < 128 * 1024);
    for (int i = 0; i < 100; i++) {
        const auto m = clients[size_t(i / 5)]->receive(20);
        CHECK(m && Answer(*m).rcode() == 2);
    }
}

int main(int argc, char** argv) { return check::main(argc, argv); }

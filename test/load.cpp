// load.cpp - many queries at once.
//
// Numbers in parentheses are those of the list of requirements in test/requirements.md.
#include <thread>

#include "program.hpp"
#include "usage.hpp"

using namespace test;

static void a_thousand_at_once(const Proxy::Words& options) {
    Pair p({}, options);
    std::vector<std::thread> clients;
    std::atomic<int> right{0};
    for (int c = 0; c < 50; c++)
        clients.emplace_back([&, c] {
            Client client(c % 2 ? SOCK_STREAM : SOCK_DGRAM, p.proxy.port);
            std::map<int, Octets> open;
            for (int i = 0; i < 20; i++) {
                open[i] = make_query("c" + std::to_string(c) + "-" + std::to_string(i) + ".test", 1,
                                     {}, i);
                client.send(open[i]);
            }
            while (!open.empty()) {
                const auto m = client.receive(60);
                if (!m) return;
                const Answer a(*m);
                if (open.count(a.id()) && a.rcode() == 0 && has_address_of(a, open[a.id()]))
                    right++;
                open.erase(a.id());
            }
        });
    for (auto& c : clients) c.join();
    CHECK_EQ(right.load(), 1000);
}
TEST("concurrency.a_thousand_queries_at_once_each_get_their_own_answer") {  // (S16)
    a_thousand_at_once({"-q", "-n", "1000", "-t", "50000"});
}
TEST("concurrency.a_thousand_at_once_with_reuse") {
    a_thousand_at_once({"-q", "-R", "-n", "1000", "-t", "50000"});
}

// Its time may be up when it gets its slot: the one before it had the same.
TEST("concurrency.a_query_that_waited_too_long_for_its_slot_is_answered") {
    Pair p({.deaf = true}, {"-n", "1", "-t", "600"});
    Client c(SOCK_STREAM, p.proxy.port);
    for (int i = 0; i < 6; i++) c.send(make_query("a.test"));
    for (int i = 0; i < 6; i++) {
        const auto a = c.receive();
        CHECK(a);
        CHECK_EQ(Answer(*a).rcode(), 2);
    }
}

TEST("concurrency.few_of_the_threads_of_a_burst_stay") {
    Pair p({.delay_ms = 1000}, {"-t", "20000"});
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    const int before = usage_of(p.proxy.pid()).threads;
    std::vector<std::thread> clients;
    for (int i = 0; i < 60; i++)
        clients.emplace_back([&] { CHECK(p.proxy.udp(make_query("a.test"))); });
    CHECK(eventually([&] { return usage_of(p.proxy.pid()).threads >= before + 50; }));
    for (auto& client : clients) client.join();
    CHECK(eventually([&] { return usage_of(p.proxy.pid()).threads <= before + spare; }));
}

// Nor may they occupy what takes queries from the socket, though this resolver is quick as a rule.
TEST("concurrency.slow_answers_do_not_hold_up_a_quick_one") {
    Pair p({}, {"-t", "20000"});
    for (int i = 0; i < 20; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    const int many = memory_counts ? 60 : 20;  // A handshake under sanitizers takes long.
    Client slow(SOCK_DGRAM, p.proxy.port);
    for (int i = 0; i < many; i++) slow.send(make_query("slow3000.test", 1, {}, i));
    const auto start = std::chrono::steady_clock::now();
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::milliseconds(2000));
    for (int i = 0; i < many; i++) {
        const auto a = slow.receive();
        CHECK(a);
        CHECK_EQ(Answer(*a).rcode(), 0);
    }
}

TEST("concurrency.without_a_slot_udp_is_answered_at_once_and_tcp_waits") {  // (114)
    Pair p({.delay_ms = 1000}, {"-n", "2"});
    Client udp(SOCK_DGRAM, p.proxy.port), tcp(SOCK_STREAM, p.proxy.port);
    for (int i = 0; i < 6; i++) udp.send(make_query("u" + std::to_string(i) + ".test", 1, {}, i));
    int servfail = 0;
    for (int i = 0; i < 6; i++) {
        const auto a = udp.receive();
        CHECK(a);
        servfail += Answer(*a).rcode() == 2;
    }
    CHECK_EQ(servfail, 4);
    CHECK(p.proxy.prints("too many queries"));
    for (int i = 0; i < 6; i++) tcp.send(make_query("t" + std::to_string(i) + ".test", 1, {}, i));
    for (int i = 0; i < 6; i++) CHECK_EQ(Answer(*tcp.receive()).rcode(), 0);
}

int main(int argc, char** argv) { return check::main(argc, argv); }

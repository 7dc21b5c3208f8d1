// ready.cpp - connections that are opened before they are needed, or used again.
//
// Numbers in parentheses are those of the list of requirements in test/requirements.md.
#include <thread>

#include "program.hpp"

using namespace test;

// ---- ready connections --------------------------------------------------------------------------

static int parked(const Upstream& u) { return u.seen().open; }

TEST("ready.a_query_takes_a_connection_that_waits_for_it") {
    Pair p;
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK(eventually([&] { return parked(p.upstream) >= 2; }));  // a miss parks two
    for (int i = 0; i < 5; i++) {
        CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
        usleep(200000);
    }
    CHECK(contains(p.proxy.out(), "resumed ready"));
    CHECK(eventually([&] {  // each query had a connection of its own, and the others wait
        const Seen seen = p.upstream.seen();
        const int unused = seen.handshakes - int(seen.queries.size()) - seen.open;
        return unused >= 0 && unused <= 2 &&
               seen.open >= 2;  // of a race that is over, on a slow machine
    }));
}

TEST("ready.no_connection_before_the_first_query") {
    Pair p;
    usleep(700000);
    CHECK_EQ(p.upstream.seen().connections, 0);
}

TEST("ready.a_parked_connection_that_died_costs_nothing") {
    Certificates certificates;
    auto upstream = std::make_unique<Upstream>(certificates);
    const int port = upstream->port();
    Proxy proxy(certificates, {upstream->spec()}, {"-v"});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK(eventually([&] { return parked(*upstream) >= 2; }));
    upstream.reset();
    Upstream again(certificates, {.port = port});
    CHECK_EQ(proxy.ask(make_query("b.test")).rcode(), 0);
    CHECK(!contains(proxy.out(), "FAILURE"));
}

TEST("ready.while_few_are_left_more_are_opened_though_none_missed") {
    Pair p({.delay_ms = 200, .handshake_ms = 400}, {"-t", "20000", "-q"});
    CHECK_EQ(Burst(p.proxy, 10).answered, 10);
    CHECK(eventually([&] { return parked(p.upstream) >= 16; }));
    sleep(1);  // nothing is being opened
    const int before = parked(p.upstream);
    CHECK_EQ(Burst(p.proxy, before - 4).answered, before - 4);
    CHECK(eventually([&] { return parked(p.upstream) >= before + 3; }));
}

TEST("ready.what_a_burst_left_waits_for_the_next_one") {
    // Handshakes that differ much, as on a busy machine, look like those of a resolver that has
    // too many. These differ little.
    Pair p({.delay_ms = 200, .handshake_ms = 400}, {"-t", "20000", "-q"});
    CHECK_EQ(Burst(p.proxy, 8).answered, 8);
    CHECK(eventually([&] { return parked(p.upstream) >= 12; }));
    sleep(10);
    CHECK_WHY(parked(p.upstream) >= 12, std::to_string(parked(p.upstream)));
}

TEST("ready.the_bound_holds") {
    Pair p({.delay_ms = 200}, {"-k", "3", "-q"});
    std::vector<std::thread> clients;
    for (int c = 0; c < 20; c++)
        clients.emplace_back(
            [&, c] { p.proxy.udp(make_query("b" + std::to_string(c) + ".test")); });
    for (auto& c : clients) c.join();
    usleep(300000);
    CHECK(eventually([&] { return parked(p.upstream) <= 3; }));
}

TEST("ready.k_0_dials_when_asked") {
    Pair p({.delay_ms = 60}, {"-k", "0"});  // slow enough to be raced by none
    for (int i = 0; i < 4; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK_EQ(p.upstream.seen().connections, 4);
    CHECK(eventually([&] { return parked(p.upstream) == 0; }));
}

TEST("ready.a_resolver_that_closes_idle_connections_soon_costs_little") {
    Pair p({.idle_ms = 2000}, {"-q"});
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    usleep(6500000);  // several of its limits
    const int before = p.upstream.seen().connections;
    const auto start = Clock::now();
    CHECK_EQ(p.proxy.ask(make_query("b.test")).rcode(), 0);
    CHECK(since(start) < 3);
    CHECK_WHY(before <= 14, std::to_string(before));
}

// ---- reuse --------------------------------------------------------------------------------------

TEST("reuse.one_connection_serves_many_queries_one_at_a_time") {
    Pair p({}, {"--reuse"});
    for (int i = 0; i < 20; i++) {
        const Octets q = make_query("r" + std::to_string(i) + ".test");
        CHECK(has_address_of(p.proxy.ask(q, i % 2), q));
    }
    CHECK_WHY(p.upstream.seen().connections <= 3, std::to_string(p.upstream.seen().connections));
}

// A resolver that is crowded refuses some. Those that it serves are kept: to open them again would
// make the crowd worse.
TEST("reuse.what_a_crowded_resolver_serves_is_kept") {
    Pair p({.delay_ms = 200, .most = 20}, {"--reuse", "-t", "20000"});
    for (int i = 0; i < 2; i++) CHECK_EQ(Burst(p.proxy, 40).good, 40);
    const int before = p.upstream.seen().handshakes;
    CHECK_EQ(Burst(p.proxy, 16).good, 16);
    const int more = p.upstream.seen().handshakes - before;
    CHECK_WHY(more <= 4, std::to_string(more));
}

int main(int argc, char** argv) { return check::main(argc, argv); }

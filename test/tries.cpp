// tries.cpp - how a query is tried again: faults of a resolver, failover, and the race.
//
// Numbers in parentheses are those of the list of requirements in test/requirements.md.
#include <algorithm>
#include <thread>

#include "program.hpp"

using namespace test;

// ---- faults -------------------------------------------------------------------------------------

TEST("faults.each_ends_in_servfail_in_time_and_the_next_query_is_answered") {  // (97, 98)
    Pair p({}, {"-t", "1500"});
    const struct {
        const char *name, *words;
    } rows[] = {
        {"close", "closed the connection"},
        {"reset", "reset"},
        {"cut", "TLS failed"},
        {"cutclean", "closed the connection"},
        {"halflength", "TLS failed"},
        {"silent", "in time"},
        {"drip", "in time"},
        {"garbage", "in time"},
        {"zero", "no answer to this query"},
        {"five", "no answer to this query"},
        {"long", "in time"},
    };
    for (auto& row : rows) {
        const auto start = Clock::now();
        const Answer a = p.proxy.ask(make_query(std::string(row.name) + ".test", 1, Edns{}));
        CHECK_WHY(a.rcode() == 2 && a.count(1) == 0 && a.has_opt, row.name);
        CHECK_WHY(since(start) < 10, row.name);
        CHECK_WHY(p.proxy.prints(row.words), std::string(row.name) + ": " + p.proxy.out());
        CHECK_WHY(p.proxy.ask(make_query("a.test")).rcode() == 0, row.name);
    }
}

TEST("faults.a_drip_ends_on_the_deadline") {
    Pair p({}, {"-t", "1000"});
    for (bool tcp : {false, true}) {
        const auto start = Clock::now();
        CHECK_EQ(p.proxy.ask(make_query("drip.test"), tcp).rcode(), 2);
        CHECK_WHY(since(start) > 0.9 && since(start) < 4, std::to_string(since(start)));
    }
}

TEST("faults.those_that_are_none_are_answered") {  // (71, 87, 97)
    Pair p;
    for (const char* name : {"dripped", "two", "unclean", "slow300", "noopt", "keyupdate"}) {
        const Octets q = make_query(std::string(name) + ".test", 1, Edns{});
        const Answer a = p.proxy.ask(q);
        CHECK_WHY(a.rcode() == 0 && has_address_of(a, q), name);
    }
}

// (100): an answer of 468 octets, cut at every place around the ends of its parts and at every 7th
// of the padding.
TEST("faults.not_an_octet_of_a_broken_answer_is_relayed") {
    Pair p({}, {"-q"});
    CHECK_EQ(p.proxy.ask(make_query("cutat999.test", 1, {}, 9999)).rcode(), 0);
    const size_t whole = 2 + p.upstream.seen().answer(9999).size();
    CHECK_EQ(whole, 470u);
    const size_t padding = 2 + 12 + 19 + 16 + 11 + 4;  // header, question, record, OPT, option
    for (size_t at = 0; at < whole; at += at < padding || at + 10 > whole ? 1 : 7) {
        const Octets q = make_query("cutat" + std::to_string(at) + ".test");
        const Answer a = p.proxy.ask(q, at % 2);
        CHECK_WHY(a.rcode() == 2 && a.count(1) == 0, std::to_string(at));
        CHECK_EQ(a.octets.size(), q.size());
    }
    CHECK_EQ(p.proxy.ask(make_query("cutat470.test")).rcode(), 0);
}

TEST("faults.a_query_is_tried_three_times_at_most") {  // (96)
    Pair p;
    CHECK_EQ(p.proxy.ask(make_query("wrongid2.test")).rcode(), 0);
    CHECK_EQ(p.upstream.seen().queries.size(), 3u);
    CHECK_EQ(p.proxy.ask(make_query("wrongid5.test")).rcode(), 2);
    CHECK_EQ(p.upstream.seen().queries.size(), 6u);
}

// A resolver closes the connection upon what it refuses to answer.
TEST("faults.a_query_that_closes_two_connections_is_not_sent_again") {
    Pair p;
    CHECK_EQ(p.proxy.ask(make_query("close1.test")).rcode(), 0);
    CHECK_EQ(p.upstream.seen().queries.size(), 2u);
    CHECK_EQ(p.proxy.ask(make_query("close5.test")).rcode(), 2);
    CHECK_EQ(p.upstream.seen().queries.size(), 4u);
}

// ---- failover -----------------------------------------------------------------------------------

TEST("failover.the_next_upstream_answers") {
    const Options faults[] = {{.accept = Options::Close},
                              {.accept = Options::Hang},
                              {.cert = Cert::Expired},
                              {.deaf = true}};
    for (const Options& fault : faults) {
        Certificates certificates;
        Upstream bad(certificates, fault), good(certificates);
        Proxy proxy(certificates, {bad.spec(), good.spec()});
        for (int i = 0; i < 8; i++) CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
        CHECK(good.seen().queries.size() >= 8);
    }
    Certificates certificates;  // nobody listens
    Upstream good(certificates);
    Proxy proxy(certificates,
                {"127.0.0.1@" + std::to_string(free_port()) + "#dot.test", good.spec()});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
}

// So that the queries which find out that the first one is gone pay no handshake.
TEST("failover.the_next_upstream_has_as_many_ready_connections") {
    Certificates certificates;
    // So slow that the handshakes of a burst are no sign of an overloaded resolver.
    Upstream first(certificates, {.delay_ms = 200, .handshake_ms = 50});
    Upstream next(certificates, {.handshake_ms = 50});
    Proxy proxy(certificates, {first.spec(), next.spec()});
    CHECK_EQ(Burst(proxy, 12).answered, 12);
    CHECK(eventually([&] {
        CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
        return next.seen().open >= 10;
    }));
}

TEST("failover.never_to_a_server_that_is_not_authenticated") {  // (77)
    Certificates certificates;
    Upstream one(certificates, {.cert = Cert::Expired}),
        two(certificates, {.accept = Options::Plaintext});
    Proxy proxy(certificates, {one.spec(), two.spec()});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 2);
    CHECK_EQ(one.seen().queries.size() + two.seen().queries.size(), 0u);
}

TEST("failover.an_upstream_that_failed_rests_and_comes_back") {  // (91, 99)
    Certificates certificates;
    auto bad = std::make_unique<Upstream>(certificates, Options{.cert = Cert::Expired});
    const int port = bad->port();
    Proxy proxy(certificates, {bad->spec()});
    const auto start = Clock::now();
    while (since(start) < 2) {
        const auto one = Clock::now();
        CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 2);
        CHECK(since(one) < 3);  // not only at the deadline
        usleep(10000);
    }
    // While it rests it is asked ten times a second at most.
    CHECK_WHY(bad->seen().connections <= 30, std::to_string(bad->seen().connections));
    bad.reset();
    Upstream good(certificates, {.port = port});
    CHECK(eventually([&] { return proxy.ask(make_query("a.test")).rcode() == 0; }, 30));
}

// What went wrong with one connection must not be taken for an error of the next one.
TEST("failover.a_bad_certificate_costs_the_next_upstream_no_ready_connection") {
    Certificates certificates;
    Upstream bad(certificates, {.cert = Cert::Expired}), good(certificates);
    Proxy proxy(certificates, {bad.spec(), good.spec()}, {"-k", "1"});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK(eventually([&] { return good.seen().connections == 2; }));
    usleep(1500000);  // for the first second nobody asks the bad one again
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK_EQ(bad.seen().connections, 2);
    CHECK(proxy.prints(" ready"));
}

TEST("failover.a_dial_that_had_no_time_is_not_held_against_a_resolver") {
    Pair p({.delay_ms = 600}, {"-k", "0", "-t", "1400"});
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    p.upstream.set({.handshake_ms = 3000});
    CHECK_EQ(p.proxy.ask(make_query("b.test")).rcode(), 2);
    p.upstream.set({});
    CHECK_EQ(p.proxy.ask(make_query("c.test")).rcode(), 0);
    CHECK(!contains(p.proxy.out(), "UPSTREAM"));
}

TEST("failover.the_next_upstream_is_kept_warm_again_when_it_is_back") {  // though nobody asks it
    Certificates certificates;
    Upstream first(certificates), next(certificates, {.accept = Options::Close});
    Proxy proxy(certificates, {first.spec(), next.spec()});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK(proxy.prints("UPSTREAM"));
    next.set({});
    CHECK(eventually([&] { return next.seen().open >= 2; }));
    CHECK(next.seen().queries.empty());
}

TEST("failover.upstream_over_ipv6") {
    Pair p({.address = "::1"});
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
}

TEST("failover.an_address_that_leads_nowhere_costs_no_more_than_the_race") {  // (101, 103)
    Certificates certificates;
    Upstream nowhere(certificates, {.accept = Options::Hang, .address = "::1"}), good(certificates);
    Proxy proxy(certificates, {nowhere.spec(), good.spec()});
    for (int i = 0; i < 10; i++) {
        const auto start = Clock::now();
        CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
        CHECK_WHY(since(start) < 2.5, std::to_string(since(start)));  // 250 ms, and a slow machine
    }
}

// It accepts and says nothing, as one does that is just starting.
TEST("failover.a_dial_that_gets_nowhere_is_joined_after_two_and_a_half_times_the_usual") {
    Certificates certificates;
    Upstream first(certificates, {.delay_ms = 200}), next(certificates);
    Proxy proxy(certificates, {first.spec(), next.spec()}, {"-k", "0", "-t", "20000"});
    for (int i = 0; i < 3; i++) CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    first.set({.accept = Options::Hang});
    const auto start = Clock::now();
    CHECK_EQ(proxy.ask(make_query("b.test")).rcode(), 0);
    CHECK_WHY(since(start) > 0.4 && since(start) < 0.9, std::to_string(since(start)));
}

// ---- the race -----------------------------------------------------------------------------------

TEST("race.answers_when_the_first_connection_goes_silent") {
    Pair p({}, {"-t", "4000"});
    for (int i = 0; i < 5; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    const auto start = Clock::now();
    CHECK_EQ(p.proxy.ask(make_query("silent1.test")).rcode(), 0);  // silent once for this name
    CHECK_WHY(since(start) < 2, std::to_string(since(start)));
    CHECK_EQ(Answer(*p.proxy.udp(make_query("silent2.test"))).rcode(), 0);
    const size_t queries = p.upstream.seen().queries.size();
    CHECK_WHY(queries >= 10 && queries <= 5 * 3 + 3 + 3, std::to_string(queries));
}

TEST("race.a_raced_query_is_answered_once") {
    Pair p;
    for (int i = 0; i < 5; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    Client c(SOCK_DGRAM, p.proxy.port);
    c.send(make_query("slow700.test"));
    CHECK(c.receive());
    CHECK(!c.readable(1));
    const auto all = p.upstream.seen().queries;
    const auto of_this =
        std::count_if(all.begin(), all.end(), [](auto& q) { return q[13] == 's'; });
    // Never more than three tries.
    CHECK_WHY(of_this >= 2 && of_this <= 3, std::to_string(of_this));
}

TEST("race.the_budget_stops_a_storm_when_all_answers_are_slow") {
    Pair p({}, {"-q"});
    for (int i = 0; i < 10; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    p.upstream.set({.delay_ms = 400});
    std::vector<std::thread> clients;
    for (int c = 0; c < 20; c++)
        clients.emplace_back([&, c] {
            for (int i = 0; i < 10; i++)
                p.proxy.udp(make_query("s" + std::to_string(c * 10 + i) + ".test"));
        });
    for (auto& c : clients) c.join();
    const size_t queries = p.upstream.seen().queries.size() - 10;
    CHECK_WHY(queries >= 200 && queries <= 200 + 20 + 21 + 2, std::to_string(queries));
}

// Before: SERVFAIL after 4 s, as slow names had used up the budget.
TEST("race.without_a_budget_a_silent_connection_is_left_after_a_second") {
    Pair p({}, {"-q"});
    for (int i = 0; i < 5; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    for (int i = 0; i < 15; i++) CHECK_EQ(p.proxy.ask(make_query("slow300.test")).rcode(), 0);
    const auto start = Clock::now();
    CHECK_EQ(p.proxy.ask(make_query("silent1.test")).rcode(), 0);
    CHECK_WHY(since(start) < 2.5, std::to_string(since(start)));
}

// A resolver that loses each third answer is not at fault, and costs no query its answer.
// Before: SERVFAIL for some of these names, beside a second resolver that nobody asked.
TEST("race.without_a_budget_lost_answers_are_asked_for_elsewhere") {
    Certificates certificates;
    Upstream lossy(certificates), next(certificates);
    Proxy proxy(certificates, {lossy.spec(), next.spec()}, {"-q"});
    for (int i = 0; i < 5; i++) CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    for (int i = 0; i < 15; i++) CHECK_EQ(proxy.ask(make_query("slow300.test")).rcode(), 0);
    std::vector<std::thread> clients;
    std::atomic<int> good{0};
    for (int c = 0; c < 20; c++)
        clients.emplace_back([&, c] {
            for (int i = 0; i < 6; i++) {
                const std::string number = std::to_string(6 * c + i);
                const std::string name = i % 3 == 0 ? "silent1-" + number + ".test" : "a.test";
                const auto answer = proxy.udp(make_query(name));
                good += answer && Answer(*answer).rcode() == 0;
            }
        });
    for (auto& client : clients) client.join();
    CHECK_EQ(good.load(), 120);
}

int main(int argc, char** argv) { return check::main(argc, argv); }

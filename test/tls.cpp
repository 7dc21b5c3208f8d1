// tls.cpp - whom the proxy trusts, and what it says in its handshakes.
//
// Numbers in parentheses are those of the list of requirements in test/requirements.md.
#include <openssl/ssl.h>

#include <algorithm>
#include <set>
#include <thread>

#include "program.hpp"
#include "usage.hpp"

using namespace test;

// The upstream's certificate, or another fault of the connection: what the line says of it.
static void refused(const Options& options, const std::string& words,
                    const std::string& more = "") {
    Certificates certificates;
    Upstream upstream(certificates, options);
    Proxy proxy(certificates, {upstream.spec(more)}, {"-t", "3000"});
    const auto start = Clock::now();
    const Answer a = proxy.ask(make_query("a.test", 1, Edns{}));
    CHECK_EQ(a.rcode(), 2);
    CHECK(a.has_opt && a.options.count(15) == 1);  // (43, 51)
    CHECK_EQ(a.options.at(15).size(), 2u);         // no text that could tell an address
    CHECK(since(start) < 10);
    CHECK_WHY(proxy.prints("FAILURE udp A SERVFAIL"), proxy.out());
    CHECK_WHY(contains(proxy.out(), words), proxy.out());
    CHECK_EQ(upstream.seen().queries.size(), 0u);  // not an octet of the query
    for (uint8_t first : upstream.seen().first_octets)
        CHECK_EQ(int(first), 0x16);  // (68): TLS and nothing else
}

TEST("tls.name_must_be_in_san") {  // (74)
    refused({.cert = Cert::CnOnly}, "does not match dot.test");
}
TEST("tls.wrong_name_is_refused") {  // (75)
    refused({.cert = Cert::WrongName}, "does not match dot.test");
}
TEST("tls.expired_certificate_is_refused") { refused({.cert = Cert::Expired}, "expired"); }
TEST("tls.certificate_of_the_future_is_refused") {
    refused({.cert = Cert::NotYetValid}, "not yet valid");
}
TEST("tls.unknown_ca_is_refused") { refused({.cert = Cert::UnknownCa}, "issuer"); }
TEST("tls.self_signed_certificate_is_refused") {
    refused({.cert = Cert::SelfSigned}, "self-signed");
}
TEST("tls.certificate_for_clients_is_refused") { refused({.cert = Cert::ClientOnly}, "purpose"); }
TEST("tls.version_1_1_is_refused") {  // (69)
    refused({.max_version = TLS1_1_VERSION}, "TLS failed");
}
TEST("tls.another_alpn_is_refused") { refused({.alpn = "h2"}, "TLS failed"); }  // (72)
TEST("tls.a_resolver_without_tls_is_refused") {
    refused({.accept = Options::Plaintext}, "TLS failed");
}
TEST("tls.reset_in_the_handshake") { refused({.accept = Options::Reset}, "reset"); }
TEST("tls.close_in_the_handshake") {
    refused({.accept = Options::Close}, "TLS failed: unexpected eof");
}
TEST("tls.handshake_that_never_ends") {
    refused({.accept = Options::Hang}, "no TLS connection in time");
}

TEST("tls.refused_connection_is_told_as_such") {
    Certificates certificates;
    Proxy proxy(certificates, {"127.0.0.1@" + std::to_string(free_port()) + "#dot.test"});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 2);
    CHECK(proxy.prints("refused"));
}

TEST("tls.wildcard_of_one_label_is_accepted") {  // (75)
    Certificates certificates;
    Upstream upstream(certificates, {.cert = Cert::Wildcard});
    for (auto [name, rcode] :
         {std::pair("dot.lab.test", 0), std::pair("a.dot.lab.test", 2), std::pair("lab.test", 2)}) {
        Proxy proxy(certificates, {"127.0.0.1@" + std::to_string(upstream.port()) + "#" + name});
        CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), rcode);
    }
}

TEST("tls.pins") {  // (79, 80): name and pin must both hold
    Certificates certificates;
    const std::string right = ",pin-sha256=" + certificates.pin(Cert::Good),
                      wrong = ",pin-sha256=" + certificates.pin(Cert::Backup);
    const struct {
        Cert cert;
        std::string pins;
        bool good;
    } rows[] = {
        {Cert::Good, right, true},
        {Cert::Good, wrong + right, true},
        {Cert::Good, right + wrong, true},
        {Cert::Good, wrong, false},
        {Cert::Backup, right + wrong, true},
        {Cert::WrongName, ",pin-sha256=" + certificates.pin(Cert::WrongName), false},
        {Cert::UnknownCa, ",pin-sha256=" + certificates.pin(Cert::UnknownCa), false},
    };
    for (auto& row : rows) {
        Upstream upstream(certificates, {.cert = row.cert});
        Proxy proxy(certificates, {upstream.spec(row.pins)});
        CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), row.good ? 0 : 2);
        CHECK_EQ(upstream.seen().queries.size(), row.good ? 1u : 0u);
        if (row.cert == Cert::Good && !row.good) CHECK_WHY(proxy.prints("pinned"), proxy.out());
    }
}

TEST("tls.resumption_on_every_connection_but_the_first") {  // (82)
    for (int version : {TLS1_3_VERSION, TLS1_2_VERSION}) {
        Pair p({.max_version = version, .delay_ms = 40}, {"-k", "0"});
        for (int i = 0; i < 20; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
        const Seen seen = p.upstream.seen();
        // On a slow machine some are raced; they may find no ticket.
        const int raced = int(seen.queries.size()) - 20;
        CHECK(seen.handshakes >= 20 && seen.handshakes - seen.resumed <= 1 + raced);
    }
}

TEST("tls.a_ticket_is_never_used_twice") {  // (83): 200 queries at once
    Pair p({}, {"-q"});
    std::vector<std::thread> clients;
    std::atomic<int> good{0};
    for (int c = 0; c < 20; c++)
        clients.emplace_back([&, c] {
            for (int i = 0; i < 10; i++) {
                const auto a = p.proxy.udp(make_query("t" + std::to_string(100 * c + i) + ".test"));
                good += a && Answer(*a).rcode() == 0;
            }
        });
    for (auto& c : clients) c.join();
    CHECK_EQ(good.load(), 200);
    const auto tickets = p.upstream.seen().tickets;
    CHECK(tickets.size() > 20);
    CHECK_EQ(std::set<std::string>(tickets.begin(), tickets.end()).size(), tickets.size());
}

// A ticket of one resolver would tell another one that they have this client in common.
TEST("tls.tickets_are_not_offered_to_another_upstream") {
    Certificates certificates;
    Upstream first(certificates), second(certificates);
    Proxy proxy(certificates, {first.spec(), second.spec()}, {"-k", "0"});
    for (int i = 0; i < 3; i++) CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK(!first.seen().tickets.empty());
    first.set({.accept = Options::Close});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    const int pre_shared_key = 41;  // RFC 8446 4.2
    CHECK(!second.seen().hellos.at(0).extensions.count(pre_shared_key));
}

// Else a resolver that has Nagle's algorithm, which is the default, answers 40 ms late.
TEST("tls.tickets_are_acknowledged_at_once") {
    double median[2];
    for (bool nagle : {false, true}) {
        Pair p({.nagle = nagle}, {"-k", "0"});
        std::vector<double> took;
        for (int i = 0; i < 21; i++) {
            const auto start = Clock::now();
            CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
            took.push_back(since(start));
        }
        std::sort(took.begin(), took.end());
        median[nagle] = took[10];
    }
    // The delay would be 40 ms. Under sanitizers times say little.
    const double most = median[0] + (memory_counts ? 0.025 : 0.25);
    CHECK_WHY(median[1] < most, std::to_string(median[1]));
}

TEST("tls.rejected_ticket_costs_no_answer") {  // (85): the resolver was started anew
    Certificates certificates;
    auto first = std::make_unique<Upstream>(certificates);
    const int port = first->port();
    Proxy proxy(certificates, {first->spec()}, {"-k", "0"});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    first.reset();
    Upstream second(certificates, {.port = port});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK(!second.seen().tickets.empty() && second.seen().resumed < second.seen().handshakes);
}

TEST("tls.sni_alpn_and_no_early_data") {  // (72, 73, 88)
    Pair p;
    for (int i = 0; i < 5; i++) CHECK(p.proxy.udp(make_query("a.test")));
    const Seen seen = p.upstream.seen();
    for (auto& hello : seen.hellos) {
        CHECK_EQ(hello.name, "dot.test");
        CHECK_EQ(hello.alpn, "dot");
        CHECK_EQ(hello.extensions.count(TLSEXT_TYPE_early_data), 0u);  // although it is offered
    }
    CHECK(seen.resumed >= 1);
}

TEST("tls.alpn_is_not_asked_of_the_resolver") {  // (72)
    Pair p({.alpn = ""});
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
}

TEST("tls.a_second_hello_happens_once") {                      // (86): the group is remembered
    Pair p({.groups = "P-384", .delay_ms = 60}, {"-k", "0"});  // slow enough to be raced by none
    for (int i = 0; i < 5; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    // A second hello is seen as another hello of the same handshake.
    const Seen seen = p.upstream.seen();
    const size_t raced = seen.queries.size() - 5,
                 seconds = seen.hellos.size() - size_t(seen.handshakes);
    CHECK_WHY(seconds >= 1 && seconds <= 1 + 2 * raced, std::to_string(seconds));
}

TEST("tls.key_update_and_many_tickets_are_no_trouble") {  // (71)
    Pair p({.tickets = 20});
    for (const char* name : {"keyupdate.test", "a.test"})
        CHECK_EQ(p.proxy.ask(make_query(name)).rcode(), 0);
}

int main(int argc, char** argv) { return check::main(argc, argv); }

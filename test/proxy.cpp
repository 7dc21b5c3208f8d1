// proxy.cpp - the whole program, black box, between clients and an upstream of the tests' own.
//
// Numbers in parentheses are those of the list of requirements in test/requirements.md.
#include <netinet/tcp.h>
#include <openssl/ssl.h>

#include <algorithm>
#include <set>
#include <thread>

#include "program.hpp"
#include "usage.hpp"

using namespace test;

// ---- transport ---------------------------------------------------------------------------------

TEST("transport.udp_and_tcp_over_ipv4_and_ipv6_are_answered_alike") {  // (1)
    Pair p;
    const Octets q = make_query("a.test");
    std::set<Octets> answers;
    for (const char* to : {"127.0.0.1", "::1"})
        for (bool tcp : {false, true}) {
            const auto a = tcp ? p.proxy.tcp(q, 30, to) : p.proxy.udp(q, 30, to);
            CHECK(a);
            CHECK(has_address_of(Answer(*a), q));
            answers.insert(*a);
        }
    CHECK_EQ(answers.size(), 1u);
}

TEST("transport.tcp_needs_no_udp_before_it") {  // (3)
    Pair p;
    CHECK(has_address_of(p.proxy.ask(make_query("a.test"), true), make_query("a.test")));
}

TEST("transport.reply_leaves_from_the_address_that_was_asked") {  // (19)
    Pair p({}, {}, {"0.0.0.0"});
    // The socket is connected: only this address's answers reach it.
    for (const char* to : {"127.0.0.1", "127.0.0.2", "127.1.2.3"})
        CHECK(p.proxy.udp(make_query("a.test"), 30, to));
    Pair six({}, {}, {"::"});
    CHECK(six.proxy.udp(make_query("a.test"), 30, "::1"));
}

TEST("transport.answer_never_crosses_sockets") {  // (2)
    Pair p;
    Client udp(SOCK_DGRAM, p.proxy.port), one(SOCK_STREAM, p.proxy.port),
        two(SOCK_STREAM, p.proxy.port);
    Client* clients[] = {&udp, &one, &two};
    for (int i = 0; i < 3; i++)
        clients[i]->send(make_query("a" + std::to_string(i) + ".test"));  // one id
    for (int i = 0; i < 3; i++) {
        const auto a = clients[i]->receive();
        CHECK(a);
        CHECK(has_address_of(Answer(*a), make_query("a" + std::to_string(i) + ".test")));
        CHECK(!clients[i]->readable(0.05));
    }
}

TEST("transport.names_case_and_ids_come_back_as_sent") {  // (20, 94)
    Pair p;
    for (int id : {0, 0xffff, 0x8001}) {  // they are the resolver's too: TLS protects them (39)
        const Octets q = make_query("FoLdEd.TeSt", 1, {}, id);
        const Answer a = p.proxy.ask(q);
        CHECK_EQ(a.id(), id);
        CHECK(std::equal(q.begin() + 12, q.end(), a.octets.begin() + 12));
        const Octets got = p.upstream.seen().query(id);
        CHECK(std::equal(q.begin() + 12, q.end(), got.begin() + 12));
    }
}

// ---- framing -----------------------------------------------------------------------------------

TEST("framing.length_over_127") {  // (21): a length octet that is taken for signed breaks at 128
    Pair p;
    for (int size :
         {126, 127, 128, 129, 255, 256, 257, 16383, 16384, 16385, 32767, 32768, 65534, 65535}) {
        const auto a =
            p.proxy.tcp(make_query("size" + std::to_string(size) + ".test", 1, {}, size));
        CHECK(a);
        CHECK_EQ(a->size(), size_t(size));
        CHECK(*a == p.upstream.seen().answer(size));  // its octets count up and differ everywhere
    }
}

TEST("framing.query_of_65535_octets") {  // (21, 65): no room for padding, so it travels as it is
    Pair p;
    Octets q = make_query("a.test", 1, Edns{1232, false, Octets(4, 0)});
    const int fill = 65535 - int(q.size()) - 4;
    Octets options{0, 0, 0, 0, 0xfd, 0xe9, uint8_t(fill >> 8), uint8_t(fill)};
    options.insert(options.end(), size_t(fill), 7);
    q = make_query("a.test", 1, Edns{1232, false, options});
    CHECK_EQ(q.size(), 65535u);
    CHECK(p.proxy.tcp(q));
    CHECK(p.upstream.seen().query(0x1234) == q);
}

TEST("framing.an_octet_at_a_time") {  // (5)
    Pair p;
    const Octets q = make_query("a.test");
    Client c(SOCK_STREAM, p.proxy.port);
    const int one = 1;
    setsockopt(c.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c.raw({0});
    for (size_t i = 0; i <= q.size(); i++) {
        usleep(3000);
        c.raw({i ? q[i - 1] : uint8_t(q.size())});
    }
    CHECK(c.receive());
}

TEST("framing.zero_and_short_frames_close_the_connection") {  // (9, 10)
    Pair p;
    for (int length : {0, 1, 11}) {
        Client c(SOCK_STREAM, p.proxy.port);
        c.raw({0, uint8_t(length)});
        if (length) c.raw(Octets(length, 0));
        CHECK(c.closed(10));
        CHECK(p.proxy.tcp(make_query("a.test")));
    }
}

TEST("framing.lengths_that_lie_are_never_answered_with_garbage") {  // (11)
    Pair p;
    const Octets q = make_query("a.test");
    for (int length : {1, 11, 14, int(q.size()) + 16}) {
        Client c(SOCK_STREAM, p.proxy.port);
        c.raw({0, uint8_t(length)});
        c.raw(q);
        shutdown(c.fd, SHUT_WR);
        if (const auto a = c.receive(15)) CHECK(Answer(*a).rcode() == 1);
        CHECK(p.proxy.tcp(q));
    }
}

TEST("framing.one_record_holds_length_and_query") {  // (6)
    Pair p;
    for (int i = 0; i < 10; i++) CHECK(p.proxy.udp(make_query("a" + std::to_string(i) + ".test")));
    const Seen seen = p.upstream.seen();
    CHECK(seen.records.size() >= 10 && seen.records.size() == seen.queries.size());
    for (size_t i = 0; i < seen.records.size(); i++)
        CHECK_EQ(seen.records[i], seen.queries[i].size() + 2);
}

// ---- TCP clients -------------------------------------------------------------------------------

TEST("tcp.pipelined_queries_are_all_answered") {  // (12, 14): also those that share an id
    Pair p;
    Client c(SOCK_STREAM, p.proxy.port);
    Octets all;
    for (int i = 0; i < 100; i++) {
        const Octets q = make_query("p" + std::to_string(i) + ".test", 1, {}, i / 2);
        append16(all, int(q.size()));
        append(all, q);
    }
    c.raw(all);
    std::multiset<int> ids;
    for (int i = 0; i < 100; i++) {
        const auto a = c.receive();
        CHECK(a);
        ids.insert(Answer(*a).id());
    }
    for (int i = 0; i < 50; i++) CHECK_EQ(ids.count(i), 2u);
}

TEST("tcp.a_fast_answer_overtakes_a_slow_one") {  // (13)
    Pair p;
    Client c(SOCK_STREAM, p.proxy.port);
    c.send(make_query("slow2000.test", 1, {}, 1));
    c.send(make_query("a.test", 1, {}, 2));
    CHECK_EQ(Answer(*c.receive()).id(), 2);
    CHECK_EQ(Answer(*c.receive()).id(), 1);
}

TEST("tcp.half_closed_client_gets_its_answer") {  // (16)
    Pair p;
    Client c(SOCK_STREAM, p.proxy.port);
    c.send(make_query("slow300.test"));
    shutdown(c.fd, SHUT_WR);
    CHECK(c.receive());
    CHECK(c.closed(5));
}

static int open_files(pid_t pid) {
    std::string out;
    run("ls /proc/" + std::to_string(pid) + "/fd | wc -l", out);
    return atoi(out.c_str());
}

TEST("tcp.clients_that_vanish_leave_nothing_behind") {  // (15, 118)
    Pair p({}, {"-k", "0"});
    CHECK(p.proxy.udp(make_query("a.test")));
    const int before = open_files(p.proxy.pid());
    for (int i = 0; i < 40; i++) {
        Client c(SOCK_STREAM, p.proxy.port);
        c.send(make_query("slow200.test"));
        const linger now{1, 0};  // half of them with a reset
        if (i % 2) setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
    CHECK(p.proxy.tcp(make_query("a.test")));
    CHECK(eventually([&] { return open_files(p.proxy.pid()) <= before; }));
}

TEST("tcp.a_client_that_is_gone_is_let_go_before_the_next_connection_is_ready") {
    Pair p;
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK(eventually([&] { return p.upstream.seen().open >= 2; }));
    p.upstream.set({.handshake_ms = 4000});
    Client c(SOCK_STREAM, p.proxy.port);
    c.send(make_query("b.test"));
    CHECK(c.receive());
    shutdown(c.fd, SHUT_WR);
    CHECK(c.closed(2));
}

TEST("tcp.only_a_whole_query_resets_the_idle_limit") {  // (7, 8): 10 s
    Pair p;
    Client silent(SOCK_STREAM, p.proxy.port), drip(SOCK_STREAM, p.proxy.port);
    const auto start = Clock::now();
    const Octets q = make_query("a.test");
    drip.raw({0, uint8_t(q.size())});
    size_t sent = 0;
    while (since(start) < 18 && !drip.readable(0.5)) {
        const uint8_t octet = sent < q.size() - 1 ? q[sent++] : 0;
        if (sent < q.size() - 1) ::send(drip.fd, &octet, 1, MSG_NOSIGNAL);
    }
    CHECK(drip.closed(1));
    CHECK_WHY(since(start) > 8, std::to_string(since(start)));
    CHECK(silent.closed(5));
    CHECK_WHY(since(start) < 20, std::to_string(since(start)));
}

TEST("tcp.silent_clients_do_not_slow_others_down") {  // (17)
    Pair p;
    std::vector<std::unique_ptr<Client>> clients;
    for (int i = 0; i < 50; i++)
        clients.push_back(std::make_unique<Client>(SOCK_STREAM, p.proxy.port));
    clients[0]->raw({0});
    const auto start = Clock::now();
    CHECK(p.proxy.udp(make_query("a.test")));
    CHECK(since(start) < 3);
}

TEST("tcp.a_client_that_never_reads_is_cut_off") {  // (108)
    Pair p;
    Client c(SOCK_STREAM, p.proxy.port);
    const int small = 4096;
    setsockopt(c.fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    const Octets q = make_query("size65535.test");
    Octets framed;
    append16(framed, int(q.size()));
    append(framed, q);
    bool cut = false;
    const auto start = Clock::now();
    while (!cut && since(start) < 40) {  // it takes what the buffers hold, then nothing for 10 s
        if (::send(c.fd, framed.data(), framed.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0 &&
            errno != EAGAIN)
            cut = true;
        usleep(50000);
    }
    CHECK(cut);
    CHECK(p.proxy.tcp(make_query("a.test")));
}

// ---- judge -------------------------------------------------------------------------------------

TEST("judge.what_is_no_query_is_met_with_silence") {  // (110, 111)
    Pair p;
    for (const Octets& m : {Octets{}, Octets(11, 0), make_query("a.test", 1, {}, 1, 0x8180)}) {
        Client c(SOCK_DGRAM, p.proxy.port);
        c.send(m);
        CHECK(!c.readable(0.3));
    }
    CHECK(p.proxy.udp(make_query("a.test")));
    CHECK_EQ(p.upstream.seen().queries.size(), 1u);
}

TEST("judge.what_is_answered_here_never_reaches_the_resolver") {  // (41, 44, 47, 53, 55, 105, 107)
    Pair p;
    const Octets one = make_query("a.test"), two_options = make_query("a.test", 1, Edns{});
    auto with = [](Octets m, size_t at, int octet) {
        m[at] = uint8_t(octet);
        return m;
    };
    auto more = [](Octets m, const Octets& tail, size_t count_at) {
        append(m, tail);
        m[count_at]++;
        return m;
    };
    const struct {
        const char* what;
        Octets query;
        int rcode;
    } rows[] = {
        {"two questions", more(one, {1, 'b', 0, 0, 1, 0, 1}, 5), 1},
        {"two OPTs", more(two_options, opt_record({}), 11), 1},
        {"an option past its OPT", make_query("a.test", 1, Edns{1232, false, {0, 3, 0, 9, 1}}), 1},
        {"an OPT whose owner is not the root",
         more(one, {1, 'x', 0, 0, 41, 4, 0, 0, 0, 0, 0, 0, 0}, 11), 1},
        {"a pointer in the question", with(one, 12, 0xc0), 1},
        {"a label of 64 octets", with(one, 12, 64), 1},
        {"a record that is announced and missing", with(one, 11, 1), 1},
        {"a question that is announced and missing",
         Octets{0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, 1},
        {"AXFR", make_query("a.test", 252), 4},
        {"IXFR", make_query("a.test", 251), 4},
        {"DSO", make_query("a.test", 1, {}, 7, 6 << 11), 4},
    };
    for (auto& row : rows)
        for (bool tcp : {false, true}) {
            const Answer a = p.proxy.ask(row.query, tcp);
            CHECK_WHY(a.rcode() == row.rcode && a.id() == get16(row.query, 0), row.what);
            CHECK_WHY(!a.tc() && (a.octets[3] & 0xf0) == 0, row.what);  // (54)
        }
    CHECK(p.proxy.ask(rows[1].query).has_opt && p.proxy.ask(rows[2].query).has_opt);  // (47)
    CHECK_EQ(p.upstream.seen().queries.size(), 0u);
    CHECK_EQ(p.upstream.seen().connections, 0);
}

TEST("judge.all_else_goes_through") {  // (29, 31, 34, 37, 45, 46, 54, 56)
    Pair p;
    std::vector<Octets> rows;
    for (int opcode : {0, 1, 2, 4, 5, 7, 15})
        rows.push_back(make_query("a.test", 1, {}, 7, opcode << 11));
    for (int flag : {0x0400, 0x0200, 0x0100, 0x0080, 0x0040, 0x0020, 0x0010, 0x07f0})
        rows.push_back(make_query("a.test", 1, {}, 7, flag));
    for (int type : {0, 2, 41, 249, 250, 255, 65280}) rows.push_back(make_query("a.test", type));
    for (int klass : {0, 3, 4, 254, 255, 65280})
        rows.push_back(make_query("a.test", 1, {}, 7, 0x0100, klass));
    rows.push_back(
        make_query("a.test", 1, Edns{0, true, {0, 100, 0, 3, 'a', 'b', 'c'}, 1, 0x00c0}));
    Octets empty(12, 0);  // no question, as with a cookie alone (53)
    empty[11] = 1;
    append(empty, opt_record(Edns{1232, false, {0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8}}));
    rows.push_back(empty);
    int id = 100;
    for (Octets& q : rows) {
        q[0] = 0;
        q[1] = uint8_t(++id);
        CHECK(p.proxy.udp(q));
        Octets got = p.upstream.seen().query(id), want = q;
        const Answer sent(q), have(got);
        CHECK_EQ(got.size() % 128, 0u);
        // Exactly the query, and behind it the padding, in an OPT of the proxy's if there was none.
        const size_t padding = have.options.at(12).size();
        if (!sent.has_opt) append(want, opt_record(Edns{1232, false, {}}));
        if (!sent.has_opt) want[11]++;
        const size_t length_at = have.opt_at + 9, length = get16(want, length_at) + 4 + padding;
        want[length_at] = uint8_t(length >> 8);
        want[length_at + 1] = uint8_t(length);
        append16(want, 12);
        append16(want, int(padding));
        want.resize(want.size() + padding);
        CHECK(got == want);
    }
}

TEST("judge.a_signed_query_travels_unchanged") {  // (36): TSIG, and SIG(0)
    Pair p;
    for (int type : {250, 24}) {
        Octets q = make_query("a.test", 1, {}, type);
        q[11] = 1;
        append(q, type == 250 ? wire_name("key.test") : Octets{0});
        append(q, {0, uint8_t(type), 0, 255, 0, 0, 0, 0, 0, 20});
        append(q, Octets(20, 0));
        CHECK(p.proxy.udp(q));
        CHECK(p.upstream.seen().query(type) == q);
    }
}

// ---- edns and padding --------------------------------------------------------------------------

// Every third length here; pad.every_size_to_a_multiple_of_128 has all.
TEST("padding.query_is_a_multiple_of_128_for_names_of_any_length") {  // (59, 66)
    Pair p;
    for (int length = 1; length <= 240; length += 3) {
        std::string name;
        for (int left = length; left > 0; left -= 63)
            name += std::string(std::min(left, 62), 'n') + ".";
        for (bool edns : {false, true}) {
            const std::optional<Edns> opt = edns ? std::optional<Edns>(Edns{}) : std::nullopt;
            const Octets q = make_query(name + "test", 1, opt, 2 * length + edns);
            CHECK(p.proxy.tcp(q));
            const Octets got = p.upstream.seen().query(2 * length + edns);
            CHECK_EQ(got.size() % 128, 0u);
            CHECK_EQ(Answer(got).options.size(), 1u);
            CHECK_EQ(Answer(got).opt_flags, 0);  // (58): a client without EDNS wants no signatures
        }
    }
}

TEST("padding.a_clients_own_is_resized_and_never_doubled") {  // (60, 61)
    Pair p;
    for (int own : {0, 1, 50, 200}) {
        Octets options{0, 12, 0, uint8_t(own)};
        options.insert(options.end(), size_t(own), 9);
        append(options, {0, 100, 0, 1, 'z'});
        CHECK(p.proxy.udp(make_query("a.test", 1, Edns{1232, false, options}, own)));
        const Octets got = p.upstream.seen().query(own);
        CHECK_EQ(got.size() % 128, 0u);
        CHECK_EQ(std::count(got.begin(), got.end(), 9), 0);
        CHECK_EQ(Answer(got).options.size(), 2u);
    }
}

TEST("padding.never_comes_back_to_a_client") {  // (62, 63)
    Pair p;
    for (bool tcp : {false, true})
        for (const Octets& options : {Octets{}, Octets{0, 12, 0, 4, 0, 0, 0, 0}}) {
            const Answer a = p.proxy.ask(make_query("a.test", 1, Edns{1232, false, options}), tcp);
            CHECK(a.has_opt && a.options.empty());
            CHECK_WHY(a.octets.size() < 100, "it is as long as with its padding");
        }
    const Answer a =
        p.proxy.ask(make_query("txt400.test", 16, Edns{512, false, {}}));  // padded to 936
    CHECK(!a.tc() && a.octets.size() > 400);
}

TEST("edns.no_opt_to_a_client_without_opt") {  // (42)
    Pair p;
    for (const char* name : {"a.test", "always.test"})  // even if the resolver sends one unasked
        for (bool tcp : {false, true}) CHECK(!p.proxy.ask(make_query(name), tcp).has_opt);
}

TEST("edns.keepalive_is_between_proxy_and_resolver") {  // (49)
    Pair p;
    const Answer a = p.proxy.ask(make_query("keepalive.test", 1, Edns{}), true);
    CHECK_EQ(a.options.count(11), 0u);
    CHECK(a.options.at(100) == (Octets{'a', 'b', 'c'}));
}

TEST("edns.extended_rcode_survives_or_becomes_servfail") {  // (45, 48)
    Pair p;
    for (auto [name, low] : {std::pair("badvers.test", 0), std::pair("badcookie.test", 7)}) {
        const Answer with = p.proxy.ask(make_query(name, 1, Edns{}));
        CHECK_EQ(with.ext_rcode, 1);
        CHECK_EQ(with.rcode(), low);
        CHECK_EQ(p.proxy.ask(make_query(std::string("always") + name)).rcode(), 0);
    }
}

TEST("edns.flags_and_errors_of_the_resolver_pass") {  // (51, 58)
    Pair p;
    CHECK(p.proxy.ask(make_query("ede.test", 1, Edns{})).options.at(15) ==
          (Octets{0, 22, 'h', 'i'}));
    for (int flags : {0x0120, 0x0110, 0x0130}) {
        const Answer a = p.proxy.ask(make_query("ad.test", 1, Edns{1232, true, {}}, 7, flags));
        CHECK_EQ(a.octets[3] & 0x30, 0x20 | (flags & 0x10));
    }
}

// ---- truncation --------------------------------------------------------------------------------

TEST("truncation.answer_fits_what_the_client_takes") {  // (22, 24, 25, 26)
    Pair p;
    const struct {
        const char* name;
        int size;
        bool tc;
        size_t limit;
    } rows[] = {
        {"txt450.test", -1, false, 512},
        {"txt600.test", -1, true, 512},
        {"txt450.test", 0, false, 512},
        {"txt450.test", 511, false, 512},  // less than 512 means 512
        {"txt1100.test", 1232, false, 1232},
        {"txt1300.test", 1400, true, 1232},
        {"txt3000.test", 65535, true, 1232},
    };
    for (auto& row : rows) {
        const Octets q =
            make_query(row.name, 16,
                       row.size < 0 ? std::nullopt : std::optional<Edns>(Edns{row.size, true, {}}));
        const Answer a = p.proxy.ask(q);
        CHECK_WHY(a.tc() == row.tc && a.octets.size() <= row.limit, row.name);
        CHECK_WHY(a.has_opt == (row.size >= 0), row.name);  // (23): the cut one too
        CHECK_WHY(!a.tc() || (a.count(0) == 1 && a.count(1) == 0), row.name);
        CHECK(!p.proxy.ask(q, true).tc());
    }
    Pair wide({}, {"--max-udp", "4096"});
    CHECK(!wide.proxy.ask(make_query("txt3000.test", 16, Edns{4096, false, {}})).tc());  // (35)
}

TEST("truncation.tc_of_the_resolver_stays") {  // (22)
    Pair p;
    CHECK(p.proxy.ask(make_query("tc.test")).tc());
}

// ---- tls ---------------------------------------------------------------------------------------

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
    CHECK_WHY(median[1] < median[0] + 0.025, std::to_string(median[1]));
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

// ---- match and faults --------------------------------------------------------------------------

TEST("match.what_is_no_answer_to_the_query_is_not_relayed") {  // (92, 93, 95, 116)
    Pair p;
    for (const char* fault :
         {"wrongid", "wrongname", "wrongtype", "wrongclass", "query", "headeronly", "short"}) {
        const size_t before = p.upstream.seen().queries.size();
        const Answer a = p.proxy.ask(make_query(std::string(fault) + ".test"));
        CHECK_WHY(a.rcode() == 2 && a.count(1) == 0, fault);
        CHECK_WHY(p.upstream.seen().queries.size() - before <= 3, fault);  // (96, S21)
        CHECK_WHY(p.proxy.prints("no answer to this query"), fault);
    }
    for (auto [name, rcode] : {std::pair("refused.test", 5), std::pair("formerr.test", 1),
                               std::pair("servfail.test", 2)})
        CHECK_EQ(p.proxy.ask(make_query(name)).rcode(), rcode);  // even without the question
}

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
    CHECK_EQ(p.proxy.ask(make_query("close2.test")).rcode(), 0);
    CHECK_EQ(p.upstream.seen().queries.size(), 3u);
    CHECK_EQ(p.proxy.ask(make_query("close5.test")).rcode(), 2);
    CHECK_EQ(p.upstream.seen().queries.size(), 6u);
}

// ---- failover ----------------------------------------------------------------------------------

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
    Upstream first(certificates, {.delay_ms = 200}), next(certificates);
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
    int asked = 0;
    for (; since(start) < 2; asked++) {
        const auto one = Clock::now();
        CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 2);
        CHECK(since(one) < 3);  // at once, not after the deadline
        usleep(10000);
    }
    CHECK_WHY(bad->seen().connections * 5 < asked, std::to_string(bad->seen().connections));
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

// ---- ready connections and the race ------------------------------------------------------------

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
    Pair p({.delay_ms = 200}, {"-q"});
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

TEST("ready.the_resolvers_idle_limit_is_learnt") {
    Pair p({.idle_ms = 2000}, {"-q"});
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    usleep(6500000);  // several limits later there are still two that live
    const int before = p.upstream.seen().connections;
    CHECK(eventually([&] { return parked(p.upstream) >= 1; }, 3));
    const auto start = Clock::now();
    CHECK_EQ(p.proxy.ask(make_query("b.test")).rcode(), 0);
    CHECK(since(start) < 3);
    CHECK_WHY(before <= 14, std::to_string(before));
}

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

TEST("reuse.one_connection_serves_many_queries_one_at_a_time") {
    Pair p({}, {"--reuse"});
    for (int i = 0; i < 20; i++) {
        const Octets q = make_query("r" + std::to_string(i) + ".test");
        CHECK(has_address_of(p.proxy.ask(q, i % 2), q));
    }
    CHECK_WHY(p.upstream.seen().connections <= 3, std::to_string(p.upstream.seen().connections));
}

// ---- concurrency -------------------------------------------------------------------------------

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

// Nor do they take its seat at the socket for long, though this resolver is quick as a rule.
TEST("concurrency.slow_answers_do_not_hold_up_a_quick_one") {
    Pair p({}, {"-t", "20000"});
    for (int i = 0; i < 20; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    Client slow(SOCK_DGRAM, p.proxy.port);
    for (int i = 0; i < 60; i++) slow.send(make_query("slow3000.test", 1, {}, i));
    const auto start = std::chrono::steady_clock::now();
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::milliseconds(2000));
    for (int i = 0; i < 60; i++) {
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

// ---- process and options -----------------------------------------------------------------------

TEST("process.sigterm_finishes_queries_in_flight") {  // (117)
    Pair p;
    Client c(SOCK_DGRAM, p.proxy.port);
    c.send(make_query("slow800.test"));
    CHECK(eventually([&] { return p.upstream.seen().queries.size() == 1; }));
    const auto start = Clock::now();
    CHECK_EQ(p.proxy.process().end(SIGTERM), 0);
    CHECK(since(start) < 10);
    CHECK_EQ(Answer(*c.receive(1)).rcode(), 0);
    CHECK_EQ(number_in_totals(p.proxy.out(), "udp"), 1);
    CHECK_EQ(number_in_totals(p.proxy.out(), "success"), 1);
}

TEST("process.sigint_and_totals") {
    Pair p;
    CHECK(p.proxy.tcp(make_query("a.test")));
    kill(p.proxy.pid(), SIGUSR1);
    CHECK(p.proxy.prints("TOTALS "));
    for (auto [name, number] : {std::pair("udp", 0), {"tcp", 1}, {"success", 1}, {"failure", 0}})
        CHECK_EQ(number_in_totals(p.proxy.out(), name), number);
    CHECK(p.proxy.udp(make_query("a.test")));
    CHECK_EQ(p.proxy.process().end(SIGINT), 0);
}

TEST("process.a_log_that_nobody_reads_is_survived") {
    TempDir dir;
    const std::string script = dir.path + "/unread";
    std::ofstream(script) << "#!/bin/bash\nexec " << environment("PROXY")
                          << " \"$@\" > >(exec true)\n";
    chmod(script.c_str(), 0700);
    setenv("PROXY", script.c_str(), 1);
    Pair p;
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
        usleep(50000);  // its line comes after the answer
    }
}

TEST("process.few_open_files_are_survived") {  // (18)
    Certificates certificates;
    Upstream upstream(certificates);
    TempDir dir;
    const std::string script = dir.path + "/few";
    std::ofstream(script) << "#!/bin/sh\nulimit -n 40\nexec " << environment("PROXY")
                          << " \"$@\"\n";
    chmod(script.c_str(), 0700);
    setenv("PROXY", script.c_str(), 1);
    Proxy proxy(certificates, {upstream.spec()}, {"-q"});
    {
        std::vector<std::unique_ptr<Client>> clients;
        for (int i = 0; i < 80; i++)
            clients.push_back(std::make_unique<Client>(SOCK_STREAM, proxy.port));
        for (int i = 0; i < 5; i++) proxy.udp(make_query("a.test"), 1);
        CHECK(proxy.process().running());
    }
    CHECK(eventually([&] {
        const auto a = proxy.udp(make_query("a.test"), 2);
        return a && Answer(*a).rcode() == 0;
    }));
    CHECK(proxy.tcp(make_query("a.test")));
}

TEST("process.lines_have_no_names_and_no_addresses") {  // (115)
    Pair p;
    CHECK(p.proxy.udp(make_query("secret-name.test", 28)));
    CHECK(p.proxy.prints("SUCCESS udp AAAA NOERROR"));
    CHECK(p.proxy.udp(make_query("close-secret.test")));
    CHECK(p.proxy.prints("FAILURE udp A SERVFAIL"));
    CHECK(!contains(p.proxy.out(), "secret") &&
          !contains(p.proxy.out(), "127.0.0.1@" + std::to_string(p.proxy.port)));
}

TEST("process.verbose_tells_the_eight_steps") {
    Pair p({}, {"-v"});
    CHECK(p.proxy.udp(make_query("a.test")));
    CHECK(p.proxy.prints("SUCCESS"));
    for (const char* step : {"[1]", "[2]", "[3]", "[4]", "[5]", "[6]", "[7]", "[8]"})
        CHECK_WHY(contains(p.proxy.out(), step), step);
    CHECK(contains(p.proxy.out(), "24 -> 128 octets") &&
          contains(p.proxy.out(), "2 + 128 octets in one record"));
}

TEST("process.verbose_tells_whose_certificate_came") {
    Pair p({.cert = Cert::Expired}, {"-v"});
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 2);
    CHECK(p.proxy.prints("FAILURE"));
    const std::string out = p.proxy.out(), came = " came: /CN=dot.test\n";
    CHECK_WHY(contains(out, came) && contains(out, "certificate: certificate has expired\n"), out);
}

static int program(const std::string& arguments, std::string& output) {
    return run("timeout 20 " + environment("PROXY") + " " + arguments, output);
}

TEST("options.bad_ones_end_with_exit_2_and_one_clear_line") {  // (67, 76, 79, 120)
    const char* rows[] = {"--nonsense",
                          "-x",
                          "extra",
                          "-l",
                          "-l localhost",
                          "-l 127.0.0.1@0",
                          "-l 127.0.0.1@65536",
                          "-l 127.0.0.1@53x",
                          "-u nobody",
                          "-u 192.0.2.1",
                          "-u 192.0.2.1#",
                          "-u 192.0.2.1@53#dot.test",
                          "-u 192.0.2.1#192.0.2.1",
                          "-u 192.0.2.1#dot.test,pin-sha256=short",
                          "-u 192.0.2.1#dot.test,pin=x",
                          "-u cloudflare -u nobody",
                          "-u '192.0.2.1#dot test'",
                          "-c /nonexistent/ca.pem",
                          "-c /dev/null",
                          "-n 0",
                          "-n 1x",
                          "-n -1",
                          "-n ''",
                          "-t 0",
                          "-t 99999999999999999999",
                          "-m 511",
                          "-m 65536",
                          "-k 9999",
                          "--rate -1",
                          "--rate x",
                          "-a 10.0.0.0/33",
                          "-a ::1/129",
                          "-a 10.0.0/8",
                          "-d 10.0.0.0/",
                          "-U no-such-user",
                          "-U -1"};
    for (const char* row : rows) {
        std::string out;
        CHECK_WHY(program(row, out) == 2, std::string(row) + ": " + out);
        CHECK_WHY(std::count(out.begin(), out.end(), '\n') == 1, std::string(row) + ": " + out);
    }
}

TEST("options.port_in_use_ends_with_exit_1_and_the_way_out") {  // (119)
    Certificates certificates;
    for (int type : {SOCK_DGRAM, SOCK_STREAM}) {
        const int port = free_port(), fd = socket(AF_INET, type, 0);
        sockaddr_in v4{};
        v4.sin_family = AF_INET;
        v4.sin_port = htons(uint16_t(port));
        v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        CHECK(bind(fd, (sockaddr*)&v4, sizeof v4) == 0 &&
              (type == SOCK_DGRAM || listen(fd, 1) == 0));
        std::string out;
        CHECK_EQ(program("-l 127.0.0.1@" + std::to_string(port) + " -c " + certificates.ca(), out),
                 1);
        CHECK_WHY(contains(out, "port " + std::to_string(port) +
                                    " is taken; try --listen 127.0.0.1@5300"),
                  out);
        close(fd);
    }
}

TEST("options.help_and_version") {
    std::string out;
    CHECK_EQ(program("--help", out), 0);
    CHECK(contains(out, "[127.0.0.1@53 ::1@53]") && contains(out, "[512]") &&
          contains(out, "[4000]"));
    CHECK_EQ(program("-V", out), 0);
    CHECK(contains(out, "dot-proxy "));
}

int main(int argc, char** argv) { return check::main(argc, argv); }

// transport.cpp - how queries come and answers go: UDP, TCP, IPv4, IPv6, framing, TCP clients.
//
// Numbers in parentheses are those of the list of requirements in test/requirements.md.
#include <netinet/tcp.h>

#include <set>

#include "program.hpp"

using namespace test;

// ---- transport ----------------------------------------------------------------------------------

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

// ---- framing ------------------------------------------------------------------------------------

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

// ---- TCP clients --------------------------------------------------------------------------------

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

// Malloc fills what is freed with octets (mallopt(3), M_PERTURB): a use of it does not pass
// unnoticed.
TEST("tcp.nothing_of_a_client_is_used_after_it") {
    setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=165:glibc.malloc.tcache_count=0", 1);
    Pair p;
    for (int i = 0; i < 12; i++) {
        Client c(SOCK_STREAM, p.proxy.port);
        c.send(make_query("slow100.test"));
        shutdown(c.fd, SHUT_WR);
        if (i % 2) CHECK(c.receive());
    }
    CHECK(eventually([&] { return p.proxy.total("tcp") == 12 && p.proxy.total("success") == 12; }));
    CHECK(p.proxy.tcp(make_query("a.test")));
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

int main(int argc, char** argv) { return check::main(argc, argv); }

// contract.cpp - what a proxy owes both sides, octet by octet: the whole program, black box.
#include <dirent.h>
#include <openssl/ssl.h>

#include <algorithm>
#include <set>
#include <thread>

#include "program.hpp"

using namespace test;

// ---- messages ----------------------------------------------------------------------------------

TEST("contract.answers_are_relayed_octet_for_octet") {
    Pair p;
    // Unknown types whose data looks like pointers, pointers into data, chains of 100 pointers.
    for (const char* name : {"unknown.test", "pointers.test", "chain.test", "size3000.test"}) {
        static int id = 0x4000;
        const Octets q = make_query(name, 65280, {}, ++id);
        const auto got = p.proxy.tcp(q);
        CHECK_WHY(got, name);
        Octets want = p.upstream.seen().answer(id);
        const Answer sent(want);
        if (sent.has_opt) {  // of the proxy's asking: it is the last record, and goes
            want.resize(sent.opt_at);
            want[11]--;
        }
        CHECK_WHY(*got == want, name);
    }
}

TEST("contract.signed_answers_are_relayed_unchanged_or_cut") {
    Pair p;
    const Octets small = make_query("tsig.test", 16, Edns{}, 0x5001);
    const auto got = p.proxy.udp(small);
    CHECK(got && *got == p.upstream.seen().answer(0x5001));
    const Answer cut(*p.proxy.udp(make_query("tsig3000.test", 16, Edns{}, 0x5002)));
    CHECK(cut.tc() && cut.count(1) == 0 && cut.octets.size() <= 1232);
}

TEST("contract.udp_query_of_4096_octets") {
    Pair p;
    Octets options{0xfd, 0xe9, 0, 0};
    const int fill = 4096 - int(make_query("a.test", 1, Edns{1232, false, options}).size());
    options[2] = uint8_t(fill >> 8);
    options[3] = uint8_t(fill);
    options.insert(options.end(), size_t(fill), 7);
    const Octets q = make_query("a.test", 1, Edns{1232, false, options}, 0x6001);
    CHECK_EQ(q.size(), 4096u);
    CHECK_EQ(p.proxy.ask(q).rcode(), 0);
    const Octets seen = p.upstream.seen().query(0x6001);
    CHECK(seen.size() % 128 == 0 && Answer(seen).options.at(0xfde9) == Octets(size_t(fill), 7));
}

TEST("contract.retransmissions_get_one_answer_each") {
    Pair p;
    Client c(SOCK_DGRAM, p.proxy.port);
    for (int i = 0; i < 3; i++) c.send(make_query("slow200.test"));
    for (int i = 0; i < 3; i++) CHECK(c.receive());
    CHECK(!c.readable(0.7));
}

TEST("contract.stray_answers_reach_no_other_query") {  // also where connections are used again
    for (const Proxy::Words& more : {Proxy::Words{}, Proxy::Words{"--reuse"}}) {
        Pair p({}, more);
        for (int i = 0; i < 30; i++) {
            const Octets q = make_query((i % 3 == 0   ? "two-"
                                         : i % 3 == 1 ? "stray30-"
                                                      : "a") +
                                        std::to_string(i) + ".test");
            const Answer a = p.proxy.ask(q);
            CHECK(a.rcode() == 2 || has_address_of(a, q));  // an answer too many ends a connection
            if (a.rcode() == 0) CHECK(std::equal(q.begin() + 12, q.end(), a.octets.begin() + 12));
        }
        CHECK_EQ(p.proxy.ask(make_query("last.test")).rcode(), 0);
    }
}

// ---- TLS ---------------------------------------------------------------------------------------

TEST("contract.client_hello_has_only_tls_1_3_and_1_2_and_no_compression") {
    Pair p;
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    for (const Hello& hello : p.upstream.seen().hellos) {
        CHECK(hello.versions == (Octets{4, 3, 4, 3, 3}) || hello.versions == (Octets{3, 4, 3, 3}));
        CHECK(hello.compressions == Octets{0});
        CHECK(!hello.extensions.count(42));  // early data
        CHECK_EQ(hello.name, "dot.test");
    }
}

TEST("contract.renegotiation_is_refused_and_does_not_hang") {
    Pair p({.max_version = TLS1_2_VERSION}, {"-t", "2000"});
    const auto start = Clock::now();
    CHECK(p.proxy.udp(make_query("renegotiate.test")));
    CHECK(since(start) < 10);
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
}

// RFC 9325 4.2. Before: AES128-SHA and others without forward secrecy were offered.
TEST("contract.in_tls_1_2_weak_ciphers_are_not_offered") {
    const std::string weak = "AES128-GCM-SHA256:AES128-SHA:ECDHE-ECDSA-AES128-SHA";
    const std::string good = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256";
    Pair with_weak({.max_version = TLS1_2_VERSION, .ciphers = weak}, {"-t", "1000"});
    Pair with_good({.max_version = TLS1_2_VERSION, .ciphers = good});
    CHECK_EQ(with_weak.proxy.ask(make_query("a.test")).rcode(), 2);
    CHECK_EQ(with_good.proxy.ask(make_query("a.test")).rcode(), 0);
}

TEST("contract.tickets_past_their_lifetime_are_not_used") {
    for (bool late : {false, true}) {
        Pair p({.ticket_lifetime = 1, .delay_ms = 40}, {"-k", "0"});
        CHECK_WHY(p.proxy.ask(make_query("a.test")).rcode() == 0, p.proxy.out());
        if (late) usleep(3200000);
        const int before = p.upstream.seen().resumed;
        CHECK_EQ(p.proxy.ask(make_query("b.test")).rcode(), 0);
        CHECK_EQ(p.upstream.seen().resumed - before, late ? 0 : 1);
    }
}

TEST("contract.close_notify_comes_before_the_end") {
    Pair p({}, {"-k", "0"});
    for (int i = 0; i < 5; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    CHECK(eventually([&] { return p.upstream.seen().notified >= 5; }));
    CHECK_EQ(p.upstream.seen().torn, 0);
}

TEST("contract.chains_and_pins_of_authorities") {
    const struct {
        Cert cert;
        int pin;
        bool good;
    } rows[] = {// pin 1: the intermediate's, 2: the CA's
                {Cert::Chained, 0, true},
                {Cert::Chained, 1, true},
                {Cert::Chained, 2, true},
                {Cert::NoIntermediate, 0, false},
                {Cert::FalseCa, 0, false}};
    for (auto& row : rows) {
        Certificates c;
        Upstream upstream(c, {.cert = row.cert});
        const std::string file = row.pin == 1 ? c.intermediate() : c.ca();
        Proxy proxy(c, {upstream.spec(row.pin ? ",pin-sha256=" + Certificates::pin(file) : "")});
        CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), row.good ? 0 : 2);
        CHECK_EQ(upstream.seen().queries.empty(), !row.good);
    }
}

// ---- connections -------------------------------------------------------------------------------

TEST("contract.the_oldest_ready_connection_is_taken_first") {
    // On a busy machine handshakes differ much, as if the resolver were overloaded. These do not.
    Pair p({.delay_ms = 40, .handshake_ms = 200}, {"-t", "20000"});
    std::vector<std::thread> clients;  // misses at once, so that several wait
    for (int i = 0; i < 4; i++)
        clients.emplace_back(
            [&, i] { p.proxy.udp(make_query("m" + std::to_string(i) + ".test")); });
    for (auto& c : clients) c.join();
    CHECK(eventually([&] { return p.upstream.seen().handshakes >= 4 + 7; }));  // a miss parks two
    usleep(500000);  // They are parked when their tickets have come.
    const int waiting = p.upstream.seen().connections;
    for (int i = 0; i < 6; i++) {
        CHECK_EQ(p.proxy.ask(make_query("a.test", 1, {}, 100 + i)).rcode(), 0);
        usleep(400000);
    }
    const Seen seen = p.upstream.seen();
    int newer = 0;  // than those which waited when the first of the six came
    for (size_t i = 0; i < seen.queries.size(); i++)
        newer += get16(seen.queries[i], 0) < 200 && seen.on[i] > waiting;
    // The oldest is out for a moment, to be looked at.
    CHECK_WHY(newer <= 1, std::to_string(newer));
}

TEST("contract.pointed_at_itself_it_ends_in_servfail") {
    Certificates c;
    Proxy proxy(c, {"127.0.0.1@{port}#dot.test"}, {"-t", "1000"});
    CHECK_EQ(proxy.ask(make_query("a.test")).rcode(), 2);
    CHECK(proxy.prints("FAILURE"));
}

TEST("contract.grace_ends_even_if_the_resolver_hangs") {  // 3 s
    Pair p({.deaf = true}, {"-t", "20000"});
    Client c(SOCK_DGRAM, p.proxy.port);
    c.send(make_query("a.test"));
    CHECK(eventually([&] { return p.upstream.seen().queries.size() >= 1; }));
    const auto start = Clock::now();
    CHECK_EQ(p.proxy.process().end(SIGTERM), 0);
    CHECK(since(start) > 2.5 && since(start) < 10);
}

// The inodes of the sockets of a process, which /proc/net lists.
static std::set<std::string> sockets_of(pid_t pid) {
    std::set<std::string> inodes;
    const std::string directory = "/proc/" + std::to_string(pid) + "/fd";
    DIR* d = opendir(directory.c_str());
    while (dirent* e = readdir(d)) {
        char to[64] = "";
        if (readlink((directory + "/" + e->d_name).c_str(), to, sizeof to - 1) > 8 &&
            strncmp(to, "socket:[", 8) == 0)
            inodes.insert(std::string(to + 8, strchr(to, ']')));
    }
    closedir(d);
    return inodes;
}
static int listed(const std::set<std::string>& inodes, const std::string& table) {
    int found = 0;
    std::ifstream in("/proc/net/" + table);
    for (std::string line, word; std::getline(in, line);) {
        std::istringstream words(line);
        for (int i = 0; i < 10; i++) words >> word;
        found += inodes.count(word);
    }
    return found;
}

TEST("contract.no_udp_socket_but_the_listeners") {  // nothing is asked over anything but TCP
    Pair p;
    Client c(SOCK_DGRAM, p.proxy.port);
    c.send(make_query("slow800.test"));
    CHECK(eventually([&] { return p.upstream.seen().queries.size() == 1; }));
    const auto inodes = sockets_of(p.proxy.pid());
    CHECK_EQ(listed(inodes, "udp"), 1);
    CHECK_EQ(listed(inodes, "udp6"), 1);
    CHECK(listed(inodes, "tcp") >= 2);
    CHECK(c.receive());
}

TEST("contract.a_bad_option_binds_nothing") {  // with a port that is taken: exit 2 comes first
    const int port = free_port();
    const int fd = socket(AF_INET, SOCK_DGRAM, 0);
    sockaddr_in place{};
    place.sin_family = AF_INET;
    place.sin_port = htons(uint16_t(port));
    CHECK_EQ(bind(fd, reinterpret_cast<sockaddr*>(&place), sizeof place), 0);
    for (const char* bad : {"-u nobody", "-c /nonexistent", "-U no-such-user", "-a 10.0.0.0/33"}) {
        std::string out;
        const std::string listen = " -l 127.0.0.1@" + std::to_string(port) + " ";
        CHECK_WHY(run("timeout 20 " + environment("PROXY") + listen + bad, out) == 2, out);
    }
    close(fd);
}

TEST("contract.quiet_prints_no_line_per_query") {
    Pair p({}, {"-q"});
    for (int i = 0; i < 3; i++) CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
    const std::string out = p.proxy.out();  // one line says that it is ready
    CHECK_EQ(std::count(out.begin(), out.end(), '\n'), 1);
    CHECK(out.starts_with("READY "));
}

int main(int argc, char** argv) { return check::main(argc, argv); }

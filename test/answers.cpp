// answers.cpp - answers of every form that the RFCs allow, octet for octet, and what is none.
#include <openssl/ssl.h>

#include <thread>

#include "program.hpp"
#include "records.hpp"

using namespace test;

static Octets from_hex(const std::string& hex) {
    Octets out;
    for (size_t i = 0; i + 1 < hex.size(); i += 2)
        out.push_back(uint8_t(std::stoi(hex.substr(i, 2), nullptr, 16)));
    return out;
}
static std::string to_hex(const Octets& octets) {
    std::string out;
    char two[3];
    for (uint8_t octet : octets) {
        snprintf(two, sizeof two, "%02x", octet);
        out += two;
    }
    return out;
}

// A resolver that gives one answer to all.
static Options told(const Octets& answer) {
    return {.script = [answer](const Octets&) { return answer; }};
}

// `query` is met with `answer`: what comes must be `want`, over both transports, for one query
// each.
static void relayed(const Octets& query, const Octets& answer, const Octets& want,
                    const std::string& what) {
    for (bool tcp : {false, true}) {
        if (!tcp && want.size() > 512) continue;  // It would be cut.
        Pair t(told(answer));
        const auto got = tcp ? t.proxy.tcp(query) : t.proxy.udp(query);
        CHECK_WHY(got, what);
        CHECK_WHY(*got == want, what + "\n  got:  " + to_hex(*got) + "\n  want: " + to_hex(want));
        CHECK_WHY(t.upstream.seen().queries.size() == 1, what + ": asked more than once");
    }
}

// It is no answer: SERVFAIL.
static void refused(const Octets& query, const Octets& answer, const std::string& what) {
    Pair t(told(answer), {"-t", "2000"});
    const auto got = t.proxy.udp(query);
    CHECK_WHY(got && Answer(*got).rcode() == 2, what);
}

// ---- The OPT may stand anywhere, RFC 6891 6.1.1 ------------------------------------------------

TEST("answers.opt_before_an_address_that_looks_like_a_pointer") {
    const Octets query =
        from_hex("123401000001000000000000025f78045f7463700373766304746573740000210001");
    const Octets answer = from_hex(
        "123481800001000100000002025f78045f7463700373766304746573740000210001"
        "c00c002100010000003c000f00000005005002683104746573740000002904d0000000000000"
        "026831047465737400000100010000003c0004c0a80107");
    const Octets want = from_hex(
        "123481800001000100000001025f78045f7463700373766304746573740000210001"
        "c00c002100010000003c000f000000050050026831047465737400"
        "026831047465737400000100010000003c0004c0a80107");
    relayed(query, answer, want, "SRV and A");
}

// Messages with an OPT in their midst, written twice: with it as the resolver sends it and as the
// client is to have it (or without). Pointers are right in both.
class Message {
public:
    Message(const Octets& query, const Octets& opt) : octets(query), opt_(opt) {
        octets.resize(size_t(Answer(query).question_end));
        octets[2] |= 0x80;
        octets[3] |= 0x80;
        std::fill(octets.begin() + 6, octets.begin() + 12, 0);
    }
    int here() const { return int(octets.size()); }
    static Octets pointer(int to) { return {uint8_t(0xc0 | to >> 8), uint8_t(to)}; }
    // The next records are of this section: 1: answers, 2: authorities, 3: additionals.
    void section(int which) { section_ = size_t(4 + 2 * which); }
    // Data comes from here, as where it stands decides what a pointer to it says.
    int record(const Octets& owner, int type, const Octets& data) {
        octets[section_ + 1]++;
        append(octets, owner);
        append16(octets, type);
        append(octets, {0, 1, 0, 0, 0, 60});
        append16(octets, int(data.size()));
        append(octets, data);
        return here() - int(data.size());
    }
    void opt() {
        if (!opt_.empty()) octets[11]++;
        append(octets, opt_);
    }
    Octets octets;

private:
    const Octets opt_;
    size_t section_ = 6;
};

// The OPTs that are tried: of the resolver, of the client's query; and what the client is to have.
struct Opts {
    const char* what;
    bool edns;          // the client's
    Octets sent, want;  // options
};
static const std::vector<Opts>& opts() {
    static const Octets padding = Octets{0, 12, 0, 30} + Octets(30, 0);
    static const Octets keepalive{0, 11, 0, 2, 0, 100}, ede{0, 15, 0, 2, 0, 3};
    static const std::vector<Opts> all{
        {"client without EDNS", false, {}, {}},
        {"client without EDNS, padded", false, padding, {}},
        {"padding goes", true, padding, {}},
        {"padding and keepalive go, an error stays", true, keepalive + ede + padding, ede},
        {"nothing goes", true, ede, ede}};
    return all;
}

static void try_all(const std::function<void(Message&)>& fill, const std::string& name, int type) {
    for (auto& one : opts()) {
        const auto edns = one.edns ? std::optional(Edns{}) : std::nullopt;
        const Octets query = make_query("_x._tcp.svc.test", type, edns, 0x2345);
        Message sent(query, opt_record({1232, false, one.sent}));
        Message want(query, one.edns ? opt_record({1232, false, one.want}) : Octets{});
        fill(sent);
        fill(want);
        relayed(query, sent.octets, want.octets, name + ", " + one.what);
    }
}

// The OPT, an address behind it with a name in full, and then records that point to that name.
static int behind_opt(Message& m) {
    m.section(3);
    m.opt();
    const int name = m.here();
    m.record(wire_name("ns.elsewhere.test"), 1, {192, 168, 1, 7});
    return name;
}

TEST("answers.owners_behind_an_opt_point_behind_it") {
    try_all(
        [](Message& m) {
            m.record(Message::pointer(12), 16, {3, 0xc0, 0x50, 0xc0});
            const int name = behind_opt(m);
            m.record(Message::pointer(name), 28, Octets(16, 0xc0));
            m.record(Octets{1, 'a'} + Message::pointer(name + 3), 1, {0xc0, 0xa8, 0xc0, 0x70});
        },
        "owners", 16);
}

TEST("answers.data_of_rfc_1035_behind_an_opt_points_behind_it") {
    const struct {
        const char* name;
        int type;
    } rows[] = {{"NS", 2}, {"CNAME", 5}, {"MB", 7}, {"MG", 8}, {"MR", 9}, {"PTR", 12}};
    for (auto& row : rows)
        try_all(
            [&](Message& m) {
                const int name = behind_opt(m);
                m.record(Message::pointer(12), row.type, Message::pointer(name));
                m.record(Message::pointer(name), row.type,
                         Octets{2, 'b', 'b'} + Message::pointer(name + 3));
                m.record(Message::pointer(name), row.type, Message::pointer(12));
            },
            row.name, 1);
}

TEST("answers.soa_mx_and_minfo_behind_an_opt_point_behind_it") {
    try_all(
        [](Message& m) {
            const int name = behind_opt(m);
            const Octets to = Message::pointer(name), numbers(20, 0xc0);  // like pointers
            m.record(to, 6, to + Octets{1, 'h'} + to + numbers);
            m.record(to, 6, wire_name("a.test") + Message::pointer(12) + numbers);
            m.record(to, 15, Octets{0xc0, 0x60} + to);
            m.record(to, 15, Octets{0, 10, 4, 'm', 'a', 'i', 'l'} + to);
            m.record(to, 14, Octets{1, 'r'} + to + to);
            m.record(to, 14, Message::pointer(12) + Octets{1, 'e'} + to);
        },
        "SOA, MX and MINFO", 6);
}

TEST("answers.opt_before_the_last_two_of_a_referral") {  // as of an authoritative server
    try_all(
        [](Message& m) {
            m.section(2);
            const int zone = m.record(Message::pointer(17), 2, wire_name("ns1.svc.test"));
            const int second =
                m.record(Message::pointer(17), 2, Octets{3, 'n', 's', '2'} + Message::pointer(17));
            m.section(3);
            m.opt();
            m.record(Message::pointer(zone), 1, {192, 0, 2, 1});
            m.record(Message::pointer(second), 1, {192, 0, 2, 2});
        },
        "referral", 1);
}

TEST("answers.data_of_other_types_behind_an_opt_is_left_alone") {
    // SRV, NAPTR, RRSIG, unknown: their data has no pointers (RFC 3597 4), whatever it looks like.
    for (int type : {33, 35, 46, 47, 64, 65, 257, 65280})
        try_all(
            [&](Message& m) {
                const int name = behind_opt(m);
                Octets data{0xc0, 0x50, 0xc0, 0xff, 0xc0, 0x40, 0xff};
                if (type == 33)
                    data = Octets{0xc0, 0x40, 0xc0, 0x41, 0xc0, 0x50} + wire_name("h.test");
                m.record(Message::pointer(name), type, data);
                m.record(Message::pointer(name), 1, {0xc0, 0x50, 0xc0, 0x51});
                m.record(Message::pointer(name), 16, {4, 0xc0, 0x50, 0xff, 0xff});
            },
            "type " + std::to_string(type), 255);
}

TEST("answers.pointers_that_need_not_move_do_not") {  // from behind the OPT to before it
    try_all(
        [](Message& m) {
            const int data = m.record(Message::pointer(12), 5, wire_name("canonical.test"));
            m.section(3);
            m.opt();
            m.record(Message::pointer(data), 1, {192, 0, 2, 1});
            m.record(Message::pointer(12), 12, Message::pointer(data));
            m.record({0}, 2, {0});  // the root
        },
        "before it", 5);
}

TEST("answers.opt_between_many_records") {  // pointers of two octets, over some kB
    try_all(
        [](Message& m) {
            int last = 12;
            for (int i = 0; i < 30; i++)
                last = m.record(Message::pointer(last), 5, Octets{1, 'x'} + Message::pointer(12));
            m.section(3);
            m.opt();
            for (int i = 0; i < 30; i++) {
                last = m.record(Message::pointer(last), 15,
                                Octets{0, 1, 1, 'y'} + Message::pointer(12)) +
                       2;
            }
        },
        "many", 5);
}

TEST("answers.two_opts_and_an_opt_in_another_section_are_refused") {
    const Octets query = make_query("a.test", 1, Edns{}, 0x2345);
    Message two(query, opt_record({}));
    two.section(3);
    two.opt();
    two.record(Message::pointer(12), 1, {1, 2, 3, 4});
    two.opt();
    refused(query, two.octets, "two OPTs");
    Message other(query, {});
    append(other.octets, opt_record({}));
    other.octets[7]++;
    refused(query, other.octets, "an OPT among the answers");
}

// A query, too, may have its OPT anywhere; what comes behind it must mean the same to the resolver.
TEST("answers.a_query_may_have_its_opt_anywhere") {
    Pair p;
    const auto query = [](int options) {
        Octets q = make_query("a.test", 1, {}, 0x2222);
        append(q, opt_record({1232, false, Octets(size_t(options))}));
        const int name = int(q.size());
        append(q, wire_name("b.test") + Octets{0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 0xc0, 0xa8, 1, 7});
        append(q, Message::pointer(name) + Octets{0, 2, 0, 1, 0, 0, 0, 9, 0, 2} +
                      Message::pointer(name));
        q[11] = 3;
        return q;
    };
    CHECK_EQ(p.proxy.ask(query(0)).rcode(), 0);
    const Octets seen = p.upstream.seen().query(0x2222), as_it_came = query(0);
    // Padded, and then with pointers that were moved, or as it came.
    const int grew = int(seen.size()) - int(as_it_came.size());
    CHECK(seen == as_it_came || grew > 0);
    if (grew > 0) {
        CHECK(seen.size() % 128 == 0);
        const int name = get16(seen, seen.size() - 2) & 0x3fff;
        CHECK_EQ(get16(seen, seen.size() - 14) & 0x3fff, name);
        const Octets b = wire_name("b.test");
        CHECK(Octets(seen.begin() + name, seen.begin() + name + long(b.size())) == b);
    }
}

// ---- Answers without a question ----------------------------------------------------------------

TEST("answers.update_answered_with_a_header") {
    relayed(
        from_hex("222228000001000000010000076578616d706c6504746573740000060001036e6577076578616d7"
                 "06c65047465737400000100010000003c0004c0000209"),
        from_hex("2222a8000000000000000000"), from_hex("2222a8000000000000000000"), "UPDATE");
}

TEST("answers.tsig_with_an_unknown_key") {  // RFC 8945 5.2.1
    const Octets answer = from_hex(
        "3132800900000000000000010864646e732d6b6579076578616d706c65036e696c0000fa00ff00000000001d"
        "0b686d61632d736861323536000000559aef27012c0000d3d500110000");
    relayed(from_hex(
                "3132000000010000000000010774657374646333076578616d706c65036e696c00000600010864"
                "646e732d6b6579c01400fa00ff00000000003d0b686d61632d736861323536000000559aef27012c"
                "0020f927106b700a03ee40ed83a18cb1ac2eb79554b7d58edf505b80ada32f71ccd6d3d500000000"),
            answer, answer, "TSIG");
}

TEST("answers.any_rcode_but_noerror_needs_no_question") {
    for (int rcode = 1; rcode < 16; rcode++) {
        const Octets query = make_query("a.test", 1, {}, 0x3333);
        const Octets answer{0x33, 0x33, 0x81, uint8_t(0x80 | rcode), 0, 0, 0, 0, 0, 0, 0, 0};
        Pair t(told(answer));
        const auto got = t.proxy.udp(query);
        CHECK_WHY(got && *got == answer, "rcode " + std::to_string(rcode));
    }
}

TEST("answers.a_header_without_records_needs_no_question") {  // NOERROR, of any opcode
    for (int opcode : {0, 2, 4, 5}) {
        Octets query = make_query("a.test", 6, {}, 0x3333, opcode << 11 | 0x0100);
        const Octets answer{0x33, 0x33, uint8_t(0x81 | opcode << 3), 0x80, 0, 0, 0, 0, 0, 0, 0, 0};
        relayed(query, answer, answer, "opcode " + std::to_string(opcode));
    }
}

TEST("answers.records_without_a_question_are_not_believed") {
    const Octets query = make_query("a.test", 1, {}, 0x3333);
    const Octets answer = Octets{0x33, 0x33, 0x81, 0x80, 0, 0, 0, 1, 0, 0, 0, 0} +
                          wire_name("a.test") + Octets{0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 6, 6, 6, 6};
    refused(query, answer, "an address");
    Octets other{0x33, 0x34, 0x81, 0x85, 0, 0, 0, 0, 0, 0, 0, 0};
    refused(query, other, "another id");
    other = {0x33, 0x33, 0xa9, 0x85, 0, 0, 0, 0, 0, 0, 0, 0};
    refused(query, other, "another opcode");
}

// ---- What nobody asked for ---------------------------------------------------------------------

// The resolver sends an answer to a query that is yet to come.
static void unasked(Options::Unasked when, const Proxy::Words& more, int version) {
    const Octets victim = make_query("victim.test", 1, {}, 0x7777);
    Octets forged = victim;
    forged[2] |= 0x84;
    forged[7] = 1;
    append(forged, {0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 6, 6, 6, 6});
    Certificates certificates;
    Upstream first(certificates, {.max_version = version, .unasked_when = when, .unasked = forged});
    Upstream second(certificates);
    Proxy proxy(certificates, {first.spec(), second.spec()}, more);
    int forgeries = 0;
    for (int i = 0; i < 5; i++) {
        // It may be that an honest answer came with the other one, and was not believed either.
        const auto before = proxy.udp(make_query("a" + std::to_string(i) + ".test"));
        CHECK(before);
        usleep(100000);
        const Answer a = proxy.ask(victim, i % 2);
        CHECK_EQ(a.rcode(), 0);
        forgeries += !has_address_of(a, victim);
        usleep(100000);
    }
    // What comes with the handshake may come so late that it cannot be told from an answer.
    if (when == Options::WithHandshake) {
        CHECK_WHY(forgeries <= 2, std::to_string(forgeries) + " of 5 answers are forged");
    } else {
        CHECK_EQ(forgeries, 0);
    }
    // Neither the queries of the first nor those of the second shared a connection with a forgery.
    if (when != Options::WithHandshake) {
        const Seen seen = first.seen();
        const std::set<int> all(seen.on.begin(), seen.on.end());
        CHECK_EQ(all.size(), seen.on.size());
    }
}

TEST("answers.what_comes_with_an_answer_ends_its_connection") {
    for (int version : {TLS1_2_VERSION, TLS1_3_VERSION})
        unasked(Options::WithAnswer, {"--reuse"}, version);
}
TEST("answers.what_comes_behind_an_answer_ends_its_connection") {
    for (int version : {TLS1_2_VERSION, TLS1_3_VERSION})
        unasked(Options::AfterAnswer, {"--reuse"}, version);
}
TEST("answers.what_comes_before_the_query_ends_its_connection") {  // RFC 8446 2.3: 0.5-RTT data
    for (const Proxy::Words& more : {Proxy::Words{}, Proxy::Words{"--reuse"}, {"-k", "0"}})
        unasked(Options::WithHandshake, more, TLS1_3_VERSION);
}

int main(int argc, char** argv) { return check::main(argc, argv); }

// messages.cpp - what happens to a message: verdicts, padding, EDNS, truncation, and whether it
// matches.
//
// Numbers in parentheses are those of the list of requirements in test/requirements.md.
#include <algorithm>

#include "program.hpp"

using namespace test;

// ---- judge --------------------------------------------------------------------------------------

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
        const auto answer = p.proxy.udp(q);
        CHECK(answer && Answer(*answer).rcode() != 2);
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

// ---- edns and padding ---------------------------------------------------------------------------

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
        p.proxy.ask(make_query("txt450.test", 16, Edns{512, false, {}}));  // padded to 936
    CHECK(!a.tc() && a.octets.size() > 450);
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
    CHECK(p.proxy.prints("ANSWERED udp A BADVERS"));
    CHECK(p.proxy.prints("ANSWERED udp A BADCOOKIE"));
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

// ---- truncation ---------------------------------------------------------------------------------

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

// ---- match --------------------------------------------------------------------------------------

TEST("match.what_is_no_answer_to_the_query_is_not_relayed") {  // (92, 93, 95, 116)
    Pair p;
    for (const char* fault :
         {"wrongid", "wrongname", "wrongtype", "wrongclass", "query", "short"}) {
        const size_t before = p.upstream.seen().queries.size();
        const Answer a = p.proxy.ask(make_query(std::string(fault) + ".test"));
        CHECK_WHY(a.rcode() == 2 && a.count(1) == 0, fault);
        CHECK_WHY(p.upstream.seen().queries.size() - before <= 3, fault);  // (96, S21)
        CHECK_WHY(p.proxy.prints("no answer to this query"), fault);
    }
    // Even without the question: nothing in these needs one to be believed.
    for (auto [name, rcode] : {std::pair("headeronly.test", 0), std::pair("refused.test", 5),
                               std::pair("formerr.test", 1), std::pair("servfail.test", 2)})
        CHECK_EQ(p.proxy.ask(make_query(name)).rcode(), rcode);
}

int main(int argc, char** argv) { return check::main(argc, argv); }

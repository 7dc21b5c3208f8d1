// unit.cpp - the pure functions of dot.hpp: tables of input and expectation, and round trips.
#include <functional>
#include <random>

#include "dot.hpp"
#include "program.hpp"
#include "reading.hpp"

using namespace test;

static Query query_of(const Octets& octets, bool tcp = false) { return {octets, tcp}; }
static Octets with(Octets m, size_t at, int octet) {
    m[at] = uint8_t(octet);
    return m;
}
static Octets plus(Octets m, const Octets& more) {
    append(m, more);
    return m;
}
// `m` with a record behind it, counted in the section whose count's low octet is at `count_at`.
static Octets with_record(Octets m, const Octets& owner, int type, const Octets& data,
                          size_t count_at = 11) {
    append(m, owner);
    append16(m, type);
    append(m, {0, 1, 0, 0, 0, 60});
    append16(m, int(data.size()));
    append(m, data);
    m[count_at]++;
    return m;
}
static const Octets root{0}, pointer{0xc0, 12};
static const Octets plain = make_query("a.test"), edns = make_query("a.test", 1, Edns{});
static Octets answer_to(Octets m) {
    m[2] |= 0x80;
    m[3] |= 0x80;
    return m;
}

TEST("parse.finds_the_parts_of_a_message") {
    const auto l = parse(make_query("a.test", 1, Edns{1400, true, {0, 3, 0, 0}}));
    CHECK(!l.fault);
    CHECK_EQ(l.question_end, 24u);
    CHECK(l.opt == 24 && l.opt_end == 39 && l.end == 39 && l.dnssec_ok && !l.is_signed);
    CHECK_EQ(l.udp_size, 1400u);
    const auto none = parse(plain);
    CHECK(!none.fault && none.opt == 0 && none.udp_size == 512);
}

TEST("parse.faults") {
    const std::string l63(63, 'x');
    const std::string n255 = l63 + "." + l63 + "." + l63 + "." + std::string(61, 'y'),
                      n256 = n255 + "y";
    const struct {
        const char* what;
        Octets m;
        bool good;
    } rows[] = {
        {"a label of 63 octets", make_query(l63 + ".test"), true},
        {"a label of 64", with(plain, 12, 64), false},
        {"a label of 191", with(plain, 12, 191), false},
        {"a name of 255", make_query(n255), true},
        {"a name of 256", make_query(n256), false},
        {"a pointer in the question", with(plain, 12, 0xc0), false},
        {"no question", Octets(12, 0), true},
        {"a question cut short", Octets(plain.begin(), plain.end() - 1), false},
        {"shorter than a header", Octets(11, 0), false},
        {"a pointer to itself as a record's owner: it is not followed",
         with_record(plain, {0xc0, 24}, 1, {1, 2, 3, 4}), true},
        {"a record that is not there", with(plain, 7, 1), false},
        {"RDLENGTH past the end", with(with_record(plain, pointer, 1, {1, 2, 3, 4}), 35, 5), false},
        {"half a pointer", plus(with(plain, 7, 1), {0xc0}), false},
        {"counts of 65535", with(with(plain, 6, 255), 7, 255), false},
        {"two OPTs", with_record(edns, root, 41, {}), false},
        {"an OPT whose owner is not the root", with_record(plain, {1, 'x', 0}, 41, {}), false},
        {"an OPT among the answers", with_record(plain, root, 41, {}, 7), false},
        {"an option past its OPT", make_query("a.test", 1, Edns{1232, false, {0, 3, 0, 2, 1}}),
         false},
        {"half an option's header", make_query("a.test", 1, Edns{1232, false, {0, 3, 0}}), false},
        {"an option of no octets", make_query("a.test", 1, Edns{1232, false, {0, 3, 0, 0}}), true},
        {"an OPT first", with_record(edns, root, 1, {1, 2, 3, 4}), true},
        {"octets behind the last record", plus(plain, {7}), true},
    };
    for (auto& row : rows) CHECK_WHY(!parse(row.m).fault == row.good, row.what);
}

TEST("parse.signed_only_if_the_signature_is_last") {
    CHECK(parse(with_record(plain, root, 250, Octets(16, 0))).is_signed);
    CHECK(parse(with_record(plain, root, 24, Octets(18, 0))).is_signed);  // SIG(0)
    // Not additional.
    CHECK(!parse(with_record(plain, root, 250, Octets(16, 0), 7)).is_signed);
    CHECK(!parse(with_record(with_record(plain, root, 250, {}), root, 1, {})).is_signed);
}

TEST("judge.verdicts") {
    const Octets large =
        make_query("a.test", 1, Edns{1232, false, plus({0, 100, 0x10, 0}, Octets(0x1000, 0))});
    const struct {
        const char* what;
        Octets m;
        Action action;
        int rcode = 0;
    } rows[] = {
        {"a query", plain, Action::forward},
        {"an answer: replying would be a loop", answer_to(plain), Action::ignore},
        {"11 octets", Octets(11, 0), Action::ignore},
        {"DSO, even malformed", with(Octets(plain.begin(), plain.end() - 3), 2, 6 << 3),
         Action::answer, NOTIMP},
        {"AXFR", make_query("a.test", 252), Action::answer, NOTIMP},
        {"IXFR", make_query("a.test", 251), Action::answer, NOTIMP},
        {"a NOTIFY about type 252 is not a transfer", make_query("a.test", 252, {}, 1, 4 << 11),
         Action::forward},
        {"no question, RFC 9619 4", Octets(12, 0), Action::forward},
        {"malformed", with(plain, 12, 64), Action::answer, FORMERR},
        {"an unknown opcode", with(plain, 2, 15 << 3), Action::forward},
        {"resolver.arpa", make_query("resolver.arpa", 64), Action::answer, NOERROR},
        {"a name below it, in capitals", make_query("_dns.RESOLVER.arpa"), Action::answer, NOERROR},
        {"another one", make_query("xresolver.arpa"), Action::forward},
        {"the domain above it", make_query("arpa"), Action::forward},
        {"more than 4,096 octets over UDP", large, Action::truncate, NOERROR},
    };
    for (auto& row : rows) {
        const Verdict verdict = judge(query_of(row.m));
        CHECK_WHY(verdict.action == row.action, row.what);
        CHECK_WHY(verdict.rcode == row.rcode, row.what);
    }
    CHECK(judge(query_of(large, true)).action == Action::forward);
    Octets two = with(plain, 5, 2);
    append(two, Octets(plain.begin() + 12, plain.end()));
    CHECK_EQ(judge(query_of(two)).rcode, FORMERR);
    // Only of opcode QUERY.
    CHECK(judge(query_of(with(two, 2, 5 << 3))).action == Action::forward);
}

TEST("pad.every_size_to_a_multiple_of_128") {
    for (int length = 1; length < 250; length++) {
        std::string name;
        for (int left = length; left > 0; left -= 63)
            name += std::string(std::min(left, 62), 'n') + ".";
        for (const Octets& q : {make_query(name + "t"),
                                make_query(name + "t", 1, Edns{1232, true, {0, 100, 0, 1, 9}})}) {
            const Octets padded = pad(query_of(q));
            const Answer a(padded);
            CHECK_EQ(padded.size() % 128, 0u);
            CHECK_EQ(padded.size() / 128,
                     (q.size() + 4 + (Answer(q).has_opt ? 0 : 11) + 127) / 128);
            CHECK(a.options.count(12) == 1 && a.count(3) == 1);
            for (uint8_t octet : a.options.at(12)) CHECK_EQ(int(octet), 0);  // RFC 7830 3
            CHECK(std::equal(a.options.at(12).begin(), a.options.at(12).end(),
                             padded.end() - a.options.at(12).size()));
        }
    }
}

TEST("pad.what_travels_unchanged") {
    const struct {
        const char* what;
        Octets m;
    } rows[] = {
        {"TSIG", with_record(edns, root, 250, Octets(16, 0))},
        {"SIG(0)", with_record(plain, root, 24, Octets(18, 0))},
        {"octets behind the last record", plus(plain, {1, 2})},
        {"a pointer into the OPT", with_record(edns, {0xc0, 26}, 1, {})},
        {"no room",
         make_query("a.test", 1, Edns{1232, false, plus({0, 9, 0xff, 0x60}, Octets(0xff60, 0))})},
    };
    for (auto& row : rows) CHECK_WHY(pad(query_of(row.m)) == row.m, row.what);
    const Octets first = with_record(edns, pointer, 1, {1, 2, 3, 4});  // this pointer stays right
    const Octets padded = pad(query_of(first));
    CHECK_EQ(padded.size() % 128, 0u);
    CHECK_EQ(Answer(padded).options.count(12), 1u);
}

TEST("pad.own_padding_is_replaced") {
    for (int own : {0, 4, 90, 300}) {
        Octets o{0, 12, uint8_t(own >> 8), uint8_t(own)};
        o.resize(4 + size_t(own), 0xaa);
        append(o, {0, 10, 0, 2, 5, 6, 0, 12, 0, 0});
        const Answer a(pad(query_of(make_query("a.test", 1, Edns{1232, false, o}))));
        CHECK_EQ(a.octets.size(), 128u);
        CHECK(a.options.size() == 2 && a.options.at(10) == (Octets{5, 6}));
        CHECK_EQ(std::count(a.octets.begin(), a.octets.end(), 0xaa), 0);
    }
}

TEST("match.table") {
    const Octets a = answer_to(plain), big = make_query("A.TEST");
    const Octets no_question{0x12, 0x34, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    const struct {
        const char* what;
        Octets q, a;
        bool good;
    } rows[] = {
        {"its answer", plain, a, true},
        {"another id", plain, with(a, 1, 0x35), false},
        {"not an answer", plain, plain, false},
        {"another opcode", plain, with(a, 2, 0x91), false},
        {"another name", plain, with(a, 13, 'b'), false},
        {"another case", big, a, true},
        {"'@' and '`' differ by 32 and are no letters", make_query("@.test"),
         answer_to(make_query("`.test")), false},
        {"type 0x61 is not 0x41", make_query("a.test", 0x41), answer_to(make_query("a.test", 0x61)),
         false},
        {"another class", plain, with(a, 23, 3), false},
        {"no question and no records", plain, with(Octets(a.begin(), a.begin() + 12), 5, 0), true},
        {"no question and a record", plain,
         with_record(with(Octets(a.begin(), a.begin() + 12), 5, 0), root, 1, {1, 2, 3, 4}, 7),
         false},
        {"no question, REFUSED", plain,
         with(with(Octets(a.begin(), a.begin() + 12), 5, 0), 3, 0x85), true},
        {"no question, NXDOMAIN", plain,
         with(with(Octets(a.begin(), a.begin() + 12), 5, 0), 3, 0x83), true},
        {"a question where none was asked", no_question, a, false},
        {"none where none was asked", no_question, with(no_question, 2, 0x81), true},
        {"a record, and no question where none was asked", no_question,
         with_record(with(no_question, 2, 0x81), root, 1, {1, 2, 3, 4}, 7), true},
        {"another id, where no question was asked", no_question,
         with(with(no_question, 2, 0x81), 1, 0x35), false},
        {"malformed", plain, with(a, 7, 1), false},
        {"a longer name", plain, answer_to(make_query("a.test.x")), false},
        {"5 octets", plain, Octets(5, 0), false},
    };
    for (auto& row : rows)
        CHECK_WHY(matches(query_of(row.q), row.a, parse(row.a)) == row.good, row.what);
}

static std::optional<Octets> unpad(const Octets& q, const Octets& a) {
    return ::unpad(query_of(q), a, parse(a));
}

TEST("unpad.takes_out_what_is_not_the_clients") {
    const Octets options{0, 12, 0, 3, 1, 2, 3, 0, 100, 0, 1, 9, 0, 11, 0, 2, 0, 7, 0, 12, 0, 0};
    const Octets a = answer_to(make_query("a.test", 1, Edns{1232, true, options}));
    CHECK(unpad(edns, a) ==
          answer_to(make_query("a.test", 1, Edns{1232, true, {0, 100, 0, 1, 9}})));
    CHECK(unpad(plain, a) == answer_to(plain));  // without EDNS no OPT at all
    CHECK(unpad(make_query("A.tesT"), answer_to(plain)) == answer_to(make_query("A.tesT")));
    const Octets middle = with_record(a, pointer, 1, {1, 2, 3, 4});
    CHECK(unpad(plain, middle) == with_record(answer_to(plain), pointer, 1, {1, 2, 3, 4}));
}

TEST("unpad.what_has_no_form_for_the_client") {
    Octets ext = answer_to(edns);
    ext[29] = 1;  // BADVERS: its low four bits are NOERROR
    CHECK(!unpad(plain, ext));
    CHECK(unpad(edns, ext) == ext);
    CHECK(!unpad(plain, with_record(answer_to(edns), {0xc0, 26}, 1, {})));  // into the OPT
    const Octets tsig =
        with_record(answer_to(make_query("a.test", 1, Edns{1232, false, {0, 12, 0, 1, 0}})), root,
                    250, Octets(16, 0));
    CHECK(unpad(plain, tsig) == tsig);
}

// RFC 6891 6.1.1: an OPT may stand anywhere among the additional records.
TEST("unpad.pointers_move_with_what_they_point_to") {
    const Octets padding{0, 12, 0, 5, 0, 0, 0, 0, 0};
    const Octets start = answer_to(make_query("a.test", 1, Edns{1232, false, padding}));
    const uint8_t name = uint8_t(start.size());  // where the first record behind the OPT begins
    const struct {
        const char* what;
        int type;
        Octets data;
    } rows[] = {
        {"NS", 2, {1, 'x', 0xc0, name}},
        {"CNAME", 5, {0xc0, name}},
        {"SOA", 6, {0xc0, name, 1, 'y', 0xc0, name, 0, 0, 0, 1}},
        {"PTR", 12, {0xc0, name}},
        {"MX", 15, {0, 5, 0xc0, name}},
        {"SRV, which some compress", 33, {0, 1, 0, 2, 0, 53, 0xc0, name}},
        {"an address that looks like a pointer", 1, {0xc0, name, 1, 7}},
        {"text that looks like a pointer", 16, {2, 0xc0, name}},
        {"an unknown type", 65280, {0xc0, name}},
        {"data that is no name", 5, {70, 1, 2}},
    };
    for (auto& row : rows) {
        const Octets first =
            with_record(start, {1, 'h', 4, 't', 'e', 's', 't', 0}, 28, Octets(16, 1));
        const Octets a = with_record(first, {0xc0, name}, row.type, row.data);
        for (const Octets& q : {plain, edns}) {
            const auto clean = unpad(q, a);
            CHECK_WHY(clean, row.what);
            CHECK_WHY(Reading(*clean).records == Reading(a).records, row.what);
            CHECK_WHY(Answer(*clean).has_opt == (q == edns), row.what);
        }
        const Octets padded = pad(query_of(with(a, 2, 0x01)));
        CHECK_EQ(padded.size() % 128, 0u);
        CHECK_WHY(Reading(padded).records == Reading(with(a, 2, 0x01)).records, row.what);
    }
}

TEST("cut.keeps_header_question_and_opt") {
    Octets a = answer_to(plain);
    for (int i = 0; i < 50; i++) a = with_record(a, pointer, 1, {1, 2, 3, 4}, 7);
    CHECK(cut(query_of(plain, true), a, 512) == a);
    const Answer no_opt(cut(query_of(plain), a, 512));
    CHECK(no_opt.tc() && no_opt.octets.size() == plain.size() && no_opt.count(1) == 0 &&
          !no_opt.has_opt);
    const Octets counted = with(a, 11, 1);
    const Octets with_opt = plus(counted, opt_record(Edns{4096, true, {0, 15, 0, 2, 0, 9}}));
    const Answer opt(cut(query_of(edns), with_opt, 512));
    CHECK(opt.tc() && opt.has_opt && opt.options.count(15) == 1 && opt.opt_flags == 0 &&
          opt.count(3) == 1);
    Octets huge{0, 15, 2, 0};
    huge.resize(4 + 512);
    const Octets with_huge = plus(counted, opt_record(Edns{4096, true, huge}));
    const Answer dropped(cut(query_of(edns), with_huge, 512));
    CHECK(dropped.tc() && dropped.has_opt && dropped.options.empty() &&
          dropped.octets.size() <= 512);
    CHECK(Answer(cut(query_of(edns), a, 512)).has_opt);  // the resolver sent none: our own
}

TEST("cut.what_a_client_can_take") {
    const struct {
        std::optional<Edns> edns;
        size_t most, limit;
    } rows[] = {{{}, 1232, 512},        {Edns{0}, 1232, 512},     {Edns{511}, 1232, 512},
                {Edns{513}, 1232, 513}, {Edns{1400}, 1232, 1232}, {Edns{65535}, 4096, 4096},
                {Edns{700}, 512, 512}};
    for (auto& row : rows)
        for (bool tcp : {false, true}) {
            const Octets q = make_query("a.test", 1, row.edns);
            Octets fits = with_record(answer_to(plain), pointer, 16, {}, 7);
            fits =
                with_record(answer_to(plain), pointer, 16, Octets(row.limit - fits.size(), 0), 7);
            const Octets longer =
                with_record(answer_to(plain), pointer, 16, Octets(row.limit - 24 - 11, 0), 7);
            CHECK_EQ(fits.size(), row.limit);
            CHECK_EQ(longer.size(), row.limit + 1);
            CHECK(cut(query_of(q, tcp), fits, row.most) == fits);
            CHECK((cut(query_of(q, tcp), longer, row.most) == longer) == tcp);
        }
}

TEST("reply.flags_opt_and_error") {
    const Octets q =
        make_query("A.test", 1, Edns{1232, true, {0, 10, 0, 1, 1}}, 0xbeef, 0x07f0 & ~0x0080);
    const Answer f(reply(query_of(q), SERVFAIL, 23));
    CHECK(f.id() == 0xbeef && f.rcode() == 2 && !f.tc() && f.count(0) == 1 && f.count(3) == 1);
    CHECK_EQ(int(f.octets[2]), 0x81);  // QR and RD
    CHECK_EQ(int(f.octets[3]), 0x92);  // RA and CD
    CHECK(f.opt_flags == 0x8000 && f.options.size() == 1 && f.options.at(15) == (Octets{0, 23}));
    const Answer n(reply(query_of(q), NOTIMP));
    CHECK(n.octets[3] == 4 && n.has_opt && n.options.empty());
    CHECK(!Answer(reply(query_of(plain), SERVFAIL, 23)).has_opt);
    Octets many = with(plain, 5, 200);  // questions, for an answer many times as long
    for (int i = 1; i < 200; i++) many.insert(many.end(), {0, 0, 1, 0, 1});
    CHECK(!query_of(many).layout.fault && reply(query_of(many), FORMERR).size() == 12);
    const Answer broken(reply(query_of(with(plain, 12, 64)), FORMERR));
    CHECK(broken.octets.size() == 12 && broken.count(0) == 0);
}

// A message of random parts; `sound`: it parses.
static Octets random_message(std::mt19937& rng, bool sound) {
    auto below = [&](int n) { return int(rng() % n); };
    std::string name;
    for (int labels = 1 + below(5); labels > 0; labels--)
        name += std::string(1 + below(40), char('a' + below(26))) + ".";
    Octets options;
    for (int n = below(4); n > 0; n--) {
        const int size = below(30), code = 100 + below(50);
        append16(options, code);
        append16(options, size);
        for (int i = 0; i < size; i++) options.push_back(uint8_t(below(128)));
    }
    Octets m = make_query(
        name, below(300),
        below(2) ? std::optional<Edns>(Edns{below(5000), below(2) > 0, options}) : std::nullopt,
        below(65536), below(128) << 4);
    for (int n = below(3); n > 0; n--)
        m = with_record(m, below(2) ? pointer : wire_name(name), 1 + below(23),
                        Octets(below(50), uint8_t(below(128))));
    if (!sound)
        for (int n = 1 + below(6); n > 0; n--) m[below(int(m.size()))] = uint8_t(rng());
    if (!sound && below(3) == 0) m.resize(below(int(m.size())));
    return m;
}

TEST("annotate.what_the_fields_say") {
    const auto says = [](const Octets& m, const std::string& line) {
        const std::string text = annotate(m);
        CHECK_WHY(text.find("\n        " + line) != text.npos, line + " is not in" + text);
    };
    Octets m = answer_to(
        make_query("www.a.test", 28, Edns{4096, true, {0, 12, 0, 2, 0, 0}}, 0x1234, 0x8730));
    m = Octets(m.begin(), m.end() - 17);  // its OPT comes last
    m[11] = 1;
    const Octets six(16, 0x20), name{3, 'n', 's', '1', 0xc0, 16};
    m = with_record(with_record(with_record(m, pointer, 28, six, 7), pointer, 1, {192, 0, 2, 1}, 7),
                    root, 2, name, 9);
    m = with_record(m, root, 16, {4, 'a', 27, '\n', 'b'}, 7);
    m = plus(m, opt_record(Edns{4096, true, {0, 12, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0,
                                             0, 0,  0, 0,  0, 0, 0, 0, 0, 0, 0, 0}}));
    for (auto line :
         {"id           4660                         12 34\n",
          "flags        opcode 0, QR AA TC RD RA AD CD NOERROR 87 b0\n",
          "questions    1                            00 01\n",
          "answers      3                            00 03\n",
          "authorities  1                            00 01\n",
          "name         www.a.test                   03 77 77 77 01 61 04 74 65 73 74 00\n",
          "type         AAAA                         00 1c\n",
          "class        IN                           00 01\n",
          "name         www.a.test                   c0 0c\n",
          "size         16                           00 10\n",
          "data         192.0.2.1                    c0 00 02 01\n",
          "data         ns1.a.test                   03 6e 73 31 c0 10\n",
          "data         .a..b                        04 61 1b 0a 62\n",
          "type         OPT                          00 29\n",
          "UDP size     4096                         10 00\n",
          "TTL          version 0 DO                 00 00 80 00\n",
          "option       PADDING                      00 0c\n",
          "size         20                           00 14\n",
          "data          00 * 20                     00 * 20"})
        says(m, line);
    says(m, "data         2020:2020:2020:2020:2020:2020:2020:2020 20 20");
    says(Octets{1, 2, 3}, "shorter than a header");
    says(plus(plain, {1, 2, 3, 4, 5}), "the rest     .....                        01 02 03 04 05");
    says(with(plain, 12, 64), "a name or record does not parse");
}

TEST("roundtrip.unpad_of_pad_gives_the_query_back") {
    std::mt19937 rng(1);
    for (int i = 0; i < 5000; i++) {
        const Octets q = random_message(rng, true);
        const Octets padded = pad(query_of(q));
        CHECK(!parse(padded).fault);
        CHECK(padded.size() % 128 == 0 || padded == q);
        CHECK(unpad(q, padded) == q);
    }
}

TEST("roundtrip.any_octets_do_no_harm") {
    std::mt19937 rng(2);
    for (int i = 0; i < 20000; i++) {
        const Octets a = random_message(rng, false), b = random_message(rng, i % 2);
        const Query q = query_of(a);
        CHECK_EQ(fault_of(annotate(a), a), "");
        if (q.octets.size() >= 12) Answer(reply(q, SERVFAIL, 23));
        if (q.layout.fault || b.size() < 12) continue;
        pad(q);
        const Layout l = parse(b);
        matches(q, b, l);
        if (l.fault) continue;
        if (const auto clean = ::unpad(q, b, l)) CHECK(cut(q, *clean, 512).size() <= 512);
    }
}

TEST("frame.length_first") {
    CHECK(frame({7, 8}) == (Octets{0, 2, 7, 8}));
    const Octets f = frame(Octets(300, 1));
    CHECK(f.size() == 302 && f[0] == 1 && f[1] == 44);
}

static bool throws(const std::function<void()>& f) {
    try {
        f();
    } catch (const BadOption&) {
        return true;
    }
    return false;
}

TEST("address.parsed_in_full") {
    CHECK_EQ(parse_address("192.0.2.1", 53).str(), "192.0.2.1@53");
    CHECK_EQ(parse_address("2001:db8::1@5300", 53).str(), "2001:db8::1@5300");
    for (const char* bad : {"", "localhost", "192.0.2", "192.0.2.1@", "192.0.2.1@0",
                            "192.0.2.1@65536", "192.0.2.1@5x", "::1@-1", "192.0.2.1 "})
        CHECK_WHY(throws([&] { parse_address(bad, 53); }), bad);
    CHECK_EQ(parse_number("65535", 1, 65535), 65535);
    for (const char* bad : {"", "0", "65536", "1x", " 1", "+1", "99999999999999"})
        CHECK_WHY(throws([&] { parse_number(bad, 1, 65535); }), bad);
}

TEST("upstream.parsed_in_full") {
    const auto c = parse_upstream("cloudflare");
    CHECK(c.size() == 4 && c[0].address.str() == "1.1.1.1@853" &&
          c[0].name == "cloudflare-dns.com");
    CHECK(c[2].address.str() == "2606:4700:4700::1111@853");
    CHECK_EQ(parse_upstream("google")[1].address.str() + parse_upstream("google")[1].name,
             "8.8.4.4@853dns.google");
    CHECK_EQ(parse_upstream("quad9")[0].name, "dns.quad9.net");
    const std::string pin = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    const auto u = parse_upstream("2001:db8::1@8853#dot.test,pin-sha256=" + pin + ",pin-sha256=/" +
                                  pin.substr(1));
    CHECK(u.size() == 1 && u[0].pins.size() == 2 && u[0].pins[0][0] == 0 &&
          u[0].pins[1][0] == 0xfc);
    for (const std::string bad :
         {"", "#dot.test", "192.0.2.1", "192.0.2.1#", "192.0.2.1#192.0.2", "192.0.2.1#.dot.test",
          "192.0.2.1#*.dot.test", "192.0.2.1#a..b", "192.0.2.1@53#dot.test", "cloudflare#x",
          "192.0.2.1#dot.test,", "192.0.2.1#dot.test,pin-sha256=AA==", "192.0.2.1#a b",
          "192.0.2.1#x,pin-sha1=AA"})
        CHECK_WHY(throws([&] { parse_upstream(bad); }), bad);
}

TEST("names.of_types_and_rcodes") {
    CHECK_EQ(type_name(28), "AAAA");
    CHECK_EQ(type_name(65280), "TYPE65280");
    CHECK_EQ(rcode_name(3), "NXDOMAIN");
    CHECK_EQ(rcode_name(15), "RCODE15");
}

int main(int argc, char** argv) { return check::main(argc, argv); }

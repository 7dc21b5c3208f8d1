// fuzz.cpp - the pure functions of dot.hpp under octets of any kind, for libFuzzer: `make fuzz`.
//
// Built once for each target, with -DTARGET=query, answer or options. What must hold is stated at
// each target; a second reader of messages (Answer of program.hpp) judges what the first one made.
#include <openssl/evp.h>

#include <algorithm>

#include "dot.hpp"
#include "program.hpp"

using namespace test;
using Text = std::string;

enum : int { keepalive = 11, padding = 12, error = 15 };

static bool ours(const Option& o) { return o.code == padding || o.code == keepalive; }
static bool same(const std::vector<Option>& a, const std::vector<Option>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](auto& x, auto& y) { return x.code == y.code && x.data == y.data; });
}
static int records(const Octets& m) { return get16(m, 6) + get16(m, 8) + get16(m, 10); }

// Parses to its last octet, for the program and for the tests' own reader.
static Layout whole(const Octets& m) {
    const Layout l = parse(m);
    CHECK_WHY(!l.fault, l.fault);
    CHECK_EQ(l.end, m.size());
    CHECK_EQ(Answer(m).has_opt, l.opt != 0);
    return l;
}

// The message with its OPT's options but 11 and 12, as written by hand.
static Octets without_ours(const Octets& m, const Layout& l) {
    if (!l.opt) return m;
    Octets out(m.begin(), m.begin() + l.opt + 9), options;
    for (auto& o : l.options) {
        if (ours(o)) continue;
        append16(options, o.code);
        append16(options, int(o.data.size()));
        append(options, o.data);
    }
    append16(out, int(options.size()));
    append(out, options);
    append(out, Octets(m.begin() + l.opt_end, m.end()));
    return out;
}

// Whether something behind the OPT looks like a pointer to behind it, so that it must not move.
static bool fixed(const Octets& m, const Layout& l) {
    for (size_t at = l.opt ? l.opt_end : m.size(); at + 2 <= m.size(); at++)
        if (get16(m, at) - 0xc000 >= int(l.opt_end)) return true;
    return false;
}

// ---- query: any octets -------------------------------------------------------------------------

// The proxy's own answers: of the query nothing but its head, and room for an OPT with an EDE.
static void check_replies(const Query& q) {
    const Layout& l = q.layout;
    const struct {
        int rcode, ede;
    } rows[] = {{FORMERR, -1}, {SERVFAIL, 23}, {NOTIMP, -1}, {REFUSED, -1}, {cut_short, -1}};
    for (auto [rcode, ede] : rows) {
        const Octets r = reply(q, rcode, ede);
        const Layout own = whole(r);
        CHECK(r.size() <= std::min<size_t>(l.question_end, 12 + 255 + 4) + 11 + 6);
        CHECK(std::equal(r.begin(), r.begin() + 2, q.octets.begin()) && (r[2] & 0x80));
        CHECK_EQ((r[2] ^ q.octets[2]) & 0x79, 0);  // opcode and RD stay
        CHECK_EQ(r[3] & 15, std::max(rcode, 0));
        CHECK_EQ((r[2] & 2) != 0, rcode == cut_short);
        CHECK(!own.opt == !l.opt && records(r) == (l.opt != 0));
        CHECK_EQ(own.options.size(), size_t(l.opt && ede >= 0));
    }
}

// Padded: a multiple of 128, or unchanged if it had to be. Nothing but the OPT differs.
static void check_padded(const Query& q, const Octets& padded) {
    const Layout &l = q.layout, p = parse(padded);
    CHECK_WHY(!p.fault, p.fault);
    CHECK(padded.size() <= longest_message && padded.size() <= q.octets.size() + 11 + 4 + 127);
    if (l.is_signed || l.end != q.octets.size() || fixed(q.octets, l)) {
        CHECK(padded == q.octets);
        return;
    }
    if (padded == q.octets && padded.size() + 11 + 4 + 127 > longest_message) return;
    CHECK_EQ(padded.size() % 128, 0u);
    whole(padded);
    CHECK(!p.options.empty() && p.options.back().code == padding);
    for (uint8_t octet : p.options.back().data) CHECK_EQ(int(octet), 0);  // RFC 7830 3
    auto before = l.options, after = p.options;
    after.pop_back();
    std::erase_if(before, [](auto& o) { return o.code == padding; });
    CHECK(same(before, after));
}

static void query(const Octets& octets) {
    const Query q{octets, false};
    CHECK_EQ(fault_of(annotate(octets), octets, q.layout.fields), "");
    const int verdict = judge(q).rcode;
    if (octets.size() < header_size) {
        CHECK_EQ(verdict, int(silence));
        return;
    }
    check_replies(q);
    CHECK_EQ(verdict == silence, (octets[2] & 0x80) != 0);
    if (verdict != ::forward) return;
    const Octets padded = pad(q);
    check_padded(q, padded);
    // What comes back if the resolver answers with the query itself is the query, with QR, and
    // without the two options that are between proxy and resolver. What is signed stays as it is.
    Octets back = padded, want = q.layout.is_signed ? octets : without_ours(octets, q.layout);
    back[2] |= 0x80;
    want[2] |= 0x80;
    const Layout l = parse(back);
    CHECK(matches(q, back, l));
    const auto clean = ::unpad(q, back, l);
    // What could move in the query need not be able to in the answer, whose OPT has another end.
    CHECK_EQ(!clean, !l.is_signed && fixed(back, l));
    if (clean) CHECK(*clean == want);
}

// ---- answer: FLAGS, the query's length in two octets, the query, the answer --------------------

// FLAGS 1: over TCP. 2: the answer gets the query's head and QR, so that more of them match.
// The other bits: --max-udp.
static void answer(const Octets& in) {
    if (in.size() < 3) return;
    const size_t length = std::min<size_t>(size_t(get16(in, 1)), in.size() - 3);
    const Query q{{in.begin() + 3, in.begin() + 3 + length}, (in[0] & 1) != 0};
    if (judge(q).rcode != ::forward) return;
    Octets a(in.begin() + 3 + length, in.end());
    if (in[0] & 2) {
        Octets head(q.octets.begin(), q.octets.begin() + q.layout.question_end);
        if (a.size() < 8) return;
        head[2] = uint8_t((head[2] & 0x78) | 0x80 | (a[0] & 7));
        head[3] = a[1];
        std::copy(a.begin() + 2, a.begin() + 8, head.begin() + 6);  // the counts of records
        a.erase(a.begin(), a.begin() + 8);
        a.insert(a.begin(), head.begin(), head.end());
    }
    const Layout l = parse(a);
    CHECK_EQ(fault_of(annotate(a), a, l.fields), "");
    if (!matches(q, a, l)) return;
    CHECK(!l.fault && get16(a, 0) == get16(q.octets, 0) && (a[2] & 0x80));
    const auto clean = ::unpad(q, a, l);
    const bool extended = l.opt && !q.layout.opt && a[l.opt + 5] != 0;  // the rcode
    CHECK_EQ(!clean, !l.is_signed && (fixed(a, l) || extended));
    if (!clean) return;
    const Layout c = parse(*clean);
    CHECK_WHY(!c.fault, c.fault);
    if (l.is_signed) {
        CHECK(*clean == a);
    } else {
        CHECK(clean->size() <= a.size() && std::none_of(c.options.begin(), c.options.end(), ours));
        CHECK_EQ(c.opt != 0, l.opt && q.layout.opt);
        CHECK_EQ(records(*clean), records(a) - (l.opt && !c.opt));
        if (get16(a, 4))  // the client's own spelling
            CHECK(std::equal(clean->begin() + 12, clean->begin() + c.question_end,
                             q.octets.begin() + 12));
    }
    CHECK(std::equal(clean->begin(), clean->begin() + 4, a.begin()));  // id, flags, rcode
    const size_t most = 512 + size_t(in[0] >> 2) * 16;
    const size_t udp = std::clamp<size_t>(q.layout.udp_size, 512, most);
    const size_t limit = q.tcp ? longest_message : udp;
    const Octets short_one = cut(q, *clean, most);
    if (clean->size() <= limit) {
        CHECK(short_one == *clean);
        return;
    }
    CHECK(short_one[2] & 2);
    CHECK_EQ(!whole(short_one).opt, !q.layout.opt);
    CHECK_EQ(records(short_one), int(q.layout.opt != 0));
    CHECK(short_one.size() <= limit);
}

// ---- options: a letter for the function, then text ---------------------------------------------

static void check_address(const Address& a) {
    const Address again = parse_address(a.str(), 1);
    CHECK_EQ(again.str(), a.str());
    CHECK(again.is_v4() == a.is_v4() &&
          memcmp(again.octets(), a.octets(), a.is_v4() ? 4 : 16) == 0 &&
          again.v4.sin_port == a.v4.sin_port);
}

static Text spec(const Peer& peer) {
    Text out = peer.address.str() + "#" + peer.name;
    for (auto& pin : peer.pins) {
        uint8_t base64[48];
        EVP_EncodeBlock(base64, pin.data(), int(pin.size()));
        out += ",pin-sha256=" + Text(reinterpret_cast<char*>(base64));
    }
    return out;
}

// BadOption, and no other exception; or what is taken can be written down and is taken again.
static void options(const Octets& in) {
    if (in.empty()) return;
    const Text from(Text(in.begin() + 1, in.end()).c_str());  // an argument ends at a zero
    try {
        if (in[0] == 'n') {
            const int number = parse_number(from, 1, 65535, "number");
            CHECK(number >= 1 && number <= 65535);
            CHECK_EQ(parse_number(std::to_string(number), 1, 65535, "number"), number);
        } else if (in[0] == 'a') {
            check_address(parse_address(from, 853));
        } else if (in[0] == 'p') {
            const Text bits = parse_prefix(from), host = from.substr(0, from.find('/'));
            CHECK(bits.size() >= 1 && bits.size() <= (bits[0] == '4' ? 33 : 129));
            CHECK(parse_address(host, 853).bits().starts_with(bits));
            CHECK_EQ(parse_prefix(host + "/" + std::to_string(bits.size() - 1)), bits);
        } else {
            const auto peers = parse_upstream(from);
            CHECK(!peers.empty());
            for (auto& peer : peers) {
                check_address(peer.address);
                CHECK(ntohs(peer.address.v4.sin_port) != 53);  // RFC 7858 3.1
                CHECK(std::any_of(peer.name.begin(), peer.name.end(),
                                  [](uint8_t c) { return isalpha(c); }));
                for (auto& pin : peer.pins) CHECK_EQ(pin.size(), 32u);
                const auto again = parse_upstream(spec(peer));
                CHECK(again.size() == 1 && spec(again[0]) == spec(peer));
            }
        }
    } catch (const BadOption& e) {
        CHECK(*e.what());
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) try {
    TARGET({data, data + size});
    return 0;
} catch (const std::exception& e) {
    fprintf(stderr, "FAILED %s\n", e.what());
    abort();  // libFuzzer writes the input down
}

// fuzz.cpp - the pure functions of dot.hpp under octets of any kind, for libFuzzer: `make fuzz`.
//
// Built once for each target, with -DTARGET=query, answer or options. What must hold is stated at
// each target; a second reader of messages (reading.hpp) judges what the first one made.
#include <openssl/evp.h>

#include <algorithm>
#include <set>

#include "dot.hpp"
#include "program.hpp"
#include "reading.hpp"

using namespace test;
using Text = std::string;

enum : int { keepalive = 11, padding = 12, error = 15 };

static int records(const Octets& m) { return get16(m, 6) + get16(m, 8) + get16(m, 10); }

using Options = std::vector<std::pair<int, Octets>>;

// The options of the OPT record but those of these codes, read by hand.
static ::Options options_but(const Octets& m, const Layout& l, std::set<int> codes = {}) {
    ::Options options;
    if (!l.opt) return options;
    for (size_t at = l.opt + 11; at < l.opt_end; at += 4 + size_t(get16(m, at + 2))) {
        const size_t end = at + 4 + size_t(get16(m, at + 2));
        if (!codes.count(get16(m, at)))
            options.push_back({get16(m, at), Octets(m.begin() + at + 4, m.begin() + end)});
    }
    return options;
}

// Parses to its last octet, for the program and for the tests' own reader.
static Layout whole(const Octets& m) {
    const Layout l = parse(m);
    CHECK_WHY(!l.fault, l.fault);
    CHECK_EQ(l.end, m.size());
    CHECK_EQ(Answer(m).has_opt, l.opt != 0);
    return l;
}

// The size of an OPT record with these options.
static size_t opt_size(const ::Options& options) {
    size_t size = 11;
    for (auto& [code, data] : options) size += 4 + data.size();
    return size;
}

// The message with so many octets more: a TXT record before all other records. What is only so in
// long messages is found in this way without long inputs.
static Octets lengthened(Octets m, size_t more) {
    const size_t at = parse(m).question_end;
    if (more < 11 || get16(m, 6) == 0xffff) return m;
    if (++m[7] == 0) m[6]++;
    const size_t data = more - 11;
    Octets record{0, 0, 16, 0, 1, 0, 0, 0, 0, uint8_t(data >> 8), uint8_t(data)};
    record.resize(more);
    m.insert(m.begin() + long(at), record.begin(), record.end());
    return m;
}

// ---- query: any octets -------------------------------------------------------------------------

// An id that begins with L makes it 16,000 octets longer, so that pointers come to their end; one
// that begins with X makes it as long as a message can be, but the id's second octet.

// The proxy's own answers: of the query nothing but its head, and room for an OPT with an EDE.
static void check_reply(const Query& q, const Octets& r, int rcode, bool truncated, bool ede) {
    const Layout& l = q.layout;
    const Layout own = whole(r);
    CHECK(r.size() <= std::min<size_t>(l.question_end, 12 + 255 + 4) + 11 + 6);
    CHECK(std::equal(r.begin(), r.begin() + 2, q.octets.begin()) && (r[2] & 0x80));
    CHECK_EQ((r[2] ^ q.octets[2]) & 0x79, 0);  // opcode and RD stay
    CHECK_EQ(r[3] & 15, rcode);
    CHECK_EQ((r[2] & 2) != 0, truncated);
    CHECK(!own.opt == !l.opt && records(r) == (l.opt != 0));
    CHECK_EQ(options_but(r, own).size(), size_t(l.opt && ede));
}

// Padded to the next multiple of 128, unless it is signed, has octets behind its records, would
// become too long, or has a pointer that cannot move. Nothing but the OPT record differs.
static void check_padded(const Query& q, const Octets& padded) {
    const Layout& l = q.layout;
    const Reading before(q.octets);
    ::Options want = options_but(q.octets, l, {padding});
    const size_t rest = q.octets.size() - (l.opt_end - l.opt);
    const size_t size = (rest + opt_size(want) + 4 + 127) / 128 * 128;
    const bool stays = l.is_signed || l.end != q.octets.size() || size > longest_message ||
                       (l.opt && before.keeps_opt_from_moving(size - rest));
    if (stays) {
        CHECK(padded == q.octets);
        return;
    }
    CHECK_EQ(padded.size(), size);
    want.push_back({padding, Octets(size - rest - opt_size(want) - 4)});  // zeros, RFC 7830 3
    CHECK(options_but(padded, whole(padded)) == want);
    CHECK(Reading(padded).records == before.records);
}

static void query(const Octets& in) {
    Octets octets = in;
    if (in.size() >= 12 && in[0] == 'L') octets = lengthened(in, 16000);
    if (in.size() >= 12 && in[0] == 'X')
        octets = lengthened(in, longest_message - in[1] - in.size());
    const Query q{octets, true};
    CHECK_EQ(fault_of(annotate(octets), octets), "");
    const Action action = judge(q).action;
    if (octets.size() < header_size) {
        CHECK(action == Action::ignore);
        return;
    }
    for (int rcode : {NOERROR, FORMERR, SERVFAIL, NOTIMP, REFUSED}) {
        check_reply(q, reply(q, Rcode(rcode)), rcode, false, false);
        check_reply(q, reply(q, Rcode(rcode), 23), rcode, false, true);
    }
    check_reply(q, truncated_reply(q), 0, true, false);
    CHECK_EQ(action == Action::ignore, (octets[2] & 0x80) != 0);
    if (action != Action::forward) return;
    const Octets padded = pad(q);
    check_padded(q, padded);
    // What comes back if the resolver answers with the query itself is the query, with QR, and
    // without the two options that are between proxy and resolver. What is signed stays as it is.
    Octets back = padded, want = octets;
    back[2] |= 0x80;
    want[2] |= 0x80;
    const Layout l = parse(back);
    CHECK(matches(q, back, l));
    const auto clean = ::unpad(q, back, l);
    const ::Options options = options_but(want, q.layout, {keepalive, padding});
    const bool stays = q.layout.opt && Reading(back).keeps_opt_from_moving(opt_size(options));
    CHECK_EQ(!clean, !l.is_signed && stays);
    if (!clean) return;
    CHECK(Reading(*clean).records == Reading(want).records);
    if (q.layout.is_signed) return;
    CHECK(options_but(*clean, parse(*clean)) == options);
}

// ---- answer: FLAGS, the query's length in two octets, the query, the answer --------------------

// FLAGS 1: over TCP. 2: the answer gets the query's head and QR, so that more of them match. 4: it
// becomes 16,000 octets longer. The other bits: --max-udp.
static void answer(const Octets& in) {
    if (in.size() < 3) return;
    const size_t length = std::min<size_t>(size_t(get16(in, 1)), in.size() - 3);
    const Query q{{in.begin() + 3, in.begin() + 3 + length}, (in[0] & 1) != 0};
    if (judge(q).action != Action::forward) return;
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
    if (in[0] & 4 && a.size() >= 12) a = lengthened(a, 16000);
    const Layout l = parse(a);
    CHECK_EQ(fault_of(annotate(a), a), "");
    if (!matches(q, a, l)) return;
    CHECK(!l.fault && get16(a, 0) == get16(q.octets, 0) && (a[2] & 0x80));
    const auto clean = ::unpad(q, a, l);
    const bool extended = l.opt && !q.layout.opt && a[l.opt + 5] != 0;  // the rcode
    const ::Options options = options_but(a, l, {keepalive, padding});
    const size_t new_size = q.layout.opt ? opt_size(options) : 0;
    const bool stays = l.opt && Reading(a).keeps_opt_from_moving(new_size);
    CHECK_EQ(!clean, !l.is_signed && (extended || stays));
    if (!clean) return;
    const Layout c = parse(*clean);
    CHECK_WHY(!c.fault, c.fault);
    if (l.is_signed) {
        CHECK(*clean == a);
    } else {
        CHECK(!extended && clean->size() <= a.size());
        Octets spelt = a;  // with the client's own spelling
        if (c.question_end == q.layout.question_end)
            std::copy(q.octets.begin() + 12, q.octets.begin() + long(c.question_end),
                      spelt.begin() + 12);
        CHECK(Reading(*clean).records == Reading(spelt).records);
        CHECK_EQ(c.opt != 0, l.opt && q.layout.opt);
        if (c.opt) CHECK(options_but(*clean, c) == options);
        CHECK_EQ(records(*clean), records(a) - (l.opt && !c.opt));
    }
    CHECK(std::equal(clean->begin(), clean->begin() + 4, a.begin()));  // id, flags, rcode
    const size_t most = 512 + size_t(in[0] >> 3) * 32;
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
    CHECK(again.bits() == a.bits() && again.port() == a.port());
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
            const int number = parse_number(from, 1, 65535);
            CHECK(number >= 1 && number <= 65535);
            CHECK_EQ(parse_number(std::to_string(number), 1, 65535), number);
        } else if (in[0] == 'a') {
            check_address(parse_address(from, 853));
        } else if (in[0] == 'p') {
            const Text bits = parse_network(from), host = from.substr(0, from.find('/'));
            CHECK(bits.size() >= 1 && bits.size() <= (bits[0] == '4' ? 33 : 129));
            CHECK(parse_address(host, 853).bits().starts_with(bits));
            CHECK_EQ(parse_network(host + "/" + std::to_string(bits.size() - 1)), bits);
        } else {
            const auto peers = parse_upstream(from);
            CHECK(!peers.empty());
            for (auto& peer : peers) {
                check_address(peer.address);
                CHECK(ntohs(peer.address.v4.sin_port) != 53);  // RFC 7858 3.1
                CHECK(!peer.name.empty() && peer.name.front() != '.' && peer.name.back() != '.');
                CHECK(peer.name.find("..") == Text::npos && peer.name.find('*') == Text::npos);
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

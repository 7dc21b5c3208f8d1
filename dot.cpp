// dot.cpp - how a query travels, in the order of the steps of dot.hpp.
//
// What the user's words mean comes first, then messages (pure functions over octets), streams and
// framing, who may ask, upstreams, TLS, and last the whole way. Nothing here knows of argv,
// listeners or signals.
#include "dot.hpp"

#include <arpa/inet.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <resolv.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <regex>

using Lock = std::lock_guard<std::recursive_mutex>;  // a look at a connection may bring a ticket
Settings settings;

void say(std::string line) {
    line += '\n';
    // A reader who is gone or a full disk must not stop the service.
    (void)!write(STDOUT_FILENO, line.data(), line.size());
}

static std::mutex counting;  // guards what follows
static std::map<std::string, int> counts{{"udp", 0}, {"tcp", 0}, {"success", 0}, {"failure", 0}};

void count(std::string name, int more, bool most) {
    std::replace(name.begin(), name.end(), ' ', '_');
    std::lock_guard lock(counting);
    counts[name] = most ? std::max(counts[name], more) : counts[name] + more;
}

std::string totals() {
    std::lock_guard lock(counting);
    std::string line = "TOTALS";
    for (auto& [name, number] : counts) line += " " + name + "=" + std::to_string(number);
    return line;
}

// ---- What the user asked for -------------------------------------------------------------------

std::string Address::bits() const {
    std::string bits = is_v4() ? "4" : "6";
    for (int i = 0; i < (is_v4() ? 32 : 128); i++)
        bits += octets()[i / 8] & (128 >> i % 8) ? '1' : '0';
    return bits;
}

std::string Address::str() const {
    char name[INET6_ADDRSTRLEN] = "?";
    inet_ntop(any.sa_family, octets(), name, sizeof name);
    return text("%s@%d", name, ntohs(v4.sin_port));
}

int parse_number(const std::string& from, int least, int most, const std::string& what) {
    const int number = std::regex_match(from, std::regex("[0-9]{1,9}")) ? std::stoi(from) : -1;
    if (number >= least && number <= most) return number;
    throw BadOption(what + " '" + from + text("' is not a number from %d to %d", least, most));
}

Address parse_address(const std::string& from, int port) {
    const size_t at = from.find('@');
    const std::string host = from.substr(0, at);
    Address a;
    const bool four = inet_pton(AF_INET, host.c_str(), &a.v4.sin_addr) == 1;
    if (!four && inet_pton(AF_INET6, host.c_str(), &a.v6.sin6_addr) != 1)
        throw BadOption("'" + host + "' is not an IP address");
    a.any.sa_family = four ? AF_INET : AF_INET6;
    if (at != from.npos) port = parse_number(from.substr(at + 1), 1, 65535, "port");
    a.v4.sin_port = htons(uint16_t(port));  // at the same place in both
    return a;
}

std::string parse_prefix(const std::string& from) {
    const size_t at = from.find('/');
    const std::string bits = parse_address(from.substr(0, at), 0).bits();
    if (at == from.npos) return bits;
    return bits.substr(0, 1 + parse_number(from.substr(at + 1), 0, int(bits.size()) - 1, "bits"));
}

// The addresses of well-known resolvers, and the name that each of them must prove to have.
static const std::map<std::string, std::string> known{
    {"cloudflare", "1.1.1.1 1.0.0.1 2606:4700:4700::1111 2606:4700:4700::1001#cloudflare-dns.com"},
    {"google", "8.8.8.8 8.8.4.4 2001:4860:4860::8888 2001:4860:4860::8844#dns.google"},
    {"quad9", "9.9.9.9 149.112.112.112 2620:fe::fe 2620:fe::9#dns.quad9.net"}};

std::vector<Peer> parse_upstream(const std::string& from) {
    const std::string whole = known.contains(from) ? known.at(from) : from;
    // Not port 53, RFC 7858 3.1. A name with a letter, so that it is no IP address. The base64 of
    // 32 octets is 43 digits and "=".
    static const std::regex form(
        "((?!.*@0*53[ #])[^#]+)#([\\w.-]*[A-Za-z][\\w.-]*)((,pin-sha256=[A-Za-z0-9+/]{43}=)*)");
    std::smatch part;
    if (!std::regex_match(whole, part, form)) throw BadOption("'" + from + "' is not cloudflare, "
        "google, quad9 or ADDR[@PORT]#NAME[,pin-sha256=BASE64]... (a NAME, and not PORT 53)");
    std::vector<Bytes> keys;
    for (std::string pins = part[3]; !pins.empty(); pins = pins.substr(56)) {
        uint8_t octets[33];  // the last one stands for the "="
        EVP_DecodeBlock(octets, reinterpret_cast<const uint8_t*>(&pins[12]), 44);
        keys.emplace_back(octets, octets + 32);
    }
    std::istringstream addresses(part[1]);
    std::vector<Peer> peers;
    for (std::string one; std::getline(addresses, one, ' ');)
        peers.push_back({parse_address(one, 853), part[2], keys});
    return peers;
}

// ---- Messages ----------------------------------------------------------------------------------
// A message is a header, questions, and three sections of records (RFC 1035 4.1). The proxy has to
// find two places in it, the end of the question and the OPT record, and leaves all else alone.

enum : int { SIG = 24, OPT = 41, TSIG = 250, IXFR, AXFR, keepalive = 11, padding, error = 15 };
constexpr size_t arcount_at = 10, opt_size = 11;

static int u16(const Bytes& m, size_t at) { return m[at] << 8 | m[at + 1]; }
static void put16(Bytes& m, size_t at, size_t value) {
    m[at] = uint8_t(value >> 8);
    m[at + 1] = uint8_t(value);
}

// Those that are asked for most. The code knows what a type means in three places only: OPT, what
// signs a message, and zone transfers.
static const std::map<int, const char*> type_names{
    {0, "-"}, {1, "A"}, {2, "NS"}, {5, "CNAME"}, {6, "SOA"}, {12, "PTR"}, {15, "MX"}, {16, "TXT"},
    {28, "AAAA"}, {33, "SRV"}, {OPT, "OPT"}, {65, "HTTPS"}, {IXFR, "IXFR"}, {AXFR, "AXFR"}};

std::string type_name(int type) {
    return type_names.contains(type) ? type_names.at(type) : text("TYPE%d", type);
}

std::string rcode_name(int rcode) {
    const char* names[] = {"NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED"};
    return size_t(rcode) < std::size(names) ? names[rcode] : text("RCODE%d", rcode);
}

// Where the name at `at` ends; 0: it does not, or it is longer than RFC 1035 2.3.4 allows. A
// pointer ends a name and is not followed: what it points to is not needed, and it may be a circle.
static size_t skip_name(const Bytes& m, size_t at, bool pointers) {
    for (size_t start = at; at < m.size() && at - start < 255; at += 1 + m[at]) {
        if (m[at] == 0) return at + 1;
        if (m[at] >= 0xc0) return pointers && at + 2 <= m.size() ? at + 2 : 0;
        if (m[at] > 63) return 0;
    }
    return 0;
}

// What the OPT record from `start`, with its type at `type`, says of its sender, RFC 6891 6.1.
static void parse_opt(const Bytes& m, size_t start, size_t type, size_t end, Layout& l) {
    if (l.opt) l.fault = "more than one OPT";
    l.udp_size = size_t(u16(m, type + 2));
    l.dnssec_ok = m[type + 6] & 0x80;
    l.opt = start;
    l.opt_end = end;
    size_t at = type + 10;
    while (at + 4 <= end && at + 4 + u16(m, at + 2) <= end) {
        l.options.push_back({u16(m, at), {&m[at] + 4, &m[at] + 4 + u16(m, at + 2)}});
        l.fields.insert(l.fields.end(), {{at, "option"}, {at + 2, "size"}, {at + 4, "data"}});
        at += 4 + l.options.back().data.size();
    }
    if (at != end || m[start] != 0) l.fault = "a malformed OPT";
}

// One walk over the records serves both ends: what -vv shows is what the proxy acts on. A message
// that does not parse has fields up to there, and what is wrong with the rest as the last one.
Layout parse(const Bytes& m) {
    Layout l;
    auto& f = l.fields = {{0, "id"}, {2, "flags"}, {4, "questions"}, {6, "answers"},
                          {8, "authorities"}, {10, "additionals"}};
    if (m.size() < header_size) l.fault = "shorter than a header";
    for (int section = 0; section < 4 && !l.fault; section++) {
        for (int left = u16(m, 4 + 2 * section); left > 0 && !l.fault; left--) {
            const size_t start = l.end, at = skip_name(m, start, section > 0);
            l.end = at + (section ? 10 : 4);
            const int type = at && l.end <= m.size() ? u16(m, at) : -1;
            if (type >= 0 && section) l.end += u16(m, at + 8);
            if (type < 0 || l.end > m.size()) l.fault = "a name or record does not parse";
            f.push_back({start, l.fault ? l.fault : "name"});
            if (l.fault) return l;
            if (section == 0) std::tie(l.question_end, l.type) = std::pair(l.end, type);
            f.insert(f.end(), {{at, "type"}, {at + 2, type == OPT ? "UDP size" : "class"}});
            if (section) f.insert(f.end(), {{at + 4, "TTL"}, {at + 8, "size"}, {at + 10, "data"}});
            if (type == OPT && section) parse_opt(m, start, at, l.end, l);
            if (type == OPT && section && section < 3) l.fault = "an OPT that is not additional";
            l.is_signed = section == 3 && (type == TSIG || type == SIG);
        }
    }
    f.push_back({l.end, "the rest"});  // which no section counts
    return l;
}

// In three columns: what a field is, what it says, its octets. A field ends where the next one
// begins. Numbers are shown as such, names in full; of what is not known here the characters are
// shown. Nothing that came over the wire reaches the terminal as a control character.
std::string annotate(const Bytes& m) {
    auto fields = parse(m).fields;
    fields.push_back({m.size(), ""});
    std::string out;
    size_t number = 0, type = 0;
    for (auto one = fields.begin(); one->first < m.size(); one++, number = 0) {
        const std::string field = one->second;
        const size_t at = one->first, to = std::min(one[1].first, m.size()), size = to - at;
        std::string hex, says(m.begin() + at, m.begin() + to);
        char buf[1025] = "";  // for the longest name, each octet as four characters
        for (size_t i = at; i < to; hex += text(" %02x", m[i++])) number = number << 8 | m[i];
        if (size > 16 && hex.compare(3, hex.npos, hex, 0, hex.size() - 3) == 0)  // all the same
            hex = says = text(" %02x * %zu", m[at], size);
        const auto flag = [=](int bit, const char* set) { return number >> bit & 1 ? set : ""; };
        if (size <= 4 && field != "data") says = std::to_string(number);
        if (field == "type") says = type_name(int(type = number));
        if (field == "TTL" && type == OPT) says = text("version %d %s", m[at + 1], flag(15, "DO"));
        if (field == "flags")
            says = text("opcode %zu, %s%s%s%s%s%s%s%s", number >> 11 & 15, flag(15, "QR "),
                        flag(10, "AA "), flag(9, "TC "), flag(8, "RD "), flag(7, "RA "),
                        flag(6, "Z "), flag(5, "AD "), flag(4, "CD ")) + rcode_name(number & 15);
        if (field == "data" && (type == 1 ? size == 4 : type == 28 && size == 16))  // A and AAAA
            says = inet_ntop(type == 1 ? AF_INET : AF_INET6, &m[at], buf, sizeof buf);
        if (field == "name" || (field == "data" && (type == 2 || type == 5 || type == 12)))
            says = dn_expand(&m[0], &m[0] + m.size(), &m[at], buf, 1025) > 0 && *buf ? buf : ".";
        std::ranges::replace_if(says, [](uint8_t c) { return c < ' ' || c > '~'; }, '.');
        out += text("\n        %-12s %-28.800s", one->second, says.c_str()) + hex;
    }
    return out;
}

// On the way over TLS, and to a TCP client, a message has its length in two octets before it.
void Query::tell(int step, const std::string& what, const Bytes& m) const {
    if (settings.verbose == 0) return;
    std::string hex = settings.verbose > 1 ? annotate(m) : "";
    if (!hex.empty() && (tcp || step == 5 || step == 6))  // framed
        hex = text("\n        %-42s%02zx %02zx", "length", m.size() >> 8, m.size() & 255) + hex;
    say(text("#%u [%d] %7.1f ms  ", number, step, Ms(Clock::now() - taken).count()) + what + hex);
}

Verdict judge(const Query& query) {  // [2]
    const Bytes& m = query.octets;
    if (m.size() < header_size) return {silence, "shorter than a header"};
    if (m[2] & 0x80) return {silence, "an answer, not a query"};  // else a loop
    const int opcode = m[2] >> 3 & 15, type = query.layout.type;
    // RFC 8490 9.4: a connection for each query cannot carry a session.
    if (opcode == 6) return {NOTIMP, "DNS stateful operations are not proxied"};
    if (query.layout.fault) return {FORMERR, query.layout.fault};
    if (opcode == 0 && u16(m, 4) > 1) return {FORMERR, "more than one question"};  // RFC 9619 4
    if (!opcode && (type == AXFR || type == IXFR)) return {NOTIMP, "AXFR and IXFR are not proxied"};
    return {forward, "to be forwarded"};
}

// Whether the octets from `from` on may move: a compression pointer counts from the message's
// start, so none may point behind that place. Data that only looks like one is refused as well.
static bool movable(const Bytes& m, size_t from) {
    for (size_t at = from; at + 1 < m.size(); at++)
        if (m[at] >= 0xc0 && size_t(u16(m, at) & 0x3fff) >= from) return false;
    return true;
}

// Puts the options of `l` into the OPT of `m`, or into a new one behind its last record.
static Bytes set_options(Bytes m, Layout& l) {
    Bytes opt{0, 0, OPT, 1232 >> 8, 1232 & 255, 0, 0, uint8_t(l.dnssec_ok ? 0x80 : 0), 0, 0, 0};
    if (l.opt) std::copy_n(m.begin() + l.opt, opt_size, opt.begin());
    else put16(m, arcount_at, u16(m, arcount_at) + 1);
    if (!l.opt) l.opt = l.opt_end = m.size();
    for (auto& [code, data] : l.options) {
        const Bytes framed = frame(data);  // an option's data has its length before it, too
        opt.insert(opt.end(), {uint8_t(code >> 8), uint8_t(code)});
        opt.insert(opt.end(), framed.begin(), framed.end());
    }
    put16(opt, opt_size - 2, opt.size() - opt_size);
    m.erase(m.begin() + l.opt, m.begin() + l.opt_end);
    m.insert(m.begin() + l.opt, opt.begin(), opt.end());
    l.opt_end = l.opt + opt.size();
    return m;
}

Bytes pad(const Query& query) {  // [3]
    Layout l = query.layout;
    const Bytes& q = query.octets;
    // RFC 8945 5.5: what is signed travels as it is. Behind octets that no section counts nobody
    // would find an OPT.
    if (l.is_signed || l.end != q.size() || (l.opt && !movable(q, l.opt_end))) return q;
    std::erase_if(l.options, [](auto& o) { return o.code == padding; });  // the client's own
    l.options.push_back({padding, {}});  // the last, RFC 8467 3
    // If there is no OPT, a new one with DO=0: a client without EDNS wants no signatures.
    const Bytes bare = set_options(q, l);
    const size_t missing = (128 - bare.size() % 128) % 128;  // RFC 8467 4.1
    l.options.back().data.resize(missing);
    return bare.size() + missing > longest_message ? q : set_options(bare, l);
}

bool matches(const Query& query, const Bytes& a, const Layout& l) {  // [7]
    const Bytes& q = query.octets;
    if (l.fault || u16(a, 0) != u16(q, 0) || !(a[2] & 0x80) || ((a[2] ^ q[2]) & 0x78)) return false;
    const int rcode = a[3] & 15;
    if (u16(a, 4) == 0 && u16(q, 4) != 0)  // some servers cannot repeat what they did not read
        return rcode == FORMERR || rcode == SERVFAIL || rcode == NOTIMP || rcode == REFUSED;
    if (u16(a, 4) != u16(q, 4) || l.question_end != query.layout.question_end) return false;
    // Names, but not the type and class behind one, are compared without case, RFC 1035 2.3.3. A
    // label's length is never a letter.
    for (size_t i = header_size; i < l.question_end; i++)
        if (q[i] != a[i] && (i + 4 >= l.question_end || (q[i] ^ a[i]) != 32 || !isalpha(q[i])))
            return false;
    return true;
}

std::optional<Bytes> unpad(const Query& query, Bytes a, Layout l) {  // [7]
    if (l.is_signed) return a;
    if (l.question_end == query.layout.question_end)  // the client's own spelling, as it came
        memcpy(&a[0] + header_size, &query.octets[0] + header_size, l.question_end - header_size);
    if (!l.opt) return a;
    if (!movable(a, l.opt_end)) return std::nullopt;
    std::erase_if(l.options, [](auto& o) { return o.code == padding || o.code == keepalive; });
    if (query.layout.opt) return set_options(a, l);
    if (a[l.opt + 5] != 0) return std::nullopt;  // its low four bits alone are another rcode
    a.erase(a.begin() + l.opt, a.begin() + l.opt_end);
    put16(a, arcount_at, u16(a, arcount_at) - 1);
    return a;
}

// The header and question of a message; the header alone if it does not have just one.
static Bytes head(const Bytes& m, const Layout& l) {
    Bytes out(m.begin(), m.begin() + (u16(m, 4) == 1 ? l.question_end : header_size));
    std::fill(out.begin() + (out.size() > header_size ? 6 : 4), out.begin() + header_size, 0);
    return out;
}

Bytes cut(const Query& query, Bytes a, size_t most_udp) {  // [8]
    const size_t limit = std::clamp<size_t>(query.layout.udp_size, 512, most_udp);
    if (query.tcp || a.size() <= limit) return a;
    const Layout l = parse(a);
    Layout own{.options = l.options, .dnssec_ok = query.layout.dnssec_ok};
    Bytes out = head(a, l);
    out[2] |= 0x02;  // TC
    // RFC 6891 7: OPT stays. RFC 8914 3: its options go if there is no room for them.
    if (out.size() + (l.opt_end - l.opt) > limit) own.options.clear();
    return query.layout.opt ? set_options(out, own) : out;
}

Bytes reply(const Query& query, int rcode, int ede) {  // [8]
    Bytes out = head(query.octets, query.layout);
    out[2] = uint8_t(0x80 | (out[2] & 0x79) | (rcode == cut_short ? 0x02 : 0));  // opcode, RD stay
    out[3] = uint8_t((rcode == SERVFAIL ? 0x80 | (out[3] & 0x10) : 0) | std::max(rcode, 0));
    Layout own{.options = {}, .dnssec_ok = query.layout.dnssec_ok};
    // Without a text, which could tell what is nobody's business.
    if (ede >= 0) own.options.push_back({error, {uint8_t(ede >> 8), uint8_t(ede)}});
    return query.layout.opt ? set_options(out, own) : out;
}

// ---- Streams and framing -----------------------------------------------------------------------

Bytes frame(Bytes message) {
    message.insert(message.begin(), {uint8_t(message.size() >> 8), uint8_t(message.size())});
    return message;
}

std::optional<Bytes> read_frame(int fd) {
    Bytes in(2);
    for (bool length : {true, false}) {
        if (in.empty() || recv(fd, in.data(), in.size(), MSG_WAITALL) < int(in.size())) return {};
        if (length) in.resize(u16(in, 0));
    }
    return in;
}

// ---- Who may ask, and how much -----------------------------------------------------------------

bool may_ask(const Address& client) {
    const auto begins = [bits = client.bits()](auto& prefix) { return bits.starts_with(prefix); };
    return std::ranges::any_of(settings.allow, begins) &&
           std::ranges::none_of(settings.deny, begins);
}

bool over_rate(const Address& client, bool tcp) {
    static std::mutex mutex;               // guards what follows
    static std::map<std::string, Time> buckets;  // when each is full again, and as good as none
    if (settings.rate == 0) return false;
    std::lock_guard lock(mutex);
    // A flood from everywhere: rather may all ask a little more than is one locked out.
    if (buckets.size() == 16384) buckets.clear();
    Time &full = buckets[client.host() + (tcp ? " tcp" : " udp")], now = Clock::now();
    const Time then = std::max(full, now) + std::chrono::nanoseconds(1000000000 / settings.rate);
    const bool over = then > now + seconds(1);  // a bucket holds one second's worth
    if (!over) full = then;
    return over;
}

// ---- Upstreams ---------------------------------------------------------------------------------

// Set once, by prepare(), before the first thread starts.
static std::vector<std::unique_ptr<struct Upstream>> upstreams;
static SSL_CTX* ctx;
static std::atomic<Time> asked{Time::min()};  // when the last query came

using Session = std::shared_ptr<SSL_SESSION>;
using Connections = std::vector<std::shared_ptr<Connection>>;

// Tickets kept; ready connections even if little is asked; points of blame for one that is no use.
constexpr size_t most_tickets = 128, warm_stock = 2, useless = 1000;
constexpr Clock::duration longest_idle = seconds(25), shortest_idle = seconds(1);

// What was learnt of a peer, and the connections that are ready: a thread that has answered opens
// the next one and parks it. So a query still has one that nobody used before, and waits for one
// round trip; the number parked follows the load. The oldest is taken, for its tickets have arrived
// and been acknowledged: a newer one would hold the answer up.
struct Upstream : Peer {
    explicit Upstream(const Peer& peer) : Peer(peer) {}
    std::atomic<int> group{0};     // the key exchange it chose last (an OpenSSL NID); 0: unknown
    std::atomic<Clock::duration> quickest{seconds(1)};  // of its answers, of late
    std::atomic<Clock::duration> usual{};               // until it answers; 0: unknown

    // Whether it may be asked now: it did not fail, or its time of rest is over. Then the caller is
    // the one who tries it: others are told no, for twice as long as before, or until it answers.
    // In pass 2, when nobody else can be asked, one that was no more than late may be; and in pass
    // 3 any that rested for `wait` ms: so that an outage is over for clients soon after it is over.
    bool available(int pass, int wait) {
        Lock lock(mutex_);
        const bool rested = Clock::now() >= (pass < 3 ? rest_until_ : tried_ + milliseconds(wait));
        if (rested && failures_) rest();
        return rested || (pass >= 2 && points_ < useless);
    }

    // Three points and no answer in between: it rests for 1 s, doubling to 5 min.
    void blame(size_t points, const std::string& why) {
        Lock lock(mutex_);
        if ((points_ += points) < 3 || Clock::now() < rest_until_) return;
        if (failures_ == 0) say("UPSTREAM " + why + ": asked last until it answers");
        rest();
    }

    void answered(Clock::duration took) {
        Lock lock(mutex_);
        if (failures_ > 0) say("UPSTREAM " + address.str() + " answers again");
        failures_ = points_ = 0;
        rest_until_ = {};
        quickest = std::min(took, quickest.load() * 65 / 64);
        // One slow answer must not spoil the average.
        const Clock::duration was = usual;
        usual = was.count() ? was + (std::min(took, 2 * was) - was) / 8 : took;
    }

    // Called by OpenSSL with each ticket. RFC 8446 4.6.1: a lifetime of 0 means discard it, and no
    // server may say more than a week (when it is over OpenSSL sees). TLS 1.2 need not say.
    static int keep(SSL* ssl, SSL_SESSION* session) {
        const unsigned long lifetime = SSL_SESSION_get_ticket_lifetime_hint(session);
        if (lifetime > 7 * 86400 || (!lifetime && SSL_version(ssl) >= TLS1_3_VERSION)) return 0;
        Upstream& own = *static_cast<Upstream*>(SSL_get_app_data(ssl));
        Lock lock(own.mutex_);
        if (own.tickets_.size() == most_tickets) own.tickets_.pop_front();
        // A copy: the connection keeps its own, and is freed by another thread.
        SSL_SESSION* const copy = SSL_SESSION_dup(session);
        if (copy) own.tickets_.emplace_back(copy, SSL_SESSION_free);
        return 0;  // nothing of the original is kept
    }

    // For one use, RFC 8446 C.4; empty: there is none.
    Session ticket() {
        Lock lock(mutex_);
        if (tickets_.empty()) return nullptr;
        Session newest(SSL_SESSION_dup(tickets_.back().get()), SSL_SESSION_free);
        // TLS 1.2 shows its ticket to every observer anyway, and seldom gives a new one.
        const int version = SSL_SESSION_get_protocol_version(tickets_.back().get());
        if (version >= TLS1_3_VERSION) tickets_.pop_back();
        return newest;
    }

    // The oldest ready connection, alive and not too old; empty: there is none. Drops others.
    std::shared_ptr<Connection> take();

    // A place for one more, to be filled by park(). false: there are enough; of those that are not
    // asked for yet (`extra`) enough is twice as many ready as there are being opened.
    bool reserve(bool extra = false) {
        Lock lock(mutex_);
        if (extra && parked_.size() + 2 >= 2 * opening_) return false;
        return parked_.size() + opening_ < size_t(settings.ready) && ++opening_ > 0;
    }

    void park(std::shared_ptr<Connection> connection) {  // empty: it came to nothing
        Lock lock(mutex_);
        --opening_;
        if (connection) parked_.push_back(std::move(connection));
    }

    // Drops those that are dead or too old. Returns how many there are; nullopt: no more are wanted
    // until it was asked, or has rested.
    std::optional<size_t> tend() {
        Lock lock(mutex_);  // so that no query misses the only one while it is looked at
        if (auto oldest = take()) parked_.push_front(std::move(oldest));
        if (points_ >= useless || Clock::now() < rest_until_) return std::nullopt;
        return parked_.size() + opening_;
    }

    void rest() {
        // RFC 9520 3.2: a failure is remembered for a second at least, and 5 min at most.
        tried_ = Clock::now();
        rest_until_ = tried_ + std::min(seconds(300), seconds(1 << std::min(failures_++, 9)));
    }

    std::recursive_mutex mutex_;  // guards all below
    std::deque<Session> tickets_;
    std::deque<std::shared_ptr<Connection>> parked_;
    Clock::duration idle_limit_ = longest_idle;  // learnt: how long it leaves a connection open
    size_t points_ = 0, opening_ = 0;
    Time rest_until_{}, tried_{};
    int failures_ = 0;  // rests, and no answer in between
};

// ---- TLS ---------------------------------------------------------------------------------------
// Every setting that decides whom the proxy trusts is in prepare() and Connection().

void prepare() {
    for (auto& peer : settings.upstreams) upstreams.push_back(std::make_unique<Upstream>(peer));
    ctx = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_min_proto_version(ctx, TLS1_2_VERSION);  // RFC 9325 3.1.1
    SSL_CTX_set_options(ctx, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER, nullptr);
    // Else OpenSSL takes the subject's CN for a name, which RFC 8310 8.1 forbids.
    X509_VERIFY_PARAM_set_hostflags(SSL_CTX_get0_param(ctx), X509_CHECK_FLAG_NEVER_CHECK_SUBJECT |
                                                             X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    SSL_CTX_set_alpn_protos(ctx, reinterpret_cast<const uint8_t*>("\3dot"), 4);
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
    SSL_CTX_sess_set_new_cb(ctx, Upstream::keep);
    if (!settings.reuse) SSL_CTX_set_mode(ctx, SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_read_ahead(ctx, 1);  // one read(2) for a record's header and what is in it
    SSL_CTX_dane_enable(ctx);  // OpenSSL's way to compare keys with pins
    for (auto& file : settings.ca)
        if (!SSL_CTX_load_verify_file(ctx, file.c_str()))
            throw BadOption("no certificates in " + file);
    if (settings.ca.empty()) SSL_CTX_set_default_verify_paths(ctx);
}

// [4]-[6] One TCP and TLS connection, used by one thread at a time. Its socket does not block, so
// that every wait is a poll(2) with the query's deadline, and one thread can wait for several.
//
// Its life: it is dialled (by a thread that has just answered, or by a query that found none
// ready), verified, perhaps parked, given a query by send(), and moved on by advance() until there
// is an answer. Whatever fails in between ends it: why_ tells why, and another one is tried.
struct Connection {
    // Begins to connect.
    explicit Connection(Upstream& to) : upstream(to), ssl(SSL_new(ctx), SSL_free) {
        count("dialled");
        fd = socket(to.address.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        bool done = fd >= 0 && ssl && SSL_set_fd(ssl.get(), fd) &&
                    SSL_dane_enable(ssl.get(), to.name.c_str()) > 0;  // SNI, and the name to prove
        // RFC 7858 4.2: a key of the verified chain, the server's own (usage 1) or one that signed
        // it (0), must be a pin (selector 1: a key; type 1: its SHA-256), RFC 8310 6.4.
        for (auto& pin : to.pins)
            for (int usage : {0, 1})
                done = done && SSL_dane_tlsa_add(ssl.get(), usage, 1, 1, &pin[0], pin.size()) > 0;
        if (!done) { fail("cannot be dialled: no open files or memory left", 0); return; }
        SSL_set_app_data(ssl.get(), &to);
        // The group that this server chose before goes first, else it asks for a second hello.
        int groups[] = {NID_X25519, NID_X9_62_prime256v1, NID_secp384r1, NID_secp521r1};
        std::stable_partition(groups, std::end(groups), [&](int one) { return one == to.group; });
        SSL_set1_groups(ssl.get(), groups, std::size(groups));
        if (Session ticket = to.ticket()) SSL_set_session(ssl.get(), ticket.get());
        set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
        if (connect(fd, &to.address.any, to.address.size()) && errno != EINPROGRESS)
            fail(strerror(errno), errno == EADDRNOTAVAIL ? 0 : useless);  // we are out of ports
    }

    ~Connection() {
        // RFC 8446 6.1: else the other end could not tell this from an attacker's cut.
        if (verified && why_.empty()) SSL_shutdown(ssl.get());
        if (fd >= 0) close(fd);
    }

    void send(const Query& query, const Bytes& message) {  // by advance()
        query_ = &query;
        ready = verified;
        count("ready", ready);
        out_ = frame(message);
        in_.assign(2, 0);
        have_ = 0;
    }

    // Goes on as far as it can without waiting. true: it has an answer, or without a query to send
    // it is verified. false: it waits, or has failed.
    bool advance() {
        if (!why_.empty()) return false;
        ERR_clear_error();  // another connection of this thread may have left some
        if (!verified) {  // [4]
            if (!call(SSL_connect(ssl.get()))) return false;
            verified = true;  // OpenSSL has judged the certificate, and the protocol chosen by ALPN
            since = Clock::now();
            upstream.group = int(SSL_get_negotiated_group(ssl.get()));
            count("resumed", SSL_session_reused(ssl.get()));
        }
        if (!out_.empty()) {  // [5] RFC 7858 3.3: length and message together, in one record
            if (!call(SSL_write(ssl.get(), out_.data(), int(out_.size())))) return false;
            since = Clock::now();
            if (settings.verbose) tell_how();
            tell(5, text("2 + %zu octets in one record", out_.size() - 2), out_);
            out_.clear();
            return events = POLLIN, false;  // it will take a while
        }
        while (have_ < in_.size()) {  // [6] the length, then as many octets
            const int got = call(SSL_read(ssl.get(), &in_[have_], int(in_.size() - have_)));
            // Not the whole answer yet, but tickets, or its begin. The rest waits in the resolver,
            // by Nagle's algorithm, until those are acknowledged: now, and not after 40 ms.
            if (!got) return set_option(fd, IPPROTO_TCP, TCP_QUICKACK, 1), false;
            have_ += size_t(got);
            if (have_ == 2) in_.resize(2 + size_t(u16(in_, 0)));
        }
        if (settings.verbose) tell(6, text("2 + %zu octets", in_.size() - 2), in_);
        return true;
    }

    // When verified: the other end has not closed it. That is one system call and no wait, so that
    // take() may look while it holds the lock.
    bool alive() {
        uint8_t octet;
        if (!in_.empty() && Clock::now() < since + seconds(1)) return true;  // it just was
        ERR_clear_error();  // this also reads the tickets that have come
        return SSL_get_error(ssl.get(), SSL_peek(ssl.get(), &octet, 1)) == SSL_ERROR_WANT_READ;
    }

    // When another try is worth while, if it does not get on until then.
    Time patience() const {
        if (!upstream.usual.load().count()) return since + milliseconds(250);  // RFC 8305 5
        // 1.5 times the usual. 2.5 times to be verified, which takes two round trips, and then 3
        // times, for the answer may wait behind tickets. What is less than 25 ms late is the
        // scheduler's fault more often than the network's.
        const Clock::duration late = upstream.usual.load() * (ready ? 3 : verified ? 6 : 5) / 2;
        return since + std::max(late, Clock::duration(25000000));
    }

    std::string how() const {
        const std::string session = SSL_session_reused(ssl.get()) ? " resumed" : " full";
        return SSL_get_version(ssl.get()) + session + (ready ? " ready" : " dialled");
    }

    std::string trouble() const {  // why it failed, or is late
        const char* late = verified ? " no answer in time" : " no TLS connection in time";
        return !why_.empty() ? why_ : upstream.address.str() + late;
    }

    bool fail(const std::string& why, size_t points) {  // false, always
        tell(!verified ? 4 : out_.empty() ? 6 : 5, why);
        why_ = upstream.address.str() + " " + why;
        upstream.blame(points, why_);
        return false;
    }

    Upstream& upstream;
    const std::shared_ptr<SSL> ssl;
    int fd;
    short events = POLLOUT;  // what advance() waits for, as of poll(2)
    bool verified = false;   // the other end proved who it is
    bool ready = false;      // it was verified before the query came
    Time since = Clock::now();  // when it was dialled, then verified, then its query was sent

    // What an OpenSSL call returned; 0: it waits for `events`, or failed. The error queue was empty
    // before the call, else an old error would be taken for its own.
    int call(int result) {
        const int error = errno;
        if (result > 0) return result;
        const int kind = SSL_get_error(ssl.get(), result);
        events = kind == SSL_ERROR_WANT_WRITE ? POLLOUT : POLLIN;
        if (kind == SSL_ERROR_WANT_READ || kind == SSL_ERROR_WANT_WRITE) return 0;
        const long verdict = verified ? X509_V_OK : SSL_get_verify_result(ssl.get());
        const char* reason = ERR_reason_error_string(ERR_peek_error());
        X509* const one = verdict ? sk_X509_value(SSL_get0_verified_chain(ssl.get()), 0) : nullptr;
        char buf[256];  // whose certificate came; with nothing in it that a terminal would obey
        if (one) tell(4, text("came: %s", X509_NAME_oneline(X509_get_subject_name(one), buf, 256)));
        const std::string why =
            verdict == X509_V_ERR_HOSTNAME_MISMATCH ? "certificate does not match " + upstream.name
            : verdict == X509_V_ERR_DANE_NO_MATCH ? "certificate has no pinned key"
            : verdict ? text("certificate: %s", X509_verify_cert_error_string(verdict))
            : reason ? text("TLS failed: %s", reason)
            : kind == SSL_ERROR_SYSCALL && error ? strerror(error) : "closed the connection";
        return fail(why, verified ? 0 : query_ ? useless : 1);  // less, if no client waited
    }

    void tell(int step, const std::string& what, const Bytes& m = Bytes(2)) const {
        if (query_ && settings.verbose)
            query_->tell(step, upstream.address.str() + " " + what, {m.begin() + 2, m.end()});
    }

    void tell_how() const {
        tm end{};
        ASN1_TIME_to_tm(X509_get0_notAfter(SSL_get0_peer_certificate(ssl.get())), &end);
        const char* group = OBJ_nid2sn(int(SSL_get_negotiated_group(ssl.get())));
        tell(4, how() + text(", %s, %s verified, good until %d-%02d-%02d", group,
             upstream.name.c_str(), 1900 + end.tm_year, 1 + end.tm_mon, end.tm_mday));
    }

    const Query* query_ = nullptr;
    Bytes out_, in_;   // framed
    size_t have_ = 0;  // octets of in
    std::string why_;  // empty: it has not failed
};

std::shared_ptr<Connection> Upstream::take() {
    Lock lock(mutex_);
    while (!parked_.empty()) {
        const auto oldest = std::move(parked_.front());
        parked_.pop_front();
        const bool alive = oldest->alive();
        const Clock::duration age = Clock::now() - oldest->since;
        if (alive && age < idle_limit_) return oldest;
        // Closed by the other end: so this is its limit. Not closed: it may be longer, try that.
        if (alive) idle_limit_ = std::min(age * 6 / 5, longest_idle);
        else if (age > shortest_idle) idle_limit_ = std::max(age * 4 / 5, shortest_idle);
    }
    return nullptr;
}

// ---- The whole way -----------------------------------------------------------------------------

// Whom to ask next: in the user's order one that is well (0: and was not asked last; 1: was), or
// (2) is no more than late, or (3) was not tried for `wait` ms, though it rests.
static Upstream* choose(const Upstream* last, int wait) {
    for (int pass : {0, 1, 2, 3})
        for (auto& one : upstreams)
            if ((pass % 3 || one.get() != last) && one->available(pass, wait)) return one.get();
    return nullptr;
}

// One query in ten may be raced, beyond a burst: a slow resolver is not asked twice as much.
constexpr int race_price = 10, race_burst = 20 * race_price;
static std::atomic<int> race_budget{race_burst};

// [7] Whether `one` has brought a good answer, which is the outcome then.
static bool accept(const Query& query, Connection& one, Outcome& outcome) {
    const Bytes answer(one.in_.begin() + 2, one.in_.end());
    const Layout layout = parse(answer);
    const auto clean = matches(query, answer, layout) ? unpad(query, answer, layout) : std::nullopt;
    if (!clean) return one.fail("sent what is no answer to this query", 0);
    if (settings.verbose) query.tell(7, text("%zu -> %zu octets", answer.size(), clean->size()));
    one.upstream.answered(Clock::now() - one.since);
    outcome = {*clean, one.upstream.name + " " + one.how(), &one, std::move(outcome.tries)};
    return true;
}

static void wait_for(const Connections& tries, Time until) {
    std::vector<pollfd> waiting;
    for (auto& one : tries)
        if (one->why_.empty()) waiting.push_back({one->fd, one->events, 0});
    const double left = Ms(until - Clock::now()).count() + 0.999;  // never a little too early
    if (!waiting.empty()) poll(waiting.data(), waiting.size(), int(std::clamp(left, 0.0, 3600e3)));
}

// [4]-[7] The race: if no try is left running another follows at once, and one that is late is
// joined by another, of the next upstream if there is one. The first good answer wins.
static void ask(const Query& query, const Bytes& message, Outcome& outcome, auto& slow) {
    Connections& tries = outcome.tries;
    Time next_try{}, soon = std::min(query.deadline, query.taken + milliseconds(5));
    size_t running = 0;
    // Each turn begins a try if one is wanted, moves all of them on as far as they go without
    // waiting, and then waits for any of them, for the time of the next try or for the deadline.
    for (Time now; (now = Clock::now()) < query.deadline;) {
        Upstream* const last = tries.empty() ? nullptr : &tries.back()->upstream;
        const bool late = running > 0 && now >= next_try;
        // RFC 9520 3.1: three at most.
        const bool more = tries.size() < 3 && (!running || (late && race_budget >= race_price));
        // A query whose upstream failed may at once try one that rests; else one does in 100 ms.
        Upstream* const next = more ? choose(last, last && !running ? 0 : 100) : nullptr;
        if (!running && !next) return;
        if (next) {  // while another runs: a race
            if (running && next != last) last->blame(1, tries.back()->trouble());
            if (running) race_budget -= race_price, count("raced");
            auto ready = next->take();
            tries.push_back(ready ? ready : std::make_shared<Connection>(*next));
            tries.back()->send(query, message);
        }
        for (running = 0; auto& one : tries) {
            if (one->advance() && accept(query, *one, outcome))
                return count("race_won", running > 0);  // an older one still runs
            if (!one->why_.empty()) outcome.detail = one->trouble();
            else ++running;
        }
        next_try = late && !next ? Time::max() : tries.back()->patience();
        // Not 1 ms: a timer ahead of the kernel's own (of 4 ms) is set in hardware, for each query.
        const bool near = now < soon && tries.back()->upstream.quickest.load() < milliseconds(1);
        if (running && !near) slow();
        if (running) wait_for(tries, near ? soon : std::min(query.deadline, next_try));
    }
    if (tries.empty()) return;  // it waited too long for its slot
    outcome.detail = tries.back()->trouble();
    // Nothing is wrong with one that had no time left for its dial.
    const bool in_vain = !tries.back()->verified && Clock::now() >= tries.back()->patience();
    tries.back()->upstream.blame(in_vain ? useless : 1, outcome.detail);
}

Outcome resolve(const Query& query, const std::function<void()>& slow) {
    const Bytes out = pad(query);  // [3]
    if (settings.verbose) query.tell(3, text("%zu -> %zu octets", query.octets.size(), out.size()));
    Outcome outcome{{}, "every upstream failed a moment ago, or its time is up"};
    asked = query.taken;
    if (race_budget < race_burst) ++race_budget;
    ask(query, out, outcome, slow);
    if (!outcome.winner) outcome.octets = reply(query, SERVFAIL, 23);  // EDE: Network Error
    outcome.octets = cut(query, outcome.octets, size_t(settings.max_udp));  // [8]
    return outcome;
}

// Opens one more connection and parks it; and with it an extra one after a miss, or if few are
// ready.
static void open(Upstream& upstream, bool hit = true) {
    Connections fresh;
    for (bool extra : {false, true})
        if (upstream.reserve(extra && hit)) fresh.push_back(std::make_shared<Connection>(upstream));
    const Time until = Clock::now() + milliseconds(settings.timeout);
    while (!fresh.empty()) {
        std::erase_if(fresh, [&](auto& one) {
            const bool done = one->advance() || !one->why_.empty() ||
                              (Clock::now() >= until && !one->fail("no TLS connection in time", 1));
            if (done) upstream.park(one->verified ? one : nullptr);
            return done;
        });
        wait_for(fresh, until);
    }
}

void restock(Outcome used) {
    for (auto& one : used.tries) {
        Upstream& upstream = one->upstream;
        // Whom the answer woke runs first, and not behind this thread's work on the same CPU.
        if (!settings.reuse) std::this_thread::sleep_for(milliseconds(1));
        const bool wanted = !settings.reuse && one->verified, hit = one->ready;
        if (settings.reuse && one.get() == used.winner && upstream.reserve()) upstream.park(one);
        one.reset();
        if (wanted) open(upstream, hit);
        // Reads the tickets of the next one now, and not while a client waits.
        if (!settings.reuse) upstream.tend();
    }
}

void tend() {
    for (;; std::this_thread::sleep_for(milliseconds(250))) {
        const bool warm = Clock::now() < asked.load() + seconds(300);  // then nothing is kept
        size_t wanted = warm_stock, well = 0;
        for (auto& upstream : upstreams) {
            const auto have = upstream->tend();
            // The one that is asked, and as many of the one that would be next.
            if (warm && have && ++well <= 2 && *have < wanted) open(*upstream);
            wanted = std::max(wanted, have.value_or(0));
        }
    }
}

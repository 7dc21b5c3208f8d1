// dot.cpp - how a query travels, in the order of the steps of dot.hpp.
//
// Messages (pure functions over octets) come first, then streams and framing, slots, TLS, and last
// the Resolver, which puts them together. Nothing here knows of options, listeners or signals.
#include "dot.hpp"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstring>
#include <regex>
#include <thread>

namespace dot {

using std::chrono::milliseconds;
using std::chrono::seconds;

std::string text(const char* format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

double ms(Clock::duration duration) {
    return std::chrono::duration<double, std::milli>(duration).count();
}

// ---- Messages ----------------------------------------------------------------------------------
// A message is a header, questions, and three sections of records (RFC 1035 4.1). The proxy has to
// find two places in it, the end of the question and the OPT record, and leaves all else alone.

static int u16(const Bytes& m, size_t at) { return m[at] << 8 | m[at + 1]; }
static void put16(Bytes& m, size_t at, size_t value) {
    m[at] = uint8_t(value >> 8);
    m[at + 1] = uint8_t(value);
}

enum : int { SIG = 24, OPT = 41, TSIG = 250, IXFR = 251, AXFR = 252 };
enum : int { keepalive_option = 11, padding_option = 12, error_option = 15 };
constexpr size_t arcount_at = 10, opt_size = 11, option_header = 4;

std::string rcode_name(int rcode) {
    static const char* const names[] = {"NOERROR",  "FORMERR",  "SERVFAIL", "NXDOMAIN",
                                        "NOTIMP",   "REFUSED",  "YXDOMAIN", "YXRRSET",
                                        "NXRRSET",  "NOTAUTH",  "NOTZONE"};
    return size_t(rcode) < std::size(names) ? names[rcode] : text("RCODE%d", rcode);
}

std::string type_name(int type) {
    static const struct {
        int type;
        const char* name;
    } names[] = {{1, "A"},       {2, "NS"},     {5, "CNAME"},  {6, "SOA"},     {12, "PTR"},
                 {15, "MX"},     {16, "TXT"},   {24, "SIG"},   {28, "AAAA"},   {33, "SRV"},
                 {35, "NAPTR"},  {41, "OPT"},   {43, "DS"},    {46, "RRSIG"},  {47, "NSEC"},
                 {48, "DNSKEY"}, {50, "NSEC3"}, {52, "TLSA"},  {64, "SVCB"},   {65, "HTTPS"},
                 {249, "TKEY"},  {250, "TSIG"}, {251, "IXFR"}, {252, "AXFR"},  {255, "ANY"},
                 {257, "CAA"}};
    for (auto& known : names)
        if (known.type == type) return known.name;
    return type ? text("TYPE%d", type) : "-";
}

// Where the name at `at` ends; 0: it does not, or it is longer than RFC 1035 2.3.4 allows. A pointer
// ends a name and is not followed: what it points to is not needed, so it cannot lead in circles.
static size_t skip_name(const Bytes& m, size_t at, bool pointers) {
    for (size_t start = at; at < m.size() && at - start < 255; at += 1 + m[at]) {
        if (m[at] == 0) return at + 1;
        if (m[at] >= 0xc0) return pointers && at + 2 <= m.size() ? at + 2 : 0;
        if (m[at] > 63) return 0;
    }
    return 0;
}

// Calls visit(at, code, size) for each option of RFC 6891 6.1.2 from `at` to `end`, headers included.
// false: they do not end there.
template <class Visit>
static bool each_option(const Bytes& m, size_t at, size_t end, Visit visit) {
    while (at + option_header <= end) {
        size_t size = option_header + u16(m, at + 2);
        if (at + size > end) return false;
        visit(at, u16(m, at), size);
        at += size;
    }
    return at == end;
}

// What the OPT record says of its sender. A fault in it is the message's, RFC 6891 6.1.1.
static void parse_opt(const Bytes& m, const Record& r, Layout& l) {
    const bool second = l.edns, root = m[r.start] == 0;
    l.edns = true;
    if (!second) l.udp_size = size_t(u16(m, r.type_at + 2));
    if (!second) l.dnssec_ok = m[r.type_at + 6] & 0x80;
    if (second) l.fault = "more than one OPT";
    const bool whole = r.end <= m.size() && each_option(m, r.type_at + 10, r.end, [](auto...) {});
    if (!whole || !root || r.section != 3) l.fault = "a malformed OPT";
    l.opt = r.start;
    l.opt_end = r.end;
}

Layout parse(const Bytes& m) {
    Layout l;
    if (m.size() < header_size) l.fault = "shorter than a header";
    for (int section = 0; section < 4; section++) {
        for (int left = l.fault ? 0 : u16(m, 4 + 2 * section); left > 0 && !l.fault; left--) {
            Record r{l.end, skip_name(m, l.end, section > 0), 0, section};
            r.end = r.type_at + (section ? 10 : 4);
            if (!r.type_at || r.end > m.size()) l.fault = "a name or record does not parse";
            if (l.fault) return l;
            if (section) r.end += u16(m, r.type_at + 8);
            if (r.end > m.size()) l.fault = "a record is longer than the message";
            const int type = u16(m, r.type_at);
            if (section && type == OPT) parse_opt(m, r, l);
            l.is_signed = section == 3 && (type == TSIG || (type == SIG && !l.fault &&
                          r.end >= r.type_at + 12 && u16(m, r.type_at + 10) == 0));
            l.end = r.end;
            if (section == 0) l.question_end = r.end;
            l.records.push_back(r);
        }
    }
    return l;
}

int Query::type() const {
    const bool asked = layout.question_end > header_size && u16(octets, 4) > 0;
    return asked ? u16(octets, layout.question_end - 4) : 0;
}

void say(const std::string& line) {
    const std::string whole = line + "\n";
    // A reader who is gone or a full disk must not stop the service.
    if (write(STDOUT_FILENO, whole.data(), whole.size()) < 0) return;
}

void Query::tell(int step, const std::string& what) const {
    if (verbosity == 0) return;
    say(text("#%u [%d] %7.1f ms  ", number, step, ms(Clock::now() - taken)) + what);
}

void Query::show(const char* title, const Bytes& message) const {
    if (verbosity < 2) return;
    std::string lines = text("#%u     %s, %zu octets", number, title, message.size());
    for (size_t at = 0; at < message.size(); at++)
        lines += (at % 16 ? "" : text("\n#%u     %04zx ", number, at)) + text(" %02x", message[at]);
    say(lines);
}

Verdict judge(const Query& query) {  // [2]
    const Bytes& m = query.octets;
    if (m.size() < header_size) return {Verdict::Silence, FORMERR, "shorter than a header"};
    if (m[2] & 0x80) return {Verdict::Silence, FORMERR, "an answer, not a query"};  // else a loop
    const int opcode = m[2] >> 3 & 15;
    if (opcode == 6)  // RFC 8490 9.4: a connection for each query cannot carry a session
        return {Verdict::Answer, NOTIMP, "DNS stateful operations are not proxied"};
    if (query.layout.fault) return {Verdict::Answer, FORMERR, query.layout.fault};
    if (opcode == 0 && u16(m, 4) > 1)  // RFC 9619 4
        return {Verdict::Answer, FORMERR, "more than one question"};
    if (opcode == 0 && (query.type() == AXFR || query.type() == IXFR))
        return {Verdict::Answer, NOTIMP, "zone transfers are not proxied"};
    return {Verdict::Forward, NOERROR, "forwarded"};
}

// Whether the octets from `from` on may move: a compression pointer counts from the message's start,
// so none may point behind that place. Data that only looks like one is refused too; never mind.
static bool movable(const Bytes& m, size_t from) {
    for (size_t at = from; at + 1 < m.size(); at++)
        if (m[at] >= 0xc0 && size_t(u16(m, at) & 0x3fff) >= from) return false;
    return true;
}

// The options of the message's OPT that are none of `dropped`.
static Bytes options(const Bytes& m, const Layout& l, std::initializer_list<int> dropped) {
    Bytes kept;
    each_option(m, l.opt + opt_size, l.opt_end, [&](size_t at, int code, size_t size) {
        if (std::find(dropped.begin(), dropped.end(), code) == dropped.end())
            kept.insert(kept.end(), m.begin() + at, m.begin() + at + size);
    });
    return kept;
}

// An option of `size` octets, all of them zero, behind `list`.
static void add_option(Bytes& list, int code, size_t size) {
    list.resize(list.size() + option_header + size);
    put16(list, list.size() - size - 4, code);
    put16(list, list.size() - size - 2, size);
}

// Puts `list` into the OPT of `m`, or into a new one behind its last record.
static void set_options(Bytes& m, Layout l, const Bytes& list, bool dnssec_ok) {
    if (!l.opt) {
        const uint8_t record[] = {0, 0, OPT, 1232 >> 8, 1232 & 255, 0, 0, 0, 0, 0, 0};
        l.opt = m.size();
        l.opt_end = l.opt + opt_size;
        m.insert(m.end(), record, record + opt_size);
        m[l.opt + 7] = dnssec_ok ? 0x80 : 0;
        put16(m, arcount_at, u16(m, arcount_at) + 1);
    }
    m.erase(m.begin() + l.opt + opt_size, m.begin() + l.opt_end);
    m.insert(m.begin() + l.opt + opt_size, list.begin(), list.end());
    put16(m, l.opt + 9, list.size());
}

Bytes pad(const Query& query) {  // [3]
    const Bytes& q = query.octets;
    const Layout& l = query.layout;
    // RFC 8945 5.5: what is signed travels as it is. Behind octets that no count covers nothing fits.
    if (l.is_signed || l.end != q.size() || u16(q, arcount_at) == 0xffff ||
        (l.opt && !movable(q, l.opt_end)))
        return q;
    Bytes list = options(q, l, {padding_option});  // a client's own is replaced, RFC 7830 3
    // The option's own header counts too. It is the last one, RFC 8467 3.
    const size_t rest = q.size() - (l.opt_end - l.opt) + opt_size + list.size() + option_header;
    const size_t padding = (padding_block - rest % padding_block) % padding_block;
    if (rest + padding > longest_message) return q;
    add_option(list, padding_option, padding);
    Bytes out = q;
    set_options(out, l, list, false);  // DO=0: a client without EDNS wants no signatures
    return out;
}

bool matches(const Query& query, const Bytes& a, const Layout& layout) {  // [7]
    const Bytes& q = query.octets;
    if (a.size() < header_size || layout.fault) return false;
    if (u16(a, 0) != u16(q, 0) || !(a[2] & 0x80) || ((a[2] ^ q[2]) & 0x78)) return false;
    const int rcode = a[3] & 15;
    if (u16(a, 4) == 0 && u16(q, 4) != 0)  // some servers cannot repeat what they did not read
        return rcode == FORMERR || rcode == SERVFAIL || rcode == NOTIMP || rcode == REFUSED;
    const size_t end = query.layout.question_end;
    if (u16(a, 4) != u16(q, 4) || layout.question_end != end) return false;
    // Names are compared without case, RFC 1035 2.3.3. A label's length is never a letter.
    const size_t name_end = u16(q, 4) == 1 ? end - 4 : header_size;
    return std::equal(q.begin() + header_size, q.begin() + name_end, a.begin() + header_size,
                      [](int x, int y) { return x == y || ((x ^ y) == 32 && isalpha(x)); }) &&
           std::equal(q.begin() + name_end, q.begin() + end, a.begin() + name_end);
}

std::optional<Bytes> unpad(const Query& query, Bytes a, const Layout& l) {  // [7]
    if (l.is_signed) return a;
    if (l.question_end == query.layout.question_end)  // the client's own spelling, as it came
        std::copy(query.octets.begin() + header_size,
                  query.octets.begin() + query.layout.question_end, a.begin() + header_size);
    if (!l.opt) return a;
    if (!movable(a, l.opt_end)) return std::nullopt;
    if (query.layout.edns) {
        set_options(a, l, options(a, l, {padding_option, keepalive_option}), false);
        return a;
    }
    if (a[l.opt + 5] != 0) return std::nullopt;  // its low four bits alone are another rcode
    a.erase(a.begin() + l.opt, a.begin() + l.opt_end);
    put16(a, arcount_at, u16(a, arcount_at) - 1);
    return a;
}

size_t udp_limit(const Query& query, size_t most) {
    if (!query.layout.edns) return 512;
    return std::max<size_t>(512, std::min<size_t>(query.layout.udp_size, most));
}

// The header and question of a message.
static Bytes head(const Bytes& m, const Layout& l) {
    Bytes out(m.begin(), m.begin() + l.question_end);
    std::fill(out.begin() + 6, out.begin() + header_size, 0);
    return out;
}

Bytes cut(const Query& query, Bytes a, size_t limit) {  // [8]
    if (a.size() <= limit) return a;
    const Layout l = parse(a);
    Bytes out = head(a, l);
    out[2] |= 0x02;                         // TC
    if (!query.layout.edns) return out;
    Bytes list = options(a, l, {});  // RFC 6891 7; RFC 8914 3: they go first if they are too long
    if (out.size() + opt_size + list.size() > limit) list.clear();
    set_options(out, {}, list, query.layout.dnssec_ok);
    if (l.opt) std::copy_n(a.begin() + l.opt, opt_size - 2, out.begin() + l.question_end);
    return out;
}

Bytes reply(const Query& query, Rcode rcode, int ede) {  // [8]
    Bytes out = head(query.octets, query.layout);
    out[2] = uint8_t(0x80 | (out[2] & 0x79));  // opcode and RD stay
    out[3] = uint8_t((rcode == SERVFAIL ? 0x80 | (out[3] & 0x10) : 0) | rcode);
    if (out.size() == header_size) put16(out, 4, 0);  // no question, or one that does not parse
    if (!query.layout.edns) return out;
    Bytes list;
    if (ede >= 0) {
        add_option(list, error_option, 2);  // no text: it could tell what is nobody's business
        put16(list, list.size() - 2, ede);
    }
    set_options(out, {}, list, query.layout.dnssec_ok);
    return out;
}


// ---- Streams and framing -----------------------------------------------------------------------

Fd::~Fd() {
    if (number >= 0) close(number);
}

Bytes frame(const Bytes& message) {
    Bytes out(2);
    put16(out, 0, message.size());
    out.insert(out.end(), message.begin(), message.end());
    return out;
}

// Milliseconds from now to `until`: never a little too early, never negative.
static int time_left(Time until) {
    return int(std::clamp(ms(until - Clock::now()) + 0.999, 0.0, 3600e3));
}

// On Linux the kernel counts this limit down over all the waits of one call with MSG_WAITALL.
static bool read_all(int fd, uint8_t* into, size_t size, Time until) {
    const int left = std::max(time_left(until), 1);  // 0 would be for ever
    const timeval limit{left / 1000, left % 1000 * 1000};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return recv(fd, into, size, MSG_WAITALL) == ssize_t(size);
}

std::optional<Bytes> read_frame(int fd, Time until) {
    Bytes message(2);
    if (!read_all(fd, message.data(), 2, until)) return std::nullopt;
    message.resize(u16(message, 0));
    if (!read_all(fd, message.data(), message.size(), until)) return std::nullopt;
    return message;
}

std::string Address::str() const {
    char name[INET6_ADDRSTRLEN] = "?";
    const void* octets = any.sa_family == AF_INET ? (void*)&v4.sin_addr : (void*)&v6.sin6_addr;
    inet_ntop(any.sa_family, octets, name, sizeof name);
    return text("%s@%d", name, ntohs(v4.sin_port));
}

int parse_number(const std::string& from, int least, int most, const std::string& what) {
    const bool digits = !from.empty() && from.size() < 10 &&
                        from.find_first_not_of("0123456789") == std::string::npos;
    const int number = digits ? std::stoi(from) : -1;
    if (number < least || number > most)
        throw BadOption(text("%s '%s' is not a number from %d to %d", what.c_str(), from.c_str(),
                             least, most));
    return number;
}

Address parse_address(const std::string& from, int default_port) {
    const size_t at = from.find('@');
    const std::string host = from.substr(0, at);
    Address a;
    const bool four = inet_pton(AF_INET, host.c_str(), &a.v4.sin_addr) == 1;
    if (!four && inet_pton(AF_INET6, host.c_str(), &a.v6.sin6_addr) != 1)
        throw BadOption("'" + host + "' is not an IP address");
    a.any.sa_family = four ? AF_INET : AF_INET6;
    a.v4.sin_port = htons(uint16_t(  // at the same place in both
        at == from.npos ? default_port : parse_number(from.substr(at + 1), 1, 65535, "port")));
    return a;
}

// ---- Slots -------------------------------------------------------------------------------------

Slots::Permit Slots::take(Time until) {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_until(lock, until, [&] { return free_ > 0; })) return nullptr;
    --free_;
    return Permit(this);
}

bool Slots::all_free(Time until) {
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, until, [&] { return free_ == total_; });
}

void Slots::give() {
    std::lock_guard lock(mutex_);
    ++free_;
    changed_.notify_all();
}

// ---- Upstreams ---------------------------------------------------------------------------------

constexpr size_t most_tickets = 128, warm_stock = 2;
constexpr seconds warm_time{300};          // after the last query
constexpr seconds longest_rest{300};       // RFC 9520 3.2: a failure is remembered 5 min at most
constexpr long oldest_ticket = 7 * 86400;  // seconds, RFC 8446 4.6.1

bool Upstream::available(Time now) {
    std::lock_guard lock(mutex_);
    if (failures_ == 0) return true;
    if (now < rest_until_) return false;
    rest_until_ = now + seconds(1);
    return true;
}

void Upstream::failed(Time now) {
    std::lock_guard lock(mutex_);
    if (failures_ > 0 && now < rest_until_ - seconds(1)) return;  // known already
    rest_until_ = now + std::min(longest_rest, seconds(1 << std::min(failures_, 9)));
    failures_++;
}

void Upstream::silent(Time now) {
    {
        std::lock_guard lock(mutex_);
        if (++silences_ < 3) return;
    }
    failed(now);
}

void Upstream::answered(Time now, Time asked) {
    std::lock_guard lock(mutex_);
    failures_ = silences_ = 0;
    answered_ = now;
    const auto took = now - asked;  // one slow answer must not spoil the average
    usual_ = usual_.count() ? usual_ + (std::min(took, 2 * usual_) - usual_) / 8 : took;
}

Time Upstream::last_answer() {
    std::lock_guard lock(mutex_);
    return answered_;
}

Time Upstream::patience(Time now, bool ready) {
    std::lock_guard lock(mutex_);
    if (!usual_.count()) return now + milliseconds(250);  // RFC 8305 5
    return now + std::max<Clock::duration>(ready ? usual_ * 3 / 2 : usual_ * 5, milliseconds(10));
}

void Upstream::keep(Session ticket) {
    std::lock_guard lock(mutex_);
    if (tickets_.size() == most_tickets) tickets_.pop_front();
    tickets_.push_back(std::move(ticket));
}

Session Upstream::ticket() {
    std::lock_guard lock(mutex_);
    while (!tickets_.empty()) {
        Session newest = std::move(tickets_.back());
        tickets_.pop_back();
        if (time(nullptr) - SSL_SESSION_get_time(newest.get()) >= oldest_ticket) continue;
        // TLS 1.2 shows its ticket to every observer anyway, and seldom gives a new one.
        if (SSL_SESSION_get_protocol_version(newest.get()) < TLS1_3_VERSION &&
            SSL_SESSION_up_ref(newest.get()))
            tickets_.emplace_back(newest.get());
        return newest;
    }
    return nullptr;
}

// ---- Ready connections -------------------------------------------------------------------------
// A thread that has answered opens the next connection and parks it: a query still has one that
// nobody used before, and waits for one round trip. The number parked follows the load.

Upstream::~Upstream() = default;

std::unique_ptr<Connection> Upstream::oldest() {
    std::lock_guard lock(mutex_);
    if (parked_.empty()) return nullptr;
    auto first = std::move(parked_.front());
    parked_.pop_front();
    return first;
}

std::unique_ptr<Connection> Upstream::take(Time now) {
    std::unique_ptr<Connection> first;
    while ((first = oldest()) && !first->alive()) {
    }
    std::lock_guard lock(mutex_);
    asked_ = now;
    return first;
}

bool Upstream::reserve(size_t most) {
    std::lock_guard lock(mutex_);
    if (parked_.size() + opening_ >= most) return false;
    ++opening_;
    return true;
}

void Upstream::park(std::unique_ptr<Connection> connection) {
    std::lock_guard lock(mutex_);
    --opening_;
    if (connection) parked_.push_back(std::move(connection));
}

bool Upstream::tend(Time now) {
    while (auto first = oldest()) {
        const auto age = now - first->since;
        const bool alive = first->alive();
        std::lock_guard lock(mutex_);
        const bool enough = parked_.size() >= warm_stock && now - asked_ > seconds(5);
        if (alive && age < idle_limit_ && !enough) {
            parked_.push_front(std::move(first));
            break;
        }
        // Closed by the other end: this is its limit. Not closed: it may be longer, so try.
        if (!alive && age > seconds(1)) idle_limit_ = std::max<Clock::duration>(age * 4 / 5, seconds(1));
        if (alive && age >= idle_limit_) idle_limit_ = std::min<Clock::duration>(idle_limit_ * 6 / 5, seconds(25));
    }
    std::lock_guard lock(mutex_);
    return now - asked_ < warm_time && parked_.size() + opening_ < warm_stock && failures_ == 0;
}

void add_upstream(Upstreams& to, const std::string& from) {
    static const struct {
        const char *alias, *name, *addresses[4];
    } known[] = {{"cloudflare", "cloudflare-dns.com",
                  {"1.1.1.1", "1.0.0.1", "2606:4700:4700::1111", "2606:4700:4700::1001"}},
                 {"google", "dns.google",
                  {"8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844"}},
                 {"quad9", "dns.quad9.net",
                  {"9.9.9.9", "149.112.112.112", "2620:fe::fe", "2620:fe::9"}}};
    for (auto& resolver : known)
        if (from == resolver.alias) {
            for (auto address : resolver.addresses)
                add_upstream(to, text("%s#%s", address, resolver.name));
            return;
        }
    // A name of letters, so that it is no IP address, then pins: 32 octets are 43 digits of base64.
    static const std::regex form("([^#]*)#([\\w.-]*[A-Za-z][\\w.-]*)((,pin-sha256=[\\w+/]{43}=)*)");
    std::smatch part;
    if (!std::regex_match(from, part, form))
        throw BadOption("upstream '" + from + "' is not cloudflare, google, quad9 or "
                        "ADDR[@PORT]#NAME[,pin-sha256=BASE64]... with the NAME it must prove");
    auto upstream = std::make_unique<Upstream>();
    upstream->address = parse_address(part[1], 853);
    upstream->name = part[2];
    if (upstream->address.v4.sin_port == htons(53))
        throw BadOption("upstream '" + from + "': port 53 is for cleartext, RFC 7858 3.1");
    for (std::string pins = part[3]; !pins.empty(); pins = pins.substr(56)) {
        uint8_t octets[33];
        EVP_DecodeBlock(octets, reinterpret_cast<const uint8_t*>(&pins[12]), 44);
        upstream->pins.emplace_back();
        std::copy_n(octets, 32, upstream->pins.back().begin());
    }
    to.push_back(std::move(upstream));
}

// ---- TLS ---------------------------------------------------------------------------------------
// Every setting that decides whom the proxy trusts is in the next three functions.

// OpenSSL asks this about each certificate, the server's own (depth 0) last. RFC 7858 4.2: one key
// of the verified chain must be a pinned one. RFC 8310 6.4: in addition to the name.
static int check_pins(int ok, X509_STORE_CTX* store) {
    auto* ssl = static_cast<SSL*>(
        X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx()));
    const auto& pins = static_cast<Upstream*>(SSL_get_app_data(ssl))->pins;
    if (!ok || pins.empty() || X509_STORE_CTX_get_error_depth(store) != 0) return ok;
    STACK_OF(X509)* chain = X509_STORE_CTX_get0_chain(store);
    for (int i = 0; i < sk_X509_num(chain); i++) {
        uint8_t* der = nullptr;
        const int size = i2d_X509_PUBKEY(X509_get_X509_PUBKEY(sk_X509_value(chain, i)), &der);
        Pin key{};
        const bool done = size > 0 && EVP_Digest(der, size, key.data(), nullptr, EVP_sha256(), nullptr);
        OPENSSL_free(der);
        if (done && std::find(pins.begin(), pins.end(), key) != pins.end()) return 1;
    }
    X509_STORE_CTX_set_error(store, X509_V_ERR_APPLICATION_VERIFICATION);
    return 0;
}

static int keep_ticket(SSL* ssl, SSL_SESSION* session) {
    Session ticket(session);
    const bool dead = SSL_SESSION_get_protocol_version(session) >= TLS1_3_VERSION &&
                      SSL_SESSION_get_ticket_lifetime_hint(session) == 0;  // RFC 8446 4.6.1
    if (!dead) static_cast<Upstream*>(SSL_get_app_data(ssl))->keep(std::move(ticket));
    return 1;  // it is ours now
}

Ctx tls_context(const std::string& ca_file) {
    Ctx ctx(SSL_CTX_new(TLS_client_method()));
    if (!ctx) throw std::runtime_error("OpenSSL does not start");
    SSL_CTX_set_min_proto_version(ctx.get(), TLS1_2_VERSION);  // RFC 9325 3.1.1
    SSL_CTX_set_options(ctx.get(), SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    SSL_CTX_set_verify(ctx.get(), SSL_VERIFY_PEER, check_pins);
    // Else OpenSSL takes the subject's CN for a name, which RFC 8310 8.1 forbids.
    X509_VERIFY_PARAM_set_hostflags(
        SSL_CTX_get0_param(ctx.get()),
        X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    static const uint8_t alpn[] = {3, 'd', 'o', 't'};
    SSL_CTX_set_alpn_protos(ctx.get(), alpn, sizeof alpn);
    SSL_CTX_set_session_cache_mode(ctx.get(), SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
    SSL_CTX_sess_set_new_cb(ctx.get(), keep_ticket);
    SSL_CTX_set_mode(ctx.get(), SSL_MODE_RELEASE_BUFFERS);
    const bool trusts = ca_file.empty()
                            ? SSL_CTX_set_default_verify_paths(ctx.get())
                            : SSL_CTX_load_verify_file(ctx.get(), ca_file.c_str());
    if (!trusts) throw BadOption("no certificates to trust in '" + ca_file + "'");
    return ctx;
}

Connection::Connection(SSL_CTX* ctx, Upstream& upstream)
    : upstream(upstream),
      fd(socket(upstream.address.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)),
      ssl(SSL_new(ctx)) {
    const int one = 1, error = errno;
    local = fd.number < 0 || !ssl || !SSL_set_fd(ssl.get(), fd.number) ||
            !SSL_set_tlsext_host_name(ssl.get(), upstream.name.c_str()) ||
            !SSL_set1_host(ssl.get(), upstream.name.c_str());
    if (local) {
        fail(strerror(error));
        return;
    }
    SSL_set_app_data(ssl.get(), &upstream);
    SSL_set_connect_state(ssl.get());
    // The group that this server chose before goes first, else it asks for a second hello.
    int groups[] = {NID_X25519, NID_X9_62_prime256v1, NID_secp384r1, NID_secp521r1};
    auto chosen = std::find(groups, groups + 4, upstream.group.load());
    if (chosen != groups + 4) std::rotate(groups, chosen, chosen + 1);
    SSL_set1_groups(ssl.get(), groups, 4);
    if (Session ticket = upstream.ticket()) SSL_set_session(ssl.get(), ticket.get());
    setsockopt(fd.number, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    events = POLLOUT;
    if (connect(fd.number, &upstream.address.any, upstream.address.size()) && errno != EINPROGRESS)
        fail(strerror(errno));
}

Connection::~Connection() {
    // Without this OpenSSL takes the session for broken and never resumes it. RFC 8446 6.1.
    if (verified && stage != Failed) SSL_shutdown(ssl.get());
    ERR_clear_error();  // a stale error would be taken for one of this thread's next connection
}

void Connection::tell(int step, const std::string& what) const {
    if (query_) query_->tell(step, upstream.address.str() + " " + what);
}

Connection::Stage Connection::fail(const std::string& why) {
    tell(stage < Idle ? 4 : stage < Read ? 5 : 6, why);
    why_ = why;
    return stage = Failed;
}

Connection::Stage Connection::again(int result) {
    const int error = errno, kind = SSL_get_error(ssl.get(), result);
    events = kind == SSL_ERROR_WANT_WRITE ? POLLOUT : POLLIN;
    if (kind == SSL_ERROR_WANT_READ || kind == SSL_ERROR_WANT_WRITE) return stage;
    const long verdict = verified ? X509_V_OK : SSL_get_verify_result(ssl.get());
    const char* reason = ERR_reason_error_string(ERR_peek_error());
    if (verdict == X509_V_ERR_HOSTNAME_MISMATCH)
        return fail("certificate does not match " + upstream.name);
    if (verdict == X509_V_ERR_APPLICATION_VERIFICATION)
        return fail("certificate has no pinned key in its chain");
    if (verdict != X509_V_OK)
        return fail(text("certificate refused: %s", X509_verify_cert_error_string(verdict)));
    if (reason) return fail(text("TLS failed: %s", reason));
    return fail(kind == SSL_ERROR_SYSCALL && error ? strerror(error) : "closed the connection");
}

// The certificate was judged in the handshake. Is all else right too?
Connection::Stage Connection::verify() {
    const uint8_t* alpn = nullptr;
    unsigned size = 0;
    SSL_get0_alpn_selected(ssl.get(), &alpn, &size);
    if (size != 0 && std::string(alpn, alpn + size) != "dot")
        return fail("chose a protocol other than DNS over TLS");
    const X509* certificate = SSL_get0_peer_certificate(ssl.get());
    if (SSL_get_verify_result(ssl.get()) != X509_V_OK || !certificate)
        return fail("certificate was not verified");
    verified = true;
    since = Clock::now();
    upstream.group = int(SSL_get_negotiated_group(ssl.get()));
    tm until{};
    ASN1_TIME_to_tm(X509_get0_notAfter(certificate), &until);
    tell(4, text("%s, %s verified, certificate valid until %d-%02d-%02d", how().c_str(),
                 upstream.name.c_str(), until.tm_year + 1900, until.tm_mon + 1, until.tm_mday));
    return stage = Idle;
}

Connection::Stage Connection::advance() {
    ERR_clear_error();
    int result = 1;
    if (stage == Connect) {
        pollfd connected{fd.number, POLLOUT, 0};
        if (poll(&connected, 1, 0) == 1) stage = Handshake;
    }
    if (stage == Handshake) {  // [4]
        if ((result = SSL_do_handshake(ssl.get())) != 1) return again(result);
        verify();
    }
    if (stage == Idle && !out_.empty()) stage = Send;
    if (stage == Send) {  // [5] RFC 7858 3.3: length and message together, in one record
        if ((result = SSL_write(ssl.get(), out_.data(), int(out_.size()))) <= 0) return again(result);
        const int one = 1;  // else what acknowledges the tickets, and with it the answer, is 40 ms late
        setsockopt(fd.number, IPPROTO_TCP, TCP_QUICKACK, &one, sizeof one);
        since = Clock::now();
        tell(5, text("2 + %zu octets in one record", out_.size() - 2));
        stage = Read;
    }
    while (stage == Read) {  // [6]
        uint8_t* const into = have_ < 2 ? length_ + have_ : in.data() + have_ - 2;
        const size_t rest = have_ < 2 ? 2 - have_ : in.size() + 2 - have_;
        if ((result = SSL_read(ssl.get(), into, int(rest))) <= 0) return again(result);
        have_ += size_t(result);
        if (have_ == 2) in.resize(size_t(length_[0] << 8 | length_[1]));
        if (have_ >= 2 && have_ == in.size() + 2) stage = Done;
    }
    if (stage == Done) tell(6, text("2 + %zu octets", in.size()));
    return stage;
}

void Connection::send(const Query& query, const Bytes& message) {
    query_ = &query;
    ready = stage == Idle;
    out_ = frame(message);
    if (ready) tell(4, how() + ", " + upstream.name + " was verified before");
}

void Connection::rest() {
    query_ = nullptr;
    out_.clear();
    have_ = 0;
    stage = Idle;
    since = Clock::now();
}

bool Connection::alive() {
    uint8_t octet;
    ERR_clear_error();  // this also reads the tickets that have come
    return SSL_get_error(ssl.get(), SSL_peek(ssl.get(), &octet, 1)) == SSL_ERROR_WANT_READ;
}

std::string Connection::how() const {
    return text("%s %s %s", SSL_get_version(ssl.get()),
                SSL_session_reused(ssl.get()) ? "resumed" : "full", ready ? "ready" : "dialled");
}

std::string Connection::trouble() const {
    return upstream.address.str() + " " +
           (stage == Failed      ? why_
            : stage == Connect   ? "no TCP connection in time"
            : stage == Handshake ? "TLS handshake not finished in time"
                                 : "no whole answer in time");
}

// ---- The whole way -----------------------------------------------------------------------------

constexpr size_t most_tries = 3;  // RFC 9520 3.1

// Whom to ask next: the first in the user's order that is well, rather not the one asked last.
Upstream* Resolver::choose(const Upstream* last) {
    const Time now = Clock::now();
    Upstream* again = nullptr;
    for (auto& upstream : upstreams_) {
        if (upstream.get() == last) again = upstream.get();
        else if (upstream->available(now)) return upstream.get();
    }
    return again && again->available(now) ? again : nullptr;
}

// One query in ten may be raced, beyond a burst: a resolver that is slow is not asked twice as much.
bool Resolver::may_race() {
    if (race_budget_.fetch_sub(race_price) >= race_price) return true;
    race_budget_ += race_price;
    return false;
}

// Takes a try as far as it goes. true: it ended, and the outcome is good or says why it is not.
bool Resolver::ended(const Query& query, Connection& one, Outcome& outcome) {
    one.advance();
    if (one.stage == Connection::Failed && !one.verified && !one.local)
        one.upstream.failed(Clock::now());
    if (one.stage == Connection::Failed) outcome.detail = one.trouble();
    if (one.stage != Connection::Done) return one.stage == Connection::Failed;
    const Layout layout = parse(one.in);
    query.show("answer over TLS", one.in);
    std::optional<Bytes> clean;
    if (matches(query, one.in, layout)) clean = unpad(query, one.in, layout);
    outcome.good = clean.has_value();
    outcome.detail = clean ? one.upstream.name + " " + one.how()
                           : one.upstream.address.str() + " sent what is no answer to this query";
    if (clean) outcome.octets = std::move(*clean);
    query.tell(7, clean ? text("it matches; %zu -> %zu octets", one.in.size(), outcome.octets.size())
                        : outcome.detail);
    if (clean) one.upstream.answered(Clock::now(), one.since);
    else one.stage = Connection::Failed;
    return true;
}

static void wait_for(const std::vector<std::unique_ptr<Connection>>& tries, Time until) {
    std::vector<pollfd> waiting;
    for (auto& one : tries)
        if (one->stage < Connection::Done) waiting.push_back({one->fd.number, one->events, 0});
    poll(waiting.data(), waiting.size(), time_left(until));
}

// [4]-[7] The race: a try that fails is followed by another at once, and one that is late is joined
// by another, of the next upstream if there is one. The first good answer wins.
void Resolver::ask(const Query& query, const Bytes& message, Outcome& outcome) {
    auto& tries = outcome.tries;
    Upstream* last = nullptr;
    Time next_try{};
    size_t running = 0;
    if (race_budget_ < race_burst) ++race_budget_;
    for (Time now; (now = Clock::now()) < query.deadline;) {
        const bool late = running > 0 && now >= next_try;
        Upstream* next = nullptr;
        if (tries.size() < most_tries && (!running || (late && may_race()))) next = choose(last);
        if (late && next && next != last) last->silent(now);
        if (next) {
            tries.push_back(connect(*(last = next)));
            tries.back()->send(query, message);
            ++running;
        }
        if (!running) return;
        if (next || late) next_try = next ? last->patience(now, tries.back()->ready) : Time::max();
        running = 0;
        for (auto& one : tries)
            if (one->stage < Connection::Done && !ended(query, *one, outcome)) ++running;
        if (outcome.good) return;
        if (running) wait_for(tries, std::min(query.deadline, next_try));
    }
    if (!tries.empty()) outcome.detail = tries.back()->trouble();
    for (auto& one : tries)
        if (one->upstream.last_answer() < query.taken) one->upstream.failed(Clock::now());
}

std::unique_ptr<Connection> Resolver::connect(Upstream& upstream) {
    auto ready = upstream.take(Clock::now());
    return ready ? std::move(ready) : std::make_unique<Connection>(ctx_.get(), upstream);
}

void Resolver::open(Upstream& upstream) {
    if (!upstream.reserve(policy_.ready)) return;
    std::vector<std::unique_ptr<Connection>> one;
    one.push_back(std::make_unique<Connection>(ctx_.get(), upstream));
    const Time until = Clock::now() + policy_.timeout;
    while (one[0]->advance() < Connection::Idle && Clock::now() < until) wait_for(one, until);
    if (!one[0]->verified && !one[0]->local) upstream.failed(Clock::now());
    upstream.park(one[0]->verified ? std::move(one[0]) : nullptr);
}

void Resolver::restock(Outcome used) {
    for (auto& one : used.tries) {
        Upstream& upstream = one->upstream;
        const int wanted = one->ready ? 1 : 2;  // a miss parks two: the stock was too small
        if (policy_.reuse && one->stage == Connection::Done && upstream.reserve(policy_.ready)) {
            one->rest();
            upstream.park(std::move(one));
            continue;
        }
        one.reset();
        for (int i = 0; i < wanted && policy_.ready && !policy_.reuse; i++) open(upstream);
    }
}

void Resolver::tend() {
    for (;; std::this_thread::sleep_for(milliseconds(250)))
        for (auto& upstream : upstreams_)
            if (upstream->tend(Clock::now()) && policy_.ready) open(*upstream);
}

Outcome Resolver::resolve(const Query& query) {
    const Bytes message = pad(query);  // [3]
    query.tell(3, text("%zu -> %zu octets", query.octets.size(), message.size()));
    query.show("query over TLS", message);
    Outcome outcome{{}, false, "every upstream failed a moment ago"};
    ask(query, message, outcome);
    if (!outcome.good) outcome.octets = reply(query, SERVFAIL, 23);  // EDE: Network Error
    const size_t whole = outcome.octets.size();
    if (!query.tcp) outcome.octets = cut(query, outcome.octets, udp_limit(query, policy_.max_udp));  // [8]
    const size_t size = outcome.octets.size();
    query.tell(8, text("%s, %zu octets%s", rcode_name(outcome.octets[3] & 15).c_str(), size,
                       size < whole ? ", cut, TC set" : ""));
    query.show("answer", outcome.octets);
    return outcome;
}

}  // namespace dot

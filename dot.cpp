// dot.cpp - how a query travels, in the order of the steps of dot.hpp.
//
// What the user asked for comes first. Messages follow: pure functions over octets. Then come
// streams, who may ask, threads, upstreams, TLS connections, and last the whole way, where all of
// it meets in one function: carry(). Nothing here knows of argv, listeners or signals.
#include "dot.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <filesystem>
#include <map>
#include <mutex>
#include <set>
#include <thread>

using Lock = std::lock_guard<std::mutex>;
Settings settings;

static std::mutex printing;

void say(std::string line) {
    line += '\n';
    // A pipe takes a short line in one piece (POSIX: up to PIPE_BUF octets), so lines do not mix.
    // With -vv lines are longer, so a lock lets one thread print at a time.
    std::unique_lock<std::mutex> lock(printing, std::defer_lock);
    if (settings.verbose >= 2) lock.lock();
    const ssize_t written = write(STDOUT_FILENO, line.data(), line.size());
    (void)written;  // A reader who is gone, or a full disk, must not stop the service.
}

static std::mutex counting;  // guards `counts`
static std::map<std::string, int64_t> counts{
    {"udp", 0}, {"tcp", 0}, {"success", 0}, {"failure", 0}};

// The reasons of failures are names as well, and have spaces.
static std::string without_spaces(std::string name) {
    std::replace(name.begin(), name.end(), ' ', '_');
    return name;
}

void count(const std::string& name, int64_t more) {
    Lock lock(counting);
    counts[without_spaces(name)] += more;
}

void count_highest(const std::string& name, int64_t value) {
    Lock lock(counting);
    int64_t& highest = counts[without_spaces(name)];
    highest = std::max(highest, value);
}

std::string totals() {
    Lock lock(counting);
    std::string line = "TOTALS";
    for (const auto& [name, number] : counts) line += " " + name + "=" + std::to_string(number);
    return line;
}

// ---- What the user asked for -------------------------------------------------------------------

socklen_t Address::size() const {
    if (is_v4()) return sizeof v4;
    return sizeof v6;
}

static const uint8_t* octets_of(const Address& address) {
    if (address.is_v4()) return reinterpret_cast<const uint8_t*>(&address.v4.sin_addr);
    return reinterpret_cast<const uint8_t*>(&address.v6.sin6_addr);
}

std::string Address::host() const {
    char name[INET6_ADDRSTRLEN] = "?";
    inet_ntop(any.sa_family, octets_of(*this), name, sizeof name);
    return name;
}

std::string Address::str() const { return host() + "@" + std::to_string(port()); }

std::string Address::bits() const {
    std::string bits = is_v4() ? "4" : "6";
    const int length = is_v4() ? 32 : 128;
    for (int i = 0; i < length; i++) {
        const int octet = octets_of(*this)[i / 8];
        const bool bit = octet & (0x80 >> (i % 8));
        bits += bit ? '1' : '0';
    }
    return bits;
}

static bool is_ip_address(const std::string& host) {
    in6_addr ignored;
    return inet_pton(AF_INET, host.c_str(), &ignored) == 1 ||
           inet_pton(AF_INET6, host.c_str(), &ignored) == 1;
}

int parse_number(const std::string& from, int least, int most) {
    const bool is_digits = from.find_first_not_of("0123456789") == from.npos;
    if (is_digits && !from.empty() && from.size() <= 10) {
        const long long number = std::stoll(from);
        if (number >= least && number <= most) return int(number);
    }
    throw BadOption(text("'%.100s' is not a number from %d to %d", from.c_str(), least, most));
}

// What to write instead of something that is no ADDR[@PORT].
static std::string advice_on_address(const std::string& from) {
    const bool is_number = from.find_first_not_of("0123456789") == from.npos;
    if (is_number && !from.empty()) return "a port follows an address: write 127.0.0.1@" + from;

    std::string host;
    std::string rest;
    if (from.starts_with('[')) {
        // "[::1]:53", "[::1]@53" or "[::1]": the host is "::1", the rest ":53", "@53" or "".
        const size_t bracket = from.find(']');
        if (bracket == from.npos) {
            host = from.substr(1);
        } else {
            host = from.substr(1, bracket - 1);
            rest = from.substr(bracket + 1);
        }
    } else {
        // "127.0.0.1:53"
        host = from.substr(0, from.rfind(':'));
        rest = from.substr(host.size());
    }
    if (!rest.empty()) rest[0] = '@';
    if (is_ip_address(host)) return "write the address as " + host + rest;
    return "this is not an IP address; write ADDR[@PORT], for example 127.0.0.1@5300";
}

Address parse_address(const std::string& from, int default_port) {
    const size_t at = from.find('@');
    const std::string host = from.substr(0, at);
    Address address;
    if (inet_pton(AF_INET, host.c_str(), &address.v4.sin_addr) == 1) {
        address.any.sa_family = AF_INET;
    } else if (inet_pton(AF_INET6, host.c_str(), &address.v6.sin6_addr) == 1) {
        address.any.sa_family = AF_INET6;
    } else {
        throw BadOption(advice_on_address(from));
    }
    int port = default_port;
    if (at != from.npos) port = parse_number(from.substr(at + 1), 1, 65535);
    address.v4.sin_port = htons(uint16_t(port));
    return address;
}

std::string parse_network(const std::string& from) {
    const size_t slash = from.find('/');
    const std::string host = from.substr(0, slash);
    if (!is_ip_address(host))
        throw BadOption("this is not a network; write ADDR[/LENGTH], for example 10.0.0.0/8");
    const Address address = parse_address(host, 0);
    const std::string bits = address.bits();
    const int longest = int(bits.size()) - 1;  // The first character is the family.
    int length = longest;
    if (slash != from.npos) length = parse_number(from.substr(slash + 1), 0, longest);

    const std::string network = bits.substr(0, 1 + size_t(length));
    const std::string rest = bits.substr(1 + size_t(length));
    // 10.0.0.1/8 could mean a host or a network.
    if (rest.find('1') != rest.npos)
        throw BadOption("the address has bits behind the first " + std::to_string(length) +
                        "; write " + address.host() + " for this host, or the network's address");
    // 0.0.0.0 could mean nobody or everybody.
    if (slash == from.npos && bits.find('1') == bits.npos)
        throw BadOption("this is no host's address; write " + address.host() + "/0 for everybody");
    return network;
}

// The addresses of well-known resolvers, and the name that each must prove to have.
static const std::map<std::string, std::string> known_resolvers{
    {"cloudflare", "1.1.1.1 1.0.0.1 2606:4700:4700::1111 2606:4700:4700::1001#cloudflare-dns.com"},
    {"google", "8.8.8.8 8.8.4.4 2001:4860:4860::8888 2001:4860:4860::8844#dns.google"},
    {"quad9", "9.9.9.9 149.112.112.112 2620:fe::fe 2620:fe::9#dns.quad9.net"},
};

static std::vector<std::string> split(const std::string& from, char separator) {
    std::vector<std::string> parts;
    size_t begin = 0;
    for (;;) {
        const size_t end = from.find(separator, begin);
        parts.push_back(from.substr(begin, end - begin));
        if (end == from.npos) return parts;
        begin = end + 1;
    }
}

// Reads the name that a resolver must prove to have: an IP address, or a host name of letters,
// digits, '-', '_' and dots. With a wildcard or a leading dot, OpenSSL would accept the certificate
// of any host of that domain.
static std::string parse_name(std::string name) {
    if (is_ip_address(name)) return name;
    if (name.ends_with('.')) name.pop_back();
    const std::string letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    if (name.size() > 253) throw BadOption("the NAME is longer than 253 characters");
    for (const std::string& label : split(name, '.')) {
        const bool is_good = label.find_first_not_of(letters + "0123456789-_") == label.npos;
        if (label.empty() || label.size() > 63 || !is_good)
            throw BadOption("'" + name + "' is not a host name; write the resolver's own");
    }
    if (name.find_first_of(letters) == name.npos)
        throw BadOption("'" + name + "' is neither a host name nor an IP address");
    return name;
}

// Reads pin-sha256=BASE64, the SHA-256 of a key. The base64 of 32 octets is 43 digits and a "=".
static Bytes parse_pin(const std::string& from) {
    const std::string prefix = "pin-sha256=";
    const BadOption bad("'" + from + "' is not pin-sha256= and 44 characters of base64");
    if (!from.starts_with(prefix)) throw bad;
    const std::string base64 = from.substr(prefix.size());
    if (base64.size() != 44 || base64.find('=') != 43) throw bad;
    uint8_t octets[33];  // EVP_DecodeBlock() writes one octet for the "=" as well.
    const auto* digits = reinterpret_cast<const uint8_t*>(base64.data());
    if (EVP_DecodeBlock(octets, digits, 44) != 33) throw bad;
    return Bytes(octets, octets + 32);
}

// What to write instead of an upstream that has no '#'.
static std::string advice_on_upstream(std::string from) {
    const std::string form = "ADDR[@PORT]#NAME[,pin-sha256=BASE64]...";
    if (from.find(',') != from.npos) return "write one --upstream for each resolver";
    if (from.starts_with("tls://")) from = from.substr(6);
    for (const auto& [name, whole] : known_resolvers) {
        const std::string its_name = whole.substr(whole.find('#') + 1);
        if (from == its_name) return "write " + name + ", or an address and #" + its_name;
    }
    if (is_ip_address(from.substr(0, from.find('@'))))
        return "say whom it must prove to be: write " + from + "#NAME, as in 192.0.2.1#dns.example";
    return "write cloudflare, google, quad9 or " + form + ", as in 192.0.2.1#dns.example";
}

std::vector<Peer> parse_upstream(const std::string& from) {
    std::string whole = from;  // ADDRESS... #NAME,PIN...: a known resolver has several addresses
    if (known_resolvers.contains(from)) whole = known_resolvers.at(from);
    const size_t hash = whole.find('#');
    if (hash == whole.npos) throw BadOption(advice_on_upstream(from));

    std::vector<std::string> parts = split(whole.substr(hash + 1), ',');
    const std::string name = parse_name(parts[0]);
    std::vector<Bytes> pins;
    for (size_t i = 1; i < parts.size(); i++) pins.push_back(parse_pin(parts[i]));

    std::vector<Peer> peers;
    for (const std::string& address : split(whole.substr(0, hash), ' ')) {
        peers.push_back({parse_address(address, 853), name, pins});
        if (peers.back().address.port() == 53)
            throw BadOption("port 53 is for plain DNS (RFC 7858 3.1); DNS over TLS has port 853");
    }
    return peers;
}

// ---- Messages ----------------------------------------------------------------------------------
// A message is a header, questions, and three sections of records (RFC 1035 4.1). The proxy has to
// find two places in it, the end of the question and the OPT record, and leaves all else alone.

enum RecordType : int {
    TYPE_A = 1,
    TYPE_NS = 2,
    TYPE_CNAME = 5,
    TYPE_PTR = 12,
    TYPE_SIG = 24,
    TYPE_AAAA = 28,
    TYPE_OPT = 41,
    TYPE_TKEY = 249,
    TYPE_TSIG = 250,
    TYPE_IXFR = 251,
    TYPE_AXFR = 252,
};
enum Opcode : int { OPCODE_QUERY = 0, OPCODE_DSO = 6 };
enum OptionCode : int { OPTION_KEEPALIVE = 11, OPTION_PADDING = 12, OPTION_ERROR = 15 };
enum ErrorInfo : int { EDE_NETWORK_ERROR = 23 };  // RFC 8914 4.24
enum Section : int { ANSWERS = 1, AUTHORITIES = 2, ADDITIONALS = 3 };

// Where the fields of a header are, RFC 1035 4.1.1.
constexpr size_t id_at = 0, flags_at = 2, questions_at = 4, additionals_at = 10;
enum Flag : int {
    FLAG_QR = 0x8000,
    FLAGS_OPCODE = 0x7800,
    FLAG_AA = 0x0400,
    FLAG_TC = 0x0200,
    FLAG_RD = 0x0100,
    FLAG_RA = 0x0080,
    FLAG_Z = 0x0040,
    FLAG_AD = 0x0020,
    FLAG_CD = 0x0010,
    FLAGS_RCODE = 0x000f,
};

constexpr size_t longest_name = 255;  // RFC 1035 2.3.4

// An OPT record without options, and where its fields are (RFC 6891 6.1.2): the root as its owner,
// the type, the UDP size, the upper bits of the rcode, the version, DO and 15 zeros, the data's
// size.
constexpr size_t opt_header_size = 11;
constexpr size_t opt_rcode_at = 5, opt_data_size_at = 9;
constexpr int OPT_FLAG_DO = 0x8000;
constexpr size_t option_header_size = 4;  // the code and the size
constexpr int own_udp_size = 1232;        // what the proxy says of itself

static int get16(const Bytes& m, size_t at) { return m[at] << 8 | m[at + 1]; }
static void put16(Bytes& m, size_t at, size_t value) {
    m[at] = uint8_t(value >> 8);
    m[at + 1] = uint8_t(value);
}
static void append16(Bytes& m, size_t value) {
    m.push_back(uint8_t(value >> 8));
    m.push_back(uint8_t(value));
}
static void append(Bytes& m, const Bytes& more) { m.insert(m.end(), more.begin(), more.end()); }

// A record type. Domain names may be in its data: `names` of them, from octet `names_at` on. They
// are listed only for those types in which they may be compressed, by the rules of RFC 1035 or
// against them (RFC 3597 4). When an OPT record grows or shrinks, all that follows it moves, and
// the pointers in these names must be corrected: see replace_opt().
struct TypeRow {
    int type;
    const char* name;
    size_t names_at = 0;
    int names = 0;
};
static const TypeRow type_rows[] = {
    {1, "A"},           {2, "NS", 0, 1},   {3, "MD", 0, 1},  {4, "MF", 0, 1},
    {5, "CNAME", 0, 1}, {6, "SOA", 0, 2},  {7, "MB", 0, 1},  {8, "MG", 0, 1},
    {9, "MR", 0, 1},    {12, "PTR", 0, 1}, {13, "HINFO"},    {14, "MINFO", 0, 2},
    {15, "MX", 2, 1},   {16, "TXT"},       {17, "RP", 0, 2}, {18, "AFSDB", 2, 1},
    {21, "RT", 2, 1},   {24, "SIG"},       {26, "PX", 2, 2}, {28, "AAAA"},
    {29, "LOC"},        {33, "SRV", 6, 1}, {35, "NAPTR"},    {39, "DNAME"},
    {41, "OPT"},        {43, "DS"},        {44, "SSHFP"},    {46, "RRSIG"},
    {47, "NSEC"},       {48, "DNSKEY"},    {50, "NSEC3"},    {52, "TLSA"},
    {59, "CDS"},        {60, "CDNSKEY"},   {64, "SVCB"},     {65, "HTTPS"},
    {250, "TSIG"},      {251, "IXFR"},     {252, "AXFR"},    {255, "ANY"},
    {257, "CAA"},
};

static const TypeRow* find_type(int type) {
    for (const TypeRow& row : type_rows)
        if (row.type == type) return &row;
    return nullptr;
}

std::string type_name(int type) {
    if (type == 0) return "-";  // The query has no question.
    const TypeRow* row = find_type(type);
    return row ? row->name : "TYPE" + std::to_string(type);
}

static std::string name_from(const std::map<int, const char*>& names, int number,
                             const char* otherwise) {
    const auto found = names.find(number);
    if (found != names.end()) return found->second;
    return otherwise + std::to_string(number);
}

std::string rcode_name(int rcode) {
    static const std::map<int, const char*> names{
        {0, "NOERROR"},  {1, "FORMERR"},  {2, "SERVFAIL"},   {3, "NXDOMAIN"}, {4, "NOTIMP"},
        {5, "REFUSED"},  {6, "YXDOMAIN"}, {7, "YXRRSET"},    {8, "NXRRSET"},  {9, "NOTAUTH"},
        {10, "NOTZONE"}, {16, "BADVERS"}, {23, "BADCOOKIE"},
    };
    return name_from(names, rcode, "RCODE");
}

static std::string class_name(int number) {
    static const std::map<int, const char*> names{
        {1, "IN"}, {3, "CH"}, {4, "HS"}, {254, "NONE"}, {255, "ANY"}};
    return name_from(names, number, "CLASS");
}

static std::string option_name(int code) {
    static const std::map<int, const char*> names{
        {3, "NSID"},          {5, "DAU"},    {6, "DHU"},      {7, "N3U"},
        {8, "CLIENT-SUBNET"}, {9, "EXPIRE"}, {10, "COOKIE"},  {11, "KEEPALIVE"},
        {12, "PADDING"},      {13, "CHAIN"}, {14, "KEY-TAG"}, {15, "ERROR"},
    };
    return name_from(names, code, "OPTION");
}

// A field of a message, for -vv. It ends where the next one begins.
struct Field {
    enum Kind { NUMBER, FLAGS, NAME, TYPE, CLASS, OPT_FLAGS, OPTION, DATA };
    Kind kind;
    const char* label;
    size_t begin;
    int type = 0;  // of the record, if this is its data
};

// What is wrong with a message. parse() catches it.
struct Malformed {
    const char* what;
};

// Reads a message from front to back. Each function moves past one field, and notes it if somebody
// wants to print the fields. It throws Malformed if the message ends too soon.
class Cursor {
public:
    Cursor(const Bytes& message, size_t at, std::vector<Field>* fields = nullptr)
        : at(at), message(message), fields(fields) {}

    void require(size_t size) const {  // that so many octets follow
        if (size > message.size() - at) throw Malformed{"a name or record does not parse"};
    }

    int number(const char* label, Field::Kind kind = Field::NUMBER) {  // of 16 bits
        require(2);
        note(kind, label);
        at += 2;
        return get16(message, at - 2);
    }

    void skip(size_t size, const char* label, Field::Kind kind = Field::NUMBER, int type = 0) {
        require(size);
        note(kind, label, type);
        at += size;
    }

    // A compression pointer ends a name, and is not followed: what it points to is not needed, and
    // it may be a circle. Returns where that pointer is; 0: there is none.
    size_t name(bool may_have_pointer) {
        size_t size = 0;  // of the labels so far; `at` stays until the whole name has been seen
        for (;;) {
            require(size + 1);
            const int length = message[at + size];
            if (length == 0) break;
            if (length >= 0xc0 && may_have_pointer) {
                const size_t pointer = at + size;
                skip(size + 2, "name", Field::NAME);  // The pointer has two octets.
                return pointer;
            }
            size += 1 + size_t(length);
            // More than 63 octets are no label, but a pointer or an unknown kind.
            const bool is_label = length <= 63;
            if (!is_label || size >= longest_name)
                throw Malformed{"a name or record does not parse"};
        }
        skip(size + 1, "name", Field::NAME);  // It ends with an empty label: one octet.
        return 0;
    }

    void note(Field::Kind kind, const char* label, int type = 0) {
        if (fields) fields->push_back({kind, label, at, type});
    }

    size_t at;
    const Bytes& message;

private:
    std::vector<Field>* const fields;
};

static void read_question(Cursor& in, Layout& layout) {
    in.name(false);
    layout.type = in.number("type", Field::TYPE);
    in.number("class", Field::CLASS);
    layout.question_end = in.at;
}

// Reads an OPT record from its UDP size on. Its fields have other meanings than those of other
// records: the class is the UDP size, and the TTL is flags. The record began at `start`.
static void read_opt(Cursor& in, size_t start, int section, Layout& layout) {
    const Malformed malformed{"a malformed OPT"};
    if (layout.opt) throw Malformed{"more than one OPT"};
    const bool owner_is_root = in.at - start == 1 + 2;  // a zero, and the type
    // What is known is set at once: even if the rest is malformed, reply() sees that the client has
    // EDNS.
    layout.opt = start;
    layout.udp_size = size_t(in.number("UDP size"));
    const size_t opt_flags_at = in.at + 2;  // behind the upper bits of the rcode, and the version
    in.skip(4, "TTL", Field::OPT_FLAGS);
    layout.dnssec_ok = get16(in.message, opt_flags_at) & OPT_FLAG_DO;
    const size_t size = size_t(in.number("size"));
    const size_t end = in.at + size;
    layout.opt_end = end;
    if (section != ADDITIONALS) throw Malformed{"an OPT that is not additional"};
    if (!owner_is_root) throw malformed;
    in.require(size);

    while (in.at < end) {  // the options
        if (end - in.at < option_header_size) throw malformed;
        in.number("option", Field::OPTION);
        const size_t option_size = size_t(in.number("size"));
        if (option_size > end - in.at) throw malformed;
        in.skip(option_size, "data", Field::DATA);
    }
}

static void read_record(Cursor& in, int section, Layout& layout) {
    const size_t start = in.at;
    in.name(true);
    const int type = in.number("type", Field::TYPE);
    if (type == TYPE_OPT) {
        read_opt(in, start, section, layout);
    } else {
        in.number("class", Field::CLASS);
        in.skip(4, "TTL");
        const size_t size = size_t(in.number("size"));
        in.skip(size, "data", Field::DATA, type);
    }
    // A message is signed if its last record is a signature. Each record overwrites this.
    layout.is_signed = section == ADDITIONALS && (type == TYPE_TSIG || type == TYPE_SIG);
}

// Where the count of a section's records is.
static size_t count_at(int section) { return questions_at + 2 * size_t(section); }

// One walk over a message serves two purposes, so what -vv shows is what the proxy acts on. A
// message that does not parse has fields up to there, and what is wrong with it as the last one.
static Layout parse_and_note(const Bytes& m, std::vector<Field>* fields) {
    Layout layout;
    Cursor in(m, 0, fields);
    try {
        if (m.size() < header_size) throw Malformed{"shorter than a header"};
        in.number("id");
        in.number("flags", Field::FLAGS);
        const int questions = in.number("questions");
        in.number("answers");
        in.number("authorities");
        in.number("additionals");
        for (int i = 0; i < questions; i++) {
            read_question(in, layout);
            layout.end = in.at;
        }
        for (int section : {ANSWERS, AUTHORITIES, ADDITIONALS}) {
            const int records = get16(m, count_at(section));
            for (int i = 0; i < records; i++) {
                read_record(in, section, layout);
                layout.end = in.at;
            }
        }
        if (in.at < m.size()) in.note(Field::DATA, "the rest");  // No section counts it.
    } catch (const Malformed& fault) {
        layout.fault = fault.what;
        in.note(Field::DATA, fault.what);
    }
    return layout;
}

Layout parse(const Bytes& message) { return parse_and_note(message, nullptr); }

int rcode_of(const Bytes& message) {
    const size_t opt = parse(message).opt;
    const int upper = opt ? message[opt + opt_rcode_at] : 0;
    return upper << 4 | (get16(message, flags_at) & FLAGS_RCODE);
}

// ---- Messages in words, for -vv ----------------------------------------------------------------

// The name at `at`, with the pointers followed. No more than 64 pointers: they may be a circle.
static std::string name_in_words(const Bytes& m, size_t at) {
    std::string name;
    int pointers = 0;
    while (at < m.size() && m[at] != 0) {
        if (m[at] >= 0xc0) {
            if (at + 1 >= m.size() || ++pointers > 64) return name + "?";
            at = size_t(get16(m, at) & 0x3fff);
            continue;
        }
        const size_t end = std::min(at + 1 + m[at], m.size());
        if (name.size() > longest_name) return name + "?";
        if (!name.empty()) name += '.';
        for (size_t i = at + 1; i < end; i++) name += char(m[i]);
        at = end;
    }
    return name.empty() ? "." : name;
}

static std::string flags_in_words(int flags) {
    static const std::pair<Flag, const char*> names[] = {
        {FLAG_QR, "QR "}, {FLAG_AA, "AA "}, {FLAG_TC, "TC "}, {FLAG_RD, "RD "},
        {FLAG_RA, "RA "}, {FLAG_Z, "Z "},   {FLAG_AD, "AD "}, {FLAG_CD, "CD "},
    };
    std::string words = text("opcode %d, ", (flags & FLAGS_OPCODE) >> 11);
    for (const auto& [flag, name] : names)
        if (flags & flag) words += name;
    return words + rcode_name(flags & FLAGS_RCODE);
}

static std::string data_in_words(const Bytes& m, const Field& field, size_t end) {
    char address[INET6_ADDRSTRLEN] = "";
    const size_t size = end - field.begin;
    if (size == 0) return "";
    switch (field.type) {
        case TYPE_A:
            if (size == 4) return inet_ntop(AF_INET, &m[field.begin], address, sizeof address);
            break;
        case TYPE_AAAA:
            if (size == 16) return inet_ntop(AF_INET6, &m[field.begin], address, sizeof address);
            break;
        case TYPE_NS:
        case TYPE_CNAME:
        case TYPE_PTR:
            return name_in_words(m, field.begin);
    }
    // Some data is text. What cannot be printed is replaced by annotate().
    return std::string(m.begin() + long(field.begin), m.begin() + long(end));
}

static std::string opt_flags_in_words(unsigned long number) {
    const unsigned long version = (number >> 16) & 0xff;
    std::string words = "version " + std::to_string(version);
    if (number & OPT_FLAG_DO) words += " DO";
    return words;
}

// What a field says. It ends at `end`.
static std::string meaning_of(const Bytes& m, const Field& field, size_t end) {
    unsigned long number = 0;
    for (size_t i = field.begin; i < end && i < field.begin + 4; i++) number = number << 8 | m[i];
    switch (field.kind) {
        case Field::NUMBER:
            return std::to_string(number);
        case Field::FLAGS:
            return flags_in_words(int(number));
        case Field::NAME:
            return name_in_words(m, field.begin);
        case Field::TYPE:
            return type_name(int(number));
        case Field::CLASS:
            return class_name(int(number));
        case Field::OPT_FLAGS:
            return opt_flags_in_words(number);
        case Field::OPTION:
            return option_name(int(number));
        case Field::DATA:
            return data_in_words(m, field, end);
    }
    return "";
}

// Whether a field has many octets that are all the same, as padding has.
static bool is_monotonous(const Bytes& m, size_t begin, size_t end) {
    if (end - begin <= 16) return false;
    const auto is_first = [&](uint8_t octet) { return octet == m[begin]; };
    return std::all_of(m.begin() + long(begin), m.begin() + long(end), is_first);
}

// The octets of a field in hexadecimal; many of the same as "00 * 84".
static std::string in_hex(const Bytes& m, size_t begin, size_t end) {
    if (is_monotonous(m, begin, end)) return text(" %02x * %zu", m[begin], end - begin);
    std::string hex;
    for (size_t i = begin; i < end; i++) hex += text(" %02x", m[i]);
    return hex;
}

std::string annotate(const Bytes& m) {
    std::vector<Field> fields;
    parse_and_note(m, &fields);
    std::string lines;
    for (size_t i = 0; i < fields.size(); i++) {
        const Field& field = fields[i];
        const size_t end = i + 1 < fields.size() ? fields[i + 1].begin : m.size();
        const std::string hex = in_hex(m, field.begin, end);
        std::string meaning = meaning_of(m, field, end);
        // Padding would be many dots: "00 * 84" stands in both columns instead.
        if (field.kind == Field::DATA && is_monotonous(m, field.begin, end)) meaning = hex;
        for (char& c : meaning)
            if (c < ' ' || c > '~') c = '.';  // Nothing that a terminal would obey.
        // Two columns of at least 12 and 28 characters come before the octets. At most 800
        // characters of the meaning are printed, as text() has room for 1,023 in all.
        lines += text("\n        %-12s %-28.800s", field.label, meaning.c_str()) + hex;
    }
    return lines;
}

// ---- Steps [2], [3], [7] and [8] ---------------------------------------------------------------

static std::atomic<unsigned> queries_so_far{0};

Query::Query(Bytes from, bool tcp)
    : octets(std::move(from)),
      tcp(tcp),
      layout(parse(octets)),
      taken(Clock::now()),
      deadline(taken + milliseconds(settings.timeout)),
      number(++queries_so_far) {}

void Query::tell(int step, const std::string& what, const Bytes& message) const {
    if (settings.verbose == 0) return;
    const std::chrono::duration<double, std::milli> since = Clock::now() - taken;
    std::string line = text("#%u [%d] %7.1f ms  ", number, step, since.count()) + what;
    if (settings.verbose >= 2 && !message.empty()) {
        const size_t size = message.size();
        // Over TLS, and to and from a TCP client, a message has its length before it.
        if (tcp || step == 5 || step == 6)
            // This is as wide as both columns of annotate() with a space behind each.
            line += text("\n        %-42s%02zx %02zx", "length", size >> 8, size & 0xff);
        line += annotate(message);
    }
    say(line);
}

static bool equals_without_case(uint8_t a, uint8_t b) { return tolower(a) == tolower(b); }

// Whether the question's name is resolver.arpa, or ends in it.
static bool asks_for_resolver_arpa(const Query& query) {
    static const Bytes wanted{8, 'r', 'e', 's', 'o', 'l', 'v', 'e', 'r', 4, 'a', 'r', 'p', 'a', 0};
    const Bytes& q = query.octets;
    if (query.layout.question_end < header_size + wanted.size() + 4) return false;
    const size_t name_end = query.layout.question_end - 4;  // Type and class follow.
    size_t at = header_size;
    // From label to label, until as many octets are left as are wanted.
    while (at + wanted.size() < name_end) at += 1 + q[at];
    if (at + wanted.size() != name_end) return false;
    return std::equal(wanted.begin(), wanted.end(), &q[at], equals_without_case);
}

static int opcode_of(const Bytes& m) { return (get16(m, flags_at) & FLAGS_OPCODE) >> 11; }

Verdict judge(const Query& query) {  // [2]
    const Bytes& q = query.octets;
    const int type = query.layout.type;
    if (q.size() < header_size) return {Action::ignore, NOERROR, "shorter than a header"};
    const int opcode = opcode_of(q);
    // To answer an answer could make a loop of two proxies.
    if (get16(q, flags_at) & FLAG_QR) return {Action::ignore, NOERROR, "an answer, not a query"};
    // RFC 8490 9.4: a connection for each query cannot carry a session.
    if (opcode == OPCODE_DSO)
        return {Action::answer, NOTIMP, "DNS stateful operations are not proxied"};
    if (query.layout.fault) return {Action::answer, FORMERR, query.layout.fault};
    // So that a datagram with a forged address cannot occupy much memory.
    if (!query.tcp && q.size() > longest_udp_query)
        return {Action::truncate, NOERROR, "too long for UDP: it may come over TCP"};
    if (opcode != OPCODE_QUERY) return {Action::forward, NOERROR, "to be forwarded"};

    if (get16(q, questions_at) > 1)  // RFC 9619 4
        return {Action::answer, FORMERR, "more than one question"};
    if (type == TYPE_AXFR || type == TYPE_IXFR)
        return {Action::answer, NOTIMP, "AXFR and IXFR are not proxied"};
    // RFC 9462 6.1: clients ask there for an encrypted resolver, and would go around the proxy.
    if (asks_for_resolver_arpa(query))
        return {Action::answer, NOERROR, "resolver.arpa has no records here"};
    return {Action::forward, NOERROR, "to be forwarded"};
}

// The options of the OPT record, as they are written, except those with these codes.
static Bytes options_without(const Bytes& m, const Layout& layout,
                             std::initializer_list<int> codes) {
    Bytes kept;
    if (!layout.opt) return kept;
    size_t at = layout.opt + opt_header_size;
    while (at < layout.opt_end) {
        const size_t end = at + option_header_size + size_t(get16(m, at + 2));
        const bool is_unwanted = std::ranges::find(codes, get16(m, at)) != codes.end();
        if (!is_unwanted) kept.insert(kept.end(), m.begin() + long(at), m.begin() + long(end));
        at = end;
    }
    return kept;
}

static void append_option(Bytes& options, int code, const Bytes& data) {
    append16(options, size_t(code));
    append16(options, data.size());
    append(options, data);
}

// Where the compression pointers in a record's data are: from `begin` to `end`.
static void find_pointers_in_data(const Bytes& m, size_t begin, size_t end, int type,
                                  std::vector<size_t>& pointers) {
    const TypeRow* row = find_type(type);
    if (!row || begin + row->names_at > end) return;
    Cursor in(m, begin + row->names_at);
    try {
        for (int i = 0; i < row->names; i++) {
            const size_t pointer = in.name(true);
            if (in.at > end) return;
            if (pointer) pointers.push_back(pointer);
        }
    } catch (const Malformed&) {
        // What is no name has no pointer.
    }
}

// Where the compression pointers of a message are: in the names of its records, and in their data.
// parse() has read the same octets, so nothing is malformed here.
static std::vector<size_t> find_pointers(const Bytes& m, const Layout& layout) {
    std::vector<size_t> pointers;
    Cursor in(m, layout.question_end);
    while (in.at < layout.end) {
        const size_t pointer = in.name(true);
        if (pointer) pointers.push_back(pointer);
        const int type = in.number("type");
        in.skip(6, "class and TTL");
        const size_t size = size_t(in.number("size"));
        find_pointers_in_data(m, in.at, in.at + size, type, pointers);
        in.skip(size, "data");
    }
    return pointers;
}

// Puts another record, or nothing, in the place of the OPT record. What comes behind it moves, and
// pointers to there must move with it. Returns nullopt if one cannot.
static std::optional<Bytes> replace_opt(Bytes m, const Layout& layout, const Bytes& record) {
    constexpr size_t pointer_bits = 0x3fff;  // where it points, in 14 bits
    const size_t new_end = layout.opt + record.size();
    std::vector<size_t> pointers;
    // If nothing comes behind it, nothing moves. Nor does a pointer lead into it: all lead back.
    if (layout.opt_end < m.size()) pointers = find_pointers(m, layout);
    // The pointers are changed in their old places, and move afterwards with all the rest.
    for (size_t pointer : pointers) {
        const size_t target = size_t(get16(m, pointer)) & pointer_bits;
        if (target < layout.opt) continue;                 // What comes before stays.
        if (target < layout.opt_end) return std::nullopt;  // It points into the OPT record.
        const size_t new_target = target - layout.opt_end + new_end;
        if (new_target > pointer_bits) return std::nullopt;
        put16(m, pointer, 0xc000 | new_target);
    }
    m.erase(m.begin() + long(layout.opt), m.begin() + long(layout.opt_end));
    m.insert(m.begin() + long(layout.opt), record.begin(), record.end());
    return m;
}

static Bytes own_opt(bool dnssec_ok, const Bytes& options, uint8_t extended_rcode = 0) {
    Bytes record{0, 0, TYPE_OPT};
    append16(record, own_udp_size);
    append(record, {extended_rcode, 0});  // the upper bits of the rcode, and the version
    append16(record, dnssec_ok ? OPT_FLAG_DO : 0);
    append16(record, options.size());
    append(record, options);
    return record;
}

static Bytes append_opt(Bytes m, const Bytes& record) {
    append(m, record);
    put16(m, additionals_at, size_t(get16(m, additionals_at)) + 1);
    return m;
}

// Gives the message's OPT record these options.
static std::optional<Bytes> replace_options(const Bytes& m, const Layout& layout,
                                            const Bytes& options) {
    Bytes record(&m[layout.opt], &m[layout.opt] + opt_header_size);
    put16(record, opt_data_size_at, options.size());
    append(record, options);
    return replace_opt(m, layout, record);
}

Bytes pad(const Query& query) {  // [3]
    const Bytes& q = query.octets;
    const Layout& layout = query.layout;
    // RFC 8945 5.5: what is signed travels as it is. And if octets follow the last record, an OPT
    // record behind them would not be found.
    if (layout.is_signed || layout.end != q.size()) return q;

    // The size without padding: the query, its OPT record written anew, an empty padding option.
    Bytes options = options_without(q, layout, {OPTION_PADDING});  // without the client's own
    size_t size = q.size() - (layout.opt_end - layout.opt);        // Both are 0 if there is none.
    size += opt_header_size + options.size();
    size += option_header_size;
    const size_t padding = (128 - size % 128) % 128;  // RFC 8467 4.1
    if (size + padding > longest_message) return q;
    append_option(options, OPTION_PADDING, Bytes(padding));  // RFC 8467 3: the last one

    // Without EDNS a client wants no signatures, so the proxy's own OPT record has DO=0.
    if (!layout.opt) return append_opt(q, own_opt(false, options));
    return replace_options(q, layout, options).value_or(q);
}

Bytes frame(const Bytes& message) {  // [5]
    Bytes framed;
    framed.reserve(2 + message.size());
    append16(framed, message.size());
    append(framed, message);
    return framed;
}

// Two kinds of answer need not repeat the question: an error, as the server may not have been able
// to read it; and an answer without records, which claims nothing.
static bool needs_no_question(const Bytes& answer, const Layout& layout) {
    if ((get16(answer, flags_at) & FLAGS_RCODE) != NOERROR) return true;
    int records = 0;
    for (int section : {ANSWERS, AUTHORITIES, ADDITIONALS})
        records += get16(answer, count_at(section));
    if (layout.opt) records--;
    return records == 0;
}

bool matches(const Query& query, const Bytes& a, const Layout& layout) {  // [7]
    const Bytes& q = query.octets;
    if (layout.fault) return false;
    const int flags = get16(a, flags_at);
    const int flags_asked = get16(q, flags_at);
    if (get16(a, id_at) != get16(q, id_at)) return false;
    if (!(flags & FLAG_QR)) return false;
    if ((flags & FLAGS_OPCODE) != (flags_asked & FLAGS_OPCODE)) return false;

    const int questions = get16(a, questions_at);
    if (questions == 0 && get16(q, questions_at) != 0) return needs_no_question(a, layout);
    if (questions != get16(q, questions_at)) return false;
    const size_t end = layout.question_end;
    if (end != query.layout.question_end) return false;
    if (questions == 0) return true;

    // The names are compared without case (RFC 1035 2.3.3); the type and class behind them exactly.
    // Lengths of labels are less than 64, so they are no letters.
    const size_t type_at = end - 4;
    const bool is_same_name = std::equal(q.begin() + header_size, q.begin() + long(type_at),
                                         a.begin() + header_size, equals_without_case);
    const bool is_same_type =
        std::equal(q.begin() + long(type_at), q.begin() + long(end), a.begin() + long(type_at));
    return is_same_name && is_same_type;
}

std::optional<Bytes> unpad(const Query& query, const Bytes& answer, const Layout& layout) {  // [7]
    if (layout.is_signed) return answer;  // Any change would break the signature (RFC 8945 5.3).
    Bytes a = answer;
    // The client gets its own spelling of the name, as some clients compare it.
    const size_t question_end = query.layout.question_end;
    if (layout.question_end == question_end)
        std::copy(query.octets.begin() + header_size, query.octets.begin() + long(question_end),
                  a.begin() + header_size);
    if (!layout.opt) return a;
    if (query.layout.opt) {
        const Bytes options = options_without(a, layout, {OPTION_PADDING, OPTION_KEEPALIVE});
        return replace_options(a, layout, options);
    }

    // Without OPT only the lower four bits of an extended rcode are left: that is another rcode.
    if (a[layout.opt + opt_rcode_at] != 0) return std::nullopt;
    put16(a, additionals_at, size_t(get16(a, additionals_at)) - 1);
    return replace_opt(a, layout, {});
}

// Returns the header and question of a message, without records; or the header alone, if there is
// not exactly one question or if that does not parse.
static Bytes head_of(const Bytes& m, const Layout& layout) {
    const bool has_question = get16(m, questions_at) == 1 && layout.question_end > header_size;
    Bytes head(m.begin(), m.begin() + long(has_question ? layout.question_end : header_size));
    put16(head, questions_at, has_question ? 1 : 0);
    for (int section : {ANSWERS, AUTHORITIES, ADDITIONALS}) put16(head, count_at(section), 0);
    return head;
}

Bytes cut(const Query& query, Bytes answer, size_t most_udp) {  // [8]
    if (query.tcp) return answer;
    const size_t limit = std::clamp<size_t>(query.layout.udp_size, 512, most_udp);
    if (answer.size() <= limit) return answer;

    const Layout layout = parse(answer);
    Bytes head = head_of(answer, layout);
    put16(head, flags_at, size_t(get16(head, flags_at) | FLAG_TC));
    if (!query.layout.opt) return head;  // RFC 6891 7: a client with EDNS gets an OPT record
    Bytes options = options_without(answer, layout, {});
    const bool is_too_long = head.size() + opt_header_size + options.size() > limit;
    if (is_too_long) options.clear();  // RFC 8914 3: an error's text may be left out
    const uint8_t extended_rcode = layout.opt ? answer[layout.opt + opt_rcode_at] : 0;
    return append_opt(head, own_opt(query.layout.dnssec_ok, options, extended_rcode));
}

static Bytes reply_with(const Query& query, int flags, const Bytes& options) {
    Bytes message = head_of(query.octets, query.layout);
    const int repeated = get16(query.octets, flags_at) & (FLAGS_OPCODE | FLAG_RD);
    put16(message, flags_at, size_t(FLAG_QR | repeated | flags));
    if (!query.layout.opt) return message;
    return append_opt(message, own_opt(query.layout.dnssec_ok, options));
}

Bytes reply(const Query& query, Rcode rcode, int ede) {  // [8]
    int flags = rcode;
    // SERVFAIL, and NOERROR for resolver.arpa, stand for a resolver's answer. It would have these
    // flags.
    if (rcode == SERVFAIL || rcode == NOERROR)
        flags |= FLAG_RA | (get16(query.octets, flags_at) & FLAG_CD);
    Bytes options;
    if (ede >= 0) {
        Bytes code;
        append16(code, size_t(ede));  // no text: it could tell what is nobody's business
        append_option(options, OPTION_ERROR, code);
    }
    return reply_with(query, flags, options);
}

Bytes truncated_reply(const Query& query) { return reply_with(query, FLAG_TC, {}); }  // [8]

// ---- Streams -----------------------------------------------------------------------------------

// Fills `octets`. Returns false if it cannot.
static bool receive(int fd, Bytes& octets) {
    ssize_t got = 0;
    do {
        got = recv(fd, octets.data(), octets.size(), MSG_WAITALL);
    } while (got < 0 && errno == EINTR);  // The process was stopped, and goes on.
    return got == ssize_t(octets.size());
}

std::optional<Bytes> read_frame(int fd) {  // [1]
    Bytes length(2);
    if (!receive(fd, length)) return std::nullopt;
    Bytes message(size_t(get16(length, 0)));
    if (message.empty()) return std::nullopt;
    if (!receive(fd, message)) return std::nullopt;
    return message;
}

// ---- Who may ask, and how much -----------------------------------------------------------------

bool may_ask(const Address& client) {
    const std::string bits = client.bits();
    const auto has_client = [&](const std::string& network) { return bits.starts_with(network); };
    return std::ranges::any_of(settings.allow, has_client) &&
           std::ranges::none_of(settings.deny, has_client);
}

std::string host_of(const Address& client) {
    return client.bits().substr(0, 1 + 64);  // An IPv4 address has only 32 bits: all of them.
}

// With --rate 10 a host has a bucket of ten queries, which is refilled by one each 100 ms. All that
// is kept is the time when the bucket will be full again. Each query moves it on by 100 ms, since
// that is how long it takes to refill. When the time is a second away, the bucket is empty: after
// ten queries at once the eleventh is refused.
bool over_rate(const Address& client, bool tcp) {
    static std::mutex mutex;  // guards `full_at`
    static std::map<std::string, Time> full_at;
    if (settings.rate == 0) return false;
    const std::string host = host_of(client) + (tcp ? " tcp" : " udp");
    const Duration one_query = std::chrono::nanoseconds(1000000000 / settings.rate);
    const Time now = Clock::now();

    Lock lock(mutex);
    // A flood from everywhere must not fill the memory. To forget all hosts locks nobody out.
    if (full_at.size() == 16384) full_at.clear();
    Time& full = full_at[host];
    const Time full_after_this = std::max(full, now) + one_query;
    if (full_after_this > now + seconds(1)) return true;
    full = full_after_this;
    return false;
}

// ---- Threads -----------------------------------------------------------------------------------

bool guard(const std::function<void()>& work) {
    try {
        work();
        return true;
    } catch (const std::exception& e) {
        // Not say(): that needs memory, and memory may be what is missing.
        dprintf(STDOUT_FILENO, "FAILURE thread: %s\n", e.what());
    } catch (...) {
        dprintf(STDOUT_FILENO, "FAILURE thread\n");
    }
    return false;
}

bool detach(const std::function<void()>& work) {
    try {
        std::thread(guard, work).detach();
        return true;
    } catch (const std::exception& e) {
        dprintf(STDOUT_FILENO, "FAILURE thread: %s\n", e.what());
        return false;
    }
}

Permit::~Permit() {
    if (of) of->give_back();
}

std::shared_ptr<Permit> Permits::take() {
    const auto permit = std::make_shared<Permit>();
    Lock lock(mutex);
    if (taken >= most) return nullptr;
    taken++;
    permit->of = this;
    return permit;
}

std::shared_ptr<Permit> Permits::wait(Time until) {
    const auto permit = std::make_shared<Permit>();
    std::unique_lock<std::mutex> lock(mutex);
    const bool is_free = given_back.wait_until(lock, until, [this] { return taken < most; });
    if (!is_free) return nullptr;
    taken++;
    permit->of = this;
    return permit;
}

void Permits::give_back() {
    Lock lock(mutex);
    taken--;
    given_back.notify_one();
}

size_t Permits::in_use() {
    Lock lock(mutex);
    return taken;
}

size_t Permits::get_most() {
    Lock lock(mutex);
    return most;
}

void Permits::set_most(size_t number) {
    Lock lock(mutex);
    // Nobody is woken: this is not called while anybody waits.
    most = number;
}

// ---- Upstreams ---------------------------------------------------------------------------------
// What is known of a resolver's address: whether it is well, its tickets, its ready connections.
// Each class here has a lock of its own. A lock is held for a few instructions, and never across a
// call that can wait or loop: no handshake, no read(2), no close(2), no output.
//
// Where connections or tickets are dropped, they are moved out under the lock and destroyed after
// it: the variable that takes them is declared before the lock.

class Connection;

// How long something usually takes: an average that a few slow ones do not spoil.
class UsualTime {
public:
    // A slower one moves the average by 1/inertia of the difference, a faster one by 1/8.
    explicit UsualTime(int inertia) : inertia(inertia) {}

    void add(Duration took) {
        Lock lock(mutex);
        if (usual == Duration(0)) {
            usual = took;
        } else if (took < usual) {
            usual -= (usual - took) / 8;
        } else {
            // It counts as twice the usual at most.
            const Duration more = std::min(took - usual, usual);
            usual += more / inertia;
        }
    }

    Duration get() {  // 0: not known yet
        Lock lock(mutex);
        return usual;
    }

private:
    const int inertia;
    std::mutex mutex;  // guards what follows
    Duration usual{};
};

using Session = std::shared_ptr<SSL_SESSION>;

// Tickets to resume TLS sessions with, which saves the resolver the costly part of a handshake.
class Tickets {
public:
    void keep(Session ticket) {
        Session dropped;
        Lock lock(mutex);
        if (tickets.size() == most) {
            dropped = std::move(tickets.front());
            tickets.pop_front();
        }
        tickets.push_back(std::move(ticket));
    }

    // Returns a ticket for one handshake; nullptr: there is none.
    Session take() {
        Lock lock(mutex);
        if (tickets.empty()) return nullptr;
        Session newest = tickets.back();
        // RFC 8446 C.4: an observer could link two sessions that begin with the same ticket.
        // TLS 1.2 shows its ticket to every observer anyway, and seldom gives a new one.
        if (SSL_SESSION_get_protocol_version(newest.get()) >= TLS1_3_VERSION) tickets.pop_back();
        return newest;
    }

    // After a handshake that failed: the tickets may have been the reason (RFC 5246 7.2.2).
    void forget() {
        std::deque<Session> forgotten;
        Lock lock(mutex);
        forgotten.swap(tickets);
    }

private:
    static constexpr size_t most = 128;
    std::mutex mutex;  // guards what follows
    std::deque<Session> tickets;
};

// Whether an upstream is well. One that is at fault rests: it is asked last. From time to time one
// query tries it all the same, to see whether it is back.
//
// One that is gone shakes hands with nobody: a handshake ends its rests. One that is deaf shakes
// hands and answers nobody: only an answer ends its rests.
//
// What this machine cannot reach, for want of a route for example, is passed over for a second.
// That is nobody's fault, and not counted among its rests.
class Health {
public:
    explicit Health(std::string address) : address(std::move(address)) {}

    // Whether it does not rest. One whose rest is over is taken to be well until it is tried.
    bool is_well() {
        Lock lock(mutex);
        return Clock::now() >= rests_until;
    }

    // Whether connections may be opened ahead for it. For one that answers nobody they would be of
    // no use: only a query can find out that it is back.
    bool may_be_warmed() {
        Lock lock(mutex);
        return Clock::now() >= rests_until && !is_deaf;
    }

    // Called before a query asks it, or a connection is opened ahead. Returns false if it must not
    // be asked now:
    // - It does not rest, and was at no fault: it may be asked.
    // - Its rest is over: one query may try it. Its next rest begins at once, so that others do not
    //   try it too. If that goes well, recover() ends this rest.
    // - It rests, and another upstream is well: that one is asked.
    // - It rests, and no upstream is well: one query in 100 ms may try it. If it is deaf all may:
    //   perhaps it only takes long for some names, and others must not wait for those.
    bool claim(bool is_anybody_well) {
        Lock lock(mutex);
        const Time now = Clock::now();
        const bool is_resting = now < rests_until;
        if (!is_resting && rests_in_a_row == 0) return true;
        if (!is_resting) {
            begin_rest(now);
            return true;
        }
        if (is_anybody_well) return false;
        if (!is_deaf && now < asked_at + milliseconds(100)) return false;
        asked_at = now;
        return true;
    }

    // It has proved who it is.
    void verified() {
        bool is_back = false;
        {
            Lock lock(mutex);
            last_handshake = Clock::now();
            if (!is_deaf) is_back = recover();
        }
        if (is_back) say("UPSTREAM " + address + " answers again");
    }

    // It has answered a query.
    void answered() {
        bool is_back = false;
        {
            Lock lock(mutex);
            last_answer = Clock::now();
            lates = 0;
            is_back = recover();
        }
        if (is_back) say("UPSTREAM " + address + " answers again");
    }

    // It could not be reached, or could not prove who it is, or answers nobody.
    void at_fault(const std::string& why) {
        bool is_news = false;
        {
            Lock lock(mutex);
            is_news = note_fault();
        }
        if (is_news) tell_fault(why);
    }

    // A try that began at that time is late. The name may be the reason, so one late try is no
    // fault.
    void late(Time begun) {
        Lock lock(mutex);
        if (last_answer >= begun) return;  // It has answered others meanwhile.
        if (lates == 0) first_late = begun;
        lates++;
    }

    // Time is evidence too, so these two are called now and then while a try is late. They find a
    // fault only if three tries are late, as one or two may be late because of their names.

    // It is gone if no handshake has succeeded for `longest`, counted from when the first of these
    // tries began. This is called while a handshake is going on. Returns whether it is gone.
    bool judge_handshakes(Duration longest, const std::string& why) {
        bool is_news = false;
        {
            Lock lock(mutex);
            const Time silent_since = std::max(first_late, last_handshake);
            if (lates < 3 || Clock::now() < silent_since + longest) return false;
            is_deaf = false;  // The next handshake will tell that it is back.
            is_news = note_fault();
        }
        if (is_news) tell_fault(why);
        return true;
    }

    // It is deaf if nobody has had an answer for `longest`, counted in the same way. Perhaps it
    // still shakes hands.
    void judge_answers(Duration longest, const std::string& why) {
        bool is_news = false;
        {
            Lock lock(mutex);
            if (lates < 3 || Clock::now() < first_late + longest) return;
            is_deaf = true;
            is_news = note_fault();
        }
        if (is_news) tell_fault(why);
    }

    // It cannot be asked for a reason on this machine, such as a missing route.
    void pass_over(const std::string& why) {
        bool is_first = false;
        {
            Lock lock(mutex);
            rests_until = std::max(rests_until, Clock::now() + seconds(1));
            is_first = !is_out_of_reach;
            is_out_of_reach = true;
        }
        if (is_first) say("LOCAL " + address + " cannot be asked from this machine: " + why);
    }

private:
    // begin_rest(), note_fault() and recover() are called under the lock; tell_fault() is called
    // without it, as say() can wait.

    // RFC 9520 3.2: a failure is remembered for a second at least, and for five minutes at most.
    void begin_rest(Time now) {
        const seconds rest(1 << std::min(rests_in_a_row, 9));
        rests_until = now + std::min(rest, seconds(300));
        asked_at = now;
        rests_in_a_row++;
    }

    // Returns whether this is news. It is not if it was at fault before.
    bool note_fault() {
        const Time now = Clock::now();
        const bool rests_for_a_fault = rests_in_a_row > 0 && now < rests_until;
        if (rests_for_a_fault) return false;
        begin_rest(now);
        return rests_in_a_row == 1;
    }

    void tell_fault(const std::string& why) {
        say("UPSTREAM " + address + " " + why + ": asked last until it answers");
    }

    // Returns whether it was at fault before.
    bool recover() {
        const bool was_at_fault = rests_in_a_row > 0;
        // After a fault the count starts anew. Without one this may be only a handshake, which is
        // no answer, and late tries still count.
        if (was_at_fault) lates = 0;
        rests_in_a_row = 0;
        is_deaf = false;
        is_out_of_reach = false;
        rests_until = {};
        return was_at_fault;
    }

    const std::string address;
    std::mutex mutex;  // guards what follows
    int rests_in_a_row = 0;
    Time rests_until{};  // in the past: it is well
    Time asked_at{};     // when it was asked last although it is at fault
    int lates = 0;       // tries that were late, since it answered last
    Time first_late{};   // when the first of these tries began
    Time last_handshake{};
    bool is_deaf = false;  // it shakes hands and answers nobody, so only an answer ends its rest
    bool is_out_of_reach = false;  // It could not be asked, for a reason on this machine.
    Time last_answer{};
};

// The ready connections of an upstream, oldest first, and used in this order. After a handshake the
// resolver sends tickets, and may hold back (Nagle's algorithm) what follows until they are
// acknowledged. With an old connection that is over.
//
// The stock is as large as the resolver likes. What it likes shows in how long a handshake takes:
// if that grows to three times the best, the resolver is overloaded, and the stock is halved. It
// grows again as its connections are used.
class Stock {
public:
    explicit Stock(size_t most) : most(most), places(most) {}

    // A place for a connection that will be opened; nullptr: there is no room.
    std::shared_ptr<Permit> reserve() { return places.take(); }

    void park(std::shared_ptr<Connection> connection);
    std::shared_ptr<Connection> take_oldest();  // that is alive; nullptr: there is none
    void drop_dead();
    void drop_older_than(Time time);

    size_t size() { return places.in_use(); }  // with those that are being opened

    // Whether fewer connections are parked than are being opened. Then queries take them faster
    // than they can be opened.
    bool is_low() {
        Lock lock(mutex);
        // Both kinds have a place.
        const size_t being_opened = places.in_use() - parked.size();
        return parked.size() < being_opened;
    }

    bool may_dial() {
        Lock lock(mutex);
        return Clock::now() >= no_dial_before;
    }

    bool was_used_since(Time time) {
        Lock lock(mutex);
        return last_use >= time;
    }

    // A ready connection has brought an answer. After as many such answers as there are places, the
    // stock gets one place more.
    void used() {
        Lock lock(mutex);
        last_use = Clock::now();
        no_dial_before = {};
        deaths = 0;
        uses++;
        const size_t room = places.get_most();
        if (uses < room || room >= most || Clock::now() < no_growth_before) return;
        uses = 0;
        places.set_most(room + 1);
    }

    // A handshake took so long.
    void dialled(Duration took) {
        usual_dial.add(took);
        const Duration usual = usual_dial.get();
        Lock lock(mutex);
        // The best fades slowly, so that after a change of routes another can be the best.
        best_dial = std::min(took, best_dial + best_dial / 256);
        if (usual >= 3 * best_dial + milliseconds(5)) halve_once_in(usual);
    }

    // The resolver has refused a connection while it served others, or this machine has no room.
    void shrink() {
        const Duration usual = usual_dial.get();
        Lock lock(mutex);
        halve_once_in(usual);
    }

    // A ready connection was closed at that age, before it was used. If that is soon, the resolver
    // does not want so many: the stock is halved and does not grow for a while. And perhaps it
    // wants none: the next one waits for a second, then two, at most a minute.
    void died(Duration age) {
        Lock lock(mutex);
        if (age >= seconds(5)) return;
        halve_once_in(seconds(1));
        no_growth_before = Clock::now() + seconds(10);
        const seconds pause(1 << std::min(deaths, 6));
        no_dial_before = Clock::now() + std::min(pause, seconds(60));
        deaths++;
    }

private:
    // Halves the stock, but only once in that time: until then the effect does not show. With
    // --reuse each connection that is kept saves a handshake, so fewer would be no relief.
    void halve_once_in(Duration time) {
        if (settings.reuse) return;
        const Time now = Clock::now();
        if (now < halved_at + time) return;
        halved_at = now;
        // Half of the connections, not of the places: many places may be empty, and to halve their
        // number is no relief.
        const size_t half = std::min(places.get_most(), places.in_use()) / 2;
        const size_t least = most > 0 ? 1 : 0;
        places.set_most(std::max(half, least));
    }

    std::deque<std::shared_ptr<Connection>>::iterator find_after(Time time);
    std::shared_ptr<Connection> pop_oldest(Time after = Time::min());
    bool is_fit(Connection& connection);

    const size_t most;
    UsualTime usual_dial{8};
    std::mutex mutex;                                // guards what follows
    std::deque<std::shared_ptr<Connection>> parked;  // the oldest first
    Permits places;                                  // for those that are parked or being opened
    size_t uses = 0;                                 // since there was a place more
    int deaths = 0;                                  // soon and unused, one after the other
    Duration best_dial = seconds(10);
    Time last_use{};
    Time halved_at{};
    Time no_dial_before{};
    Time no_growth_before{};
};

struct Upstream : Peer {
    Upstream(const Peer& peer, size_t number)
        : Peer(peer), number(number), health(address.str()), stock(size_t(settings.ready)) {}

    const size_t number;  // its place in the user's order
    Health health;
    Tickets tickets;
    Stock stock;
    UsualTime usual_answer{64};  // from a query that was sent to its answer
    // Two counters that go down by themselves; there is no limit.
    Permits open{SIZE_MAX};     // verified connections
    Permits dials{SIZE_MAX};    // those that are going on
    std::atomic<int> group{0};  // of the last key exchange, as an OpenSSL NID; 0: none yet
};

// Set once, by prepare(), before the first thread starts.
static std::vector<std::unique_ptr<Upstream>> upstreams;
static SSL_CTX* tls;

// ---- A transaction -----------------------------------------------------------------------------

// How a try to ask an upstream came to nothing. Thrown by a connection; caught by carry(), and by
// open_ahead().
struct Failure {
    enum Cause {
        OVERTAKEN,  // there is an answer, or three later tries go on: see is_overtaken()
        LOCAL,      // something on this machine, such as no route or too many open files
        TIMEOUT,    // the deadline
        CLOSED,     // the other end refused, reset or closed the connection
        FAULT,      // the other end could not prove who it is, or broke a protocol
    };
    enum Stage { NOWHERE, STARTED, CONNECTED, VERIFIED, ASKED };  // how far the try had got
    Cause cause;
    Stage stage;
    std::string why;
};

static std::atomic<bool> somebody_answered{false};  // since the program began

// Whether a query may be sent twice. One that only asks may. An UPDATE changes something, and so
// does a query of type TKEY: it makes a key (RFC 2930).
static bool may_be_repeated(const Query& query) {
    return opcode_of(query.octets) == OPCODE_QUERY && query.layout.type != TYPE_TKEY;
}

// A query and its answer. The threads that carry it share it, and nobody else holds it. The first
// good answer is the client's; if the last thread lets go and there was none, the client gets
// SERVFAIL. So every query that was taken has one answer, whatever happens.
class Transaction : public std::enable_shared_from_this<Transaction> {
    // How one upstream was tried for this query.
    struct Tries {
        int asked = 0;    // how often it was asked, as note_failure() counts it
        int ready = 0;    // how many ready connections were used
        int closed = 0;   // how many connections were closed, perhaps because of this query
        int staying = 0;  // the number of the try that is_overtaken() spares; 0: there is none
        bool may_use_ticket = true;
        Time not_before{};                  // when it may be asked again
        Duration pause = milliseconds(50);  // after the next failure
    };
    static constexpr int most_ready = 2;

public:
    Transaction(std::shared_ptr<const Query> asked, std::function<void(const Outcome&)> finish)
        : query_owner(std::move(asked)),
          query(*query_owner),
          is_repeatable(may_be_repeated(query)),
          finish(std::move(finish)),
          tries(upstreams.size()) {}

    ~Transaction() {
        guard([this] { fail(); });
    }

    // [8] Returns false if there was an answer before.
    bool answer(Outcome outcome) {
        if (was_answered.exchange(true)) return false;
        try {
            outcome.answer = cut(query, std::move(outcome.answer), size_t(settings.max_udp));
            finish(outcome);
        } catch (...) {
            was_answered = false;  // Nothing was sent. If no other try does better, fail() will.
            throw;
        }
        finish = nullptr;  // Lets go of the client's socket, so that it can be closed now.
        return true;
    }

    // [3] The query, padded. The threads that carry it share one copy.
    const Bytes& padded_query() {
        std::call_once(is_padded, [this] { message = pad(query); });
        return message;
    }

    // A try begins. Returns its number: the first one is 1.
    int begin_try() {
        Lock lock(mutex);
        tries_begun++;
        going_on.insert(tries_begun);
        return tries_begun;
    }

    // A try is over, and has brought no answer.
    void end_try(const Upstream& upstream, int number) {
        Lock lock(mutex);
        int& staying = tries[upstream.number].staying;
        if (staying == number) staying = 0;
        going_on.erase(number);
    }

    // Whether a try need not go on: there is an answer, or three later tries are going on. That
    // bounds how many go on at a time. But at each upstream the first try that has asked over a new
    // connection stays: a later one would have its answer later.
    bool is_overtaken(const Upstream& upstream, int number) {
        if (was_answered) return true;
        Lock lock(mutex);
        const bool stays = tries[upstream.number].staying == number;
        const auto later_ones = std::distance(going_on.upper_bound(number), going_on.end());
        return !stays && later_ones >= 3;
    }

    // A try has asked an upstream over a new connection.
    void asks_over_new_connection(const Upstream& upstream, int number) {
        Lock lock(mutex);
        int& staying = tries[upstream.number].staying;
        if (staying == 0) staying = number;
    }

    // Which upstream to ask next; nullptr: none. Each may be asked three times for one query (RFC
    // 9520 3.1), and none a second time before every other that is well was asked. After a failure
    // an upstream is left alone for 50 ms, then 100 and so on. Waits if somebody may be asked
    // later.
    Upstream* next_upstream() {
        for (;;) {
            if (was_answered || Clock::now() >= query.deadline) return nullptr;
            Upstream* const chosen = choose();
            if (chosen || !has_anybody_left()) return chosen;
            std::this_thread::sleep_for(milliseconds(20));
        }
    }

    bool has_anybody_left() {
        Lock lock(mutex);
        return std::ranges::any_of(upstreams, [&](auto& one) { return may_be_asked(*one); });
    }

    // Two tries may take a ready connection: the second one cures a lost packet. Otherwise a new
    // connection is dialled: after two ready ones, as perhaps all are dead; when this upstream has
    // closed one upon this query; and for a query that may be sent only once.
    bool may_use_ready(const Upstream& upstream) {
        Lock lock(mutex);
        const Tries& one = tries[upstream.number];
        return is_repeatable && one.closed == 0 && one.ready < most_ready;
    }

    // A handshake is late. Some servers hang on a ticket, so the next one goes without.
    void handshake_hangs(const Upstream& upstream) {
        Lock lock(mutex);
        tries[upstream.number].may_use_ticket = false;
    }

    bool may_use_ticket(const Upstream& upstream) {
        Lock lock(mutex);
        return tries[upstream.number].may_use_ticket;
    }

    void note_ready(const Upstream& upstream) {
        Lock lock(mutex);
        tries[upstream.number].ready++;
    }

    bool has_used_all_ready(const Upstream& upstream) {
        Lock lock(mutex);
        return tries[upstream.number].ready == most_ready;
    }

    void will_be_sent() { was_sent = true; }

    bool was_closed_by(const Upstream& upstream) {
        Lock lock(mutex);
        return tries[upstream.number].closed > 0;
    }

    // A try has failed. `is_try`: it counts as one of three. `is_refusal`: the upstream may have
    // closed the connection because of the query.
    void failed(const Upstream& upstream, const Failure& failure, bool is_try, bool is_refusal) {
        Lock lock(mutex);
        Tries& one = tries[upstream.number];
        if (!is_try) one.asked--;
        if (is_refusal) {
            one.closed++;
            closed_by_all++;
        }
        one.not_before = Clock::now() + one.pause;
        one.pause = std::min<Duration>(2 * one.pause, milliseconds(400));
        // The client's line tells the reason of the try that got furthest.
        if (failure.stage < furthest) return;
        furthest = failure.stage;
        reason = upstream.address.str() + " " + failure.why;
    }

private:
    bool may_be_asked(const Upstream& upstream) const {
        if (was_sent && !is_repeatable) return false;
        // If two connections were closed upon this query, it may be what they refuse to answer.
        // Then one try at each upstream must do. (A try is not counted if the connection was ready
        // and was closed: see note_failure().)
        const int most = closed_by_all >= 2 ? 1 : 3;
        return tries[upstream.number].asked < most;
    }

    // Of the upstreams that are well, the first in the user's order that was asked least; if none
    // is well, of those that rest. One that may not be asked now is left out.
    Upstream* choose() {
        Lock lock(mutex);
        bool is_anybody_well = false;
        for (const auto& upstream : upstreams)
            if (may_be_asked(*upstream) && upstream->health.is_well()) is_anybody_well = true;

        std::vector<Upstream*> candidates;
        for (const auto& upstream : upstreams) {
            const Time not_before = tries[upstream->number].not_before;
            if (!may_be_asked(*upstream) || Clock::now() < not_before) continue;
            if (is_anybody_well && !upstream->health.is_well()) continue;
            candidates.push_back(upstream.get());
        }
        // Those that were asked less often come first. Among equals the user's order stays.
        const auto was_asked_less = [this](const Upstream* one, const Upstream* other) {
            return tries[one->number].asked < tries[other->number].asked;
        };
        std::ranges::stable_sort(candidates, was_asked_less);
        for (Upstream* const one : candidates) {
            const bool may_ask_it = one->health.claim(is_anybody_well);
            if (!may_ask_it) continue;  // Another query is just trying it.
            tries[one->number].asked++;
            return one;
        }
        return nullptr;
    }

    void fail() {
        const Bytes servfail = reply(query, SERVFAIL, EDE_NETWORK_ERROR);
        const bool is_the_answer =
            answer({.answer = servfail, .is_from_resolver = false, .detail = reason});
        if (is_the_answer) give_advice();
    }

    void give_advice() {
        static std::atomic<bool> was_given{false};
        const auto has_port_853 = [](auto& upstream) { return upstream->address.port() == 853; };
        const bool has_none_connected = furthest == Failure::STARTED;
        if (somebody_answered || !has_none_connected) return;
        if (!std::ranges::all_of(upstreams, has_port_853) || was_given.exchange(true)) return;
        say("UPSTREAM nobody can be reached: TCP port 853 may be filtered here; some resolvers "
            "answer on port 443 as well: --upstream ADDR@443#NAME");
    }

    const std::shared_ptr<const Query> query_owner;  // keeps `query` alive

public:
    const Query& query;
    const bool is_repeatable;  // It may be sent twice: an UPDATE, for example, may not.

private:
    std::function<void(const Outcome&)> finish;
    std::once_flag is_padded;
    Bytes message;
    std::atomic<bool> was_answered{false};
    std::atomic<bool> was_sent{false};
    std::mutex mutex;          // guards what follows
    std::vector<Tries> tries;  // one for each upstream
    int tries_begun = 0;
    std::set<int> going_on;  // the numbers of the tries that have begun and are not over
    int closed_by_all = 0;   // how many connections were closed, by all upstreams together
    Failure::Stage furthest = Failure::NOWHERE;
    std::string reason = "nobody could be asked in time";
};

// A try is late. Has another thread carry the transaction to the next upstream as well. Returns
// false if no race is allowed or possible now: then the caller asks again after a while. If the try
// is very late, the race needs no budget.
static bool start_race(Transaction& transaction, Upstream& upstream, bool is_very_late);

// ---- TLS ---------------------------------------------------------------------------------------
// Every setting that decides whom the proxy trusts is in prepare() and in Connection::set_name()
// and set_pins().

// Called by OpenSSL with each new ticket. Returns 0: nothing of the original is kept.
static int on_ticket(SSL* ssl, SSL_SESSION* session) {
    Upstream& upstream = *static_cast<Upstream*>(SSL_get_app_data(ssl));
    const unsigned long lifetime = SSL_SESSION_get_ticket_lifetime_hint(session);
    // RFC 8446 4.6.1: nobody may promise more than a week, and 0 means not to keep it. In TLS 1.2
    // it means that the lifetime is not known. OpenSSL sees when the lifetime is over.
    if (lifetime > 7 * 86400) return 0;
    if (lifetime == 0 && SSL_version(ssl) >= TLS1_3_VERSION) return 0;
    guard([&] {  // No exception may pass through OpenSSL.
        // A copy: the original belongs to a connection, which another thread may be using.
        const Session copy(SSL_SESSION_dup(session), SSL_SESSION_free);
        if (copy) upstream.tickets.keep(copy);
    });
    return 0;
}

static int keylog_file = -1;

static void write_key(const SSL*, const char* line) {
    guard([line] {
        const std::string whole = std::string(line) + "\n";
        const ssize_t written = write(keylog_file, whole.data(), whole.size());
        (void)written;  // It is a help, and must not stop anybody.
    });
}

static void log_keys() {
    keylog_file = open(settings.keylog.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (keylog_file < 0) throw BadOption("--keylog " + settings.keylog + ": " + strerror(errno));
    SSL_CTX_set_keylog_callback(tls, write_key);
    fprintf(stderr, "dot-proxy: warning: whoever can read %s can read every query\n",
            settings.keylog.c_str());
}

// OpenSSL has read the system's file of certificates, and looks into its directory when it needs
// one. So either the file gave some, or the directory is not empty.
static bool has_system_certificates() {
    const STACK_OF(X509_OBJECT)* found = X509_STORE_get0_objects(SSL_CTX_get_cert_store(tls));
    if (sk_X509_OBJECT_num(found) > 0) return true;
    const char* directory = getenv(X509_get_default_cert_dir_env());
    if (!directory) directory = X509_get_default_cert_dir();
    std::error_code error;
    const bool is_empty = std::filesystem::is_empty(directory, error);
    return !is_empty && !error;
}

static void load_certificates() {
    for (const std::string& file : settings.ca) {
        if (access(file.c_str(), R_OK) != 0)
            throw BadOption("--ca " + file + ": " + strerror(errno));
        if (!SSL_CTX_load_verify_file(tls, file.c_str()))
            throw BadOption("--ca " + file + ": there are no certificates in it");
    }
    if (!settings.ca.empty()) return;
    SSL_CTX_set_default_verify_paths(tls);
    if (has_system_certificates()) return;
    fprintf(stderr,
            "dot-proxy: warning: no certificates to trust, so no resolver can be verified; "
            "install ca-certificates, or name a file with --ca\n");
}

void prepare() {
    for (const Peer& peer : settings.upstreams)
        upstreams.push_back(std::make_unique<Upstream>(peer, upstreams.size()));
    tls = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_min_proto_version(tls, TLS1_2_VERSION);  // RFC 9325 3.1.1
    // For TLS 1.2, RFC 9325 4.2: forward secrecy, and authenticated encryption (AEAD).
    SSL_CTX_set_cipher_list(tls, "ECDHE+AESGCM:ECDHE+CHACHA20");
    SSL_CTX_set_options(tls, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    SSL_CTX_set_verify(tls, SSL_VERIFY_PEER, nullptr);
    // Otherwise OpenSSL takes the subject's CN for a name, which RFC 8310 8.1 forbids.
    X509_VERIFY_PARAM_set_hostflags(
        SSL_CTX_get0_param(tls),
        X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    SSL_CTX_set_max_cert_list(tls, 32 * 1024);  // octets
    const uint8_t alpn[] = {3, 'd', 'o', 't'};  // its length, then the name
    SSL_CTX_set_alpn_protos(tls, alpn, sizeof alpn);
    // on_ticket() keeps the sessions, and OpenSSL none.
    SSL_CTX_set_session_cache_mode(tls, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
    SSL_CTX_sess_set_new_cb(tls, on_ticket);
    SSL_CTX_dane_enable(tls);        // OpenSSL's way to compare keys with pins
    SSL_CTX_set_read_ahead(tls, 1);  // one read(2) for a record's header and what is in it
    // A connection that is used once need not keep its buffers while it waits.
    if (!settings.reuse) SSL_CTX_set_mode(tls, SSL_MODE_RELEASE_BUFFERS);
    load_certificates();
    if (!settings.keylog.empty()) log_keys();
}

// [4] to [6] A TCP and TLS connection, used by one thread at a time. Its socket blocks: each
// function returns when it is done, or throws a Failure.
//
// A blocking call must not outlive the deadline, not even if the other end sends an octet now and
// then, or tickets without end. OpenSSL calls on_io() before each read(2) and write(2). There the
// time that is left until `wake_at` becomes the time limit of the socket; if none is left, the call
// fails. persist() then looks at the time, and calls again or throws.
class Connection {
public:
    explicit Connection(Upstream& upstream) : upstream(upstream), ssl(SSL_new(tls), SSL_free) {}

    ~Connection() {
        // RFC 8446 6.1: otherwise the other end could not tell this from an attacker's cut. It must
        // not take long.
        wake_at = Clock::now() + milliseconds(5);
        if (stage >= Failure::VERIFIED && !has_failed) SSL_shutdown(ssl.get());
        ssl.reset();
        if (fd >= 0) close(fd);
    }

    // From now on it works for this transaction. nullptr: for none.
    void work_for(Transaction* whom) {
        transaction = whom;
        if (whom) {
            deadline = whom->query.deadline;
            try_number = whom->begin_try();
        }
        has_raced = false;
        late_at = Time::max();
        // With --reuse it may have asked before.
        if (stage == Failure::ASKED) stage = Failure::VERIFIED;
    }

    void dial() {  // [4]
        const Time begun = Clock::now();
        const auto going_on = upstream.dials.take();  // counts this one until it ends
        count("dialled");
        open_socket();
        set_up_tls();
        if (!transaction || transaction->may_use_ticket(upstream)) offer_ticket();
        begin_step(2.5);  // late after 2.5 usual answers: TCP and TLS take one each
        persist([this] { return connect_socket(); });
        stage = Failure::CONNECTED;
        persist([this] { return has_succeeded(SSL_connect(ssl.get())); });
        // Now OpenSSL has judged the certificate, and the protocol that ALPN chose.
        stage = Failure::VERIFIED;
        open_permit = upstream.open.take();
        // A server that is crowded may close it now. Nothing else can come before a query but
        // tickets.
        if (!is_alive()) throw failure(Failure::CLOSED, "closed the connection at once");
        upstream.health.verified();
        upstream.stock.dialled(Clock::now() - begun);
        const int group = int(SSL_get_negotiated_group(ssl.get()));
        if (group != 0) upstream.group = group;  // A resumed session of TLS 1.2 has none.
        if (SSL_session_reused(ssl.get())) count("resumed");
        opened = Clock::now();
    }

    // Waits for the tickets that follow a handshake. Nothing tells which of them is the last, so
    // this always waits for one and a half times as long as an answer usually takes. Throws a
    // Failure if anything but tickets comes, such as the end.
    void settle() {
        const Duration wait = upstream.usual_answer.get() * 3 / 2;
        const Time until =
            Clock::now() + std::clamp<Duration>(wait, milliseconds(4), milliseconds(300));
        if (!is_quiet(std::min(until, deadline)))
            throw failure(Failure::CLOSED, "closed the connection at once");
    }

    // Whether it can be used: the other end has not closed it, and has sent nothing but tickets.
    // Takes what is there, and does not wait for more.
    bool is_alive() {
        if (is_nothing_there() && !SSL_has_pending(ssl.get())) return true;
        may_wait = false;  // With this on_io() refuses each read(2) that would wait.
        const Time bound = Clock::now() + seconds(1);  // only for tickets without end
        const bool is_good = is_quiet(bound);
        may_wait = true;
        if (!is_good) has_failed = true;
        return is_good;
    }

    // [5] RFC 7858 3.3: the length and the message leave together, in one record.
    void write(const Bytes& framed) {
        // An answer over a new connection may wait behind tickets.
        begin_step(is_ready ? 1.25 : 3);
        stage = Failure::ASKED;
        if (!is_ready) transaction->asks_over_new_connection(upstream, try_number);
        persist(
            [&] { return has_succeeded(SSL_write(ssl.get(), framed.data(), int(framed.size()))); });
    }

    Bytes read_message() {  // [6]
        is_awaiting_answer = true;
        const Bytes length = read_octets(2);
        const Bytes message = read_octets(size_t(get16(length, 0)));
        is_awaiting_answer = false;
        return message;
    }

    std::string how() const {  // "TLSv1.3 resumed ready"
        std::string words = SSL_get_version(ssl.get());
        words += SSL_session_reused(ssl.get()) ? " resumed" : " full";
        words += is_ready ? " ready" : " dialled";
        return words;
    }

    std::string how_verified() const {
        tm end{};
        ASN1_TIME_to_tm(X509_get0_notAfter(SSL_get0_peer_certificate(ssl.get())), &end);
        const char* group = OBJ_nid2sn(int(SSL_get_negotiated_group(ssl.get())));
        return how() + ", " + group + ", " + upstream.name + " verified, good until " +
               text("%d-%02d-%02d", 1900 + end.tm_year, 1 + end.tm_mon, end.tm_mday);
    }

    // Marks the connection as failed. Returns the failure, to be thrown.
    Failure failure(Failure::Cause cause, const std::string& why) {
        has_failed = true;
        open_permit = nullptr;
        tell(stage >= Failure::VERIFIED ? 6 : 4, why);
        // A reason on this machine is told to the client only if no try has got further.
        if (cause == Failure::LOCAL) return {cause, Failure::NOWHERE, why};
        return {cause, stage, why};
    }

    void tell(int step, const std::string& what, const Bytes& message = {}) const {
        if (!transaction || settings.verbose == 0) return;
        transaction->query.tell(step, upstream.address.str() + " " + what, message);
    }

    Upstream& upstream;
    std::shared_ptr<Permit> place;  // in the stock; nullptr: it is not there
    bool is_ready = false;          // It was opened before the query came.
    bool is_used = false;           // It has brought an answer before, with --reuse.
    Time opened{};                  // when it was verified; with --reuse, when it was used last
    Time step_begun{};              // when it began to connect or sent its query
    int try_number = 0;             // of the transaction that it works for

private:
    // The octets that are read in one step, a handshake or an answer: at most as many as four
    // messages, which leaves room for tickets.
    static constexpr size_t most_octets = 4 * longest_message;

    void open_socket() {
        fd = socket(upstream.address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0) throw failure(Failure::LOCAL, strerror(errno));
        set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    }

    void set_up_tls() {
        if (!ssl || !SSL_set_fd(ssl.get(), fd)) throw failure(Failure::LOCAL, "no memory left");
        SSL_set_app_data(ssl.get(), &upstream);  // for on_ticket()
        // OpenSSL uses a socket by way of a BIO. SSL_set_fd() has made one for both directions.
        BIO_set_callback_ex(SSL_get_rbio(ssl.get()), on_io);
        BIO_set_callback_arg(SSL_get_rbio(ssl.get()), reinterpret_cast<char*>(this));
        if (!set_name() || !set_pins()) throw failure(Failure::LOCAL, "no memory left");

        // The group that this server chose last goes first. Otherwise it asks for a second hello,
        // which costs a round trip.
        int groups[] = {NID_X25519, NID_X9_62_prime256v1, NID_secp384r1, NID_secp521r1};
        int* const chosen = std::ranges::find(groups, upstream.group.load());
        if (chosen != std::end(groups)) std::swap(groups[0], *chosen);
        SSL_set1_groups(ssl.get(), groups, std::size(groups));
    }

    void offer_ticket() {
        const Session ticket = upstream.tickets.take();
        if (!ticket) return;
        // A copy: SSL_connect() writes to it, and another thread may use the original.
        const Session copy(SSL_SESSION_dup(ticket.get()), SSL_SESSION_free);
        if (copy) SSL_set_session(ssl.get(), copy.get());
    }

    // [4] Sets the name that must be in the certificate, and in the hello (SNI): `upstream.name`.
    // If it is an IP address, the certificate must have that address, and the hello has no name.
    // Returns false on failure.
    bool set_name() {
        X509_VERIFY_PARAM* param = SSL_get0_param(ssl.get());
        const char* name = upstream.name.c_str();
        // RFC 6066 3: an IP address is not sent as SNI.
        if (is_ip_address(upstream.name)) return X509_VERIFY_PARAM_set1_ip_asc(param, name);
        return X509_VERIFY_PARAM_set1_host(param, name, 0) &&
               SSL_set_tlsext_host_name(ssl.get(), name);
    }

    // RFC 7858 4.2: one of the pins must be the SHA-256 of a key in the verified chain. OpenSSL has
    // this for TLSA records (RFC 6698 2.1), whose three numbers say whose key it is, what is
    // compared and how. Each pin may be the server's key or an authority's. In both cases the
    // certificate must be good in the ordinary way as well.
    bool set_pins() {
        constexpr uint8_t key_of_authority = 0;  // PKIX-TA
        constexpr uint8_t key_of_server = 1;     // PKIX-EE
        constexpr uint8_t public_key = 1;        // the selector: not the whole certificate
        constexpr uint8_t sha_256 = 1;           // the matching type
        if (upstream.pins.empty()) return true;
        // This sets the name to be verified and the SNI as well. For an IP address both are wrong,
        // and are taken back.
        if (SSL_dane_enable(ssl.get(), upstream.name.c_str()) <= 0) return false;
        if (is_ip_address(upstream.name)) {
            X509_VERIFY_PARAM_set1_host(SSL_get0_param(ssl.get()), nullptr, 0);
            SSL_set_tlsext_host_name(ssl.get(), nullptr);
        }
        for (const Bytes& pin : upstream.pins)
            for (uint8_t usage : {key_of_authority, key_of_server})
                if (SSL_dane_tlsa_add(ssl.get(), usage, public_key, sha_256, pin.data(),
                                      pin.size()) <= 0)
                    return false;
        return true;
    }

    // [6] Reads just so many octets, in however many pieces they come. Throws a Failure if it
    // cannot.
    Bytes read_octets(size_t size) {
        Bytes octets(size);
        size_t have = 0;
        while (have < size) {
            int got = 0;
            persist([&] {
                got = SSL_read(ssl.get(), &octets[have], int(size - have));
                return has_succeeded(got);
            });
            have += size_t(got);
        }
        return octets;
    }

    // ---- Time

    // A step begins: it is late if it takes longer than so many times the usual time of an answer.
    // But less than 25 ms is not late: it is more often the scheduler's fault than the network's.
    // And more than 500 ms always is: slow names raise the usual time, and others must not wait for
    // that. It is very late after a quarter of --timeout: see start_race().
    void begin_step(double times) {
        step_begun = Clock::now();
        octets_left = most_octets;
        is_late = false;
        if (!transaction || has_raced) return;
        const Duration usual = upstream.usual_answer.get();
        const auto late = std::chrono::duration_cast<Duration>(usual * times);
        late_at = step_begun + std::clamp<Duration>(late, milliseconds(25), milliseconds(500));
        if (usual == Duration(0)) late_at = step_begun + milliseconds(250);  // RFC 8305 5
        very_late_at = step_begun + std::max<Duration>(late, milliseconds(settings.timeout) / 4);
    }

    // Makes a blocking call again and again until it is done.
    void persist(const std::function<bool()>& is_done) {
        // Four times a second it looks whether it was overtaken.
        for (;;) {
            wake_at = std::min({deadline, late_at, Clock::now() + milliseconds(250)});
            ERR_clear_error();  // Another connection of this thread may have left an error.
            if (is_done()) return;
            if (octets_left == 0) throw failure(Failure::FAULT, "sent more than an answer can be");
            if (transaction && transaction->is_overtaken(upstream, try_number))
                throw failure(Failure::OVERTAKEN, "overtaken by other tries");
            if (Clock::now() >= deadline) throw failure(Failure::TIMEOUT, why_it_is_late());
            if (transaction && Clock::now() >= late_at) be_late();
        }
    }

    // This step is late: has another try begin. If that may not be now, this is called again after
    // 50 ms.
    void be_late() {
        tell_health();
        if (stage == Failure::CONNECTED) transaction->handshake_hangs(upstream);
        const bool is_very_late = Clock::now() >= very_late_at;
        has_raced = start_race(*transaction, upstream, is_very_late);
        late_at = has_raced ? Time::max() : Clock::now() + milliseconds(50);

        if (is_very_late && stage < Failure::VERIFIED) dial_hangs();
    }

    // This dial is very late. Throws a Failure if the query cannot be raced.
    void dial_hangs() {
        // Its ticket may be why it hangs. Then other dials would hang on the other tickets.
        if (stage == Failure::CONNECTED) upstream.tickets.forget();
        // What may be sent only once was not sent yet, so another upstream can be asked instead.
        if (!transaction->is_repeatable) throw failure(Failure::TIMEOUT, why_it_is_late());
    }

    // This step is late: has Health judge whether that is the upstream's fault.
    void tell_health() {
        Health& health = upstream.health;
        if (!is_late) health.late(step_begun);
        is_late = true;

        const Duration usual = upstream.usual_answer.get();
        const Duration longest_answer = std::max<Duration>(3 * usual, milliseconds(500));
        // A handshake is late after 2.5 usual answers. This is twice that.
        const Duration longest_handshake =
            std::clamp<Duration>(5 * usual, milliseconds(100), longest_answer);
        const bool does_anybody_dial = upstream.dials.in_use() > 0;
        bool is_gone = false;
        if (does_anybody_dial)
            is_gone = health.judge_handshakes(longest_handshake, why_it_is_late());
        if (!is_gone) health.judge_answers(longest_answer, why_it_is_late());
    }

    const char* why_it_is_late() const {
        if (stage == Failure::STARTED) return "no TCP connection in time";
        if (stage == Failure::CONNECTED) return "no TLS connection in time";
        return "no answer in time";
    }

    // OpenSSL calls this before each read(2) and write(2), and once more after it: `what` then has
    // BIO_CB_RETURN as well (see BIO_set_callback_ex(3)). After a read(2) `octets` is how many
    // came. If this returns `result`, the call is made, or its result stands. If this returns -1
    // before a call, that is not made; "retry" then says that it would have had to wait.
    static long on_io(BIO* bio, int what, const char*, size_t, int, long, int result,
                      size_t* octets) {
        Connection& own = *reinterpret_cast<Connection*>(BIO_get_callback_arg(bio));
        const bool is_before_read = what == BIO_CB_READ;
        const bool is_before_write = what == BIO_CB_WRITE;
        const bool is_after_read = what == (BIO_CB_READ | BIO_CB_RETURN);
        if (is_before_read && !own.may_read()) {
            BIO_set_retry_read(bio);
            return -1;
        }
        if (is_before_write && !own.set_time_limit()) {
            BIO_set_retry_write(bio);
            return -1;
        }
        if (is_after_read && result > 0) own.octets_left -= std::min(*octets, own.octets_left);
        return result;
    }

    bool may_read() {
        if (octets_left == 0) return false;
        if (!may_wait && is_nothing_there()) return false;
        // The resolver may hold the rest back until what came is acknowledged.
        if (is_awaiting_answer) acknowledge_at_once(fd);
        return set_time_limit();
    }

    // Returns false if no time is left until `wake_at`.
    bool set_time_limit() {
        using std::chrono::microseconds;
        const long left = std::chrono::ceil<microseconds>(wake_at - Clock::now()).count();
        if (left <= 0) return false;
        const timeval limit{left / 1000000, left % 1000000};
        set_option(fd, SOL_SOCKET, SO_RCVTIMEO, limit);
        set_option(fd, SOL_SOCKET, SO_SNDTIMEO, limit);
        return true;
    }

    // ---- Results

    // Returns false if it waited until `wake_at`. SO_SNDTIMEO bounds connect(2) as well: then it
    // fails with EINPROGRESS, and another call waits on.
    bool connect_socket() {
        if (!set_time_limit()) return false;
        const int result = connect(fd, &upstream.address.any, upstream.address.size());
        if (result == 0 || errno == EISCONN) return true;
        switch (errno) {
            case EINPROGRESS:
            case EALREADY:
            case EAGAIN:
            case EINTR:
                return false;
            case EADDRNOTAVAIL:
            case ENETUNREACH:
            case EHOSTUNREACH:
            case ENETDOWN:
            case EACCES:
            case EPERM:
            case ENOBUFS:
            case ENOMEM:
                throw failure(Failure::LOCAL, strerror(errno));
        }
        throw failure(Failure::CLOSED, strerror(errno));
    }

    // Whether an OpenSSL call has done its work, by its result. Returns false if it waited until
    // `wake_at`. Throws a Failure if it failed.
    bool has_succeeded(int result) {
        const int error = errno;
        if (result > 0) return true;
        const int kind = SSL_get_error(ssl.get(), result);
        if (kind == SSL_ERROR_WANT_READ || kind == SSL_ERROR_WANT_WRITE) return false;
        if (stage == Failure::CONNECTED) {
            upstream.tickets.forget();
            tell_whose_certificate_came();
        }
        const Failure::Cause cause = is_end(kind) ? Failure::CLOSED : Failure::FAULT;
        throw failure(cause, why_it_failed(kind, error));
    }

    // Whether an error means that the other end has closed or reset the connection.
    static bool is_end(int kind) {
        if (kind == SSL_ERROR_ZERO_RETURN || kind == SSL_ERROR_SYSCALL) return true;
        return ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING;
    }

    // The most telling reason first.
    std::string why_it_failed(int kind, int error) const {
        long verdict = X509_V_OK;
        if (stage == Failure::CONNECTED) verdict = SSL_get_verify_result(ssl.get());
        const char* tls_reason = ERR_reason_error_string(ERR_peek_error());
        if (verdict == X509_V_ERR_DANE_NO_MATCH) return "certificate has no pinned key";
        if (verdict == X509_V_ERR_HOSTNAME_MISMATCH || verdict == X509_V_ERR_IP_ADDRESS_MISMATCH)
            return "certificate does not match " + upstream.name;
        if (verdict != X509_V_OK)
            return text("certificate: %s", X509_verify_cert_error_string(verdict));
        if (tls_reason) return text("TLS failed: %s", tls_reason);
        if (kind == SSL_ERROR_SYSCALL && error != 0) return strerror(error);
        return "closed the connection";
    }

    void tell_whose_certificate_came() const {
        const STACK_OF(X509)* chain = SSL_get0_verified_chain(ssl.get());
        if (SSL_get_verify_result(ssl.get()) == X509_V_OK || sk_X509_num(chain) <= 0) return;
        char subject[256];  // X509_NAME_oneline() leaves nothing in it that a terminal would obey
        X509_NAME_oneline(X509_get_subject_name(sk_X509_value(chain, 0)), subject, sizeof subject);
        tell(4, text("came: %s", subject));
    }

    bool is_nothing_there() const {
        uint8_t octet;
        return recv(fd, &octet, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN;
    }

    // Whether the other end sends nothing but tickets until then. OpenSSL takes these, and goes on
    // reading until on_io() makes it give up.
    bool is_quiet(Time until) {
        uint8_t octet;
        wake_at = until;
        octets_left = most_octets;
        ERR_clear_error();
        const int result = SSL_peek(ssl.get(), &octet, 1);
        const bool is_waiting = SSL_get_error(ssl.get(), result) == SSL_ERROR_WANT_READ;
        return is_waiting && octets_left > 0;
    }

    Transaction* transaction = nullptr;  // which it works for
    Time deadline = Clock::now() + milliseconds(settings.timeout);
    std::shared_ptr<SSL> ssl;
    int fd = -1;
    Failure::Stage stage = Failure::STARTED;
    bool has_failed = false;
    std::shared_ptr<Permit> open_permit;  // counts it among the upstream's open connections
    bool is_awaiting_answer = false;      // may_read() has what comes acknowledged at once
    bool may_wait = true;                 // until there is something to read
    bool is_late = false;                 // This step is.
    bool has_raced = false;               // Another try was begun, as this one is late.
    Time late_at = Time::max();           // when this step is late
    Time very_late_at = Time::max();      // when it is so late that a race needs no budget
    Time wake_at{};                       // when a call that waits gives up
    size_t octets_left = most_octets;     // that may be read in this step
};

// The first connection that was opened after that time. They are sorted by when they were opened,
// so a binary search finds it.
std::deque<std::shared_ptr<Connection>>::iterator Stock::find_after(Time time) {
    const auto is_older = [time](const auto& one) { return one->opened <= time; };
    return std::ranges::partition_point(parked, is_older);
}

// One that was taken out to be looked at comes back to its place, so the oldest is always the
// first.
void Stock::park(std::shared_ptr<Connection> connection) {
    Lock lock(mutex);
    const auto next = find_after(connection->opened);
    parked.insert(next, std::move(connection));
}

// The oldest of those that were opened after that time.
std::shared_ptr<Connection> Stock::pop_oldest(Time after) {
    Lock lock(mutex);
    const auto found = find_after(after);
    if (found == parked.end()) return nullptr;
    std::shared_ptr<Connection> oldest = std::move(*found);
    parked.erase(found);
    return oldest;
}

std::shared_ptr<Connection> Stock::take_oldest() {
    for (;;) {
        std::shared_ptr<Connection> oldest = pop_oldest();
        if (oldest && !is_fit(*oldest)) continue;
        if (oldest) oldest->place.reset();
        return oldest;
    }
}

// Looks at each of them, the oldest first and one after the other, so that a query which comes
// meanwhile finds the others.
void Stock::drop_dead() {
    Time seen = Time::min();
    for (;;) {
        std::shared_ptr<Connection> oldest = pop_oldest(seen);
        if (!oldest) return;
        seen = oldest->opened;
        if (is_fit(*oldest)) park(std::move(oldest));
    }
}

void Stock::drop_older_than(Time time) {
    std::vector<std::shared_ptr<Connection>> dropped;
    Lock lock(mutex);
    best_dial = seconds(10);  // After a change of networks another one is the best.
    while (!parked.empty() && parked.front()->opened < time) {
        dropped.push_back(std::move(parked.front()));
        parked.pop_front();
    }
}

bool Stock::is_fit(Connection& connection) {
    constexpr Duration longest_idle = seconds(25);  // Most resolvers close idle ones after 30 s.
    const Duration age = Clock::now() - connection.opened;
    if (connection.is_alive()) return age < longest_idle;
    died(age);
    return false;
}

// ---- The whole way -----------------------------------------------------------------------------

static std::atomic<Time> last_query{Time::min()};

// One query in ten may be raced, beyond a burst of twenty, so that a resolver which is slow with
// all its answers is not asked twice as much. A query earns a tenth of a race.
class RaceBudget {
public:
    void earn() {
        Lock lock(mutex);
        tenths = std::min(tenths + 1, burst);
    }

    bool spend() {
        Lock lock(mutex);
        if (tenths < 10) return false;
        tenths -= 10;
        return true;
    }

private:
    static constexpr int burst = 20 * 10;
    std::mutex mutex;  // guards `tenths`
    int tenths = burst;
};
static RaceBudget race_budget;

static void carry(const std::shared_ptr<Transaction>& transaction);

// The race: another thread carries the transaction to the next upstream while this try waits on. If
// this upstream is known to be at fault, that is no race but a failover, and does not spend the
// budget. Nor does a try that is very late: its connection may be dead, and no query is to wait for
// that until its time is over.
static bool start_race(Transaction& transaction, Upstream& upstream, bool is_very_late) {
    if (!transaction.is_repeatable || !transaction.has_anybody_left()) return false;
    const bool is_free = is_very_late || !upstream.health.is_well();
    if (!is_free && !race_budget.spend()) return false;
    count("raced");
    const auto shared = transaction.shared_from_this();
    return detach([shared] { carry(shared); });
}

// What a failure says of the upstream. What goes wrong after it was asked says more of the query's
// name than of the upstream. A TIMEOUT is not here: tell_health() was called while it was late. Nor
// is what is LOCAL, which says nothing of the upstream.
static void learn_from_failure(const Failure& failure, Upstream& upstream) {
    if (failure.cause != Failure::CLOSED && failure.cause != Failure::FAULT) return;
    if (failure.stage == Failure::ASKED) return;
    upstream.stock.drop_dead();  // A resolver that has gone has closed these, too.
    if (failure.cause == Failure::CLOSED && upstream.open.in_use() > 0) {
        upstream.stock.shrink();  // It serves others, and wants no more.
    } else {
        upstream.health.at_fault(failure.why);
    }
}

// Opens a connection ahead of the query that will use it, and parks it in that place of the stock.
static void open_ahead(Upstream& upstream, const std::shared_ptr<Permit>& place) {
    if (!place || !upstream.stock.may_dial()) return;
    const auto connection = std::make_shared<Connection>(upstream);
    try {
        connection->dial();
        connection->settle();
        connection->is_ready = true;
        connection->place = place;
        upstream.stock.park(connection);
    } catch (const Failure& failure) {
        // Too many open files, for example: then it is better to have fewer of these.
        if (failure.cause == Failure::LOCAL) upstream.stock.shrink();
        learn_from_failure(failure, upstream);
        // Here be_late() was not called: there is no transaction.
        if (failure.cause == Failure::TIMEOUT) upstream.health.at_fault(failure.why);
        // It was closed before it could be parked: like one that was closed soon after.
        if (failure.stage == Failure::VERIFIED) upstream.stock.died(Duration(0));
    }
}

static void open_ahead_in_thread(Upstream& upstream, const std::shared_ptr<Permit>& place) {
    detach([&upstream, place] { open_ahead(upstream, place); });
}

// After an answer: the next query is to find a connection ready. If the stock is low, two are
// opened for one that was used, so that it grows.
static void restock(Upstream& upstream) {
    // Let the client run before this thread takes the processor for a handshake.
    std::this_thread::sleep_for(milliseconds(1));
    const auto place = upstream.stock.reserve();  // first: is_low() then counts it as being opened
    if (upstream.stock.is_low()) open_ahead_in_thread(upstream, upstream.stock.reserve());
    open_ahead(upstream, place);
}

// With --reuse: parks a connection that has brought an answer, for the next query.
static void park_again(std::shared_ptr<Connection> connection) {
    Stock& stock = connection->upstream.stock;
    connection->place = stock.reserve();
    if (!connection->place) return;
    connection->is_ready = true;
    connection->is_used = true;
    connection->opened = Clock::now();
    stock.park(std::move(connection));
}

static void learn_from_answer(Transaction& transaction, Upstream& upstream,
                              const Connection& connection) {
    somebody_answered = true;
    upstream.health.answered();
    upstream.usual_answer.add(Clock::now() - connection.step_begun);
    if (connection.is_ready) {
        upstream.stock.used();
    } else if (transaction.has_used_all_ready(upstream) &&
               !upstream.stock.was_used_since(transaction.query.taken)) {
        // Two ready connections failed this query, none has worked since it came, and a new one
        // did: so those that are as old are dead. It is so after a change of networks.
        upstream.stock.drop_older_than(connection.opened);
    }
    // Other upstreams have closed connections upon this query. It was not the reason, as it has
    // been answered now. So each of them counts as late, and after three such queries as deaf.
    for (const auto& other : upstreams) {
        if (other.get() == &upstream || !transaction.was_closed_by(*other)) continue;
        other->health.late(transaction.query.taken);
        other->health.judge_answers(milliseconds(500), "closes upon every query");
    }
}

// A try has failed. Whose fault is it, and does it count as one of three?
//
// What happened                            a try?  a refusal of this query?
// no route, no port, no memory here        no      no
// closed while connecting                  no      no
// closed after the query was sent
//   on a new connection                    yes     yes
//   on a ready one                         no      perhaps, so: yes
//   on one that has answered (--reuse)     no      no
// a fault of the upstream, or the deadline yes     no
static void note_failure(Transaction& transaction, Upstream& upstream, const Failure& failure,
                         const Connection& connection) {
    learn_from_failure(failure, upstream);
    bool is_try = true;
    bool is_refusal = false;
    if (failure.cause == Failure::LOCAL) {
        upstream.health.pass_over(failure.why);
        is_try = false;
    }
    if (failure.cause == Failure::CLOSED) {
        const bool was_asked = failure.stage == Failure::ASKED;
        // A dial that was refused has asked nobody: it is repeated after a pause, until the
        // deadline. A ready connection may have been dead before.
        is_try = was_asked && !connection.is_ready;
        is_refusal = was_asked && !connection.is_used;
    }
    transaction.failed(upstream, failure, is_try, is_refusal);
}

// Takes a query from step [3] to step [8]: asks one upstream after the other until there is an
// answer or nobody is left to ask. This is a thread of its own. If a try is late, start_race()
// starts a second one, which does the same beside this one.
static void carry(const std::shared_ptr<Transaction>& transaction) {
    const Query& query = transaction->query;
    Upstream* upstream = nullptr;
    std::shared_ptr<Connection> connection;
    bool is_answered = false;

    // [3] A query's length would nearly tell its name.
    const Bytes& message = transaction->padded_query();
    query.tell(3, text("%zu -> %zu octets", query.octets.size(), message.size()));

    while (!is_answered) {
        upstream = transaction->next_upstream();
        if (!upstream) break;
        connection = nullptr;
        try {
            // [4] A ready connection saves two round trips.
            if (transaction->may_use_ready(*upstream)) connection = upstream->stock.take_oldest();
            if (connection) {
                transaction->note_ready(*upstream);
                connection->work_for(transaction.get());
                count("ready");
            } else {
                connection = std::make_shared<Connection>(*upstream);
                connection->work_for(transaction.get());
                connection->dial();
                // It has closed one upon this query. Does it close unused ones as well?
                if (transaction->was_closed_by(*upstream)) connection->settle();
            }
            if (settings.verbose) connection->tell(4, connection->how_verified());

            // [5] TCP is a stream: the length tells where the message ends.
            transaction->will_be_sent();
            connection->write(frame(message));
            connection->tell(5, text("2 + %zu octets in one record", message.size()), message);

            // [6] The answer comes in as many pieces as the network likes.
            const Bytes answer = connection->read_message();
            connection->tell(6, text("2 + %zu octets", answer.size()), answer);

            // [7] Only an answer to this question is believed.
            const Layout layout = parse(answer);
            std::optional<Bytes> clean;
            if (matches(query, answer, layout)) clean = unpad(query, answer, layout);
            if (!clean)
                throw connection->failure(Failure::FAULT, "sent what is no answer to this query");
            query.tell(7, text("%zu -> %zu octets", answer.size(), clean->size()));
            learn_from_answer(*transaction, *upstream, *connection);

            // [8] Other threads may carry the same query: the first answer is the client's.
            transaction->answer({.answer = std::move(*clean),
                                 .is_from_resolver = true,
                                 .detail = upstream->name + " " + connection->how()});
            is_answered = true;
        } catch (const Failure& failure) {
            transaction->end_try(*upstream, connection->try_number);
            if (failure.cause == Failure::OVERTAKEN) break;
            note_failure(*transaction, *upstream, failure, *connection);
        }
    }
    // If nobody answered, and this was the last thread to carry the transaction, its destructor
    // answers SERVFAIL.
    if (!is_answered) return;

    // Nobody waits for what follows.
    connection->work_for(nullptr);
    if (settings.reuse) {
        park_again(std::move(connection));
    } else {
        connection = nullptr;  // closes it
        restock(*upstream);
    }
}

void resolve(std::shared_ptr<const Query> query, std::function<void(const Outcome&)> finish) {
    last_query = query->taken;
    race_budget.earn();
    const auto transaction = std::make_shared<Transaction>(std::move(query), std::move(finish));
    // If there is no room for a thread, the transaction ends here, and its destructor answers.
    detach([transaction] { carry(transaction); });
}

// While the program is used, two connections are ready at the first upstream that is well; and at
// the second one as many as at the first, so that it can take over at once.
static void keep_upstreams_warm() {
    constexpr size_t warm_upstreams = 2;
    size_t wanted = 2;
    size_t well = 0;
    for (const auto& upstream : upstreams) {
        if (well == warm_upstreams || !upstream->health.may_be_warmed()) continue;
        well++;
        Stock& stock = upstream->stock;
        const size_t have = stock.size();
        std::shared_ptr<Permit> place;
        if (have < wanted && stock.may_dial()) place = stock.reserve();
        // In a thread of its own: a resolver that says nothing would hold up the others. One that
        // was at fault is tried by one connection at a time.
        constexpr bool is_anybody_well = true;
        if (place && upstream->health.claim(is_anybody_well))
            open_ahead_in_thread(*upstream, place);
        wanted = std::max(wanted, have);  // for the next upstream
    }
}

void keep_warm() {
    for (;;) {
        for (const auto& upstream : upstreams) upstream->stock.drop_dead();
        const bool is_in_use = Clock::now() < last_query.load() + seconds(300);
        if (is_in_use) keep_upstreams_warm();
        std::this_thread::sleep_for(milliseconds(250));
    }
}

// ---- Beyond POSIX ------------------------------------------------------------------------------
// What POSIX.1-2024 does not have. Without it (-DPOSIX_ONLY) the program serves as well: somewhat
// slower, and on a host with several addresses less precisely.

#ifdef POSIX_ONLY

void acknowledge_at_once(int) {}
void report_asked_address(int, bool) {}
void answer_from_asked_address(msghdr& header) { header.msg_controllen = 0; }
void allow_absent_address(int) {}
bool drop_groups() { return true; }
void gain_no_privileges() {}
void save_memory() {}

int next_option(int argc, char** argv, const std::vector<OptionWord>& words) {
    std::string letters = ":";  // getopt(3): a missing value is told by ':'.
    for (const OptionWord& word : words) {
        letters += word.letter;
        if (word.has_value) letters += ':';
    }
    return getopt(argc, argv, letters.c_str());
}

#else

#include <getopt.h>
#include <grp.h>
#include <malloc.h>
#include <sys/prctl.h>

// A resolver may hold an answer back, by Nagle's algorithm, until its tickets or the beginning of
// the answer are acknowledged: that is to be now, and not 40 ms later.
void acknowledge_at_once(int fd) { set_option(fd, IPPROTO_TCP, TCP_QUICKACK, 1); }

void report_asked_address(int fd, bool is_v4) {
    if (is_v4) {
        set_option(fd, IPPROTO_IP, IP_PKTINFO, 1);
    } else {
        set_option(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);
    }
}

void answer_from_asked_address(msghdr& header) {
    for (cmsghdr* part = CMSG_FIRSTHDR(&header); part; part = CMSG_NXTHDR(&header, part)) {
        if (part->cmsg_level == IPPROTO_IP && part->cmsg_type == IP_PKTINFO) {
            // Without an interface the routes decide which one it is.
            reinterpret_cast<in_pktinfo*>(CMSG_DATA(part))->ipi_ifindex = 0;
        } else if (part->cmsg_level == IPPROTO_IPV6 && part->cmsg_type == IPV6_PKTINFO) {
            in6_pktinfo* info = reinterpret_cast<in6_pktinfo*>(CMSG_DATA(part));
            // A link-local address means nothing without its interface.
            if (!IN6_IS_ADDR_LINKLOCAL(&info->ipi6_addr)) info->ipi6_ifindex = 0;
        }
    }
}

void allow_absent_address(int fd) { set_option(fd, IPPROTO_IPV6, IPV6_FREEBIND, 1); }
bool drop_groups() { return setgroups(0, nullptr) == 0; }
void gain_no_privileges() { prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); }

// glibc would keep eight pools of memory for each processor.
void save_memory() { mallopt(M_ARENA_MAX, 2); }

int next_option(int argc, char** argv, const std::vector<OptionWord>& words) {
    std::string letters = ":";  // getopt(3): a missing value is told by ':'.
    std::vector<option> long_words;
    for (const OptionWord& word : words) {
        letters += word.letter;
        if (word.has_value) letters += ':';
        long_words.push_back({word.word, word.has_value, nullptr, word.letter});
    }
    long_words.push_back({});
    return getopt_long(argc, argv, letters.c_str(), long_words.data(), nullptr);
}

#endif

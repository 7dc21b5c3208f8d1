// dot.hpp - every type and every contract of dot-proxy, in the order in which a query meets them.
//
// dot-proxy takes plain DNS over UDP and TCP and asks a resolver over TLS (RFC 7858). A query takes
// eight steps. They have the same numbers here, at the code, in what -v prints and in the README:
//
//     stub resolver              dot-proxy                       resolver
//     +-----------+  UDP/TCP  +---------------------------+  TLS  +-------+
//     | nslookup  | --------> | [1] take the query        |       |       |
//     |           |           | [2] judge it              |       |       |
//     |           |           | [3] pad it                |       |       |
//     |           |           | [4] connect and verify    | ----> | port  |
//     |           |           | [5] frame and send        | ----> |  853  |
//     |           |           | [6] read the frame back   | <---- |       |
//     |           |           | [7] match it, unpad it    |       |       |
//     |           | <-------- | [8] answer, or cut it (TC)|       |       |
//     +-----------+           +---------------------------+       +-------+
//
// What it is not: a cache, a validator, an authoritative server or a client of plain DNS. There is
// no code path that sends a query in the clear, or to a server that is not authenticated.
//
// Reading order: this file; dot.cpp (how a query travels); main.cpp (how the program runs).
// Errors come in three tiers: before the first thread starts, functions throw; while serving, they
// return nullopt, false or a text; what is ignored has its reason on the line.
#pragma once

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using Bytes = std::vector<uint8_t>;
using Clock = std::chrono::steady_clock;  // the wall clock jumps; deadlines must not
using Time = Clock::time_point;
using Ms = std::chrono::duration<double, std::milli>;
using std::chrono::milliseconds, std::chrono::seconds;
using BadOption = std::invalid_argument;  // what the user asked for cannot be done: exit 2

std::string text(const char* format, auto... with) {  // as printf(3), 1023 characters at most
    char line[1024];
    snprintf(line, sizeof line, format, with...);
    return line;
}
// Prints a line on stdout in one write(2), so that the lines of many threads do not mix.
void say(std::string line);
// Adds to one of the totals, which the program prints as a line of name=value; or keeps the `most`.
void count(std::string name, int more = 1, bool most = false);
std::string totals();

// ---- What the user asked for ------------------------------------------------------------------

// An IP address and port.
union Address {
    sockaddr any;
    sockaddr_in v4;
    sockaddr_in6 v6{};
    socklen_t size() const { return is_v4() ? sizeof v4 : sizeof v6; }
    std::string str() const;   // "1.1.1.1@853"
    std::string bits() const;  // "4" or "6" and its bits, "400000001..."; a network's begin so, too
    std::string host() const { return bits().substr(0, 1 + 64); }  // IPv4, or the /64 of IPv6
    bool is_v4() const { return any.sa_family == AF_INET; }
    const uint8_t* octets() const { return (const uint8_t*)&any + (is_v4() ? 4 : 8); }
};
Address parse_address(const std::string& from, int default_port);  // ADDR[@PORT]; throws BadOption
// All of `from` as a number from `least` to `most`; throws BadOption that names `what`.
int parse_number(const std::string& from, int least, int most, const std::string& what);

// The bits with which an address of ADDR[/BITS] begins; throws BadOption.
std::string parse_prefix(const std::string& from);

// One address of a resolver, and who it must prove to be.
struct Peer {
    Address address;
    std::string name;         // must be in the certificate's SAN, RFC 8310 8.1
    std::vector<Bytes> pins;  // if any, the SHA-256 of a key of its chain, RFC 7858 4.2
};
// cloudflare | google | quad9 | ADDR[@PORT]#NAME[,pin-sha256=BASE64]...; throws BadOption.
std::vector<Peer> parse_upstream(const std::string& from);

// Times in milliseconds, sizes in octets.
struct Settings {
    std::vector<Address> listen;
    std::vector<Peer> upstreams;
    // Files of the certificates to trust, none: the system's; prefixes of who may ask, and may not.
    std::vector<std::string> ca, allow, deny;
    int rate = 0, queries = 512, timeout = 4000, ready = 128, max_udp = 1232, verbose = 0;
    bool reuse = false, quiet = false;
    int uid = -1, gid = -1;  // of whom to become; -1: who it is
};
extern Settings settings;  // set before the first thread starts
void prepare();            // from the settings, before all below; throws BadOption

// ---- Messages: pure functions over octets ------------------------------------------------------

enum Rcode : int { NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED };
std::string rcode_name(int rcode), type_name(int type);

constexpr size_t header_size = 12, longest_message = 65535;  // RFC 1035 4.1.1, 4.2.2

struct Option { int code; Bytes data; };  // of an OPT record, RFC 6891 6.1.2

// Where the parts of a message are. Positions count octets from the message's start.
struct Layout {
    const char* fault = nullptr;  // why it does not parse; nullptr: it does
    int type = 0;                 // of the question
    size_t question_end = header_size;
    size_t opt = 0, opt_end = 0;  // the OPT record, even if a faulty one; 0: it has none
    size_t end = header_size;     // of the last record; the message may go on behind it
    std::vector<Option> options;  // of the OPT record
    bool dnssec_ok = false;       // its DO bit
    size_t udp_size = 512;        // the longest UDP answer its sender takes
    bool is_signed = false;       // ends in TSIG (RFC 8945) or SIG(0) (RFC 2931)
    std::vector<std::pair<size_t, const char*>> fields{};  // where each begins, and what it is
};
Layout parse(const Bytes& message);
// A line for each field: what it is, what it says, and its octets. Safe for a terminal.
std::string annotate(const Bytes& message);

// One query on its way. Made in step [1]; owned by the one thread that carries it.
struct Query {
    const Bytes octets;
    const bool tcp;
    const Layout layout = parse(octets);
    const unsigned number = ++numbers;  // tells the lines of concurrent queries apart
    const Time taken = Clock::now(), deadline = taken + milliseconds(settings.timeout);
    inline static std::atomic<unsigned> numbers{0};

    // A line of the story, with -v; and with -vv the message, annotated.
    void tell(int step, const std::string& what, const Bytes& message = {}) const;
};

// [2] What to do with a query: forward it, or answer at once with an rcode, or with TC and nothing
// else, which makes a client come back over TCP; or keep silent.
constexpr int forward = -1, silence = -2, cut_short = -3;
struct Verdict { int rcode; const char* why; };
Verdict judge(const Query& query);

// [3] The query padded to a multiple of 128 octets (RFC 7830, RFC 8467 4.1). A client's own padding
// is resized. Unchanged if it is signed, its octets cannot move, octets follow its last record, or
// it would become too long.
Bytes pad(const Query& query);

// [7] Whether `answer` answers `query`: QR, id, opcode and question (RFC 5452 9.1).
bool matches(const Query& query, const Bytes& answer, const Layout& layout);

// [7] The answer as the client may see it: without padding and keepalive, which are between this
// proxy and the resolver (RFC 7830 6, RFC 7828 3.4), and without OPT if the client sent none
// (RFC 6891 7). nullopt: there is no such form, as of an extended rcode for a client without EDNS.
std::optional<Bytes> unpad(const Query& query, Bytes answer, Layout layout);

// [8] The answer if its client can take it, else its header, question and OPT with TC set. Over UDP
// that is 512 octets, or more if its OPT says so, but not more than `most_udp`, RFC 6891 6.2.5.
// After unpad(), for padding must not make an answer too long.
Bytes cut(const Query& query, Bytes answer, size_t most_udp);

// [8] An answer of the proxy's own. To an EDNS client it has an OPT, and an Extended DNS Error
// (RFC 8914) if `ede` is not negative. QR, opcode, RD, and CD and RA with SERVFAIL, are set.
Bytes reply(const Query& query, int rcode, int ede = -1);

// ---- Streams and framing -----------------------------------------------------------------------

// The message behind its length in two octets, RFC 1035 4.2.2. At most `longest_message` octets.
Bytes frame(Bytes message);
// A whole message from a blocking stream socket. nullopt: closed, cut short, late or of length 0.
std::optional<Bytes> read_frame(int fd);

// A socket's, as setsockopt(2). None is worth more than the service: without one it is slower or
// less precise.
void set_option(int fd, int level, int option, auto value) {
    setsockopt(fd, level, option, &value, sizeof value);
}

// ---- Who may ask, and how much -----------------------------------------------------------------

// Whoever is in one of --allow's prefixes and in none of --deny's.
bool may_ask(const Address& client);
// Whether this query is one too many for its host, with --rate. Over TCP, where addresses are no
// pretence, hosts have a share of their own, so that nobody can spend another's.
bool over_rate(const Address& client, bool tcp);

// ---- The whole way -----------------------------------------------------------------------------

struct Connection;  // over TCP and TLS, to an upstream
struct Outcome {
    Bytes octets;                          // for the client
    std::string detail;                    // how the resolver answered, or why not
    const Connection* winner = nullptr;    // it brought the answer; nullptr: there is none
    std::vector<std::shared_ptr<Connection>> tries{};  // all that were used; for restock()
};
// Steps [3] to [8], by any thread. Calls `slow`, perhaps often, if the resolver is not one that
// answers within 1 ms, or takes more than 5 ms all the same.
Outcome resolve(const Query& query, const std::function<void()>& slow);
void restock(Outcome used);           // after the answer: connections in place of those used
void tend();                          // keeps a small stock of ready connections warm, for ever

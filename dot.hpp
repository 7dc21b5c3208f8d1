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
// What it is not: a cache, a validator, an authoritative server or a client of plain DNS. There is no
// code path that sends a query in the clear and none that sends one to a server not authenticated.
//
// Reading order: this file; dot.cpp (how a query travels); main.cpp (how the program runs).
// Errors come in three tiers: before the first thread starts, functions throw; while serving, they
// return nullopt, false or a text; what is ignored has its reason on the line.
#pragma once

#include <netinet/in.h>
#include <openssl/ssl.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace dot {

using Bytes = std::vector<uint8_t>;
using Clock = std::chrono::steady_clock;  // the wall clock jumps; deadlines must not
using Time = Clock::time_point;

// What the user asked for cannot be done as asked (exit 2).
struct BadOption : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// printf into a string.
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Prints a line on stdout in one write(2), so that the lines of many threads do not mix.
void say(const std::string& line);
double ms(Clock::duration duration);

// ---- Messages: pure functions over octets ------------------------------------------------------

enum Rcode : int { NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED };
std::string rcode_name(int rcode);
std::string type_name(int type);

constexpr size_t header_size = 12;       // RFC 1035 4.1.1
constexpr size_t longest_message = 65535;  // two octets of length, RFC 1035 4.2.2
constexpr size_t padding_block = 128;    // RFC 8467 4.1

// One entry of a section, from its name at `start` over its type at `type_at` to its `end`.
struct Record {
    size_t start, type_at, end;
    int section;  // 0: question, 1: answer, 2: authority, 3: additional
};

// Where the parts of a message are. Positions count octets from the message's start.
struct Layout {
    const char* fault = nullptr;  // why it does not parse; nullptr: it does
    std::vector<Record> records;  // up to the fault, if there is one
    size_t question_end = header_size;
    size_t opt = 0, opt_end = 0;  // the OPT record; 0: it has none
    size_t end = header_size;     // of the last record; the message may go on behind it
    bool edns = false;            // an OPT was seen, even if a faulty one
    bool dnssec_ok = false;       // its DO bit
    size_t udp_size = 512;        // the longest UDP answer its sender takes
    bool is_signed = false;       // ends in TSIG (RFC 8945) or SIG(0) (RFC 2931)
};
Layout parse(const Bytes& message);

// One query on its way. Made in step [1]; owned by the one thread that carries it.
struct Query {
    Bytes octets;
    Layout layout;
    bool tcp = false;
    int verbosity = 0;  // 0: say nothing, 1: the story of the eight steps, 2: the octets too
    unsigned number = 0;  // tells the lines of concurrent queries apart
    Time taken = Clock::now(), deadline = Time::max();

    int type() const;  // of the question; 0: there is none
    // Prints a line of the story.
    void tell(int step, const std::string& what) const;
    void show(const char* title, const Bytes& message) const;  // the octets, if they are wanted
};

// [2] What to do with a query: forward it, or answer `rcode` at once, or keep silent.
struct Verdict {
    enum { Forward, Answer, Silence } action;
    Rcode rcode;
    const char* why;
};
Verdict judge(const Query& query);

// [3] The query padded to a multiple of 128 octets (RFC 7830, RFC 8467 4.1). A client's own padding
// is resized. Unchanged if it is signed or its octets cannot move, or if it would become too long.
Bytes pad(const Query& query);

// [7] Whether `answer` answers `query`: QR, id, opcode and question (RFC 5452 9.1).
bool matches(const Query& query, const Bytes& answer, const Layout& layout);

// [7] The answer as the client may see it: without padding and keepalive, which are between this
// proxy and the resolver (RFC 7830 6, RFC 7828 3.4), and without OPT if the client sent none
// (RFC 6891 7). nullopt: there is no such form, as with an extended rcode for a client without EDNS.
std::optional<Bytes> unpad(const Query& query, Bytes answer, const Layout& layout);

// [8] The answer if it fits `limit` octets, else its header, question and OPT with TC set.
Bytes cut(const Query& query, Bytes answer, size_t limit);
// What a UDP client can take, RFC 6891 6.2.5: at least 512 and at most `most` octets.
size_t udp_limit(const Query& query, size_t most);

// [8] An answer of the proxy's own. To an EDNS client it has an OPT, and an Extended DNS Error
// (RFC 8914) if `ede` is not negative. QR, opcode, RD, and CD and RA with SERVFAIL, are set.
Bytes reply(const Query& query, Rcode rcode, int ede = -1);

// ---- Streams and framing -----------------------------------------------------------------------

// A file descriptor and its only owner.
struct Fd {
    explicit Fd(int number) : number(number) {}
    Fd(const Fd&) = delete;
    ~Fd();
    const int number;
};

// The message behind its length in two octets, RFC 1035 4.2.2. At most `longest_message` octets.
Bytes frame(const Bytes& message);

// A whole message from a stream socket. nullopt: closed, cut short or late.
std::optional<Bytes> read_frame(int fd, Time until);

// An IP address and port.
union Address {
    sockaddr any;
    sockaddr_in v4;
    sockaddr_in6 v6{};
    socklen_t size() const { return any.sa_family == AF_INET ? sizeof v4 : sizeof v6; }
    std::string str() const;  // "1.1.1.1@853"
};
// ADDR[@PORT]; throws BadOption.
Address parse_address(const std::string& from, int default_port);
// All of `from` as a number from `least` to `most`; throws BadOption that names `what`.
int parse_number(const std::string& from, int least, int most, const std::string& what);

// ---- Slots -------------------------------------------------------------------------------------

// A counted permit is taken before a thread starts and given back by its destructor. That bounds
// threads, memory and the handshakes strangers can cause, and tells when the last thread is done.
class Slots {
public:
    explicit Slots(int total) : free_(total), total_(total) {}
    struct GiveBack {
        void operator()(Slots* slots) const { slots->give(); }
    };
    using Permit = std::unique_ptr<Slots, GiveBack>;

    Permit take(Time until = {});  // empty: none became free before `until`
    bool all_free(Time until);     // false: some were still taken at `until`

private:
    void give();
    std::mutex mutex_;  // guards free_
    std::condition_variable changed_;
    int free_;
    const int total_;
};

// ---- TLS ---------------------------------------------------------------------------------------

template <auto release>
struct Release {
    template <class T>
    void operator()(T* handle) const { release(handle); }
};
using Ctx = std::unique_ptr<SSL_CTX, Release<SSL_CTX_free>>;
using Ssl = std::unique_ptr<SSL, Release<SSL_free>>;
using Session = std::unique_ptr<SSL_SESSION, Release<SSL_SESSION_free>>;
using Pin = std::array<uint8_t, 32>;  // SHA-256 of a SubjectPublicKeyInfo, RFC 7858 4.2

struct Connection;

// One address of a resolver: who it must prove to be, what was learnt about it, and the connections
// that are ready: parked by a thread that has answered, for the next query. The oldest is taken, for
// its tickets have arrived and been acknowledged: a newer one would hold the answer up.
struct Upstream {
    Address address;
    std::string name;            // must be in the certificate's SAN, RFC 8310 8.1
    std::vector<Pin> pins;       // if any, one must be in the verified chain as well
    std::atomic<int> group{0};   // the key exchange it chose last (an OpenSSL NID); 0: unknown

    // Whether it may be asked now: it did not fail, or its time of rest is over. In the latter case
    // the caller is the one who tries it: others are told no until this is known.
    bool available(Time now);
    void failed(Time now);                   // it rests for 1 s, doubling to 5 min
    void silent(Time now);                   // slower than usual; the third time in a row it failed
    void answered(Time now, Time asked);
    Time patience(Time now, bool ready);     // until when to wait before another try is worth while
    Time last_answer();

    void keep(Session ticket);
    Session ticket();  // for one use (RFC 8446 C.4); empty: there is none

    std::unique_ptr<Connection> take(Time now);  // empty: none is ready
    bool reserve(size_t most);  // a place for one more; to be followed by park()
    void park(std::unique_ptr<Connection> connection);  // empty: it came to nothing
    // Drops those that are too old, or too many for how little is asked. true: one more is wanted.
    bool tend(Time now);
    ~Upstream();

private:
    std::unique_ptr<Connection> oldest();
    std::mutex mutex_;  // guards all below
    std::deque<Session> tickets_;
    std::deque<std::unique_ptr<Connection>> parked_;
    size_t opening_ = 0;
    Clock::duration idle_limit_ = std::chrono::seconds(25);  // learnt: how long parked ones live
    Clock::duration usual_{};                                // of an answer; 0: unknown
    int failures_ = 0, silences_ = 0;
    Time rest_until_{}, asked_ = Clock::now() - std::chrono::hours(1), answered_{};
};
using Upstreams = std::vector<std::unique_ptr<Upstream>>;
// cloudflare | google | quad9 | ADDR[@PORT]#NAME[,pin-sha256=BASE64]... appended, one for each
// address. Throws BadOption.
void add_upstream(Upstreams& to, const std::string& from);

// The settings of all connections: TLS 1.2 at least, ALPN "dot", certificates verified, SAN only.
// Empty `ca_file`: the system's. Throws BadOption.
Ctx tls_context(const std::string& ca_file);

// [4]-[6] One TCP and TLS connection, used by one thread at a time. Its socket does not block, so
// that every wait is a poll(2) with the query's deadline, and one thread can wait for several.
struct Connection {
    Connection(SSL_CTX* ctx, Upstream& upstream);  // begins to connect
    ~Connection();                                 // close_notify, then close

    // In the order in which they come. Idle: verified, and nothing to send yet.
    enum Stage { Connect, Handshake, Idle, Send, Read, Done, Failed };
    // Goes on as far as it can without waiting, to Idle, Done or Failed at most.
    Stage advance();
    void send(const Query& query, const Bytes& message);  // when Idle or before; `query` outlives it
    void rest();                  // Idle again after an answer
    bool alive();                 // when Idle: the other end has not closed it
    std::string how() const;      // "TLSv1.3 resumed ready", once Idle
    std::string trouble() const;  // "1.1.1.1@853 certificate has expired": why it Failed, or is late

    Upstream& upstream;
    const Fd fd;
    const Ssl ssl;
    Stage stage = Connect;
    short events = 0;       // what advance() waits for, as of poll(2)
    bool verified = false;  // the other end proved who it is
    bool local = false;     // it failed for want of something here
    bool ready = false;     // it was when the query came
    Time since;             // when it became Idle, or its query was sent
    Bytes in;               // the answer, when Done

private:
    Stage fail(const std::string& why);
    Stage again(int result);  // after an OpenSSL call that did not succeed
    Stage verify();
    void tell(int step, const std::string& what) const;

    const Query* query_ = nullptr;
    Bytes out_;
    size_t have_ = 0;  // octets of the length and of `in`
    uint8_t length_[2];
    std::string why_;
};

// ---- The whole way -----------------------------------------------------------------------------

struct Outcome {
    Bytes octets;        // for the client
    bool good = false;   // the resolver answered
    std::string detail;  // how, or why not
    // What was used for it: closed, or kept, only when the client has its answer.
    std::vector<std::unique_ptr<Connection>> tries{};
};

struct Policy {
    size_t max_udp, ready;  // octets of a UDP answer; ready connections for each upstream
    bool reuse;             // a connection may serve more than one query, one at a time
    Clock::duration timeout;
};

// Steps [3] to [8] of every query. Many threads may call it at once.
class Resolver {
public:
    Resolver(Ctx ctx, Upstreams upstreams, Policy policy)
        : ctx_(std::move(ctx)), upstreams_(std::move(upstreams)), policy_(policy) {}
    Outcome resolve(const Query& query);
    void restock(Outcome used);  // after the answer: ready connections in place of those used
    [[noreturn]] void tend();    // keeps a small stock warm, for ever

private:
    Upstream* choose(const Upstream* last);
    std::unique_ptr<Connection> connect(Upstream& upstream);
    bool ended(const Query& query, Connection& one, Outcome& outcome);
    bool may_race();
    void ask(const Query& query, const Bytes& message, Outcome& outcome);
    void open(Upstream& upstream);

    const Ctx ctx_;
    const Upstreams upstreams_;
    const Policy policy_;
    std::atomic<int> race_budget_{race_burst};
    static constexpr int race_price = 10, race_burst = 20 * race_price;
};

}  // namespace dot

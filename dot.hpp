// dot.hpp - the types and contracts that both parts of dot-proxy use, in the order in which a query
// meets them.
//
// dot-proxy takes plain DNS over UDP and TCP and asks a resolver over TLS (RFC 7858). A query takes
// eight steps. They have the same numbers here, in the code, in what -v prints and in the README:
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
// One thread at each UDP socket and one for each TCP client do steps [1] and [2]. One more at each
// TCP socket waits for new clients. A query that is to be forwarded gets a thread of its own, which
// takes it through steps [3] to [8] and waits for one thing at a time: every socket blocks. If its
// resolver is late, the query gets a second thread, which asks another resolver or tries another
// connection.
//
// Each query has a TLS connection to itself (unless --reuse is given). That costs a round trip for
// TCP, one for TLS and one for the answer, so a thread that has answered opens the next connection
// ahead of time. Such a "ready connection" is verified and unused, and waits for a query to come.
//
// What dot-proxy is not: a cache, a validator, an authoritative server or a client of plain DNS. No
// code path sends a query in the clear, or to a server that is not authenticated.
//
// Reading order: this file; dot.cpp (how a query travels); main.cpp (how the program runs).
//
// Errors: before the first thread starts, functions throw. While the program serves, a function of
// this file that can fail returns std::nullopt, nullptr or false. (Inside dot.cpp a try that comes
// to nothing throws a Failure, which carry() catches.) Where an error is ignored, the reason is on
// the line.
#pragma once

#include <netinet/in.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

using Bytes = std::vector<uint8_t>;
using Clock = std::chrono::steady_clock;  // The wall clock jumps; deadlines must not.
using Time = Clock::time_point;
using Duration = Clock::duration;
using std::chrono::milliseconds, std::chrono::seconds;

// The user asked for something that cannot be done. The program ends with exit status 2.
using BadOption = std::invalid_argument;

// Formats like printf(3); 1,023 characters at most.
std::string text(const char* format, auto... values) {
    char line[1024];
    snprintf(line, sizeof line, format, values...);
    return line;
}

// Prints a line on stdout with a single write(2), so that the lines of many threads do not mix.
void say(std::string line);

// The totals: numbers with names, which the program prints at its end.
void count(const std::string& name, int64_t more = 1);
void count_highest(const std::string& name, int64_t value);  // keeps the highest value so far
std::string totals();                                        // "TOTALS name=number ..."

// ---- What the user asked for -------------------------------------------------------------------

// An IP address and a port.
struct Address {
    union {  // any.sa_family tells which
        sockaddr any;
        sockaddr_in v4;
        sockaddr_in6 v6{};  // the largest, so this zeroes all of it
    };
    bool is_v4() const { return any.sa_family == AF_INET; }
    int port() const { return ntohs(v4.sin_port); }  // at the same place in both families
    socklen_t size() const;                          // of the sockaddr, in octets
    std::string host() const;                        // "1.1.1.1"
    std::string str() const;                         // "1.1.1.1@853"

    // '4' or '6', and then the bits of the address as '0' and '1': "4" "00000001" "00000001" and so
    // on. An address is in a network if its bits start with the network's.
    std::string bits() const;
};

// Reads ADDR[@PORT]. Throws BadOption.
Address parse_address(const std::string& from, int default_port);

// Reads all of `from` as a number from `least` to `most`. Throws BadOption.
int parse_number(const std::string& from, int least, int most);

// Reads ADDR[/LENGTH] and returns the bits of that network. Throws BadOption.
std::string parse_network(const std::string& from);

// One address of a resolver, and who it must prove to be.
struct Peer {
    Address address;
    // A host name or IP address that its certificate must have as a subject alternative name, SAN
    // (RFC 8310 8.1).
    std::string name;
    // If there are any, one must be the SHA-256 of a key in its chain (RFC 7858 4.2).
    std::vector<Bytes> pins;
};

// Reads cloudflare | google | quad9 | ADDR[@PORT]#NAME[,pin-sha256=BASE64]... Throws BadOption.
std::vector<Peer> parse_upstream(const std::string& from);

struct Settings {
    std::vector<Address> listen;
    std::vector<Peer> upstreams;     // in the order in which they are asked
    std::vector<std::string> ca;     // files of certificates to trust; none: the system's
    std::vector<std::string> allow;  // networks whose hosts may ask, as bits()
    std::vector<std::string> deny;   // networks whose hosts may not
    std::string keylog;              // a file for TLS secrets; empty: none
    int rate = 0;                    // queries a second for one client; 0: no limit
    int queries = 512;               // queries in flight
    int timeout = 4000;              // for a whole query, in milliseconds
    int ready = 128;                 // ready connections for each upstream
    int max_udp = 1232;              // the longest UDP answer, in octets
    int verbose = 0;                 // 1: the eight steps; 2: the octets as well
    bool reuse = false;              // use a connection for more than one query
    bool quiet = false;              // print no line per query
    int uid = -1;                    // the user to run as; -1 keeps the current one
    int gid = -1;
};
extern Settings settings;  // Set before the first thread starts, and constant from then on.

// Prepares TLS and the upstreams as the settings say. Throws BadOption.
void prepare();

// ---- Messages: pure functions over octets ------------------------------------------------------

constexpr size_t header_size = 12;         // RFC 1035 4.1.1
constexpr size_t longest_message = 65535;  // RFC 1035 4.2.2
constexpr size_t longest_udp_query = 4096;

enum Rcode : int {  // RFC 1035 4.1.1
    NOERROR = 0,
    FORMERR = 1,
    SERVFAIL = 2,
    NXDOMAIN = 3,
    NOTIMP = 4,
    REFUSED = 5,
};
std::string rcode_name(int rcode);
std::string type_name(int type);

// Where the parts of a message are. Positions count octets from the beginning of the message.
struct Layout {
    const char* fault = nullptr;        // why the message does not parse; nullptr: it does
    int type = 0;                       // of the question
    size_t question_end = header_size;  // where the question ends
    size_t end = header_size;           // where the last record ends; octets may follow
    // Where the OPT record begins and ends; 0: there is none. Whoever sends one speaks EDNS, the
    // extension of DNS that has sizes, options and more rcodes (RFC 6891).
    size_t opt = 0;
    size_t opt_end = 0;
    size_t udp_size = 512;   // the longest UDP answer that the sender takes, in octets
    bool dnssec_ok = false;  // the DO bit of the OPT record
    bool is_signed = false;  // ends in TSIG (RFC 8945) or SIG(0) (RFC 2931)
};
Layout parse(const Bytes& message);

// The rcode of a message that parses, with the upper bits that its OPT record adds (RFC
// 6891 6.1.3).
int rcode_of(const Bytes& message);

// Describes a message for people, a line for each field: its name, its meaning, its octets.
// Only printable characters.
std::string annotate(const Bytes& message);

// A query, as it was taken in step [1]. The threads that carry it share it.
struct Query {
    Query(Bytes octets, bool tcp);

    // Prints a line of this query's story, with -v; and with -vv the message as well.
    void tell(int step, const std::string& what, const Bytes& message = {}) const;

    const Bytes octets;
    const bool tcp;  // It came over TCP.
    const Layout layout;
    const Time taken;
    const Time deadline;    // By then its client has an answer.
    const unsigned number;  // It tells the lines of concurrent queries apart.
};

// [2] What to do with a query.
enum class Action {
    forward,   // ask a resolver
    answer,    // answer at once, with an rcode
    truncate,  // answer at once, with TC and no records, so that the client comes back over TCP
    ignore,    // keep silent
};
struct Verdict {
    Action action;
    Rcode rcode;
    const char* reason;
};
// [2] Judges a query, by the first of these that is true of it:
// - It is shorter than a header, or is an answer: silence.
// - It is a DNS stateful operation (DSO): NOTIMP (RFC 8490 9.4).
// - It does not parse: FORMERR.
// - It came over UDP and is longer than `longest_udp_query`: TC.
// - Its opcode is not QUERY: it is forwarded, whatever it is (RFC 5625 3).
// - It has more than one question: FORMERR (RFC 9619 4).
// - It asks for a zone transfer, AXFR or IXFR: NOTIMP.
// - It asks for resolver.arpa or a name below it: NOERROR, and no records. By these names clients
//   look for ways around this proxy (RFC 9462 6.1).
// All others are forwarded. Where the verdict is not `answer`, nobody reads its rcode.
Verdict judge(const Query& query);

// [3] Returns the query, which parses, padded to the next multiple of 128 octets (RFC 8467 4.1),
// with zeros, in an option (RFC 7830 3) that comes behind all others. A query without an OPT record
// gets one, with DO=0. A client's own padding is replaced; its other options stay. Returns the
// query unchanged in these cases:
// - It is signed.
// - Octets follow its last record.
// - It would be longer than `longest_message`.
// - A compression pointer leads into its OPT record, so that this cannot be replaced.
Bytes pad(const Query& query);

// [5] Returns the message behind its length in two octets (RFC 1035 4.2.2). The message has at most
// `longest_message` octets.
Bytes frame(const Bytes& message);

// [7] Whether `answer`, which has this layout, answers `query`: it must parse and have QR set, and
// id, opcode and question must agree (RFC 5452 9.1), the name without regard to case. An error, and
// an answer without records (an OPT does not count here), may leave the question out.
bool matches(const Query& query, const Bytes& answer, const Layout& layout);

// [7] Returns the answer as its client may see it: without padding and keepalive, which are between
// this proxy and the resolver (RFC 7830 6; RFC 7828 3.4), and without an OPT record if the client
// sent none (RFC 6891 7). One that is signed stays as it is. Returns nullopt if there is no such
// form: an extended rcode, for example, cannot be told to a client without EDNS.
std::optional<Bytes> unpad(const Query& query, const Bytes& answer, const Layout& layout);

// [8] Returns the answer if it fits, else its header and question with TC set. Over TCP any answer
// fits. Over UDP as many octets fit as the client's OPT record says, but at least 512 and at most
// `most_udp` (RFC 6891 6.2.3). This comes after unpad(), so that padding does not make an answer
// too long. To a client with EDNS an answer that was cut has an OPT record of the proxy's own:
// - It has the client's DO bit.
// - It has the upper bits of the answer's rcode.
// - It has the answer's options, if they fit.
Bytes cut(const Query& query, Bytes answer, size_t most_udp);

// [8] Returns an answer of the proxy's own. For an EDNS client it has an OPT record, and in it an
// Extended DNS Error (RFC 8914) if `ede` is not negative.
Bytes reply(const Query& query, Rcode rcode, int ede = -1);
Bytes truncated_reply(const Query& query);  // TC and no records

// ---- Streams -----------------------------------------------------------------------------------

// [1] Reads a framed message from a stream socket, in however many pieces it comes, and returns it
// without its length. Returns nullopt if the stream ends too soon, if the socket's time limit is
// over, or if the length is 0.
std::optional<Bytes> read_frame(int fd);

// Sets a socket option and ignores failure: without it the service is slower, but it serves.
void set_option(int fd, int level, int option, const auto& value) {
    setsockopt(fd, level, option, &value, sizeof value);
}

// ---- Beyond POSIX ------------------------------------------------------------------------------
// In a program that was made with -DPOSIX_ONLY these do nothing, and options have no long words.

// Has the kernel acknowledge at once what has come over this TCP socket. Otherwise a server with
// Nagle's algorithm holds the rest back for 40 ms.
void acknowledge_at_once(int fd);
// Has recvmsg(2) report which of our addresses a datagram was sent to.
void report_asked_address(int fd, bool is_v4);
// Takes the header that recvmsg(2) has filled in, and changes it so that sendmsg(2) can use it: the
// answer leaves from the address that was asked, by whatever interface the routes say.
void answer_from_asked_address(struct msghdr& header);
// Allows bind(2) to an IPv6 address that this host does not have yet.
void allow_absent_address(int fd);
// Gives up the supplementary groups. Returns false on failure, and sets errno.
bool drop_groups();
// From now on a set-user-ID program that this one executes gains no rights (PR_SET_NO_NEW_PRIVS).
void gain_no_privileges();
// Has malloc(3) share two pools of memory among all threads.
void save_memory();

// An option of the command line: --word or -l, for a letter.
struct OptionWord {
    const char* word;
    char letter;
    bool has_value;
};
// Returns the letter of the next option, as getopt(3) does, with its value in `optarg`.
int next_option(int argc, char** argv, const std::vector<OptionWord>& words);

// ---- Who may ask, and how much -----------------------------------------------------------------

// Whether a client is in one of --allow's networks and in none of --deny's.
bool may_ask(const Address& client);

// Whether this query is one too many for its host, with --rate. Queries over TCP have a share of
// their own: UDP addresses can be forged, and nobody must be able to spend another host's share.
bool over_rate(const Address& client, bool tcp);

// The host of a client, for limits: an IPv4 address, or the /64 of an IPv6 address.
std::string host_of(const Address& client);

// ---- Threads -----------------------------------------------------------------------------------

// Does `work` and catches whatever it throws, so that no thread can end the process. Returns false
// if something was thrown.
bool guard(const std::function<void()>& work);

// Does `work` in a thread of its own. Returns false if the system has no room for one more thread.
bool detach(const std::function<void()>& work);

// A permit to do something of which only so much may go on at a time. It is given back when it is
// destroyed. Permits bound the threads, memory and handshakes that strangers can cause. They are
// shared, as a std::function that holds one must be copyable.
class Permits;
struct Permit {
    Permit() = default;
    Permit(const Permit&) = delete;
    ~Permit();
    Permits* of = nullptr;  // who gave it, and gets it back; set by take() and wait()
};

class Permits {
public:
    explicit Permits(size_t most) : most(most) {}
    std::shared_ptr<Permit> take();                          // nullptr: there is none left
    std::shared_ptr<Permit> wait(Time until = Time::max());  // nullptr: there was none until then
    size_t in_use();
    size_t get_most();
    void set_most(size_t number);

private:
    friend struct Permit;
    void give_back();

    std::mutex mutex;  // guards what follows
    std::condition_variable given_back;
    size_t most;
    size_t taken = 0;
};

// ---- The whole way -----------------------------------------------------------------------------

// What became of a query.
struct Outcome {
    Bytes answer;  // for the client
    bool is_from_resolver;
    std::string detail;  // who answered and how, or why nobody did
};

// [3] to [8]: has a query answered by one of the upstreams, in threads of its own. One of them
// calls `finish`, exactly once, at the deadline or before.
void resolve(std::shared_ptr<const Query> query, std::function<void(const Outcome&)> finish);

// Keeps a few ready connections while the program is in use. Never returns.
void keep_warm();

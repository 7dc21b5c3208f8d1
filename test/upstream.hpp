// upstream.hpp - a DNS-over-TLS server of the tests' own that misbehaves on command.
//
// What it does with a query is said by the first label of the query's name, so that tests that run
// many queries at once need no other means: KEY[NUMBER][-ANYTHING].test
//
//   close3-x.test   closes the connection for the first 3 queries of this name, then answers
//   slow200.test    answers after 200 ms
//   size16384.test  answers with exactly so many octets
//
// and what it does with a connection by Options. The keys are listed in upstream.cpp.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace test {

using Octets = std::vector<uint8_t>;

// A directory that is gone with its owner.
struct TempDir {
    TempDir();
    ~TempDir();
    std::string path;
};

// Certificates for dot.test, made anew: a CA and leaves that are right or wrong in one respect.
enum class Cert {
    Good,
    WrongName,
    Expired,
    NotYetValid,
    UnknownCa,
    SelfSigned,
    CnOnly,
    Wildcard,
    ClientOnly,
    Backup,
    Chained,
    NoIntermediate,
    FalseCa,
    IpAddress,  // its name is 127.0.0.1
    Fair28kB,   // one large certificate, or a long chain
    Large77kB,
    Chain77kB,
    Huge105kB
};
struct Certificates {
    Certificates();
    std::string ca() const { return dir.path + "/ca.pem"; }
    std::string leaf(Cert kind) const;  // file of the certificate
    std::string key(Cert kind) const;   // file of its key
    std::string intermediate() const { return dir.path + "/intermediate.pem"; }
    std::string pin(Cert kind) const { return pin(leaf(kind)); }
    static std::string pin(const std::string& file);  // base64 of the SHA-256 of its SPKI
    TempDir dir;
};

// What a hostile server says without end.
enum class Endless {
    Nothing,
    // In the clear, instead of a handshake:
    HelloRequests,
    Warnings,             // alerts that are none
    WarningsAndRequests,  // in turn, so that neither comes twice in a row
    EmptyRecords,
    DrippedHello,        // a ServerHello in pieces of one octet
    DrippedRecord,       // a record in pieces of one octet
    DrippedCertificate,  // of TLS 1.2, behind a ServerHello that is good
    // Under the keys of a handshake that was good:
    Tickets,  // TLS 1.3
    KeyUpdates,
    KeyUpdatesWithReply,  // and the other end must send one, too
    EmptyData,
    SealedWarnings,
    SealedRequests,  // TLS 1.2: HelloRequest
    DrippedTicket
};

struct Options {
    enum Accept { Serve, Close, Reset, Hang, Plaintext, CloseAfterHandshake } accept = Serve;
    Cert cert = Cert::Good;
    std::string address = "127.0.0.1";
    int port = 0;                          // 0: any
    int min_version = 0, max_version = 0;  // of TLS, as OpenSSL has them; 0: its own choice
    std::string groups{};                  // of key exchange; empty: OpenSSL's
    std::string ciphers{};                 // of TLS 1.2; empty: OpenSSL's
    std::string alpn = "dot";              // what it chooses; empty: none
    int tickets = 2;
    int ticket_lifetime = -1;  // seconds; -1: OpenSSL's
    int idle_ms = 0;           // closes a connection that is silent for so long; 0: never
    int delay_ms = 0;          // of every answer
    int handshake_ms = 0;      // passes before it says anything
    bool deaf = false;         // reads queries and never answers
    bool nagle = false;        // holds an answer back until what was sent before is acknowledged
    int most = 0;        // connections that it serves at once, it closes others; 0: any number
    int answers = 0;     // after which it closes a connection; 0: it does not
    int reset_each = 0;  // so many'th connection; 0: none
    bool alert_ticket = false;  // meets a hello that offers a ticket with an alert
    bool hang_ticket = false;   // or with silence
    std::function<bool(const Octets&)>
        refuses{};  // queries that it meets by closing the connection

    Endless endless = Endless::Nothing;
    bool endless_after_query = false;  // and not at once; of what is said under the keys
    int endless_pause_ms = 0;          // between two; 0: as many as go
    // Answers as it is told, octet for octet; where that is empty, as ever.
    std::function<Octets(const Octets& query)> script{};
    // A message that nobody asked for: in one record with each answer, in one of its own after it,
    // or with the handshake, before the client has proved anything.
    enum Unasked { WithAnswer, AfterAnswer, WithHandshake } unasked_when = WithAnswer;
    Octets unasked{};
};

// What a client says first.
struct Hello {
    std::string name, alpn;  // of SNI and ALPN
    Octets versions, compressions;
    std::set<int> extensions;
};

struct Seen {                              // all that came, in order
    std::vector<Octets> queries, answers;  // the answers as they were sent
    std::vector<size_t> records;           // octets of the first TLS record of each query
    std::vector<int> on;                   // which connection each query came on, from 1
    std::vector<std::string> tickets;      // the identities offered by clients
    std::vector<Hello> hellos;
    std::vector<uint8_t> first_octets;  // of each connection
    int connections = 0, handshakes = 0, resumed = 0, open = 0, most_open = 0;
    int notified = 0, torn = 0;  // closed by the client, with and without close_notify
    size_t most_endless = 0;     // octets of what has no end, that went into one connection

    Octets query(int id) const;  // the last one with that id; throws if there is none
    Octets answer(int id) const;
};

class Upstream {
public:
    Upstream(const Certificates& certificates, Options options = {});
    ~Upstream();  // closes all connections
    int port() const { return port_; }
    Seen seen() const;
    void set(const Options& options);  // for connections and queries from now on
    // No answer any more on the connections that are open now, and no sign of their end: for their
    // client it is as if it were in another network.
    void fall_silent();
    std::string spec(const std::string& more = "") const;  // for --upstream

private:
    struct Shared;
    std::shared_ptr<Shared> shared_;
    std::thread acceptor_;
    int port_ = 0;
};

}  // namespace test

// main.cpp - how the program runs: options, listeners, threads, signals. main() comes last.
//
// Each UDP listener has a thread that takes queries, and each TCP listener one that takes clients.
// Each TCP client has a thread that reads its queries. A query that is to be forwarded gets a
// thread of its own. One more thread keeps connections ready, and the main thread waits for
// signals.
#include <netinet/tcp.h>
#include <pwd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <system_error>
#include <thread>

#include "dot.hpp"

// ---- Options -----------------------------------------------------------------------------------

static void print_help();

static void set_user(const std::string& name) {
    const passwd* known = getpwnam(name.c_str());
    if (known) {
        settings.uid = int(known->pw_uid);
        settings.gid = int(known->pw_gid);
        return;
    }
    if (name.find_first_not_of("0123456789") != name.npos)
        throw BadOption("there is no user of that name");
    settings.uid = parse_number(name, 0, INT_MAX);
    settings.gid = settings.uid;
}

static void add_upstream(const std::string& from) {
    for (const Peer& peer : parse_upstream(from)) settings.upstreams.push_back(peer);
}

// All there is to say of an option. --help, getopt(3) and parse_options() read it here.
struct OptionRow {
    char letter;
    const char* word;
    const char* value;  // what its value is; nullptr: it takes none
    const char* help;
    std::string preset;  // what holds without it, in words for --help
    std::function<void(const std::string&)> set;
};

static const std::vector<OptionRow>& option_rows() {
    using Value = const std::string&;
    static const std::vector<OptionRow> rows{
        {'l', "listen", "ADDR[@PORT]", "where to listen, UDP and TCP; repeatable",
         "127.0.0.1@53 ::1@53",
         [](Value value) { settings.listen.push_back(parse_address(value, 53)); }},
        {'u', "upstream", "UPSTREAM", "whom to ask, in this order; repeatable", "cloudflare",
         add_upstream},
        {'c', "ca", "FILE", "certificates to trust instead; repeatable", "the system's",
         [](Value value) { settings.ca.push_back(value); }},
        {'a', "allow", "NETWORK", "who may ask, besides this host; repeatable", "private networks",
         [](Value value) { settings.allow.push_back(parse_network(value)); }},
        {'d', "deny", "NETWORK", "who may not, even if allowed; repeatable", "",
         [](Value value) { settings.deny.push_back(parse_network(value)); }},
        {'r', "rate", "N", "queries a second for one client (IPv6: one /64)", "0: no limit",
         [](Value value) { settings.rate = parse_number(value, 0, 1000000); }},
        {'n', "queries", "N", "queries in flight at most", std::to_string(Settings().queries),
         [](Value value) { settings.queries = parse_number(value, 1, 10000); }},
        {'t', "timeout", "MS", "for a whole query", std::to_string(Settings().timeout),
         [](Value value) { settings.timeout = parse_number(value, 1, 60000); }},
        {'k', "ready", "N", "ready connections for an upstream at most; 0: none",
         std::to_string(Settings().ready),
         [](Value value) { settings.ready = parse_number(value, 0, 1000); }},
        {'R', "reuse", nullptr, "use a connection for more than one query", "",
         [](Value) { settings.reuse = true; }},
        {'m', "max-udp", "N", "longest UDP answer, octets", std::to_string(Settings().max_udp),
         [](Value value) { settings.max_udp = parse_number(value, 512, 65535); }},
        {'U', "user", "NAME|UID", "become this user once the sockets are open", "", set_user},
        {'K', "keylog", "FILE", "write TLS secrets there, for Wireshark", "",
         [](Value value) { settings.keylog = value; }},
        {'q', "quiet", nullptr, "no line per query", "", [](Value) { settings.quiet = true; }},
        {'v', "verbose", nullptr, "the eight steps of every query; -vv adds the octets", "",
         [](Value) { settings.verbose++; }},
        {'h', "help", nullptr, "print this", "", [](Value) { print_help(); }},
        {'V', "version", nullptr, "print the version", "",
         [](Value) {
             puts("dot-proxy 0.2");
             exit(0);
         }},
    };
    return rows;
}

static void print_help() {
    puts("dot-proxy [options]");
    for (const OptionRow& row : option_rows()) {
        std::string words = text("-%c, --%s", row.letter, row.word);
        if (row.value) words += std::string(" ") + row.value;
        printf("  %-26s %s", words.c_str(), row.help);
        if (!row.preset.empty()) printf(" [%s]", row.preset.c_str());
        puts("");
    }
    puts("An UPSTREAM is cloudflare, google, quad9 or ADDR[@PORT]#NAME[,pin-sha256=BASE64]...,");
    puts("for example 192.0.2.1#dns.example. A NETWORK is ADDR[/LENGTH].");
    exit(0);
}

static void apply_option(char letter, const std::string& value) {
    for (const OptionRow& row : option_rows()) {
        if (row.letter != letter) continue;
        try {
            if (value.size() > 1000) throw BadOption("is longer than 1,000 characters");
            row.set(value);
        } catch (const BadOption& e) {
            throw BadOption(text("--%s %.80s: %.800s", row.word, value.c_str(), e.what()));
        }
    }
}

static void set_defaults() {
    if (settings.upstreams.empty()) settings.upstreams = parse_upstream("cloudflare");
    if (settings.listen.empty())
        settings.listen = {parse_address("127.0.0.1", 53), parse_address("::1", 53)};
    if (settings.allow.empty()) {
        for (const char* network : {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16",
                                    "100.64.0.0/10", "169.254.0.0/16", "fc00::/7", "fe80::/10"})
            settings.allow.push_back(parse_network(network));
    }
    // This host may ask in any case, at loopback and where the program listens.
    settings.allow.push_back(parse_network("127.0.0.0/8"));
    settings.allow.push_back(parse_network("::1"));
    for (const Address& address : settings.listen) settings.allow.push_back(address.bits());
}

// Otherwise the second one would find the port taken.
static void refuse_to_listen_twice() {
    std::set<std::string> places;
    for (const Address& address : settings.listen) {
        const bool is_new = places.insert(address.str()).second;
        if (!is_new) throw BadOption("--listen " + address.str() + ": is named twice");
    }
}

// What is wrong with a word that getopt(3) did not take. It says so in `optopt`:
// - an unknown letter, of "-qx" the 'x';
// - the letter of an option that takes no value, though the word has one: "--quiet=yes";
// - 0: there is no such word.
static std::string complaint_about(const std::string& word) {
    const auto is_met = [](const OptionRow& row) { return row.letter == optopt; };
    if (std::ranges::any_of(option_rows(), is_met))
        return text("%.80s: this option takes no value; see --help", word.c_str());
    std::string what = word;
    if (optopt != 0) what = std::string("-") + char(optopt);
    return text("%.80s: there is no such option; see --help", what.c_str());
}

// Fills the settings. Throws BadOption.
static void parse_options(int argc, char** argv) {
    std::vector<OptionWord> words;
    for (const OptionRow& row : option_rows())
        words.push_back({row.word, row.letter, row.value != nullptr});
    opterr = 0;  // getopt(3) is not to say itself what is wrong.
    for (;;) {
        const int letter = next_option(argc, argv, words);
        if (letter == -1) break;
        if (letter == '?') throw BadOption(complaint_about(argv[optind - 1]));
        if (letter == ':')
            throw BadOption(text("%.80s: its value is missing; see --help", argv[optind - 1]));
        apply_option(char(letter), optarg ? optarg : "");
    }
    if (optind < argc)
        throw BadOption(
            text("unexpected argument '%.80s': a value follows its option, as in "
                 "--upstream quad9; see --help",
                 argv[optind]));
    set_defaults();
    refuse_to_listen_twice();
}

// ---- Bounds ------------------------------------------------------------------------------------

static Permits query_permits(0);           // queries in flight: main() sets how many
static Permits client_permits(256);        // TCP clients
constexpr size_t clients_of_a_host = 64;   // at one listener
constexpr size_t queries_of_a_client = 8;  // of a TCP client, in flight

static std::atomic<int> unanswered{0};      // queries in flight, until their answers have been sent
static std::atomic<bool> is_ending{false};  // No more queries are taken.

// ---- Queries -----------------------------------------------------------------------------------

using Send = std::function<void(const Bytes& answer)>;  // the way back to a client

// In the flags of a header, RFC 1035 4.1.1: QR, opcode, AA, TC, RD.
static bool is_truncated(const Bytes& answer) { return answer[2] & 0x02; }  // TC

// Counts what became of a query, and prints its line, for example
// SUCCESS udp A NOERROR 45 octets 12.3 ms cloudflare-dns.com TLSv1.3 resumed ready
static void report(const Query& query, const Outcome& outcome) {
    const int rcode = rcode_of(outcome.answer);
    const char* result = "SUCCESS";
    if (rcode != NOERROR && rcode != NXDOMAIN) result = "ANSWERED";
    if (!outcome.is_from_resolver) result = "FAILURE";

    count(rcode_name(rcode));
    count(outcome.is_from_resolver ? "success" : "failure");
    if (!outcome.is_from_resolver) count("failure:" + outcome.detail);
    if (settings.quiet) return;
    const std::chrono::duration<double, std::milli> took = Clock::now() - query.taken;
    const char* transport = query.tcp ? "tcp" : "udp";
    const char* colon = outcome.is_from_resolver ? "" : ":";
    say(text("%s %s %s %s %zu octets %.1f ms%s %s", result, transport,
             type_name(query.layout.type).c_str(), rcode_name(rcode).c_str(), outcome.answer.size(),
             took.count(), colon, outcome.detail.c_str()));
}

static void tell_of_answer(const Query& query, const Bytes& answer) {
    if (settings.verbose == 0) return;
    std::string words = rcode_name(rcode_of(answer)) + text(", %zu octets", answer.size());
    if (is_truncated(answer)) words += ", TC: there is more";
    query.tell(8, words, answer);
}

// Answers a query that is not forwarded.
static void answer_here(const Query& query, const Verdict& verdict, const Send& send) {
    Bytes answer = reply(query, verdict.rcode);
    if (verdict.action == Action::truncate) answer = truncated_reply(query);
    tell_of_answer(query, answer);
    send(answer);
    // NOERROR, for resolver.arpa, is no failure, and is not reported: the container's health check
    // asks for it all the time.
    const bool is_no_error = verdict.action == Action::answer && verdict.rcode == NOERROR;
    if (!is_no_error)
        report(query, {.answer = answer, .is_from_resolver = false, .detail = verdict.reason});
}

// Counts a query in flight, until it is destroyed. Its permit is not enough: that is given back
// before a slow TCP client has taken its answer, and end() must wait for this.
struct InFlight {
    InFlight() { unanswered++; }
    InFlight(const InFlight&) = delete;
    ~InFlight() { unanswered--; }
};

// Has a query answered by an upstream, in threads of its own.
static void forward(const std::shared_ptr<const Query>& query, std::shared_ptr<Permit> permit,
                    const Send& send) {
    count_highest("in_flight_most", int64_t(query_permits.in_use()));
    const auto in_flight = std::make_shared<InFlight>();
    resolve(query, [query, permit, in_flight, send](const Outcome& outcome) mutable {
        guard([&] { tell_of_answer(*query, outcome.answer); });
        // A TCP client may be slow to read, and must not keep a permit meanwhile that others need.
        if (query->tcp) permit = nullptr;
        send(outcome.answer);  // If this throws, the transaction learns that nothing was sent.
        guard([&] { report(*query, outcome); });
    });
}

static void tell_of_refusal(const Address& client, bool tcp) {
    count("denied");
    if (settings.verbose == 0) return;
    const std::string host = client.host();
    say(text("DENIED %s %s: --allow %s would let it in, unless --deny names it",
             tcp ? "tcp" : "udp", host.c_str(), host.c_str()));
}

// [1] [2] A query has come: judges it, and answers it or has it forwarded. Returns false if it was
// no query.
static bool take(Bytes octets, bool tcp, const Address& client, const Send& send) {
    count(tcp ? "tcp" : "udp");
    const auto query = std::make_shared<const Query>(std::move(octets), tcp);
    query->tell(1, text("%zu octets over %s", query->octets.size(), tcp ? "TCP" : "UDP"),
                query->octets);

    Verdict verdict = judge(*query);
    const bool is_ignored = verdict.action == Action::ignore;
    const bool is_too_much = !is_ignored && over_rate(client, tcp);
    if (is_too_much && tcp) verdict = {Action::answer, REFUSED, "over the rate"};
    // TC: a real client comes back over TCP, and a forged one gets no more octets than it sent.
    if (is_too_much && !tcp) verdict = {Action::truncate, NOERROR, "over the rate"};
    query->tell(2, verdict.reason);
    if (is_ignored) return false;
    if (verdict.action != Action::forward) {
        answer_here(*query, verdict, send);
        return true;
    }

    // A TCP client's own thread can wait for a permit: it reads no more meanwhile. The thread of a
    // UDP socket must not.
    std::shared_ptr<Permit> permit =
        tcp ? query_permits.wait(query->deadline) : query_permits.take();
    if (!permit) {
        verdict = {Action::answer, SERVFAIL, "too many queries in flight"};
    } else if (is_ending) {
        verdict = {Action::answer, SERVFAIL, "the program is ending"};
    }
    if (verdict.action == Action::forward) {
        forward(query, std::move(permit), send);
    } else {
        answer_here(*query, verdict, send);
    }
    return true;
}

// ---- UDP ---------------------------------------------------------------------------------------

// A datagram, and the way back to where it came from.
struct Datagram {
    explicit Datagram(int fd) : fd(fd) {}

    // [1] Waits for the next datagram, and puts its octets into the buffer. Returns false on an
    // error.
    bool receive(Bytes& buffer) {
        iovec whole{buffer.data(), buffer.size()};
        msghdr header = header_of(whole);
        const ssize_t got = recvmsg(fd, &header, 0);
        if (got < 0) return false;
        answer_from_asked_address(header);  // It changes `control`, which answer() sends.
        control_size = header.msg_controllen;
        octets.assign(buffer.begin(), buffer.begin() + got);
        return true;
    }

    void answer(Bytes message) {
        iovec whole{message.data(), message.size()};
        msghdr header = header_of(whole);
        header.msg_namelen = client.size();
        // UDP may lose an answer, for example if a buffer is full: then the client asks again.
        sendmsg(fd, &header, MSG_DONTWAIT);
    }

    msghdr header_of(iovec& whole) {
        msghdr header{};
        header.msg_name = &client;
        header.msg_namelen = sizeof client;
        header.msg_iov = &whole;
        header.msg_iovlen = 1;
        header.msg_control = control;
        header.msg_controllen = control_size;
        return header;
    }

    const int fd;
    Address client;
    Bytes octets;
    alignas(cmsghdr) char control[64];     // which of our addresses was asked
    size_t control_size = sizeof control;  // the room in it; then what is in it
};

static void serve_udp(int fd) {
    Bytes buffer(longest_message);
    for (;;) {
        const auto datagram = std::make_shared<Datagram>(fd);
        const bool has_come = datagram->receive(buffer);  // [1]
        if (!has_come) {                                  // There is no memory, for example.
            std::this_thread::sleep_for(milliseconds(20));
            continue;
        }
        if (!may_ask(datagram->client)) {
            tell_of_refusal(datagram->client, false);
            continue;
        }
        const auto send = [datagram](const Bytes& answer) { datagram->answer(answer); };
        take(std::move(datagram->octets), false, datagram->client, send);  // [2]: detaches a thread
    }
}

// ---- TCP ---------------------------------------------------------------------------------------

// A TCP client. Its thread and its queries share it; the last of them closes the stream.
struct Client {
    Client(int fd, const Address& address) : fd(fd), address(address) {}
    Client(const Client&) = delete;
    ~Client() { close(fd); }

    void answer(const Bytes& message) {
        std::lock_guard lock(writing);
        const Bytes framed = frame(message);  // under the lock: those that wait hold no copy
        const ssize_t sent = send(fd, framed.data(), framed.size(), MSG_NOSIGNAL);
        // It is gone, or did not take an answer in time.
        if (sent != ssize_t(framed.size())) shutdown(fd, SHUT_RDWR);
    }

    const int fd;
    const Address address;
    std::shared_ptr<Permit> permit;  // one of `client_permits`
    std::shared_ptr<Permits> host;   // for the clients of its host
    // One of `host`. Declared after it, so that it is given back before `host` is destroyed.
    std::shared_ptr<Permit> permit_of_host;
    Permits queries{queries_of_a_client};
    std::mutex writing;  // guards the order of octets
};

// For one query of a client. Its permit is given back when its answer has been sent.
struct WayBack {
    const std::shared_ptr<Client> client;
    // One of client->queries. Declared after `client`, so that it is given back before the client
    // is destroyed.
    const std::shared_ptr<Permit> permit;
};

static void serve_client(const std::shared_ptr<Client>& client) {
    for (;;) {
        const auto permit = client->queries.wait();
        std::optional<Bytes> octets = read_frame(client->fd);  // [1]
        if (!octets) return;
        const auto way_back = std::make_shared<WayBack>(WayBack{client, permit});
        const auto send = [way_back](const Bytes& answer) { way_back->client->answer(answer); };
        const bool is_query = take(std::move(*octets), true, client->address, send);  // [2]
        if (!is_query) return;
    }
}

static void serve_tcp(int listener) {
    std::map<std::string, std::shared_ptr<Permits>> hosts;  // those that have clients
    for (;;) {
        const auto permit = client_permits.wait();  // More clients wait in the backlog.
        Address address;
        socklen_t size = sizeof address;
        const int fd = accept4(listener, &address.any, &size, SOCK_CLOEXEC);
        if (fd < 0) {  // There are too many open files, for example. Some will be closed.
            std::this_thread::sleep_for(milliseconds(20));
            continue;
        }
        const auto client = std::make_shared<Client>(fd, address);  // It closes fd, in any case.
        client->permit = permit;
        if (!may_ask(address)) {
            tell_of_refusal(address, true);
            continue;
        }
        std::erase_if(hosts, [](const auto& host) { return host.second->in_use() == 0; });
        std::shared_ptr<Permits>& host = hosts[host_of(address)];
        if (!host) host = std::make_shared<Permits>(clients_of_a_host);
        client->host = host;
        client->permit_of_host = host->take();
        if (!client->permit_of_host) {
            count("denied");
            continue;
        }
        // RFC 7766 6.2.3. On Linux the limit is for a whole recv() or send(), not for each wait in
        // it, so a client which sends or takes an octet now and then gains nothing.
        set_option(fd, SOL_SOCKET, SO_RCVTIMEO, timeval{10, 0});
        set_option(fd, SOL_SOCKET, SO_SNDTIMEO, timeval{3, 0});
        set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
        detach([client] { serve_client(client); });
    }
}

// ---- Listeners ---------------------------------------------------------------------------------

struct Listener {
    Address address;
    int fd;
    int type;  // SOCK_DGRAM or SOCK_STREAM
};

static bool is_own_address(const Address& address) {
    const int fd = socket(address.any.sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    Address any_port = address;
    any_port.v4.sin_port = 0;
    const bool is_own = bind(fd, &any_port.any, any_port.size()) == 0;
    close(fd);
    return is_own;
}

static std::string why_not_bound(const Address& address, int error) {
    const std::string port = std::to_string(address.port());
    const std::string elsewhere = address.port() == 5300 ? "5301" : "5300";
    const std::string advice = "; try --listen 127.0.0.1@" + elsewhere;
    switch (error) {
        case EADDRINUSE:
            return address.str() + ": port " + port + " is taken" + advice;
        case EACCES:
            return address.str() + ": port " + port + " is not allowed" + advice;
        case EADDRNOTAVAIL:
            return address.host() + " is not an address of this host" + advice;
    }
    return "cannot listen on " + address.str() + advice;
}

// Opens a socket for the life of the process. Throws std::system_error that says what to do.
static int open_listener(const Address& address, int type) {
    const auto fail = [&address](int error) {
        throw std::system_error(error, std::generic_category(), why_not_bound(address, error));
    };
    const int fd = socket(address.any.sa_family, type | SOCK_CLOEXEC, 0);
    if (fd < 0) fail(EAFNOSUPPORT);  // whatever the reason: this family cannot be served
    if (type == SOCK_STREAM) set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    // A burst waits in this buffer, not in threads. In octets.
    if (type == SOCK_DGRAM) set_option(fd, SOL_SOCKET, SO_RCVBUF, 1 << 20);
    report_asked_address(fd, address.is_v4());  // RFC 2181 4: the answer is to leave from there.
    if (!address.is_v4()) {
        set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
        allow_absent_address(fd);
    }
    if (bind(fd, &address.any, address.size()) != 0) fail(errno);
    if (type == SOCK_STREAM && listen(fd, SOMAXCONN) != 0) fail(errno);
    return fd;
}

static std::vector<Listener> open_listeners() {
    std::vector<Listener> listeners;
    for (const Address& address : settings.listen) {
        try {
            for (int type : {SOCK_DGRAM, SOCK_STREAM})
                listeners.push_back({address, open_listener(address, type), type});
        } catch (const std::system_error& e) {
            // A host without IPv6 is served without it, if there is another address.
            const int error = e.code().value();
            const bool is_missing = error == EAFNOSUPPORT || error == EADDRNOTAVAIL;
            if (address.is_v4() || !is_missing || settings.listen.size() == 1) throw;
            fprintf(stderr, "dot-proxy: warning: nobody listens on %s: %s\n", address.str().c_str(),
                    strerror(error));
            continue;
        }
        // "::1:53" is a good address, and hardly what was meant.
        if (!address.is_v4() && !is_own_address(address))
            fprintf(stderr,
                    "dot-proxy: warning: %s is not an address of this host yet; a port is written "
                    "ADDR@PORT\n",
                    address.str().c_str());
    }
    if (listeners.empty()) throw std::runtime_error("there is no address to listen on");
    return listeners;
}

// ---- main --------------------------------------------------------------------------------------

// Gives up the rights of root for good.
static void become_user() {
    if (settings.uid == -1) return;
    const uid_t uid = uid_t(settings.uid);
    const gid_t gid = gid_t(settings.gid);
    const bool is_other = geteuid() != uid;
    if (is_other && (!drop_groups() || setgid(gid) != 0 || setuid(uid) != 0))
        throw std::system_error(errno, std::generic_category(), text("cannot become user %u", uid));
    if (uid != 0 && setuid(0) == 0) throw std::runtime_error("root's rights can be had back");
}

static std::string ready_line(const std::vector<Listener>& listeners) {
    std::string places;
    for (const Listener& one : listeners) {
        if (one.type != SOCK_DGRAM) continue;  // Each address is served over TCP as well.
        if (!places.empty()) places += ", ";
        places += one.address.str();
    }
    const Peer& first = settings.upstreams.front();
    const size_t more = settings.upstreams.size() - 1;
    std::string line = "READY listening on " + places + ", UDP and TCP; asking " + first.name +
                       " at " + first.address.str();
    if (more > 0) line += " and " + std::to_string(more) + " more";
    return line;
}

// Tells systemd that the service is ready, as sd_notify(3) does.
static void notify_service_manager() {
    const char* path = getenv("NOTIFY_SOCKET");
    if (!path) return;
    sockaddr_un address{};
    const size_t length = strlen(path);
    if (length >= sizeof address.sun_path) return;
    address.sun_family = AF_UNIX;
    memcpy(address.sun_path, path, length);
    if (path[0] == '@') address.sun_path[0] = '\0';  // an abstract name
    const socklen_t size = socklen_t(offsetof(sockaddr_un, sun_path) + length);
    const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sendto(fd, "READY=1", 7, MSG_NOSIGNAL, reinterpret_cast<sockaddr*>(&address), size);
    close(fd);
}

// Does `work`, which never ends, in a thread of its own. If something is thrown it begins again.
static void keep_doing(const std::function<void()>& work) {
    std::thread([work] {
        for (;;) guard(work);
    }).detach();
}

// Prints the totals. In a thread of its own: a log that nobody reads would hold up the main thread.
static void say_totals() {
    detach([] { say(totals()); });
}

// Waits for a signal to end, and prints the totals when it is asked to.
static void wait_for_end(const sigset_t& signals) {
    for (;;) {
        int signal = 0;
        sigwait(&signals, &signal);
        if (signal == SIGUSR1) say_totals();
        if (signal == SIGTERM || signal == SIGINT || signal == SIGHUP) return;
    }
}

// Takes no more queries, waits until those in flight are answered, and ends the process, after
// 3.8 s at most.
[[noreturn]] static void end() {
    is_ending = true;
    const Time until = Clock::now() + milliseconds(3500);
    while (unanswered > 0 && Clock::now() < until) std::this_thread::sleep_for(milliseconds(10));
    std::atomic<bool> is_said{false};
    detach([&is_said] {  // A reference will do: this function does not return.
        say(totals());
        is_said = true;
    });
    const Time at_last = Clock::now() + milliseconds(300);
    while (!is_said && Clock::now() < at_last) std::this_thread::sleep_for(milliseconds(1));
    _exit(0);  // No destructors: other threads still run, and would lose the ground under them.
}

// Each query takes a few open files. The usual limit, 1024, may be raised up to a hard one.
static void allow_many_files() {
    rlimit files{};
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
}

int main(int argc, char** argv) {
    try {
        parse_options(argc, argv);

        // These signals are blocked in all threads. sigwait() takes them; nobody takes SIGPIPE.
        sigset_t signals;
        sigemptyset(&signals);
        for (int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGPIPE}) sigaddset(&signals, signal);
        // With nohup(1) SIGHUP is ignored. It is left out, as sigwait() would take it if blocked.
        struct sigaction hangup {};
        sigaction(SIGHUP, nullptr, &hangup);
        if (hangup.sa_handler == SIG_IGN) sigdelset(&signals, SIGHUP);
        pthread_sigmask(SIG_BLOCK, &signals, nullptr);

        allow_many_files();
        save_memory();
        prepare();
        const std::vector<Listener> listeners = open_listeners();
        become_user();
        gain_no_privileges();

        query_permits.set_most(size_t(settings.queries));
        keep_doing(keep_warm);
        for (const Listener& one : listeners) {
            if (one.type == SOCK_DGRAM) keep_doing([one] { serve_udp(one.fd); });
            if (one.type == SOCK_STREAM) keep_doing([one] { serve_tcp(one.fd); });
        }
        const std::string is_ready = ready_line(listeners);
        detach([is_ready] { say(is_ready); });  // as say_totals() does
        notify_service_manager();

        wait_for_end(signals);
        end();
    } catch (const BadOption& e) {
        fprintf(stderr, "dot-proxy: %s\n", e.what());
        return 2;
    } catch (const std::exception& e) {
        fprintf(stderr, "dot-proxy: %s\n", e.what());
        return 1;
    }
}

// main.cpp - how the program runs: options, listeners, threads, signals. main() comes last.
//
// Each UDP listener has a thread that takes queries, and each TCP listener one that takes clients.
// Each TCP client has a thread that reads its queries. A query that is to be forwarded gets a
// thread of its own. One more thread keeps connections ready, and the main thread waits for
// signals.
#include <netinet/tcp.h>
#include <pwd.h>
#include <semaphore.h>
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
    std::string preset;  // what holds without it
    std::function<void(const std::string&)> set;
};

static const std::vector<OptionRow>& option_rows() {
    using Value = const std::string&;
    static Settings& s = settings;
    static const std::vector<OptionRow> rows{
        {'l', "listen", "ADDR[@PORT]", "where to listen, UDP and TCP; repeatable",
         "127.0.0.1@53 ::1@53", [](Value value) { s.listen.push_back(parse_address(value, 53)); }},
        {'u', "upstream", "UPSTREAM", "whom to ask, in this order; repeatable", "cloudflare",
         add_upstream},
        {'c', "ca", "FILE", "certificates to trust; repeatable", "the system's",
         [](Value value) { s.ca.push_back(value); }},
        {'a', "allow", "NETWORK", "who may ask, besides loopback; repeatable", "private networks",
         [](Value value) { s.allow.push_back(parse_network(value)); }},
        {'d', "deny", "NETWORK", "who may not, even if allowed; repeatable", "",
         [](Value value) { s.deny.push_back(parse_network(value)); }},
        {'r', "rate", "N", "queries a second for one client (IPv6: one /64)", "0: no limit",
         [](Value value) { s.rate = parse_number(value, 0, 1000000); }},
        {'n', "queries", "N", "queries in flight at most", std::to_string(Settings().queries),
         [](Value value) { s.queries = parse_number(value, 1, 10000); }},
        {'t', "timeout", "MS", "for a whole query", std::to_string(Settings().timeout),
         [](Value value) { s.timeout = parse_number(value, 1, 60000); }},
        {'k', "ready", "N", "ready connections for an upstream at most; 0: none",
         std::to_string(Settings().ready),
         [](Value value) { s.ready = parse_number(value, 0, 1000); }},
        {'R', "reuse", nullptr, "use a connection for more than one query", "",
         [](Value) { s.reuse = true; }},
        {'m', "max-udp", "N", "longest UDP answer, octets", std::to_string(Settings().max_udp),
         [](Value value) { s.max_udp = parse_number(value, 512, 65535); }},
        {'U', "user", "NAME|UID", "become this user once the sockets are open", "", set_user},
        {'K', "keylog", "FILE", "write TLS secrets there, for Wireshark", "",
         [](Value value) { s.keylog = value; }},
        {'q', "quiet", nullptr, "no line per query", "", [](Value) { s.quiet = true; }},
        {'v', "verbose", nullptr, "the eight steps of every query; -vv adds the octets", "",
         [](Value) { s.verbose++; }},
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

static void set_option_of_user(char letter, const std::string& value) {
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
    settings.allow.push_back(parse_network("127.0.0.0/8"));
    settings.allow.push_back(parse_network("::1"));
}

// Fills the settings. Throws BadOption.
static void parse_options(int argc, char** argv) {
    std::vector<OptionWord> words;
    for (const OptionRow& row : option_rows())
        words.push_back({row.word, row.letter, row.value != nullptr});
    for (;;) {
        const int letter = next_option(argc, argv, words);
        if (letter == -1) break;
        // getopt(3) has said on stderr what is wrong.
        if (letter == '?') throw BadOption("");
        set_option_of_user(char(letter), optarg ? optarg : "");
    }
    if (optind < argc)
        throw BadOption(text("unexpected argument '%.80s'; see --help", argv[optind]));
    set_defaults();
}

// ---- Permits -----------------------------------------------------------------------------------

// A permit to do something of which only so much may go on at a time. Its destructor gives it back.
// Permits bound the threads, memory and handshakes that strangers can cause.
using Permit = std::shared_ptr<sem_t>;

static Permit wait_for(sem_t& permits) {
    while (sem_wait(&permits) != 0) continue;  // It was interrupted.
    return Permit(&permits, sem_post);
}

static Permit take_if_any(sem_t& permits) {
    if (sem_trywait(&permits) != 0) return nullptr;
    return Permit(&permits, sem_post);
}

static sem_t query_permits;   // queries in flight
static sem_t client_permits;  // TCP clients

static std::atomic<int> unanswered{0};      // queries in flight, until their answers have been sent
static std::atomic<bool> is_ending{false};  // No more queries are taken.

// ---- Queries -----------------------------------------------------------------------------------

using Send = std::function<void(const Bytes& answer)>;  // the way back to a client

static void report(const Query& query, const Outcome& outcome) {
    const int rcode = outcome.answer[3] & 0x0f;
    const bool is_error = rcode != NOERROR && rcode != NXDOMAIN;
    count(rcode_name(rcode));
    count(outcome.is_resolvers ? "success" : "failure");
    if (!outcome.is_resolvers) count("failure:" + outcome.detail);
    if (settings.quiet) return;
    const char* result = "SUCCESS";
    if (is_error) result = "ANSWERED";
    if (!outcome.is_resolvers) result = "FAILURE";
    const std::chrono::duration<double, std::milli> took = Clock::now() - query.taken;
    say(text("%s %s %s %s %zu octets %.1f ms%s %s", result, query.tcp ? "tcp" : "udp",
             type_name(query.layout.type).c_str(), rcode_name(rcode).c_str(), outcome.answer.size(),
             took.count(), outcome.is_resolvers ? "" : ":", outcome.detail.c_str()));
}

static void tell_of_answer(const Query& query, const Bytes& answer) {
    if (settings.verbose == 0) return;
    const bool is_cut = answer[2] & 0x02;
    query.tell(8,
               rcode_name(answer[3] & 0x0f) + text(", %zu octets", answer.size()) +
                   (is_cut ? ", TC: there is more" : ""),
               answer);
}

// Answers a query that is not forwarded.
static void answer_here(const Query& query, const Verdict& verdict, const Send& send) {
    Bytes answer = reply(query, verdict.rcode);
    if (verdict.action == Action::truncate) answer = truncated_reply(query);
    tell_of_answer(query, answer);
    send(answer);
    const bool is_no_error = verdict.action == Action::answer && verdict.rcode == NOERROR;
    if (!is_no_error) report(query, {answer, false, verdict.reason});
}

// Has a query answered by an upstream, in threads of its own.
static void forward(std::shared_ptr<const Query> query, Permit permit, const Send& send) {
    int left = 0;
    sem_getvalue(&query_permits, &left);
    count_highest("in_flight_most", settings.queries - left);
    unanswered++;
    std::shared_ptr<void> in_flight(nullptr, [](void*) { unanswered--; });
    const Query& asked = *query;
    resolve(std::move(query), [=, &asked](const Outcome& outcome) mutable {
        guard([&] { tell_of_answer(asked, outcome.answer); });
        // A TCP client may be slow to read. It must not keep a permit meanwhile that others need.
        if (asked.tcp) permit.reset();
        send(outcome.answer);
        guard([&] { report(asked, outcome); });
        permit.reset();
        in_flight.reset();
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
static bool take(const Bytes& octets, bool tcp, const Address& client, const Send& send) {
    count(tcp ? "tcp" : "udp");
    const auto query = std::make_shared<const Query>(octets, tcp);
    query->tell(1, text("%zu octets over %s", octets.size(), tcp ? "TCP" : "UDP"), octets);

    Verdict verdict = judge(*query);
    const bool is_ignored = verdict.action == Action::ignore;
    if (!is_ignored && over_rate(client, tcp)) {
        // Over UDP with TC: a real client comes back over TCP, and a forged one gets no more octets
        // than it sent.
        verdict = {tcp ? Action::answer : Action::truncate, tcp ? REFUSED : NOERROR,
                   "over the rate"};
    }
    query->tell(2, verdict.reason);
    if (is_ignored) return false;
    if (verdict.action != Action::forward) {
        answer_here(*query, verdict, send);
        return true;
    }

    // A TCP client can wait for a permit: it sends no more meanwhile. Over UDP there is nothing to
    // wait in.
    Permit permit = tcp ? wait_for(query_permits) : take_if_any(query_permits);
    if (!permit || is_ending) {
        answer_here(*query, {Action::answer, SERVFAIL, "too many queries in flight"}, send);
        return true;
    }
    forward(query, std::move(permit), send);
    return true;
}

// ---- UDP ---------------------------------------------------------------------------------------

// A datagram, and the way back to where it came from.
struct Datagram {
    // Waits for the next one. Its octets go into `buffer`.
    Datagram(int fd, Bytes& buffer) : fd(fd) {
        iovec whole{buffer.data(), buffer.size()};
        msghdr header = header_of(whole);
        header.msg_controllen = sizeof control;
        size = recvmsg(fd, &header, 0);
        keep_asked_address_only(header);
        control_size = header.msg_controllen;
    }

    void answer(Bytes message) {
        iovec whole{message.data(), message.size()};
        const msghdr header = header_of(whole);
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
    ssize_t size = 0;                   // in octets; negative: there was an error
    alignas(cmsghdr) char control[64];  // which of our addresses was asked
    size_t control_size = 0;
};

static void serve_udp(int fd) {
    Bytes buffer(longest_message);
    for (;;) {
        const auto datagram = std::make_shared<Datagram>(fd, buffer);  // [1]
        if (datagram->size < 0) continue;
        if (!may_ask(datagram->client)) {
            tell_of_refusal(datagram->client, false);
            continue;
        }
        const Bytes octets(buffer.begin(), buffer.begin() + datagram->size);
        take(octets, false, datagram->client,  // [2], and a thread for it
             [datagram](const Bytes& answer) { datagram->answer(answer); });
    }
}

// ---- TCP ---------------------------------------------------------------------------------------

// A TCP client. Its thread and its queries share it; the last of them closes the stream.
struct Client {
    Client(int fd, const Address& address, Permit permit, std::shared_ptr<int> of_host)
        : fd(fd), address(address), permit(std::move(permit)), of_host(std::move(of_host)) {
        sem_init(&in_flight, 0, 8);
    }
    ~Client() { close(fd); }

    void answer(const Bytes& message) {
        const Bytes framed = frame(message);
        std::lock_guard lock(writing);
        const ssize_t sent = send(fd, framed.data(), framed.size(), MSG_NOSIGNAL);
        // It is gone, or did not take an answer in time.
        if (sent != ssize_t(framed.size())) shutdown(fd, SHUT_RDWR);
    }

    const int fd;
    const Address address;
    const Permit permit;
    const std::shared_ptr<int> of_host;  // shared by the clients of its host, to count them
    sem_t in_flight;                     // permits for so many of its queries
    std::mutex writing;                  // guards the order of octets
};

static void serve_client(const std::shared_ptr<Client>& client) {
    for (;;) {
        const Permit permit = wait_for(client->in_flight);
        const std::optional<Bytes> octets = read_frame(client->fd);  // [1]
        if (!octets) return;
        // The lambda holds the permit until the answer has been sent.
        const auto send = [client, permit](const Bytes& answer) { client->answer(answer); };
        if (!take(*octets, true, client->address, send)) return;  // [2], and a thread for it
    }
}

static void serve_tcp(int listener) {
    constexpr long most_of_a_host = 64;
    std::map<std::string, std::shared_ptr<int>> hosts;  // those that have clients
    for (;;) {
        Permit permit = wait_for(client_permits);  // Others wait in the backlog.
        Address address;
        socklen_t size = sizeof address;
        const int fd = accept4(listener, &address.any, &size, SOCK_CLOEXEC);
        if (fd < 0) {  // There are too many open files, for example. Some will be closed.
            std::this_thread::sleep_for(milliseconds(20));
            continue;
        }
        // RFC 7766 6.2.3. On Linux a limit holds for all the waits of one call, so that a client
        // which sends or takes an octet now and then gains nothing.
        set_option(fd, SOL_SOCKET, SO_RCVTIMEO, timeval{10, 0});
        set_option(fd, SOL_SOCKET, SO_SNDTIMEO, timeval{3, 0});
        set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);

        std::erase_if(hosts, [](const auto& host) { return host.second.use_count() == 1; });
        std::shared_ptr<int>& of_host = hosts[host_of(address)];
        if (!of_host) of_host = std::make_shared<int>();
        const bool are_too_many = of_host.use_count() > most_of_a_host;  // The map has one use.
        const auto client = std::make_shared<Client>(fd, address, std::move(permit), of_host);
        if (!may_ask(address)) {
            tell_of_refusal(address, true);
        } else if (are_too_many) {
            count("denied");
        } else {
            detach([client] { serve_client(client); });
        }
    }
}

// ---- Listeners ---------------------------------------------------------------------------------

struct Listener {
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
    const std::string elsewhere = address.port() == 5300 ? "5353" : "5300";
    const std::string advice = "; try --listen 127.0.0.1@" + elsewhere;
    switch (error) {
        case EADDRINUSE:
            return "port " + port + " is taken" + advice;
        case EACCES:
            return "port " + port + " is not allowed" + advice;
        case EADDRNOTAVAIL:
            return address.host() + " is not an address of this host" + advice;
    }
    return "cannot listen on " + address.str() + advice;
}

// Opens a socket for the life of the process. Throws std::system_error that says what to do.
static int open_listener(const Address& address, int type) {
    const int fd = socket(address.any.sa_family, type | SOCK_CLOEXEC, 0);
    if (type == SOCK_STREAM) set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    // A burst waits in this buffer, not in threads. In octets.
    if (type == SOCK_DGRAM) set_option(fd, SOL_SOCKET, SO_RCVBUF, 1 << 20);
    if (!address.is_v4()) {
        set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
        allow_absent_address(fd);
    }
    ask_for_asked_address(fd, address.is_v4());  // RFC 2181 4: the answer is to leave from there.
    const bool is_bound = bind(fd, &address.any, address.size()) == 0;
    if (is_bound && (type == SOCK_DGRAM || listen(fd, SOMAXCONN) == 0)) return fd;
    const int error = fd < 0 ? EAFNOSUPPORT : errno;
    close(fd);
    throw std::system_error(error, std::generic_category(), why_not_bound(address, error));
}

static std::vector<Listener> open_listeners() {
    std::vector<Listener> listeners;
    for (const Address& address : settings.listen) {
        try {
            for (int type : {SOCK_DGRAM, SOCK_STREAM})
                listeners.push_back({open_listener(address, type), type});
        } catch (const std::system_error& e) {
            // A host without IPv6 is served without it, if there is another address.
            const int error = e.code().value();
            const bool is_missing = error == EAFNOSUPPORT || error == EADDRNOTAVAIL;
            if (address.is_v4() || !is_missing || settings.listen.size() == 1) throw;
            fprintf(stderr, "dot-proxy: warning: nobody listens on %s: %s\n", address.str().c_str(),
                    strerror(error));
            continue;
        }
        if (!address.is_v4() && !is_own_address(address))
            fprintf(stderr, "dot-proxy: warning: %s is not an address of this host yet\n",
                    address.host().c_str());
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

static std::string ready_line() {
    std::string places;
    for (const Address& address : settings.listen) {
        if (!places.empty()) places += ", ";
        places += address.str();
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

// In a thread of its own that works for ever. If something is thrown it begins again.
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
// 3.5 s at most.
[[noreturn]] static void end() {
    is_ending = true;
    const Time until = Clock::now() + milliseconds(3500);
    while (unanswered > 0 && Clock::now() < until) std::this_thread::sleep_for(milliseconds(10));
    std::atomic<bool> is_said{false};
    detach([&] {
        say(totals());
        is_said = true;
    });
    const Time at_last = Clock::now() + milliseconds(300);
    while (!is_said && Clock::now() < at_last) std::this_thread::sleep_for(milliseconds(1));
    _exit(0);  // No destructors: other threads still run, and would lose the ground under them.
}

int main(int argc, char** argv) {
    try {
        parse_options(argc, argv);

        // Signals wait for sigwait() in all threads. SIGPIPE waits for ever.
        sigset_t signals;
        sigemptyset(&signals);
        for (int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGPIPE}) sigaddset(&signals, signal);
        pthread_sigmask(SIG_BLOCK, &signals, nullptr);

        save_memory();
        prepare();
        const std::vector<Listener> listeners = open_listeners();
        become_user();
        give_up_new_privileges();

        sem_init(&query_permits, 0, unsigned(settings.queries));
        sem_init(&client_permits, 0, 256);
        keep_doing(keep_warm);
        for (const auto& [fd, type] : listeners) {
            if (type == SOCK_DGRAM) keep_doing([fd = fd] { serve_udp(fd); });
            if (type == SOCK_STREAM) keep_doing([fd = fd] { serve_tcp(fd); });
        }
        detach([] { say(ready_line()); });
        notify_service_manager();

        wait_for_end(signals);
        end();
    } catch (const BadOption& e) {
        if (*e.what()) fprintf(stderr, "dot-proxy: %s\n", e.what());
        return 2;
    } catch (const std::exception& e) {
        fprintf(stderr, "dot-proxy: %s\n", e.what());
        return 1;
    }
}

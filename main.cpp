// main.cpp - how the program runs: options, listeners, threads, signals; main comes last.
//
// One thread for each UDP socket, one for each TCP listener, one for each TCP client, and a detached
// one for each query. The main thread waits for signals. Slots bound all that strangers can start.
#include <getopt.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>

#include "dot.hpp"

using namespace dot;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr const char* version = "0.1";
constexpr seconds idle_limit{10};          // for a TCP client to send a whole query, RFC 7766 6.2.3
constexpr seconds grace{3};                // for the queries in flight when the program is to end
constexpr int most_clients = 256;          // TCP
constexpr int most_queries_of_client = 32;  // in flight, on one TCP connection

// ---- Options -----------------------------------------------------------------------------------

struct Settings {
    std::vector<std::string> listen{"127.0.0.1", "::1"}, upstreams{"cloudflare"};
    std::string ca;
    int queries = 512, timeout = 4000, max_udp = 1232;
    bool quiet = false;
    int ready = 64;
    bool reuse = false;
    int verbosity = 0;
    Policy policy() const {
        return {size_t(max_udp), size_t(ready), reuse, milliseconds(timeout)};
    }
};

static void print_help() {
    const Settings d;
    printf(R"(dot-proxy [options]
  -l, --listen ADDR[@PORT]     where to listen, UDP and TCP; repeatable        [%s@53 %s@53]
  -u, --upstream UPSTREAM      whom to ask, in this order; repeatable          [%s]
                               cloudflare | google | quad9, or ADDR[@PORT]#NAME[,pin-sha256=BASE64]...
  -c, --ca FILE                certificates to trust                           [the system's]
  -n, --queries N              queries in flight at most                       [%d]
  -t, --timeout MS             for a whole query                               [%d]
  -k, --ready N                ready connections kept for an upstream at most  [%d], 0: open one when asked
  -R, --reuse                  use a connection for more than one query
  -m, --max-udp N              longest UDP answer, octets                      [%d]
  -q, --quiet                  no line per query
  -v, --verbose                the eight steps of every query; -vv adds the octets, annotated
  -h, --help   -V, --version
)",
           d.listen[0].c_str(), d.listen[1].c_str(), d.upstreams[0].c_str(), d.queries, d.timeout,
           d.ready, d.max_udp);
}

// nullopt: what was asked for is printed. Throws BadOption; getopt itself tells of unknown options.
static std::optional<Settings> parse_options(int argc, char** argv) {
    static const option long_options[] = {
        {"listen", 1, nullptr, 'l'},  {"upstream", 1, nullptr, 'u'}, {"ca", 1, nullptr, 'c'},
        {"queries", 1, nullptr, 'n'}, {"timeout", 1, nullptr, 't'},  {"max-udp", 1, nullptr, 'm'},
        {"ready", 1, nullptr, 'k'},   {"reuse", 0, nullptr, 'R'},
        {"quiet", 0, nullptr, 'q'},   {"verbose", 0, nullptr, 'v'},  {"help", 0, nullptr, 'h'},
        {"version", 0, nullptr, 'V'}, {}};
    Settings s;
    std::vector<std::string> listen, upstreams;
    for (int c; (c = getopt_long(argc, argv, "l:u:c:n:t:k:Rm:qvhV", long_options, nullptr)) != -1;) {
        switch (c) {
            case 'l': listen.push_back(optarg); break;
            case 'u': upstreams.push_back(optarg); break;
            case 'c': s.ca = optarg; break;
            case 'n': s.queries = parse_number(optarg, 1, 10000, "--queries"); break;
            case 't': s.timeout = parse_number(optarg, 1, 60000, "--timeout"); break;
            case 'm': s.max_udp = parse_number(optarg, 512, 65535, "--max-udp"); break;
            case 'k': s.ready = parse_number(optarg, 0, 1000, "--ready"); break;
            case 'R': s.reuse = true; break;
            case 'q': s.quiet = true; break;
            case 'v': s.verbosity++; break;
            case 'h': print_help(); return std::nullopt;
            case 'V': printf("dot-proxy %s\n", version); return std::nullopt;
            default: throw BadOption("");
        }
    }
    if (optind < argc) throw BadOption(text("unexpected argument '%s'", argv[optind]));
    if (!listen.empty()) s.listen = listen;
    if (!upstreams.empty()) s.upstreams = upstreams;
    return s;
}

// ---- Listeners ---------------------------------------------------------------------------------

// A bound socket, for the life of the process. Throws runtime_error that says what to do.
static int open_listener(const Address& address, int type) {
    const int one = 1, fd = socket(address.any.sa_family, type | SOCK_CLOEXEC, 0);
    const bool six = address.any.sa_family == AF_INET6;
    if (six) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
    if (type == SOCK_STREAM) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    } else {  // RFC 2181 4: the answer leaves from the address that was asked
        setsockopt(fd, six ? IPPROTO_IPV6 : IPPROTO_IP, six ? IPV6_RECVPKTINFO : IP_PKTINFO, &one,
                   sizeof one);
        const int buffer = 1 << 20;
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
    }
    if (fd >= 0 && bind(fd, &address.any, address.size()) == 0 &&
        (type != SOCK_STREAM || listen(fd, SOMAXCONN) == 0))
        return fd;
    const int error = errno;
    const int port = ntohs(address.v4.sin_port);
    throw std::system_error(error, std::generic_category(),
                            error == EADDRINUSE || error == EACCES
                                ? text("%s: port %d is %s; try --listen 127.0.0.1@5300",
                                       address.str().c_str(), port,
                                       error == EACCES ? "not permitted" : "taken")
                                : address.str());
}

// ---- Threads -----------------------------------------------------------------------------------

using Send = std::function<void(const Bytes&)>;  // an answer to its client, by any thread

struct TcpClient {
    TcpClient(int fd, Slots::Permit permit) : fd(fd), permit(std::move(permit)) {}
    Fd fd;
    Slots::Permit permit;
    Slots in_flight{most_queries_of_client};
    std::mutex writing;  // guards the order of octets to fd
};

// What a thread that answers a TCP query holds. The slot goes first: it is a part of the client.
struct Turn {
    std::shared_ptr<TcpClient> client;
    std::shared_ptr<Slots> slot;
};

// Where a UDP query came from, and in `control` which of our addresses it asked.
struct Sender {
    sockaddr_storage address;
    alignas(cmsghdr) char control[64];
    msghdr header;
};

// Runs `work` in a thread of its own. false: the system has no room for one more.
template <class Work>
static bool detach(Work work) {
    try {
        std::thread([work = std::move(work)]() mutable {
            try {
                work();
            } catch (const std::exception& e) {  // no thread can end the process
                say(text("FAILURE thread: %s", e.what()));
            }
        }).detach();
        return true;
    } catch (const std::system_error&) {
        return false;
    }
}

class Server {
public:
    Server(const Settings& settings, Ctx ctx, Upstreams upstreams)
        : settings_(settings), queries_(settings.queries),
          resolver_(std::move(ctx), std::move(upstreams), settings.policy()) {}

    [[noreturn]] void serve_udp(int fd) {
        Bytes buffer(longest_message);
        for (;;) {
            auto sender = std::make_shared<Sender>();
            iovec octets{buffer.data(), buffer.size()};
            sender->header = {&sender->address, sizeof sender->address, &octets, 1,
                              sender->control, sizeof sender->control, 0};
            const ssize_t size = recvmsg(fd, &sender->header, 0);
            if (size < 0) continue;  // an ICMP error for an answer sent before; nothing to do
            take({buffer.begin(), buffer.begin() + size}, false, [fd, sender](Bytes answer) {
                iovec octets{answer.data(), answer.size()};
                msghdr header = sender->header;
                header.msg_iov = &octets;
                // UDP may lose an answer, as when a buffer is full: the client asks again.
                (void)!sendmsg(fd, &header, MSG_DONTWAIT);
            });
        }
    }

    [[noreturn]] void serve_tcp(int listener) {
        for (;;) {
            Slots::Permit permit = clients_.take(Time::max());  // until then they wait in the backlog
            const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
            if (fd < 0) {  // out of open files, say: others will be closed
                std::this_thread::sleep_for(milliseconds(20));
                continue;
            }
            auto client = std::make_shared<TcpClient>(fd, std::move(permit));
            const int one = 1;
            const timeval limit{idle_limit.count(), 0};  // for one whole send()
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
            detach([this, client] { serve_client(client); });
        }
    }

    [[noreturn]] void tend() { resolver_.tend(); }

    void print_totals() {
        say(text("TOTALS udp=%u tcp=%u success=%u failure=%u", udp_.load(), tcp_.load(),
                 good_.load(), bad_.load()));
    }

    // Returns when no query is in flight, or after the time of grace.
    void stop() {
        stopping_ = true;
        queries_.all_free(Clock::now() + grace);
        print_totals();
    }

private:
    void serve_client(const std::shared_ptr<TcpClient>& client) {
        while (auto message = read_frame(client->fd.number, Clock::now() + idle_limit)) {
            if (message->size() < header_size) return;  // this stream is out of step
            const Turn turn{client, client->in_flight.take(Time::max())};
            take(std::move(*message), true, [turn](const Bytes& answer) {
                const Bytes framed = frame(answer);
                std::lock_guard lock(turn.client->writing);
                const int fd = turn.client->fd.number;
                if (send(fd, framed.data(), framed.size(), MSG_NOSIGNAL) != ssize_t(framed.size()))
                    shutdown(fd, SHUT_RDWR);  // gone, or it does not read: this stream is cut
            });
        }
    }

    // [1] and [2] in the thread that received the query; the other steps in one of their own.
    void take(Bytes octets, bool tcp, const Send& send) {
        if (stopping_) return;
        ++(tcp ? tcp_ : udp_);
        auto query = std::make_shared<Query>();
        query->layout = parse(octets);
        query->octets = std::move(octets);
        query->tcp = tcp;
        query->verbosity = settings_.verbosity;
        query->number = ++taken_;
        query->deadline = query->taken + milliseconds(settings_.timeout);
        query->tell(1, text("%zu octets over %s", query->octets.size(), tcp ? "TCP" : "UDP"));
        query->show("query", query->octets);
        const Verdict verdict = judge(*query);
        query->tell(2, verdict.why);
        if (verdict.action == Verdict::Silence) return;
        if (verdict.action == Verdict::Answer)
            return finish(*query, send, {reply(*query, verdict.rcode), false, verdict.why});
        // A TCP client can wait, and then sends no more. A UDP query is never silently lost.
        Slots::Permit permit = queries_.take(tcp ? query->deadline : Time{});
        if (!permit || !detach([this, query, send, permit = std::move(permit)]() mutable {
                Outcome outcome = resolver_.resolve(*query);
                finish(*query, send, outcome);
                permit.reset();
                resolver_.restock(std::move(outcome));
            }))
            finish(*query, send, {reply(*query, SERVFAIL, 0), false, "too many queries in flight"});
    }

    void finish(const Query& query, const Send& send, const Outcome& outcome) {
        send(outcome.octets);
        ++(outcome.good ? good_ : bad_);
        if (settings_.quiet) return;
        say(text("%s %s %s %s %zu octets %.1f ms%s %s", outcome.good ? "SUCCESS" : "FAILURE",
                 query.tcp ? "tcp" : "udp", type_name(query.type()).c_str(),
                 rcode_name(outcome.octets[3] & 15).c_str(), outcome.octets.size(),
                 ms(Clock::now() - query.taken), outcome.good ? "" : ":", outcome.detail.c_str()));
    }

    const Settings settings_;
    Slots queries_, clients_{most_clients};
    Resolver resolver_;
    std::atomic<bool> stopping_{false};
    std::atomic<unsigned> taken_{0}, udp_{0}, tcp_{0}, good_{0}, bad_{0};
};

// ---- main --------------------------------------------------------------------------------------

static int run(const Settings& settings) {
    Ctx ctx = tls_context(settings.ca);
    Upstreams upstreams;
    for (auto& one : settings.upstreams) add_upstream(upstreams, one);
    std::vector<Address> addresses;
    for (auto& one : settings.listen) addresses.push_back(parse_address(one, 53));
    rlimit files{};
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);  // if not, there are as many as there were
    }
    // For the life of the process: threads still use it when main returns.
    static Server server(settings, std::move(ctx), std::move(upstreams));
    std::vector<std::pair<int, int>> sockets;
    for (auto& address : addresses)
        sockets.emplace_back(open_listener(address, SOCK_DGRAM), open_listener(address, SOCK_STREAM));
    sigset_t signals;
    sigemptyset(&signals);
    for (int wanted : {SIGTERM, SIGINT, SIGUSR1}) sigaddset(&signals, wanted);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    signal(SIGPIPE, SIG_IGN);
    std::thread([] { server.tend(); }).detach();
    for (auto [udp, tcp] : sockets) {
        std::thread([udp = udp] { server.serve_udp(udp); }).detach();
        std::thread([tcp = tcp] { server.serve_tcp(tcp); }).detach();
    }
    for (int caught = 0; caught != SIGTERM && caught != SIGINT;)
        if (sigwait(&signals, &caught) == 0 && caught == SIGUSR1) server.print_totals();
    server.stop();
    _exit(0);  // no destructors: listeners and clients still run
}

int main(int argc, char** argv) {
    try {
        const auto settings = parse_options(argc, argv);
        return settings ? run(*settings) : 0;
    } catch (const BadOption& e) {
        if (*e.what()) fprintf(stderr, "dot-proxy: %s\n", e.what());
        return 2;
    } catch (const std::exception& e) {
        fprintf(stderr, "dot-proxy: %s\n", e.what());
        return 1;
    }
}

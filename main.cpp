// main.cpp - how the program runs: options, listeners, threads, signals; main comes last.
//
// One thread for each UDP socket, one for each TCP listener, one for each TCP client, and a
// detached one for each query. The main thread waits for signals. Slots bound what strangers start.
#include <getopt.h>
#include <malloc.h>
#include <netinet/tcp.h>
#include <semaphore.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <functional>
#include <mutex>
#include <thread>

#include "dot.hpp"

using namespace dot;

const Settings defaults{{"127.0.0.1@53", "::1@53"}, {"cloudflare"}, {}};

constexpr seconds idle_limit{10};  // for a TCP client to send a whole query, RFC 7766 6.2.3
constexpr seconds grace{3};        // for the queries in flight when the program is to end
constexpr int most_clients = 256;  // TCP
constexpr int most_queries_of_client = 32;  // in flight, on one TCP connection

// ---- Options -----------------------------------------------------------------------------------

static void print_help() {
    printf(R"(dot-proxy [options]
  -l, --listen ADDR[@PORT]     where to listen, UDP and TCP; repeatable        [%s %s]
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
)", defaults.listen[0].c_str(), defaults.listen[1].c_str(), defaults.upstreams[0].c_str(),
           defaults.queries, defaults.timeout, defaults.ready, defaults.max_udp);
}

// Throws BadOption; of unknown options getopt itself tells.
static Settings parse_options(int argc, char** argv) {
    static const option words[] = {
        {"listen", 1, nullptr, 'l'}, {"upstream", 1, nullptr, 'u'}, {"ca", 1, nullptr, 'c'},
        {"queries", 1, nullptr, 'n'}, {"timeout", 1, nullptr, 't'}, {"ready", 1, nullptr, 'k'},
        {"reuse", 0, nullptr, 'R'}, {"max-udp", 1, nullptr, 'm'}, {"quiet", 0, nullptr, 'q'},
        {"verbose", 0, nullptr, 'v'}, {"help", 0, nullptr, 'h'}, {"version", 0, nullptr, 'V'}, {}};
    Settings s;
    for (int c; (c = getopt_long(argc, argv, "l:u:c:n:t:k:Rm:qvhV", words, nullptr)) != -1;) {
        switch (c) {
            case 'l': s.listen.push_back(optarg); break;
            case 'u': s.upstreams.push_back(optarg); break;
            case 'c': s.ca.push_back(optarg); break;
            case 'n': s.queries = parse_number(optarg, 1, 10000, "--queries"); break;
            case 't': s.timeout = parse_number(optarg, 1, 60000, "--timeout"); break;
            case 'k': s.ready = parse_number(optarg, 0, 1000, "--ready"); break;
            case 'm': s.max_udp = parse_number(optarg, 512, 65535, "--max-udp"); break;
            case 'R': s.reuse = true; break;
            case 'q': s.quiet = true; break;
            case 'v': ++s.verbose; break;
            case 'h': print_help(); exit(0);
            case 'V': puts("dot-proxy 0.1"); exit(0);
            default: throw BadOption("");
        }
    }
    if (optind < argc) throw BadOption(text("unexpected argument '%s'", argv[optind]));
    if (s.listen.empty()) s.listen = defaults.listen;
    if (s.upstreams.empty()) s.upstreams = defaults.upstreams;
    return s;
}

// ---- Listeners ---------------------------------------------------------------------------------

// A bound socket, for the life of the process. Throws system_error that says what to do.
static int open_listener(const Address& address, int type) {
    const bool tcp = type == SOCK_STREAM, six = address.any.sa_family == AF_INET6;
    const int fd = socket(address.any.sa_family, type | SOCK_CLOEXEC, 0);
    if (tcp) set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    else set_option(fd, SOL_SOCKET, SO_RCVBUF, 1 << 20);
    if (six) set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
    // Which of our addresses was asked, for the answer to leave from it: RFC 2181 4.
    set_option(fd, six ? IPPROTO_IPV6 : IPPROTO_IP, six ? IPV6_RECVPKTINFO : IP_PKTINFO, 1);
    const bool bound = bind(fd, &address.any, address.size()) == 0;
    if (bound && (!tcp || listen(fd, SOMAXCONN) == 0)) return fd;
    const int error = fd < 0 ? EAFNOSUPPORT : errno, port = ntohs(address.v4.sin_port);
    const char* fault = error == EADDRINUSE ? "taken" : error == EACCES ? "not allowed" : "no use";
    throw std::system_error(error, std::generic_category(), text(
        "port %d is %s; try --listen 127.0.0.1@5300", port, fault));
}

// ---- Threads -----------------------------------------------------------------------------------

// A counted permit is taken before a thread starts and given back by its destructor. That bounds
// threads, memory and the handshakes strangers can cause, and tells when the last thread is done.
struct GiveBack { void operator()(sem_t* slots) const { sem_post(slots); } };
using Permit = std::unique_ptr<sem_t, GiveBack>;

static Permit take_slot(sem_t& slots, bool wait) {  // empty: there is none now
    return Permit((wait ? sem_wait(&slots) : sem_trywait(&slots)) == 0 ? &slots : nullptr);
}

static sem_t query_slots, client_slots;
static std::atomic<bool> stopping{false};
static std::atomic<unsigned> taken[2], ended[2];  // over UDP and TCP; badly and well

// No thread can end the process, even if memory runs out.
static void guard(auto work) try {
    work();
} catch (const std::exception& e) {
    say(text("FAILURE thread: %s", e.what()));
}

// Runs `work` in a thread of its own. false: the system has no room for one more.
static bool detach(auto work) try {
    std::thread([work = std::move(work)]() mutable { guard(std::move(work)); }).detach();
    return true;
} catch (const std::system_error&) {
    return false;
}

using Send = std::function<void(const Bytes&)>;  // an answer to its client, by any thread

static bool finish(const Query& query, const Send& send, const Outcome& outcome) {
    ++ended[outcome.good];
    send(outcome.octets);
    if (settings.quiet) return true;
    say(text("%s %s %s %s %zu octets %.1f ms%s %s", outcome.good ? "SUCCESS" : "FAILURE",
             query.tcp ? "tcp" : "udp", type_name(query.type()).c_str(),
             rcode_name(outcome.octets[3] & 15).c_str(), outcome.octets.size(),
             ms(Clock::now() - query.taken), outcome.good ? "" : ":", outcome.detail.c_str()));
    return true;
}

// [1] and [2] in the thread that received the query; the other steps in one of their own.
// false: there will be no answer.
static bool take(Bytes octets, bool tcp, const Send& send) {
    if (stopping) return false;
    ++taken[tcp];
    auto query = std::make_shared<Query>(std::move(octets), tcp, settings.verbose,
                                         settings.timeout);
    const char* transport = tcp ? "TCP" : "UDP";
    query->tell(1, [&] { return text("%zu octets over %s", query->octets.size(), transport); });
    query->show("query", query->octets);
    const Verdict verdict = judge(*query);
    query->tell(2, [&] { return verdict.why; });
    if (verdict.rcode == silence) return false;
    if (verdict.rcode != forward)
        return finish(*query, send, {reply(*query, verdict.rcode), false, verdict.why});
    // A TCP client can wait, and then sends no more. A UDP query is never silently lost.
    Permit permit = take_slot(query_slots, tcp);
    if (permit && detach([query, send, permit = std::move(permit)]() mutable {
            Outcome outcome = resolve(*query);
            finish(*query, send, outcome);
            permit.reset();
            restock(std::move(outcome));
        }))
        return true;
    return finish(*query, send, {reply(*query, SERVFAIL, 0), false, "too many queries in flight"});
}

// Where a UDP query came from, and in `control` which of our addresses it asked.
struct Sender {
    sockaddr_storage address;
    alignas(cmsghdr) char control[64];
    msghdr header;
};

static void serve_udp(int fd) {
    for (Bytes buffer(longest_message);;) {
        auto sender = std::make_shared<Sender>();
        iovec octets{buffer.data(), buffer.size()};
        sender->header = {&sender->address, sizeof sender->address, &octets, 1,
                          sender->control, sizeof sender->control, 0};
        const ssize_t size = recvmsg(fd, &sender->header, 0);
        if (size < 0) continue;  // an ICMP error for an answer sent before; nothing to do
        take({buffer.begin(), buffer.begin() + size}, false, [fd, sender](Bytes answer) {
            iovec octets{answer.data(), answer.size()};
            sender->header.msg_iov = &octets;
            // UDP may lose an answer, as when a buffer is full: the client asks again.
            (void)!sendmsg(fd, &sender->header, MSG_DONTWAIT);
        });
    }
}

struct TcpClient {
    TcpClient(int fd, Permit permit) : fd(fd), permit(std::move(permit)) {}
    ~TcpClient() { close(fd); }
    const int fd;
    const Permit permit;
    sem_t in_flight;     // slots
    std::mutex writing;  // guards the order of octets to fd
};

static void serve_client(const std::shared_ptr<TcpClient>& client) {
    while (auto message = read_frame(client->fd, Clock::now() + idle_limit)) {
        sem_wait(&client->in_flight);
        const bool in_step = take(std::move(*message), true, [client](const Bytes& answer) {
            const Bytes framed = frame(answer);
            std::lock_guard lock(client->writing);
            const ssize_t sent = send(client->fd, framed.data(), framed.size(), MSG_NOSIGNAL);
            if (sent != ssize_t(framed.size()))
                shutdown(client->fd, SHUT_RDWR);  // gone, or it does not read: this stream is cut
            sem_post(&client->in_flight);
        });
        if (!in_step) return;
    }
}

static void serve_tcp(int listener) {
    for (;;) {
        Permit permit = take_slot(client_slots, true);  // until then they wait in the backlog
        const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (fd < 0) {  // out of open files, say: others will be closed
            std::this_thread::sleep_for(milliseconds(20));
            continue;
        }
        auto client = std::make_shared<TcpClient>(fd, std::move(permit));
        sem_init(&client->in_flight, 0, most_queries_of_client);
        const timeval limit{idle_limit.count(), 0};  // on Linux, for one whole send()
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
        detach([client] { serve_client(client); });
    }
}

static void print_totals() {
    say(text("TOTALS udp=%u tcp=%u success=%u failure=%u", taken[0].load(), taken[1].load(),
             ended[true].load(), ended[false].load()));
}

// ---- main --------------------------------------------------------------------------------------

static int run() {
    sigset_t signals{};
    for (int wanted : {SIGTERM, SIGINT, SIGUSR1}) sigaddset(&signals, wanted);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    signal(SIGPIPE, SIG_IGN);
    mallopt(M_ARENA_MAX, 2);  // glibc would keep eight for each core, each as large as its peak
    prepare();
    std::vector<Address> addresses;
    for (auto& one : settings.listen) addresses.push_back(parse_address(one, 53));
    rlimit files{};
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);  // if it fails, there are as many as there were
    std::vector<int> udp, tcp;
    for (auto& address : addresses) try {
        udp.push_back(open_listener(address, SOCK_DGRAM));
        tcp.push_back(open_listener(address, SOCK_STREAM));
    } catch (const std::system_error& e) {  // a host without IPv6 is served without it
        const int error = e.code().value();
        const bool none = error == EAFNOSUPPORT || error == EADDRNOTAVAIL;
        if (!none || address.any.sa_family != AF_INET6 || addresses.size() == 1) throw;
        say("no IPv6 here: " + address.str() + " is left out");
    }
    sem_init(&query_slots, 0, unsigned(settings.queries));
    sem_init(&client_slots, 0, most_clients);
    auto forever = [](auto work) { std::thread([=] { for (;;) guard(work); }).detach(); };
    forever([] { tend(); });
    for (int fd : udp) forever([fd] { serve_udp(fd); });
    for (int fd : tcp) forever([fd] { serve_tcp(fd); });
    for (int caught = 0; caught != SIGTERM && caught != SIGINT;)
        if (sigwait(&signals, &caught) == 0 && caught == SIGUSR1) print_totals();
    stopping = true;
    const Time until = Clock::now() + grace;
    for (int free = 0; free < settings.queries && Clock::now() < until;
         sem_getvalue(&query_slots, &free))
        std::this_thread::sleep_for(milliseconds(5));
    print_totals();
    _exit(0);  // no destructors: listeners and clients still run
}

int main(int argc, char** argv) try {
    settings = parse_options(argc, argv);
    return run();
} catch (const std::exception& e) {
    if (*e.what()) fprintf(stderr, "dot-proxy: %s\n", e.what());
    return dynamic_cast<const BadOption*>(&e) ? 2 : 1;
}

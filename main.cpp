// main.cpp - how the program runs: options, listeners, threads, signals; main comes last.
//
// One thread for each UDP socket, one for each TCP listener, one for each TCP client, and a detached
// one for each query. The main thread waits for signals. Slots bound all that strangers can start.
#include <getopt.h>
#include <malloc.h>
#include <netinet/tcp.h>
#include <semaphore.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <variant>

#include "dot.hpp"

using namespace dot;
using std::chrono::milliseconds;
using std::chrono::seconds;
using Strings = std::vector<std::string>;

const Strings default_listen{"127.0.0.1@53", "::1@53"}, default_upstreams{"cloudflare"};

constexpr const char* version = "0.1";
constexpr seconds idle_limit{10};  // for a TCP client to send a whole query, RFC 7766 6.2.3
constexpr seconds grace{3};        // for the queries in flight when the program is to end
constexpr int most_clients = 256;  // TCP
constexpr int most_queries_of_client = 32;  // in flight, on one TCP connection

// ---- Options -----------------------------------------------------------------------------------

// `help` has %s where the default is printed.
struct Option {
    char letter;
    const char *word, *value, *help;
    std::variant<int*, Strings*> to;
    int least = 0, most = 0;
};

static std::vector<Option> options(Settings& s) {
    return {
        {'l', "listen", " ADDR[@PORT]", "where to listen, UDP and TCP; repeatable        [%s]", &s.listen},
        {'u', "upstream", " UPSTREAM", "whom to ask, in this order; repeatable          [%s]\n%31s"
         "cloudflare | google | quad9, or ADDR[@PORT]#NAME[,pin-sha256=BASE64]...", &s.upstreams},
        {'c', "ca", " FILE", "certificates to trust                           [the system's]", &s.ca},
        {'n', "queries", " N", "queries in flight at most                       [%s]", &s.queries, 1, 10000},
        {'t', "timeout", " MS", "for a whole query                               [%s]", &s.timeout, 1, 60000},
        {'k', "ready", " N", "ready connections kept for an upstream at most  [%s], 0: open one when asked",
         &s.ready, 0, 1000},
        {'R', "reuse", "", "use a connection for more than one query", &s.reuse},
        {'m', "max-udp", " N", "longest UDP answer, octets                      [%s]", &s.max_udp, 512, 65535},
        {'q', "quiet", "", "no line per query", &s.quiet},
        {'v', "verbose", "", "the eight steps of every query; -vv adds the octets, annotated", &s.verbose},
    };
}

static void print_help() {
    Settings defaults{.listen = default_listen, .upstreams = default_upstreams, .ca = {}};
    puts("dot-proxy [options]");
    for (const Option& o : options(defaults)) {
        std::string value;
        if (auto number = std::get_if<int*>(&o.to)) value = std::to_string(**number);
        if (auto list = std::get_if<Strings*>(&o.to))
            for (auto& one : **list) value += (value.empty() ? "" : " ") + one;
        printf("  -%c, --%-22s ", o.letter, (std::string(o.word) + o.value).c_str());
        printf(o.help, value.c_str(), "");
        puts("");
    }
    puts("  -h, --help   -V, --version");
}

// Throws BadOption; of unknown options getopt itself tells.
static Settings parse_options(int argc, char** argv) {
    Settings s;
    const std::vector<Option> known = options(s);
    std::string letters = "hV";
    std::vector<option> words{{"help", 0, nullptr, 'h'}, {"version", 0, nullptr, 'V'}};
    for (const Option& o : known) {
        letters += std::string(1, o.letter) + (*o.value ? ":" : "");
        words.push_back({o.word, *o.value != 0, nullptr, o.letter});
    }
    words.push_back({});
    for (int c; (c = getopt_long(argc, argv, letters.c_str(), words.data(), nullptr)) != -1;) {
        if (c == '?') throw BadOption("");
        if (c == 'h') print_help();
        if (c == 'V') printf("dot-proxy %s\n", version);
        if (c == 'h' || c == 'V') exit(0);
        for (const Option& o : known) {
            if (o.letter != c) continue;
            if (auto list = std::get_if<Strings*>(&o.to)) (*list)->push_back(optarg);
            else *std::get<int*>(o.to) += 1;
            if (o.most) *std::get<int*>(o.to) = parse_number(optarg, o.least, o.most, o.word);
        }
    }
    if (optind < argc) throw BadOption(text("unexpected argument '%s'", argv[optind]));
    if (s.listen.empty()) s.listen = default_listen;
    if (s.upstreams.empty()) s.upstreams = default_upstreams;
    return s;
}

// ---- Listeners ---------------------------------------------------------------------------------

static void set(int fd, int level, int option, int value) {
    // No option here is worth more than the service: without one it is slower or less precise.
    setsockopt(fd, level, option, &value, sizeof value);
}

// A bound socket, for the life of the process. Throws system_error that says what to do.
static int open_listener(const Address& address, int type) {
    const int fd = socket(address.any.sa_family, type | SOCK_CLOEXEC, 0);
    if (type == SOCK_STREAM) set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    if (type == SOCK_DGRAM) set(fd, SOL_SOCKET, SO_RCVBUF, 1 << 20);
    if (address.any.sa_family == AF_INET6) {
        set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
        set(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);  // which address was asked, RFC 2181 4
    } else {
        set(fd, IPPROTO_IP, IP_PKTINFO, 1);
    }
    if (fd >= 0 && bind(fd, &address.any, address.size()) == 0 &&
        (type == SOCK_DGRAM || listen(fd, SOMAXCONN) == 0))
        return fd;
    const int error = errno;
    close(fd);
    const char* fault = error == EADDRINUSE ? "taken" : error == EACCES ? "not permitted" : nullptr;
    throw std::system_error(error, std::generic_category(),
                            fault ? text("port %d is %s; try --listen 127.0.0.1@5300",
                                         ntohs(address.v4.sin_port), fault)
                                  : address.str());
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

// Runs `work` in a thread of its own. false: the system has no room for one more.
static bool detach(auto work) try {
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

using Send = std::function<void(const Bytes&)>;  // an answer to its client, by any thread

static void finish(const Query& query, const Send& send, const Outcome& outcome) {
    send(outcome.octets);
    ++ended[outcome.good];
    if (settings.quiet) return;
    say(text("%s %s %s %s %zu octets %.1f ms%s %s", outcome.good ? "SUCCESS" : "FAILURE",
             query.tcp ? "tcp" : "udp", type_name(query.type()).c_str(),
             rcode_name(outcome.octets[3] & 15).c_str(), outcome.octets.size(),
             ms(Clock::now() - query.taken), outcome.good ? "" : ":", outcome.detail.c_str()));
}

// [1] and [2] in the thread that received the query; the other steps in one of their own.
// false: there will be no answer.
static bool take(Bytes octets, bool tcp, const Send& send) {
    if (stopping) return false;
    ++taken[tcp];
    const milliseconds timeout(settings.timeout);
    auto query = std::make_shared<Query>(std::move(octets), tcp, settings.verbose, timeout);
    query->tell(1, [&] { return text("%zu octets, ", query->octets.size()) + (tcp ? "TCP" : "UDP"); });
    query->show("query", query->octets);
    const Verdict verdict = judge(*query);
    query->tell(2, [&] { return verdict.why; });
    if (verdict.rcode == silence) return false;
    if (verdict.rcode != forward) {
        finish(*query, send, {reply(*query, verdict.rcode), false, verdict.why});
        return true;
    }
    // A TCP client can wait, and then sends no more. A UDP query is never silently lost.
    Permit permit = take_slot(query_slots, tcp);
    if (!permit || !detach([query, send, permit = std::move(permit)]() mutable {
            Outcome outcome = resolve(*query);
            finish(*query, send, outcome);
            permit.reset();
            restock(std::move(outcome));
        }))
        finish(*query, send, {reply(*query, SERVFAIL, 0), false, "too many queries in flight"});
    return true;
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
    TcpClient(int fd, Permit permit) : fd(fd), permit(std::move(permit)) {
        sem_init(&in_flight, 0, most_queries_of_client);
    }
    ~TcpClient() { close(fd); }
    const int fd;
    const Permit permit;
    sem_t in_flight;
    std::mutex writing;  // guards the order of octets to fd
};

static void serve_client(const std::shared_ptr<TcpClient>& client) {
    while (auto message = read_frame(client->fd, Clock::now() + idle_limit)) {
        sem_wait(&client->in_flight);
        const bool in_step = take(std::move(*message), true, [client](const Bytes& answer) {
            const Bytes framed = frame(answer);
            {
                std::lock_guard lock(client->writing);
                if (send(client->fd, framed.data(), framed.size(), MSG_NOSIGNAL) < ssize_t(framed.size()))
                    shutdown(client->fd, SHUT_RDWR);  // gone, or it does not read: this stream is cut
            }
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
        const timeval limit{idle_limit.count(), 0};  // on Linux, for one whole send()
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
        detach([client] { serve_client(client); });
    }
}

static void print_totals() {
    say(text("TOTALS udp=%u tcp=%u success=%u failure=%u", taken[0].load(), taken[1].load(),
             ended[true].load(), ended[false].load()));
}

// ---- main --------------------------------------------------------------------------------------

static int run() {
    mallopt(M_ARENA_MAX, 2);  // glibc would keep eight for each core, each as large as its peak
    prepare();
    std::vector<Address> addresses;
    for (auto& one : settings.listen) addresses.push_back(parse_address(one, 53));
    rlimit files{};
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);  // if it fails, there are as many as there were
    std::vector<int> udp, tcp;
    for (auto& address : addresses) {
        udp.push_back(open_listener(address, SOCK_DGRAM));
        tcp.push_back(open_listener(address, SOCK_STREAM));
    }
    sem_init(&query_slots, 0, unsigned(settings.queries));
    sem_init(&client_slots, 0, most_clients);
    sigset_t signals;
    sigemptyset(&signals);
    for (int wanted : {SIGTERM, SIGINT, SIGUSR1}) sigaddset(&signals, wanted);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    signal(SIGPIPE, SIG_IGN);
    std::thread([] { tend(); }).detach();
    for (int fd : udp) std::thread(serve_udp, fd).detach();
    for (int fd : tcp) std::thread(serve_tcp, fd).detach();
    for (int caught = 0; caught != SIGTERM && caught != SIGINT;)
        if (sigwait(&signals, &caught) == 0 && caught == SIGUSR1) print_totals();
    stopping = true;
    const Time until = Clock::now() + grace;
    for (int free = 0; free < settings.queries && Clock::now() < until; sem_getvalue(&query_slots, &free))
        std::this_thread::sleep_for(milliseconds(5));
    print_totals();
    _exit(0);  // no destructors: listeners and clients still run
}

int main(int argc, char** argv) try {
    settings = parse_options(argc, argv);
    return run();
} catch (const BadOption& e) {
    if (*e.what()) fprintf(stderr, "dot-proxy: %s\n", e.what());
    return 2;
} catch (const std::exception& e) {
    fprintf(stderr, "dot-proxy: %s\n", e.what());
    return 1;
}

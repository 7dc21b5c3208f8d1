// main.cpp - how the program runs: options, listeners, threads, signals; main comes last.
//
// One thread accepts at each TCP listener, one keeps connections ready, the main thread waits for
// signals. Some wait at each UDP socket, and one for each TCP client. The one that takes a query
// carries it to its end; if that takes a while another takes its place.
// Slots bound what strangers start.
#include <getopt.h>
#include <grp.h>
#include <malloc.h>
#include <pwd.h>
#include <semaphore.h>
#include <sys/prctl.h>

#include <csignal>

#include "dot.hpp"

// ---- Options -----------------------------------------------------------------------------------

constexpr char help[] = R"(dot-proxy [options]
  -l, --listen ADDR[@PORT]     where to listen, UDP and TCP; repeatable        [127.0.0.1@53 ::1@53]
  -u, --upstream UPSTREAM      whom to ask, in this order; repeatable          [cloudflare]
                               cloudflare | google | quad9, or ADDR[@PORT]#NAME[,pin-sha256=BASE64]...
  -c, --ca FILE                certificates to trust                           [the system's]
  -a, --allow PREFIX           who may ask; repeatable                         [loopback and private networks]
  -d, --deny PREFIX            who may not, even if allowed; repeatable
  -r, --rate N                 queries a second for one client (IPv6: one /64) [%d: no limit]
  -n, --queries N              queries in flight at most                       [%d]
  -t, --timeout MS             for a whole query                               [%d]
  -k, --ready N                ready connections kept for an upstream at most  [%d], 0: open one when asked
  -R, --reuse                  use a connection for more than one query
  -m, --max-udp N              longest UDP answer, octets                      [%d]
  -U, --user NAME|UID          become this user once the sockets are open
  -q, --quiet                  no line per query
  -v, --verbose                the eight steps of every query; -vv adds the octets, annotated
  -h, --help   -V, --version
)";

// A user's uid and gid; throws BadOption.
static std::pair<int, int> parse_user(const char* name) {
    if (const passwd* known = getpwnam(name)) return {known->pw_uid, known->pw_gid};
    const int uid = parse_number(name, 0, INT_MAX, "no such user, and uid");
    return {uid, uid};
}

// Into the settings; throws BadOption. Of unknown options getopt itself tells.
static void parse_options(int argc, char** argv) {
    static const option words[] = {
        {"listen", 1, 0, 'l'}, {"upstream", 1, 0, 'u'}, {"ca", 1, 0, 'c'}, {"allow", 1, 0, 'a'},
        {"deny", 1, 0, 'd'}, {"rate", 1, 0, 'r'}, {"queries", 1, 0, 'n'}, {"timeout", 1, 0, 't'},
        {"ready", 1, 0, 'k'}, {"reuse", 0, 0, 'R'}, {"max-udp", 1, 0, 'm'}, {"verbose", 0, 0, 'v'},
        {"quiet", 0, 0, 'q'}, {"user", 1, 0, 'U'}, {"help", 0, 0, 'h'}, {"version", 0, 0, 'V'}, {}};
    Settings &s = settings, d;  // d: the defaults
    for (int c; (c = getopt_long(argc, argv, "l:u:c:a:d:r:n:t:k:Rm:U:qvhV", words, nullptr)) != -1;)
        switch (c) {
            case 'l': s.listen.push_back(parse_address(optarg, 53)); break;
            case 'u': for (auto& peer : parse_upstream(optarg)) s.upstreams.push_back(peer); break;
            case 'c': s.ca.push_back(optarg); break;
            case 'a': s.allow.push_back(parse_prefix(optarg)); break;
            case 'd': s.deny.push_back(parse_prefix(optarg)); break;
            case 'r': s.rate = parse_number(optarg, 0, 1000000, "--rate"); break;
            case 'n': s.queries = parse_number(optarg, 1, 10000, "--queries"); break;
            case 't': s.timeout = parse_number(optarg, 1, 60000, "--timeout"); break;
            case 'k': s.ready = parse_number(optarg, 0, 1000, "--ready"); break;
            case 'm': s.max_udp = parse_number(optarg, 512, 65535, "--max-udp"); break;
            case 'U': std::tie(s.uid, s.gid) = parse_user(optarg); break;
            case 'R': s.reuse = true; break;
            case 'q': s.quiet = true; break;
            case 'v': ++s.verbose; break;
            case 'h': printf(help, d.rate, d.queries, d.timeout, d.ready, d.max_udp); exit(0);
            case 'V': puts("dot-proxy 0.1"); exit(0);
            default: throw BadOption("");
        }
    if (optind < argc) throw BadOption(text("unexpected argument '%s'", argv[optind]));
    if (s.upstreams.empty()) s.upstreams = parse_upstream("cloudflare");
    if (s.listen.empty()) s.listen = {parse_address("127.0.0.1", 53), parse_address("::1", 53)};
    if (!s.allow.empty()) return;
    for (auto prefix : {"127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16",
                        "169.254.0.0/16", "::1", "fc00::/7", "fe80::/10"})
        s.allow.push_back(parse_prefix(prefix));
}

// ---- Listeners ---------------------------------------------------------------------------------

// A bound socket, for the life of the process. Throws system_error that says what to do.
static int open_listener(const Address& address, int type) {
    const bool tcp = type == SOCK_STREAM, six = !address.is_v4();
    const int fd = socket(address.any.sa_family, type | SOCK_CLOEXEC, 0);
    set_option(fd, SOL_SOCKET, tcp ? SO_REUSEADDR : SO_RCVBUF, 1 << 20);
    if (six) set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
    // Which of our addresses was asked, for the answer to leave from it: RFC 2181 4.
    set_option(fd, six ? IPPROTO_IPV6 : IPPROTO_IP, six ? IPV6_RECVPKTINFO : IP_PKTINFO, 1);
    if (!bind(fd, &address.any, address.size()) && (!tcp || !listen(fd, SOMAXCONN))) return fd;
    const int error = fd < 0 ? EAFNOSUPPORT : errno, port = ntohs(address.v4.sin_port);
    const bool none = six && (error == EAFNOSUPPORT || error == EADDRNOTAVAIL);
    // A host without IPv6 is served without it; but it must be possible to listen somewhere.
    if (none && &address != &settings.listen.front()) return -1;
    const char* fault = error == EADDRINUSE ? "taken" : error == EACCES ? "not allowed" : "no use";
    throw std::system_error(error, std::generic_category(), text(
        "port %d is %s; try --listen 127.0.0.1@5300", port, fault));
}

// ---- Threads -----------------------------------------------------------------------------------

// A counted permit is taken before a query is carried and given back by its destructor. That bounds
// threads, memory and the handshakes strangers can cause (with --ready, which bounds those that are
// made after the answer), and tells when the last query is done.
using Permit = std::shared_ptr<sem_t>;

static Permit take_slot(sem_t& slots, bool wait) {  // empty: there is none now
    return (wait ? sem_wait(&slots) : sem_trywait(&slots)) ? nullptr : Permit(&slots, sem_post);
}

static sem_t query_slots, client_slots;

// No thread can end the process, even if memory runs out. false: `work` was not done.
static bool guard(auto work, auto... with) try {
    work(std::move(with)...);
    return true;
} catch (const std::exception& e) {
    dprintf(STDOUT_FILENO, "FAILURE thread: %s\n", e.what());
    return false;
}

// Does it in a thread of its own, where nobody but `work` holds what it is given. false: the system
// has no room for one more.
static bool detach(auto work, auto... with) {
    return guard([=] {
        std::thread(guard<decltype(work), decltype(with)...>, work, with...).detach(); });
}

// At a UDP socket. With more of them a fresh connection for each query takes more memory, and with
// fewer --reuse takes more time.
static int seats() { return settings.reuse ? 8 : 4; }

// Where queries come from and answers go: a UDP socket, for ever, or the stream of a TCP client.
struct Source {
    ~Source() { if (tcp) close(fd); }
    const bool tcp;
    const int fd;
    Address client{};                // over TCP
    Permit permit{};                 // to be one of the TCP clients
    std::shared_ptr<int> of_host{};  // its use_count() tells how many of them its host has
    // One use more than threads that wait for a seat, or in it for a query.
    const std::shared_ptr<int> waiting = std::make_shared<int>();
    std::mutex writing{};            // guards the order of octets in a stream
    sem_t free{};                    // seats: a thread takes one before it takes a query
    const int made = sem_init(&free, 0, tcp ? 1 : seats());
};

// Who asks, and the way back: over UDP good for one query.
struct Client {
    explicit Client(Source& source) : source(source), address(source.client) {}

    // [1] nullopt: the stream has ended. Empty: an empty datagram, or recvmsg() failed.
    std::optional<Bytes> take() {
        if (source.tcp) return read_frame(source.fd);
        iovec whole{octets, sizeof octets};
        header = {&address, sizeof address, &whole, 1, control, sizeof control, 0};
        return Bytes(octets, octets + std::max<ssize_t>(recvmsg(source.fd, &header, 0), 0));
    }

    void answer(const Bytes& message) {
        Bytes framed = source.tcp ? frame(message) : message;
        iovec whole{framed.data(), framed.size()};
        header.msg_iov = &whole;
        auto lock = source.tcp ? std::unique_lock(source.writing) : std::unique_lock<std::mutex>();
        // UDP may lose an answer, as when a buffer is full: the client asks again. A TCP client
        // that is gone, or does not read, loses its stream.
        const ssize_t sent = sendmsg(source.fd, &header, source.tcp ? MSG_NOSIGNAL : MSG_DONTWAIT);
        if (source.tcp && sent != ssize_t(framed.size())) shutdown(source.fd, SHUT_RDWR);
    }

    Source& source;
    Address address;
    alignas(cmsghdr) char control[64]{};  // which of our addresses was asked over UDP
    msghdr header{nullptr, 0, nullptr, 1, nullptr, 0, 0};
    uint8_t octets[longest_message];  // not a vector's, which would be written to in whole
};

static void finish(const Query& query, Client& client, const Outcome& outcome) {
    const std::string rcode = rcode_name(outcome.octets[3] & 15);
    const char* tc = outcome.octets[2] & 0x02 ? ", TC: there is more" : "";
    if (settings.verbose)
        query.tell(8, rcode + text(", %zu octets%s", outcome.octets.size(), tc), outcome.octets);
    count(rcode);
    count(outcome.winner ? "success" : "failure");
    if (!outcome.winner) count("failure:" + outcome.detail);
    client.answer(outcome.octets);
    if (settings.quiet) return;
    say(text("%s %s %s %s %zu octets %.1f ms%s %s", outcome.winner ? "SUCCESS" : "FAILURE",
             query.tcp ? "tcp" : "udp", type_name(query.layout.type).c_str(), rcode.c_str(),
             outcome.octets.size(), Ms(Clock::now() - query.taken).count(),
             outcome.winner ? "" : ":", outcome.detail.c_str()));
}

// The steps [1] to [8] of one query after the other. A thread that has taken a query carries it to
// its end. If that takes a while it leaves its seat to one that waits, or to a new one: so there
// are as many threads as queries in flight, and where answers come at once, with --reuse, those
// with a seat do it all (else each has a handshake to do). As the seats are few, queries beyond
// what the machine can carry wait in the socket, not in threads. Over TCP the next one reads on.
static void serve(std::shared_ptr<Source> source) {
    Permit seat;
    do {
        Client client(*source);
        auto waits = source->waiting;
        if (!seat) seat = take_slot(source->free, true);
        auto octets = client.take();
        waits.reset();
        const bool tcp = source->tcp, may = may_ask(client.address);
        if (!octets) return;
        count(!may ? "denied" : tcp ? "tcp" : "udp");
        if (!may) continue;
        const Query query{*octets, tcp};
        if (settings.verbose)
            query.tell(1, text("%zu octets over %s", octets->size(), tcp ? "TCP" : "UDP"), *octets);
        Verdict verdict = judge(query);
        if (verdict.rcode != silence && over_rate(client.address, tcp))
            verdict = {tcp ? REFUSED : cut_short, "over the rate"};  // no more than was sent
        query.tell(2, verdict.why);
        if (verdict.rcode == silence && tcp) return;
        if (verdict.rcode == silence) continue;
        // For want of a slot a TCP client can wait, and sends no more; over UDP it gets SERVFAIL.
        Permit permit = verdict.rcode == forward ? take_slot(query_slots, tcp) : nullptr;
        int free = 0;
        sem_getvalue(&query_slots, &free);
        if (permit) count("in_flight_most", settings.queries - free, true);
        if (verdict.rcode == forward && !permit) verdict = {SERVFAIL, "too many queries in flight"};
        const auto leave = [&](int enough) {  // the seat to another thread
            if (seat && source->waiting.use_count() <= enough) detach(serve, source);
            seat.reset();
        };
        Outcome outcome = permit ? resolve(query, [&] { leave(tcp ? 1 : seats()); })
                                 : Outcome{reply(query, verdict.rcode), verdict.why};
        finish(query, client, outcome);
        permit.reset();
        if (!settings.reuse && !outcome.tries.empty()) leave(1);
        if (tcp && !seat) source.reset();  // its client may go before what follows ends
        restock(std::move(outcome));
    } while (source && source->waiting.use_count() <= seats());
}

static void serve_tcp(int listener) {
    std::map<std::string, std::shared_ptr<int>> hosts;  // those with clients, who share it
    for (;;) {
        Permit all = take_slot(client_slots, true);  // until then they wait in the backlog
        Address from;
        socklen_t size = sizeof from;
        const int fd = accept4(listener, &from.any, &size, SOCK_CLOEXEC);
        std::erase_if(hosts, [](auto& host) { return host.second.use_count() == 1; });
        auto& host = hosts.try_emplace(from.host(), std::make_shared<int>()).first->second;
        auto client = std::make_shared<Source>(true, fd, from, std::move(all), host);
        // RFC 7766 6.2.3. On Linux for all the waits of one call, so that no drip resets it.
        for (int way : {SO_RCVTIMEO, SO_SNDTIMEO}) set_option(fd, SOL_SOCKET, way, timeval{10, 0});
        set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
        // Out of open files, say: others will be closed.
        if (fd < 0) std::this_thread::sleep_for(milliseconds(20));
        // 64 of a host; one more use of the count is the map's.
        else if (!may_ask(from) || host.use_count() > 65) count("denied");
        else detach(serve, client);
    }
}

// ---- main --------------------------------------------------------------------------------------

int main(int argc, char** argv) try {
    parse_options(argc, argv);
    sigset_t signals{};
    for (int wanted : {SIGTERM, SIGINT, SIGUSR1, SIGPIPE}) sigaddset(&signals, wanted);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    mallopt(M_ARENA_MAX, 2);  // glibc would keep eight for each core: 1.5 MB more at saturation
    prepare();
    std::vector<std::pair<int, int>> listeners;  // and their types
    for (auto& address : settings.listen)
        for (int type : {SOCK_DGRAM, SOCK_STREAM})
            listeners.emplace_back(open_listener(address, type), type);
    // Root's rights are given up for good, and those that a setuid program could bring.
    const uid_t uid = uid_t(settings.uid), gid = uid_t(settings.gid);
    if (settings.uid != -1 && geteuid() != uid &&
        (setgroups(0, nullptr) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid)))
        throw std::system_error(errno, std::generic_category(), text("cannot become user %u", uid));
    if (settings.uid > 0 && !setuid(0)) throw std::runtime_error("root's rights can be had back");
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    sem_init(&query_slots, 0, unsigned(settings.queries));
    sem_init(&client_slots, 0, 256);  // over TCP; more wait to be accepted
    // What must never end, even if it throws: it is begun again.
    auto forever = [](auto... work) { std::thread([=] { for (;;) guard(work...); }).detach(); };
    forever(tend);
    for (auto [fd, type] : listeners) {
        if (fd >= 0 && type == SOCK_STREAM) forever(serve_tcp, fd);
        const auto source = std::make_shared<Source>(false, fd);
        for (int i = 0; i < seats() && fd >= 0 && type == SOCK_DGRAM; i++) forever(serve, source);
    }
    for (int caught = 0; caught != SIGTERM && caught != SIGINT;)
        if (sigwait(&signals, &caught) == 0 && caught == SIGUSR1) say(totals());
    // All slots are taken, so that new queries find none; those in flight are waited for, 3 s
    // within half a second. CLOCK_MONOTONIC is the steady clock.
    const timespec until{Clock::now().time_since_epoch() / seconds(1) + 3, 500000000};
    for (int i = 0; i < settings.queries; i++) sem_clockwait(&query_slots, CLOCK_MONOTONIC, &until);
    say(totals());
    _exit(0);  // no destructors: listeners and clients still run
} catch (const std::exception& e) {
    if (*e.what()) fprintf(stderr, "dot-proxy: %s\n", e.what());
    return dynamic_cast<const BadOption*>(&e) ? 2 : 1;
}

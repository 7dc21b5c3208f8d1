// chaos.cpp - clients and resolvers of every bad manner at once, through one program, for a time.
//
// Whatever they do, each honest query has its answer within its deadline and a half second, and
// when they have gone the program is as it was after the first minute. usage: PROXY=... [SECONDS=8]
// chaos
#include <openssl/ssl.h>

#include <array>

#include "pipe.hpp"
#include "usage.hpp"

using namespace test;

constexpr double deadline = 2;                     // seconds, of each query
constexpr double slack = memory_counts ? 0.5 : 2;  // and so much more; under sanitizers all is slow
constexpr int honest_clients = memory_counts ? 6 : 3;
constexpr int bad_clients = memory_counts ? 15 : 8;  // of those that stay

class Random {
public:
    explicit Random(unsigned seed) : engine_(seed) {}
    int below(int most) { return int(engine_() % unsigned(most)); }
    template <class T>
    const T& of(const std::vector<T>& all) {
        return all[size_t(below(int(all.size())))];
    }

private:
    std::mt19937 engine_;
};

// ---- Resolvers ---------------------------------------------------------------------------------

static std::vector<Options> manners() {
    const auto garbage = [](const Octets& query) {
        Octets out = query;
        for (size_t i = 2; i < out.size(); i++) out[i] = uint8_t(out[i] * 7 + i);
        return out;
    };
    const Octets unasked = make_query("victim.test", 1, {}, 1, 0x8180);
    std::vector<Options> all{
        {},
        {},
        {.deaf = true},
        {.accept = Options::Close},
        {.accept = Options::Reset},
        {.accept = Options::Hang},
        {.accept = Options::Plaintext},
        {.accept = Options::CloseAfterHandshake},
        {.idle_ms = 100},
        {.delay_ms = 100},
        {.handshake_ms = 400},
        {.cert = Cert::WrongName},
        {.cert = Cert::Expired},
        {.cert = Cert::Fair28kB},
        {.cert = Cert::Large77kB},
        {.max_version = TLS1_2_VERSION},
        {.max_version = TLS1_1_VERSION},
        {.alpn = ""},
        {.tickets = 0},
        {.ticket_lifetime = 0},
        {.most = 3},
        {.answers = 1},
        {.reset_each = 3},
        {.alert_ticket = true},
        {.script = garbage},
        {.unasked_when = Options::WithAnswer, .unasked = unasked},
        {.unasked_when = Options::AfterAnswer, .unasked = unasked},
        {.max_version = TLS1_3_VERSION, .unasked_when = Options::WithHandshake, .unasked = unasked},
    };
    for (int kind = 1; kind <= int(Endless::DrippedTicket); kind++)
        for (bool after_query : {false, true}) {
            Options o{.endless = Endless(kind), .endless_after_query = after_query};
            o.endless_pause_ms = !after_query;  // as fast as it goes would leave nothing for others
            if (o.endless == Endless::SealedRequests) o.max_version = TLS1_2_VERSION;
            // What is said in the clear comes at once.
            if (o.endless > Endless::DrippedCertificate || !after_query) all.push_back(o);
        }
    return all;
}

// A resolver whose manners change, and which dies and comes back.
class Moody {
public:
    Moody(const Certificates& certificates, unsigned seed)
        : certificates_(certificates), random_(seed) {
        upstream_ = std::make_unique<Upstream>(certificates_);
        port_ = upstream_->port();
    }
    std::string spec() const { return "127.0.0.1@" + std::to_string(port_) + "#dot.test"; }
    void change() {
        if (random_.below(4) == 0) restart(random_.below(800));
        upstream_->set(random_.of(manners_));
        changes++;
    }
    // As a good one. What it remembers is forgotten, and its connections are at an end.
    void restart(int pause_ms) {
        upstream_.reset();
        usleep(useconds_t(1000 * pause_ms));
        upstream_ = std::make_unique<Upstream>(certificates_, Options{.port = port_});
        restarts++;
    }
    int changes = 0, restarts = 0;

private:
    const Certificates& certificates_;
    Random random_;
    const std::vector<Options> manners_ = manners();
    std::unique_ptr<Upstream> upstream_;
    int port_ = 0;
};

// ---- Clients -----------------------------------------------------------------------------------

// A client's address: honest ones and bad ones never share one, for a port may be had again before
// an answer to the one who had it comes.
static std::string address(int network, int number) {
    return "127." + std::to_string(network) + "." + std::to_string(number / 250 % 250) + "." +
           std::to_string(1 + number % 250);
}

static const std::vector<std::string> faults{
    "close",      "reset", "cut",    "cutclean", "halflength", "drip",    "garbage", "zero",
    "five",       "long",  "two",    "stray30",  "wrongid",    "short",   "query",   "silent",
    "headeronly", "tc",    "before", "unclean",  "keyupdate",  "slow300", "servfail"};

// Those who do not wait for answers, or ask for what nobody can carry.
class Bad {
public:
    Bad(int port, unsigned seed) : port_(port), random_(seed) {}
    void step() {  // often
        if (staying_.size() < size_t(bad_clients)) staying_.push_back(begin());
        for (auto& one : staying_) annoy(one);
        std::erase_if(staying_, [&](const Staying& one) { return one.over; });
        hit_and_run();
    }
    int met = 0;

private:
    struct Staying {
        std::unique_ptr<Client> client;
        int kind, round = 0;
        Octets rest{};
        bool over = false;
    };
    enum { Silent, Drips, NeverReads, ReadsSlowly, HalfClosed, Kinds };

    std::string from() { return address(50, number_++ % 50000); }
    Staying begin() {
        met++;
        Staying one{std::make_unique<Client>(SOCK_STREAM, port_, "127.0.0.1", from()),
                    random_.below(Kinds)};
        one.over = !one.client->connected;
        fcntl(one.client->fd, F_SETFL, O_NONBLOCK);
        const Octets q =
            make_query(one.kind == Drips || one.kind == HalfClosed ? "a.test" : "size16000.test");
        append16(one.rest, int(q.size()));
        append(one.rest, q);
        return one;
    }
    void annoy(Staying& one) {
        uint8_t octet;
        Client& c = *one.client;
        one.round++;
        if (one.kind == Drips && one.round % 10 == 0 && size_t(one.round / 10) < one.rest.size())
            ::send(c.fd, &one.rest[size_t(one.round / 10)], 1, MSG_NOSIGNAL);
        const bool asks_on = one.kind == NeverReads || one.kind == ReadsSlowly;
        if (asks_on && one.round <= 40)  // more than the connection takes, with its answers
            if (::send(c.fd, one.rest.data(), one.rest.size(), MSG_NOSIGNAL) < 0 && errno != EAGAIN)
                one.over = true;
        if (one.kind == ReadsSlowly && one.round % 20 == 0) (void)!recv(c.fd, &octet, 1, 0);
        if (one.kind == HalfClosed && one.round == 1) {
            ::send(c.fd, one.rest.data(), one.rest.size(), MSG_NOSIGNAL);
            shutdown(c.fd, SHUT_WR);
        }
        if (!asks_on && recv(c.fd, &octet, 1, 0) == 0) one.over = true;
        if (random_.below(200) > 0) return;
        one.over = true;  // leaves: politely, or with a reset
        const linger now{1, 0};
        if (random_.below(2)) setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
    void hit_and_run() {
        met++;
        const int kind = random_.below(8);
        Client c(kind < 4 ? SOCK_DGRAM : SOCK_STREAM, port_, "127.0.0.1", from());
        Octets out = make_query(random_.of(faults) + "-b.test", 1, Edns{}, random_.below(65536));
        if (kind == 0)
            for (int i = 0; i < 5; i++) out[size_t(random_.below(int(out.size())))] ^= 0x55;
        if (kind == 1) out.resize(size_t(random_.below(int(out.size()))));
        if (kind == 2 && random_.below(10) == 0)
            out = make_query("a.test", 1, Edns{1232, false, Octets(60000)});
        if (kind == 4) out = {0, 0, 1};           // no frame
        if (kind == 5) out = {0xff, 0xff, 1, 2};  // and then nothing
        if (kind == 6 || kind == 7) {
            Octets framed;
            append16(framed, int(out.size()));
            for (int i = 0; i < 3; i++) append(framed, out);
            out = framed;  // one that is good, and two that are not framed
        }
        ::send(c.fd, out.data(), out.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        const linger now{1, 0};
        if (kind == 7) setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }

    const int port_;
    Random random_;
    int number_ = 0;
    std::vector<Staying> staying_;
};

// What came of the honest queries.
struct Tally {
    std::atomic<int> asked{0}, good{0}, failed{0}, none{0}, wrong{0}, late{0}, slowest_ms{0};
    std::atomic<int> stalled_ms{0};  // by which 2 ms of work came late on this machine
    std::atomic<bool> over{false};   // what comes now does not count
};

static double cpu_seconds_of_thread() {
    timespec used{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    return double(used.tv_sec) + double(used.tv_nsec) / 1e9;
}

static void keep_most(std::atomic<int>& most, int value) {
    for (int was = most; value > was && !most.compare_exchange_weak(was, value);) {
    }
}

// A query by a new client, and what came of it. In one of ten the resolver is asked to misbehave.
static void ask(int port, const std::string& from, Random& random, Tally& tally) {
    const bool tcp = random.below(3) == 0, fault = random.below(10) == 0;
    const std::string name = (fault ? random.of(faults) : std::string("a")) + "-" +
                             std::to_string(random.below(100000)) + ".test";
    const auto edns = random.below(2) ? std::optional(Edns{}) : std::nullopt;
    const Octets q = make_query(name, 1, edns, random.below(65536));
    const auto start = Clock::now();
    Client client(tcp ? SOCK_STREAM : SOCK_DGRAM, port, "127.0.0.1", from);
    const double connected = since(start);
    client.send(q);
    tally.asked++;
    const auto m = client.receive(5 * deadline);
    if (tally.over) return;
    keep_most(tally.slowest_ms, int(1000 * since(start)));
    if (!m) {
        tally.none++;
        printf("no answer: %s over %s\n", name.c_str(), tcp ? "TCP" : "UDP");
        return;
    }
    if (since(start) > deadline + slack + 3 * tally.stalled_ms / 1000.0) {
        tally.late++;
        printf("late: %s over %s, %.2f s, %.2f of them to connect\n", name.c_str(),
               tcp ? "TCP" : "UDP", since(start), connected);
    }
    const Answer a(*m);
    const bool is_good = a.rcode() == 0 && (a.tc() || has_address_of(a, q));
    if (a.id() != get16(q, 0) || (a.rcode() == 0 && !fault && !is_good)) {
        tally.wrong++;
        printf("wrong: %s over %s\n", name.c_str(), tcp ? "TCP" : "UDP");
    } else if (!fault) {
        (is_good ? tally.good : tally.failed)++;
    }
}

// ---- Chaos -------------------------------------------------------------------------------------

class Chaos {
public:
    explicit Chaos(const Proxy::Words& more)
        : first_(certificates_, 1), second_(certificates_, 2), good_(certificates_, 3) {
        // So many that none has to wait for another.
        Proxy::Words words{"-n", "3000", "-t", std::to_string(int(1000 * deadline))};
        words.insert(words.end(), more.begin(), more.end());
        // With -vv so much is written that whoever reads it would hold the program up.
        if (contains(more.empty() ? "" : more.back(), "v"))
            redirected_ = std::make_unique<Redirected>("/dev/null");
        proxy_ = std::make_unique<Proxy>(
            certificates_, std::vector{first_.spec(), second_.spec(), good_.spec()}, words);
    }
    ~Chaos() { stop(); }
    void start() {
        over_ = false;
        rounds_++;
        for (int i = 0; i < honest_clients; i++)
            begin([this, i] {
                Random random(unsigned(100 + i + 1000 * rounds_));
                for (int n = 0; !over_; n++) {
                    ask(proxy_->port, address(60 + i, n), random, tally);
                    usleep(useconds_t(random.below(60000)));
                }
            });
        begin([this] {
            Bad bad(proxy_->port, unsigned(7 + rounds_));
            for (; !over_; usleep(memory_counts ? 40000 : 100000)) bad.step();
            met_ += bad.met;
        });
        for (Moody* one : {&first_, &second_})
            begin([this, one] {
                Random random(unsigned(one == &first_ ? 5 : 6));
                for (; !over_; one->change())
                    for (int left = random.below(100); !over_ && left > 0; left--) usleep(20000);
            });
        begin([this] {
            while (!over_) {
                const auto before = Clock::now();
                usleep(20000);
                const double used = cpu_seconds_of_thread();
                while (cpu_seconds_of_thread() < used + 0.002) {
                }
                keep_most(tally.stalled_ms, int(1000 * since(before)) - 22);
            }
        });
    }
    void stop() {
        over_ = true;
        for (auto& one : threads_) one.join();
        threads_.clear();
    }
    // What it uses when all have gone and connections that were ready are at an end.
    Usage when_quiet(const std::optional<Usage>& was) {
        for (Moody* one : {&first_, &second_, &good_}) one->restart(0);
        Usage u{};
        const auto quiet = [&] {
            u = usage_of(proxy_->pid());
            return was && u.threads <= was->threads && u.files <= was->files;
        };
        sleep(5);  // what was in flight is at its end
        eventually(quiet, was ? 40 : 0);
        return u;
    }
    // Amid all of it; how long it took.
    double end() {
        tally.over = true;
        const auto start = Clock::now();
        CHECK_EQ(proxy_->process().end(), 0);
        CHECK_EQ(proxy_->err(), "");  // where sanitizers report
        return since(start);
    }
    void print(const char* what, const Usage& u) {
        printf("%-20s %4d threads, %4d files, %7ld kB\n", what, u.threads, u.files, u.kilobytes);
        fflush(stdout);
    }
    void print_figures() {
        printf(
            "%d asked: %d good, %d failed, %d late, %d wrong, %d without an answer; the slowest "
            "took %d ms (this machine stalled for %d)\n%d bad clients, %d moods and %d restarts "
            "of resolvers\n",
            tally.asked.load(), tally.good.load(), tally.failed.load(), tally.late.load(),
            tally.wrong.load(), tally.none.load(), tally.slowest_ms.load(), tally.stalled_ms.load(),
            met_.load(), first_.changes + second_.changes, first_.restarts + second_.restarts);
        printf("CPU: %.1f s, and %.1f s of the clients and resolvers, on %ld cores\n",
               cpu_seconds(proxy_->pid()), cpu_seconds(getpid()), sysconf(_SC_NPROCESSORS_ONLN));
        print_log();
    }
    Tally tally;

private:
    void begin(const std::function<void()>& work) {
        threads_.emplace_back([this, work] {
            try {
                work();
            } catch (const std::exception& e) {
                if (tally.over) return;
                printf("in a thread: %s\n", e.what());
                tally.wrong++;
            }
        });
    }
    void print_log() {
        std::istringstream log(proxy_->out());
        std::map<std::string, int> failures;
        double slowest = 0;
        for (std::string line; std::getline(log, line);) {
            const size_t at = line.find(" octets "), why = line.find(": ");
            if (at == line.npos) continue;
            slowest = std::max(slowest, atof(&line[at + 8]));
            if (line[0] != 'F' || why == line.npos) continue;
            std::string reason = line.substr(why + 2);
            if (reason.compare(0, 10, "127.0.0.1@") == 0) reason.erase(0, reason.find(' ') + 1);
            failures[reason]++;
        }
        if (slowest == 0) return;
        printf("by its own account the slowest took %.0f ms; of all queries failed\n", slowest);
        for (auto& [why, times] : failures) printf("%6d x %s\n", times, why.c_str());
    }
    std::unique_ptr<Redirected> redirected_;
    Certificates certificates_;
    Moody first_, second_, good_;  // the last one is always good
    std::unique_ptr<Proxy> proxy_;
    std::atomic<bool> over_{false};
    std::atomic<int> met_{0};
    int rounds_ = 0;
    std::vector<std::thread> threads_;
};

static void run_chaos(const Proxy::Words& more) {
    const char* const given = getenv("SECONDS");
    const int seconds = given && atoi(given) > 0 ? atoi(given) : 8;
    const int first_part = std::min(60, std::max(1, seconds / 2));
    Chaos chaos(more);
    chaos.start();
    sleep(unsigned(first_part));
    chaos.stop();
    const Usage first = chaos.when_quiet({});
    chaos.print("after the first part", first);
    chaos.start();
    sleep(unsigned(std::max(1, seconds - first_part)));
    chaos.stop();
    const Usage last = chaos.when_quiet(first);
    chaos.print("at the end", last);
    chaos.print_figures();
    const Tally& tally = chaos.tally;
    const int asked = tally.asked, good = tally.good, none = tally.none, wrong = tally.wrong;
    const int late = tally.late;
    chaos.start();
    sleep(1);
    const double took = chaos.end();  // amid all of it
    printf("it ended after %.1f s\n", took);
    CHECK_EQ(none, 0);
    CHECK_EQ(wrong, 0);
    CHECK_EQ(late, 0);
    CHECK_WHY(took < 4 + 3 * slack, std::to_string(took));
    CHECK(good > asked / 2);
    CHECK_WHY(last.threads <= first.threads + 4, std::to_string(last.threads) + " threads");
    // A few connections of each upstream may be ready.
    CHECK_WHY(last.files <= first.files + 8, std::to_string(last.files) + " files");
    if (memory_counts)
        CHECK_WHY(last.kilobytes <= first.kilobytes * 13 / 10 + 4096,
                  std::to_string(last.kilobytes) + " kB");
}

TEST("chaos.every_bad_manner_at_once") { run_chaos({}); }
TEST("chaos.every_bad_manner_at_once_with_reuse_and_vv") { run_chaos({"--reuse", "-vv"}); }

int main(int argc, char** argv) { return check::main(argc, argv); }

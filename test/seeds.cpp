// seeds.cpp - what `make fuzz` begins with: queries as clients send them, and each with the answer
// that the tests' upstream gave. usage: PROXY=... seeds DIRECTORY
#include <filesystem>

#include "program.hpp"

using namespace test;

static void save(const std::string& dir, const Octets& octets) {
    static int number = 0;
    std::filesystem::create_directories(dir);
    std::ofstream(dir + "/" + std::to_string(++number))
        .write(reinterpret_cast<const char*>(octets.data()), std::streamsize(octets.size()));
}

static std::vector<Octets> queries() {
    std::vector<Octets> all;
    const Octets options{0, 12, 0, 3, 0, 0, 0, 0, 11, 0, 0, 0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8};
    for (const char* key :
         {"a",         "ede",      "keepalive",  "badvers", "badcookie", "always",   "noopt",
          "unknown",   "pointers", "chain",      "txt40",   "txt700",    "tsig",     "tsig400",
          "size600",   "tc",       "ad",         "folded",  "formerr",   "servfail", "wrongid",
          "wrongname", "short",    "headeronly", "query"})
        for (int variant = 0; variant < 3; variant++) {
            std::optional<Edns> edns;
            if (variant == 1) edns = Edns{};
            if (variant == 2) edns = Edns{512, true, options};
            all.push_back(
                make_query(std::string(key) + ".TeSt", 1, edns, 0x4000 + int(all.size())));
        }
    for (int flags : {0x2100, 0x2900, 0x3100, 0x0130}) {  // NOTIFY, UPDATE, DSO; AD and CD
        Octets q = make_query("a.test", 6, Edns{}, 1, flags);
        append(q, {0xc0, 12, 0, 250, 0, 255, 0, 0, 0, 0, 0, 2, 7, 7});  // a TSIG behind the OPT
        q[11]++;
        all.push_back(q);
        q[q.size() - 11] = 1;  // an A record behind it
        all.push_back(q);
        q[q.size() - 13] = uint8_t(q.size() - 14);  // whose owner is a pointer to itself
        all.push_back(q);
    }
    for (int type : {252, 251, 28, 65280}) all.push_back(make_query("b.test", type));
    all.push_back(Octets(12, 0));
    return all;
}

static void save_pair(const std::string& dir, int flags, const Octets& query,
                      const Octets& answer) {
    Octets in{uint8_t(flags)};
    append16(in, int(query.size()));
    append(in, query);
    append(in, answer);
    save(dir + "/answer", in);
}

// A message with records behind its OPT record, whose names point to before it, to each other and,
// if `into_opt`, into it. So may servers write them; few do.
static Octets opt_inside(const std::string& name, int flags, const Edns& edns, bool into_opt) {
    Octets m = make_query(name, 1, {}, 0x1234, flags);
    m[9] = 1;   // NS
    m[11] = 5;  // OPT, MX, A, SOA, CNAME
    const auto pointer = [&m](size_t to) { append16(m, 0xc000 | int(to)); };
    pointer(12);
    append(m, {0, 2, 0, 1, 0, 0, 1, 0, 0, 5, 2, 'n', 's'});
    pointer(12);
    const size_t opt = m.size();
    append(m, opt_record(edns));
    const size_t mail = m.size();
    append(m, {4, 'm', 'a', 'i', 'l'});
    pointer(12);
    append(m, {0, 15, 0, 1, 0, 0, 1, 0, 0, 4, 0, 10});
    pointer(mail);
    pointer(mail);
    append(m, {0, 1, 0, 1, 0, 0, 1, 0, 0, 4, 192, 0, 2, 1});
    pointer(into_opt ? opt : 12);
    append(m, {0, 6, 0, 1, 0, 0, 1, 0, 0, 26});
    pointer(mail);
    append(m, {1, 'h'});
    pointer(mail + 19);  // what the MX record points to: a pointer to a pointer
    m.insert(m.end(), 20, 0);
    pointer(mail);
    append(m, {0, 5, 0, 1, 0, 0, 1, 0, 0, 3, 1, 'x', 0});
    return m;
}

int main(int argc, char** argv) try {
    if (argc != 2) return 2;
    const std::string dir = argv[1];
    Certificates certificates;
    Upstream upstream(certificates);
    Proxy proxy(certificates, {upstream.spec()}, {"-q", "-t", "300"});
    for (const Octets& q : queries()) {
        save(dir + "/query", q);
        const size_t before = upstream.seen().answers.size();
        if (!proxy.udp(q, 2)) continue;
        const Seen seen = upstream.seen();
        if (seen.answers.size() == before) continue;
        for (int flags : {0, 1, 0xfc}) save_pair(dir, flags, q, seen.answers.back());
    }
    const Octets padding{0, 12, 0, 3, 0, 0, 0, 0, 11, 0, 2, 0, 9, 0, 15, 0, 4, 0, 23, 'x', 'y'};
    for (const bool into_opt : {false, true}) {
        const Octets a = opt_inside("a.test", 0x8180, {1232, false, padding}, into_opt);
        for (const Octets& q : {make_query("A.tesT"), make_query("A.tesT", 1, Edns{})})
            for (int flags : {0, 1, 4, 5}) save_pair(dir, flags, q, a);
        Octets q = opt_inside("a.test", 0x0100, {1232, true, padding}, into_opt);
        for (int first : {0x12, int('L'), int('X')}) {
            q[0] = uint8_t(first);
            save(dir + "/query", q);
        }
    }
    // Options that have no room in an answer that is cut.
    Octets options{0, 100, 2, 0};
    options.resize(options.size() + 512);
    save_pair(dir, 0, make_query("a.test", 1, Edns{}),
              make_query("a.test", 1, Edns{1232, false, options}, 0x1234, 0x8180));
    const std::string pin = ",pin-sha256=" + Certificates::pin(certificates.leaf(Cert::Good));
    for (const std::string& text :
         {std::string("ucloudflare"), std::string("uquad9"), "u192.0.2.1@853#dot.test" + pin + pin,
          std::string("u2001:db8::1#a.b-c_d"), std::string("u192.0.2.1@53#dot.test"),
          std::string("a127.0.0.1@5300"), std::string("a::1"), std::string("a::ffff:1.2.3.4@1"),
          std::string("p10.0.0.0/8"), std::string("pfe80::/10"), std::string("n65535"),
          std::string("n007")})
        save(dir + "/options", Octets(text.begin(), text.end()));
} catch (const std::exception& e) {
    fprintf(stderr, "seeds: %s\n", e.what());
    return 1;
}

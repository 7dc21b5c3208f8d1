// process.cpp - the program as a process: signals, limits, what it prints, and its options.
//
// Numbers in parentheses are those of the list of requirements in test/requirements.md.
#include <algorithm>

#include "program.hpp"

using namespace test;

// ---- process ------------------------------------------------------------------------------------

TEST("process.sigterm_finishes_queries_in_flight") {  // (117)
    Pair p;
    Client c(SOCK_DGRAM, p.proxy.port);
    c.send(make_query("slow800.test"));
    CHECK(eventually([&] { return p.upstream.seen().queries.size() == 1; }));
    const auto start = Clock::now();
    CHECK_EQ(p.proxy.process().end(SIGTERM), 0);
    CHECK(since(start) < 10);
    CHECK_EQ(Answer(*c.receive(1)).rcode(), 0);
    CHECK_EQ(number_in_totals(p.proxy.out(), "udp"), 1);
    CHECK_EQ(number_in_totals(p.proxy.out(), "success"), 1);
}

TEST("process.sigint_and_totals") {
    Pair p;
    CHECK(p.proxy.tcp(make_query("a.test")));
    CHECK(p.proxy.prints("SUCCESS "));  // A query is counted after its client has the answer.
    kill(p.proxy.pid(), SIGUSR1);
    CHECK(p.proxy.prints("TOTALS "));
    for (auto [name, number] : {std::pair("udp", 0), {"tcp", 1}, {"success", 1}, {"failure", 0}})
        CHECK_EQ(number_in_totals(p.proxy.out(), name), number);
    CHECK(p.proxy.udp(make_query("a.test")));
    CHECK_EQ(p.proxy.process().end(SIGINT), 0);
}

TEST("process.a_log_that_nobody_reads_is_survived") {
    TempDir dir;
    const std::string script = dir.path + "/unread";
    std::ofstream(script) << "#!/bin/bash\nexec " << environment("PROXY")
                          << " \"$@\" > >(exec true)\n";
    chmod(script.c_str(), 0700);
    setenv("PROXY", script.c_str(), 1);
    Pair p;
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 0);
        usleep(50000);  // its line comes after the answer
    }
}

TEST("process.few_open_files_are_survived") {  // (18)
    Certificates certificates;
    Upstream upstream(certificates);
    TempDir dir;
    const std::string script = dir.path + "/few";
    std::ofstream(script) << "#!/bin/sh\nulimit -n 40\nexec " << environment("PROXY")
                          << " \"$@\"\n";
    chmod(script.c_str(), 0700);
    setenv("PROXY", script.c_str(), 1);
    Proxy proxy(certificates, {upstream.spec()}, {"-q"});
    {
        std::vector<std::unique_ptr<Client>> clients;
        for (int i = 0; i < 80; i++)
            clients.push_back(std::make_unique<Client>(SOCK_STREAM, proxy.port));
        for (int i = 0; i < 5; i++) proxy.udp(make_query("a.test"), 1);
        CHECK(proxy.process().running());
    }
    CHECK(eventually([&] {
        const auto a = proxy.udp(make_query("a.test"), 2);
        return a && Answer(*a).rcode() == 0;
    }));
    CHECK(proxy.tcp(make_query("a.test")));
}

TEST("process.lines_have_no_names_and_no_addresses") {  // (115)
    Pair p;
    CHECK(p.proxy.udp(make_query("secret-name.test", 28)));
    CHECK(p.proxy.prints("SUCCESS udp AAAA NOERROR"));
    CHECK(p.proxy.udp(make_query("close-secret.test")));
    CHECK(p.proxy.prints("FAILURE udp A SERVFAIL"));
    const std::string out = p.proxy.out();
    const std::string lines =
        out.substr(out.find('\n'));  // without the one that tells the listeners
    CHECK(!contains(lines, "secret"));
    CHECK(!contains(lines, "127.0.0.1@" + std::to_string(p.proxy.port)));
}

TEST("process.verbose_tells_the_eight_steps") {
    Pair p({}, {"-v"});
    CHECK(p.proxy.udp(make_query("a.test")));
    CHECK(p.proxy.prints("SUCCESS"));
    for (const char* step : {"[1]", "[2]", "[3]", "[4]", "[5]", "[6]", "[7]", "[8]"})
        CHECK_WHY(contains(p.proxy.out(), step), step);
    CHECK(contains(p.proxy.out(), "24 -> 128 octets") &&
          contains(p.proxy.out(), "2 + 128 octets in one record"));
}

TEST("process.verbose_tells_whose_certificate_came") {
    Pair p({.cert = Cert::Expired}, {"-v"});
    CHECK_EQ(p.proxy.ask(make_query("a.test")).rcode(), 2);
    CHECK(p.proxy.prints("FAILURE"));
    const std::string out = p.proxy.out(), came = " came: /CN=dot.test\n";
    CHECK_WHY(contains(out, came) && contains(out, "certificate: certificate has expired\n"), out);
}

// ---- options ------------------------------------------------------------------------------------

static int program(const std::string& arguments, std::string& output) {
    return run("timeout 20 " + environment("PROXY") + " " + arguments, output);
}

TEST("options.bad_ones_end_with_exit_2_and_one_clear_line") {  // (67, 76, 79, 120)
    const char* rows[] = {"--nonsense",
                          "-x",
                          "extra",
                          "-l",
                          "-l localhost",
                          "-l 127.0.0.1@0",
                          "-l 127.0.0.1@65536",
                          "-l 127.0.0.1@53x",
                          "-u nobody",
                          "-u 192.0.2.1",
                          "-u 192.0.2.1#",
                          "-u 192.0.2.1@53#dot.test",
                          "-u 192.0.2.1#192.0.2",
                          "-u 192.0.2.1#dot.test,pin-sha256=short",
                          "-u 192.0.2.1#dot.test,pin=x",
                          "-u cloudflare -u nobody",
                          "-u '192.0.2.1#dot test'",
                          "-c /nonexistent/ca.pem",
                          "-c /dev/null",
                          "-n 0",
                          "-n 1x",
                          "-n -1",
                          "-n ''",
                          "-t 0",
                          "-t 99999999999999999999",
                          "-m 511",
                          "-m 65536",
                          "-k 9999",
                          "--rate -1",
                          "--rate x",
                          "-a 10.0.0.0/33",
                          "-a ::1/129",
                          "-a 10.0.0/8",
                          "-d 10.0.0.0/",
                          "-U no-such-user",
                          "-U -1"};
    for (const char* row : rows) {
        std::string out;
        CHECK_WHY(program(row, out) == 2, std::string(row) + ": " + out);
        CHECK_WHY(std::count(out.begin(), out.end(), '\n') == 1, std::string(row) + ": " + out);
    }
}

TEST("options.a_bad_one_is_named") {
    const std::pair<const char*, const char*> rows[] = {
        {"-qx", "-x: there is no such option"},
        {"-port 5300", "-p: there is no such option"},
        {"-q --nonsense", "--nonsense: there is no such option"},
        {"--quiet=yes", "--quiet=yes: this option takes no value"},
        {"-q --user", "--user: its value is missing"},
        {"-U 9999999999", "is not a number from 0 to 2147483647"},
        {"-U 2147483647 -n 0", "'0' is not a number"}};
    for (const auto& [row, what] : rows) {
        std::string out;
        program(row, out);
        CHECK_WHY(out.find(what) != out.npos, std::string(row) + ": " + out);
    }
}

TEST("options.port_in_use_ends_with_exit_1_and_the_way_out") {  // (119)
    Certificates certificates;
    for (int type : {SOCK_DGRAM, SOCK_STREAM}) {
        const int port = free_port(), fd = socket(AF_INET, type, 0);
        sockaddr_in v4{};
        v4.sin_family = AF_INET;
        v4.sin_port = htons(uint16_t(port));
        v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        CHECK(bind(fd, (sockaddr*)&v4, sizeof v4) == 0 &&
              (type == SOCK_DGRAM || listen(fd, 1) == 0));
        std::string out;
        CHECK_EQ(program("-l 127.0.0.1@" + std::to_string(port) + " -c " + certificates.ca(), out),
                 1);
        CHECK_WHY(contains(out, "port " + std::to_string(port) +
                                    " is taken; try --listen 127.0.0.1@5300"),
                  out);
        close(fd);
    }
}

TEST("options.help_and_version") {
    std::string out;
    CHECK_EQ(program("--help", out), 0);
    CHECK(contains(out, "[127.0.0.1@53 ::1@53]") && contains(out, "[512]") &&
          contains(out, "[4000]"));
    CHECK_EQ(program("-V", out), 0);
    CHECK(contains(out, "dot-proxy "));
}

int main(int argc, char** argv) { return check::main(argc, argv); }

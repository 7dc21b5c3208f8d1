// The scripted DNS-over-TLS server on its own: prints its --upstream and --ca options and serves
// until its standard input ends. usage: upstream [PORT [ADDRESS]]
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "upstream.hpp"

int main(int argc, char** argv) {
    test::Certificates certificates;
    test::Options options;
    if (argc > 1) options.port = atoi(argv[1]);
    if (argc > 2) options.address = argv[2];
    test::Upstream upstream(certificates, options);
    printf("--upstream %s --ca %s\n", upstream.spec().c_str(), certificates.ca().c_str());
    fflush(stdout);
    while (getchar() != EOF) {
    }
}

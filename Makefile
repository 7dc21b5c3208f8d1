# make                  builds build/dot-proxy; CPPFLAGS=-DPOSIX_ONLY without what POSIX lacks
# make run              on 127.0.0.1, port 5300
# make demo             two queries without internet, their story, octets and a capture for Wireshark
# make install          into PREFIX=/usr/local (and DESTDIR); make uninstall takes it away
# make test             all tests, or TESTS='-R ^tls'; SANITIZE=address,undefined or SANITIZE=thread
# make exercise N=07    a copy of the tree with that contribution applied, to be reviewed
# make exercises        proves all of them; ALL=--all with every test
# make exercise-pack    the tree, all contributions and a sheet, without the answers, for a class
# make step N=3         a copy of the tree without that step's function, which is yours to write
# make try N=3          runs its tests in that copy
# make steps            proves that the tests grade all eight
# make bench            beside the forwarders that are installed
# make fuzz             gives any octets to the pure functions; SECONDS=60 for each
# make soak             clients and resolvers of every bad manner; N=200000 queries
# make outage           one of two resolvers is killed each second; SECONDS=60
# make flood            what a flood takes from an honest client
# make chaos            all bad manners at once; SECONDS=600 in each of six programs
# make clean            removes build/
# README.md says more.

SANITIZE =
COMMA = ,
DIR = build$(if $(SANITIZE),/$(subst $(COMMA),-,$(SANITIZE)))$(if $(filter -DPOSIX_ONLY,$(CPPFLAGS)),/posix)
CXXFLAGS = -O2 -g -Wall -Wextra
STRICT = -std=c++20 -pthread $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-sanitize=vptr -fno-omit-frame-pointer)
JOBS = $(shell echo $$((2 * $$(nproc))))

all: $(DIR)/dot-proxy
	@echo "$< is built; \"make help\" lists what else can be made."

help:
	@sed -n '/^$$/q; s/^# //p' $(firstword $(MAKEFILE_LIST))

$(DIR)/dot-proxy: main.cpp dot.cpp dot.hpp Makefile
	@command -v $(CXX) >/dev/null && echo '#include <openssl/ssl.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1 || \
	  { echo "needs a C++ compiler and OpenSSL: apt-get install g++ make libssl-dev" >&2; exit 1; }
	@mkdir -p $(DIR)
	$(CXX) $(CXXFLAGS) $(STRICT) $(CPPFLAGS) $(if $(SANITIZE),,-static-libstdc++ -static-libgcc) $(LDFLAGS) -o $@ main.cpp dot.cpp -lssl -lcrypto

run: $(DIR)/dot-proxy
	$< --listen 127.0.0.1@5300

PREFIX = /usr/local
install: $(DIR)/dot-proxy
	install -D -m 755 $< $(DESTDIR)$(PREFIX)/bin/dot-proxy

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/dot-proxy

LONG = seeds soak outage flood chaos
$(addprefix $(DIR)/test/,all upstream $(LONG)): $(DIR)/test/%: $(DIR)/dot-proxy
	@command -v cmake >/dev/null || { echo "needs CMake: apt-get install cmake" >&2; exit 1; }
	cmake -S test -B $(DIR)/test -DPROXY=$(abspath $<) -DSANITIZE=$(SANITIZE) >/dev/null
	@+cmake --build $(DIR)/test --target $* -j $$(nproc) >/dev/null

demo: $(DIR)/test/upstream
	@test/demo.sh $(DIR)/dot-proxy $< $(DIR)/demo.pcapng

bench: $(DIR)/test/upstream
	@test/bench.sh $(abspath $(DIR)/dot-proxy) $(abspath $<)

test: $(DIR)/test/all
	cd $(DIR)/test && ctest -j $(JOBS) --output-on-failure $(TESTS)

SECONDS = 60
fuzz: $(DIR)/test/seeds
	@rm -rf $(DIR)/fuzz/seeds && mkdir -p $(DIR)/fuzz
	@PROXY=$(abspath $(DIR)/dot-proxy) $< $(DIR)/fuzz/seeds && test/fuzz.sh $(SECONDS) $(DIR)/fuzz
N = 200000
soak: $(DIR)/test/soak
	@PROXY=$(abspath $(DIR)/dot-proxy) N=$(N) $<

outage: $(DIR)/test/outage
	@PROXY=$(abspath $(DIR)/dot-proxy) SECONDS=$(SECONDS) $<

flood: $(DIR)/test/flood
	@PROXY=$(abspath $(DIR)/dot-proxy) $<

chaos: SECONDS = 600
chaos:
	@for with in thread address,undefined ''; do \
	  $(MAKE) --no-print-directory SANITIZE=$$with SECONDS=$(SECONDS) chaos-of-two || exit 1; done
chaos-of-two: $(DIR)/test/chaos
	@echo "$(DIR)/dot-proxy, $(SECONDS) s, and again with --reuse and -vv"
	@PROXY=$(abspath $(DIR)/dot-proxy) SECONDS=$(SECONDS) $<

ALL =
exercises:
	@test -d test/exercises/answers || { echo "the answers are not in this copy of the tree" >&2; exit 1; }
	@test/exercises/prove.sh $(ALL)

# For those who review: no answers, and no other contribution.
FOR_REVIEW = main.cpp dot.cpp dot.hpp Makefile Dockerfile README.md test
exercise:
	@command -v patch >/dev/null || { echo "needs patch: apt-get install patch" >&2; exit 1; }
	@set -- test/exercises/$(N)-*.patch; test -f "$$1" || \
	  { echo "which one? make exercise N=01, or another of:" $$(ls test/exercises | sed -n 's/-.*patch$$//p') >&2; exit 1; }; \
	tree=build/exercise-$(N); trap 'rm -rf $$tree.part' EXIT; rm -rf $$tree $$tree.part && mkdir -p $$tree.part && \
	cp -r $(FOR_REVIEW) $$tree.part && rm -r $$tree.part/test/exercises/[!R]* && \
	patch -d $$tree.part -p1 --fuzz=0 --no-backup-if-mismatch -s <"$$1" && mv $$tree.part $$tree && \
	sed -n '/^Subject/,/^---$$/p' "$$1" && echo "is applied in $$tree"

exercise-pack:
	@pack=build/dot-proxy-exercises; trap "rm -rf $$pack" EXIT; rm -rf $$pack && mkdir -p $$pack && \
	cp -r $(FOR_REVIEW) $$pack && (cd $$pack/test/exercises && rm -r answers prove.sh && \
	sed -n '/^| exercise/,/^|-/p' README.md >sheet.md && \
	for one in *.patch; do echo "| $${one%.patch} | | | | | |"; done >>sheet.md) && \
	tar -C build -czf build/exercises.tar.gz dot-proxy-exercises && echo "build/exercises.tar.gz is written"

STEPS = command -v python3 >/dev/null || { echo "needs Python 3: apt-get install python3" >&2; exit 1; }; test/steps/steps.py
step:
	@$(STEPS) begin "$(N)"

try:
	@$(STEPS) try "$(N)"

steps:
	@$(STEPS) prove

clean:
	rm -rf build
.PHONY: all help install uninstall run demo bench test fuzz soak outage flood chaos chaos-of-two exercises exercise exercise-pack step try steps clean $(addprefix $(DIR)/test/,all upstream $(LONG))

# Built on Debian, run on nothing but the program, the certificates it trusts and busybox.
FROM debian:bookworm-slim AS build
RUN apt-get update && \
    apt-get install -y --no-install-recommends g++ make libssl-dev ca-certificates busybox-static
COPY Makefile main.cpp dot.cpp dot.hpp /src/
RUN make -C /src LDFLAGS="-static -s"

WORKDIR /image
RUN mkdir -p bin etc usr/lib/ssl var/lib/dpkg/status.d && \
    cp /src/build/dot-proxy . && \
    cp /bin/busybox bin/ && \
    for tool in sh nslookup grep id sed tr; do ln -s busybox bin/$tool; done && \
    cp /etc/ssl/certs/ca-certificates.crt usr/lib/ssl/cert.pem

# For scanners: the release, and the packages whose files are in the image or linked into the program.
RUN cp /etc/os-release /etc/debian_version etc/ && \
    for package in libssl-dev libc6-dev libstdc++6 busybox-static ca-certificates; do \
        dpkg -s $package >var/lib/dpkg/status.d/$package || exit 1; done

# What the container starts with. Its options are those of $OPTIONS, then the arguments of docker run.
# Programs in the container are to ask the proxy too, as long as it listens everywhere. It becomes
# user 65534 if it has the right to: CAP_SETGID and CAP_SETUID are bits 6 and 7 of CapEff.
RUN printf '%s\n' >bin/start \
    '#!/bin/sh' \
    'set -f' \
    'set -- $OPTIONS "$@"' \
    'case " $*" in' \
    '*" -l"* | *" --l"*) ;;' \
    '*)' \
    '    set -- --listen 0.0.0.0 --listen :: "$@"' \
    '    grep -qsx "nameserver 127.0.0.1" /etc/resolv.conf ||' \
    '        echo nameserver 127.0.0.1 2>/dev/null >/etc/resolv.conf ||' \
    '        echo "warning: /etc/resolv.conf cannot be written:" \' \
    '            "programs in this container ask the resolver that it names; start it with --dns 127.0.0.1" >&2 ;;' \
    'esac' \
    'if grep -q "^CapEff:.*[c-f].$" /proc/self/status; then' \
    '    set -- --user 65534 "$@"' \
    'elif [ "$(id -u)" = 0 ]; then' \
    '    echo "warning: no right to become another user than root" >&2' \
    'fi' \
    'exec /dot-proxy "$@"' && \
    chmod 755 bin/start

# Whether the proxy answers, at the first address that it listens on. It answers resolver.arpa by itself,
# without a resolver and without a line.
RUN printf '%s\n' >bin/health \
    '#!/bin/sh' \
    'words() { tr "\0" "\n" </proc/1/cmdline; printf "%s\n" $OPTIONS; }' \
    'set -- $(words | sed -nE "/^(-l|--l[a-z]*)$/{n;p}; s/^(-l|--l[a-z]*=)(.)/\2/p")' \
    'address=${1:-0.0.0.0} port=53' \
    'case $address in *@*) port=${address#*@} address=${address%@*} ;; esac' \
    'case $address in 0.0.0.0) address=127.0.0.1 ;; ::) address=::1 ;; esac' \
    'exec nslookup -type=a resolver.arpa "[$address]:$port"' && \
    chmod 755 bin/health

FROM scratch
COPY --from=build /image/ /
LABEL org.opencontainers.image.title="dot-proxy" \
      org.opencontainers.image.description="A DNS to DNS-over-TLS proxy" \
      org.opencontainers.image.version="0.2"
EXPOSE 53/udp 53/tcp
HEALTHCHECK --interval=4s --timeout=6s CMD ["/bin/health"]
ENTRYPOINT ["/bin/start"]

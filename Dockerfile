# Built on Debian, run on nothing but the program, the certificates it trusts and busybox.
FROM debian:bookworm-slim AS build
RUN apt-get update && \
    apt-get install -y --no-install-recommends g++ make libssl-dev ca-certificates busybox-static
COPY Makefile main.cpp dot.cpp dot.hpp /src/
RUN make -C /src LDFLAGS="-static -s" && \
    mkdir -p /image/bin /image/etc /image/usr/lib/ssl && \
    cp /src/build/dot-proxy /image/ && \
    cp /bin/busybox /image/bin/ && \
    for tool in sh nslookup grep id; do ln -s busybox /image/bin/$tool; done && \
    cp /etc/ssl/certs/ca-certificates.crt /image/usr/lib/ssl/cert.pem

FROM scratch
COPY --from=build /image/ /
EXPOSE 53/udp 53/tcp
HEALTHCHECK --interval=30s --timeout=6s CMD ["/bin/nslookup", "example.com", "127.0.0.1"]
# The container's own programs are to ask the proxy too. The proxy becomes user 65534, unless it has no
# right to (CAP_SETGID and CAP_SETUID). Arguments of docker run follow the options.
ENTRYPOINT ["/bin/sh", "-c", "\
    echo nameserver 127.0.0.1 2>/dev/null >/etc/resolv.conf || \
        echo 'warning: /etc/resolv.conf is read-only and stays as it is' >&2; \
    user=65534; grep -q '^CapEff:.*[c-f].$' /proc/self/status || user=$(id -u); \
    [ $user != 0 ] || echo 'warning: no right to become another user than root' >&2; \
    exec /dot-proxy --listen 0.0.0.0 --listen :: --user $user \"$@\"", "dot-proxy"]

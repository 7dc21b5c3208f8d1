# Built on Debian, run on nothing but the program, the certificates it trusts and busybox.
FROM debian:bookworm-slim AS build
RUN apt-get update && \
    apt-get install -y --no-install-recommends g++ make libssl-dev ca-certificates busybox-static
COPY Makefile main.cpp dot.cpp dot.hpp /src/
RUN make -C /src LDFLAGS="-static -s" && \
    mkdir -p /image/bin /image/etc /image/usr/lib/ssl && \
    cp /src/build/dot-proxy /image/ && \
    cp /bin/busybox /image/bin/ && ln -s busybox /image/bin/sh && ln -s busybox /image/bin/nslookup && \
    cp /etc/ssl/certs/ca-certificates.crt /image/usr/lib/ssl/cert.pem

FROM scratch
COPY --from=build /image/ /
EXPOSE 53/udp 53/tcp
HEALTHCHECK --interval=30s --timeout=6s CMD ["/bin/nslookup", "example.com", "127.0.0.1"]
# The container's own programs are to ask the proxy too. Arguments of docker run follow the options.
ENTRYPOINT ["/bin/sh", "-c", "echo nameserver 127.0.0.1 2>/dev/null >/etc/resolv.conf || echo 'warning: /etc/resolv.conf is read-only and stays as it is' >&2; exec /dot-proxy --listen 0.0.0.0 --listen :: \"$@\"", "dot-proxy"]

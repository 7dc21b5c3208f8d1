#!/usr/bin/env python3
"""Whether what -vv says of a message agrees with what tshark says of the same octets, field by field.

usage: octets.py PROXY UPSTREAM. The proxy runs with -vv before a resolver of this file, which answers with
records of many types. The messages of the steps [1], [5], [6] and [8] are known octet by octet here; they are
given to tshark too, those of [1] and [8] as UDP and the others as TCP, with the length before them.
"""
import os, random, re, socket, ssl, struct, subprocess, sys, tempfile, threading, time
import xml.etree.ElementTree as ElementTree

PROXY, UPSTREAM = (os.path.abspath(path) for path in sys.argv[1:3])
QUERIES = 60  # of which each makes four messages
rng = random.Random(7)


def check(condition, *why):
    if not condition:
        sys.exit(" ".join(map(str, why)))


# ---- Messages ----------------------------------------------------------------------------------

def wire(name):
    return b"".join(bytes([len(label)]) + label for label in name.encode().split(b".") if label) + b"\0"


def record(name, kind, data, klass=1, ttl=None):
    return name + struct.pack("!HHIH", kind, klass, rng.randrange(1, 86400) if ttl is None else ttl, len(data)) + data


def option(code, data):
    return struct.pack("!HH", code, len(data)) + data


POINTER = b"\xc0\x0c"  # to the question's name
DATA = {  # by type: data as it may come, names with and without pointers
    1: [b"\xc0\0\2\1"], 28: [bytes(range(16)), bytes(15) + b"\1"], 2: [b"\3ns1" + POINTER, wire("ns.other.test")],
    5: [b"\5alias" + POINTER], 12: [wire("host-1.other.test")], 15: [b"\0\x0a\4mail" + POINTER],
    6: [wire("ns1.test") + wire("admin.test") + struct.pack("!IIIII", 2026010101, 7200, 3600, 1209600, 300)],
    16: [b"\x0dv=spf1 -all ~", b"\5hello\5world", b"\4\x1b[2J"], 33: [struct.pack("!HHH", 1, 2, 5060) + wire("sip.test")],
    43: [struct.pack("!HBB", 12345, 13, 2) + bytes(range(32))], 48: [struct.pack("!HBB", 257, 3, 13) + bytes(range(64))],
    46: [struct.pack("!HBBIIIH", 1, 13, 2, 300, 1893456000, 1767225600, 4711) + wire("test") + bytes(64)],
    65: [b"\0\1\0" + struct.pack("!HH", 1, 3) + b"\2h2"], 257: [b"\0\5issueca.test"], 65280: [b"\1\2\3"], 99: [b"\3txt"]}


def opt(options, do=0, size=1232):
    return b"\0" + struct.pack("!HHBBHH", 41, size, 0, 0, do << 15, len(options)) + options


def make_query(n):
    name = "%s%d.%s.test" % (rng.choice(["www", "a", "_dns", "MiXed", "x" * 40]), n, rng.choice(["b", "example", "y" * 60]))
    kind = rng.choice(list(DATA))
    options = b"".join(rng.sample([option(10, bytes(range(8))), option(3, b""), option(8, b"\0\1\x18\0\xc0\0\2")], rng.randrange(3)))
    tail = opt(options, rng.randrange(2), rng.choice([512, 1232, 4096])) if rng.random() < 0.7 else b""
    flags = rng.choice([0x0100, 0x0120, 0x0110, 0x0000])
    return struct.pack("!HHHHHH", rng.randrange(65536), flags, 1, 0, 0, bool(tail)) + wire(name) + struct.pack("!HH", kind, 1) + tail


def make_answer(query):
    end = query.index(b"\0", 12) + 5
    kind = struct.unpack("!H", query[end - 4:end - 2])[0]
    answers = [record(POINTER, kind, rng.choice(DATA[kind])) for _ in range(rng.randrange(4))]
    other = [record(wire("test"), t, rng.choice(DATA[t])) for t in rng.sample(list(DATA), rng.randrange(3))]
    more = [record(POINTER, 28, DATA[28][0])] * rng.randrange(2)
    extra = [opt(rng.choice([b"", option(15, b"\0\x16text"), option(10, bytes(24))]) + option(12, bytes(rng.choice([0, 5, 90]))), 1, 4096)]
    flags = struct.unpack("!H", query[2:4])[0] | rng.choice([0x8080, 0x8580, 0x80a0]) | rng.choice([0, 0, 0, 3])
    head = query[:2] + struct.pack("!HHHHH", flags, 1, len(answers), len(other), len(more + extra))
    return head + query[12:end] + b"".join(answers + other + more + extra)


# ---- The proxy between a client and a resolver ---------------------------------------------------

def receive(stream, size):
    got = b""
    while len(got) < size:
        part = stream.recv(size - len(got))
        if not part:
            raise OSError("closed")
        got += part
    return got


class Resolver(threading.Thread):
    def __init__(self, certificates):
        super().__init__(daemon=True)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificates + "/good.pem", certificates + "/good.key")
        self.context.set_alpn_protocols(["dot"])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.seen = []  # (query, answer)

    def run(self):
        while True:
            threading.Thread(target=self.serve, args=(self.listener.accept()[0],), daemon=True).start()

    def serve(self, raw):
        try:
            with self.context.wrap_socket(raw, server_side=True) as stream:
                while True:
                    query = receive(stream, struct.unpack("!H", receive(stream, 2))[0])
                    answer = make_answer(query)
                    self.seen.append((query, answer))
                    stream.sendall(struct.pack("!H", len(answer)) + answer)
        except OSError:
            pass


def talk(port, resolver):
    """What was sent at each step, of each query: {(number, step): octets}."""
    messages = {}
    for n in range(1, QUERIES + 1):
        query = make_query(n)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(30)
            client.sendto(query, ("127.0.0.1", port))
            answer = client.recv(65535)
        padded, sent = [pair for pair in resolver.seen if pair[0][:2] == query[:2]][-1]
        messages.update({(n, 1): query, (n, 5): padded, (n, 6): sent, (n, 8): answer})
    return messages


def run_proxy(messages_of):
    rig = subprocess.Popen([UPSTREAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        ca = rig.stdout.readline().split()[3]  # its certificates are all that is wanted
        resolver = Resolver(os.path.dirname(ca))
        resolver.start()
        for _ in range(10):
            port = rng.randrange(20000, 32000)
            with tempfile.TemporaryFile("w+") as out:
                proxy = subprocess.Popen(
                    [PROXY, "-vv", "-R", "-l", "127.0.0.1@%d" % port, "-c", ca, "-u", "127.0.0.1@%d#dot.test" % resolver.port],
                    stdout=out)
                try:
                    while proxy.poll() is None:
                        with socket.socket() as s:
                            if s.connect_ex(("127.0.0.1", port)) == 0:
                                break
                        time.sleep(0.05)
                    if proxy.poll() is not None:
                        continue  # somebody has the port
                    messages = messages_of(port, resolver)
                    time.sleep(0.3)
                    proxy.terminate()
                    check(proxy.wait(60) == 0, "the proxy did not end well")
                    out.seek(0)
                    return messages, out.read()
                finally:
                    proxy.kill()
                    proxy.wait()
        sys.exit("no free port")
    finally:
        rig.stdin.close()
        rig.wait()


def annotated(text):
    """{(number, step): [(what, says, octets)]}, the last of each."""
    found, fields = {}, []
    for line in text.split("\n"):
        head = re.match(r"#(\d+) \[(\d)\] ", line)
        if head:
            fields = found[int(head[1]), int(head[2])] = []
        elif line.startswith("        "):
            what, rest = line[8:20].strip(), line[21:]
            octets = re.search(r"((?: [0-9a-f]{2})*| [0-9a-f]{2} \* \d+)$", rest)[1]
            says = rest[:len(rest) - len(octets)].strip() if len(octets) < len(rest) - 27 else rest[:28].strip()
            many = re.match(r" (\w\w) \* (\d+)$", octets)
            octets = bytes.fromhex(many[1]) * int(many[2]) if many else bytes.fromhex(octets)
            if octets:
                fields.append((what, says, octets))
    return found


# ---- tshark --------------------------------------------------------------------------------------

def packet(n, step, message):
    answer = step in (6, 8)
    ports = (53, 20000 + n * 8 + step) if answer else (20000 + n * 8 + step, 53)
    if step in (5, 6):
        message = struct.pack("!H", len(message)) + message
        body = struct.pack("!HHIIBBHHH", *ports, 1, 1, 0x50, 0x18, 65535, 0, 0) + message
    else:
        body = struct.pack("!HHHH", *ports, 8 + len(message), 0) + message
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), n, 0, 64, 6 if step in (5, 6) else 17, 0,
                     bytes([192, 0, 2, 1 + answer]), bytes([192, 0, 2, 2 - answer]))
    return ip + body


def dissect(keys, messages):
    with tempfile.NamedTemporaryFile(suffix=".pcap") as file:
        file.write(struct.pack("!IHHiIII", 0xa1b2c3d4, 2, 4, 0, 0, 262144, 101))  # 101: raw IP
        for i, key in enumerate(keys):
            octets = packet(*key, messages[key])
            file.write(struct.pack("!IIII", i, 0, len(octets), len(octets)) + octets)
        file.flush()
        pdml = subprocess.run(["tshark", "-n", "-r", file.name, "-T", "pdml"], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, check=True).stdout
    packets = list(ElementTree.fromstring(pdml))
    check(len(packets) == len(keys), "tshark saw", len(packets), "of", len(keys))
    return dict(zip(keys, packets))


PLAIN = {"dns.length": "length", "dns.id": "id", "dns.flags": "flags", "dns.count.queries": "questions",
         "dns.count.answers": "answers", "dns.count.auth_rr": "authorities", "dns.count.add_rr": "additionals",
         "dns.qry.name": "name", "dns.qry.type": "type", "dns.qry.class": "class", "dns.resp.name": "name",
         "dns.resp.type": "type", "dns.resp.class": "class", "dns.rr.udp_payload_size": "UDP size", "dns.resp.ttl": "TTL",
         "dns.resp.len": "size", "dns.opt.code": "option", "dns.opt.len": "size"}
VALUES = {"dns.a": 1, "dns.aaaa": 28, "dns.ns": 2, "dns.cname": 5, "dns.ptr.domain_name": 12}
FLAGS = [("response", "QR"), ("authoritative", "AA"), ("truncated", "TC"), ("recdesired", "RD"), ("recavail", "RA"),
         ("z", "Z"), ("authenticated", "AD"), ("checkdisable", "CD")]
CLASSES = {1: "IN", 3: "CH", 4: "HS", 254: "NONE", 255: "ANY"}
OPTIONS = {3: "NSID", 5: "DAU", 6: "DHU", 7: "N3U", 8: "CLIENT-SUBNET", 9: "EXPIRE", 10: "COOKIE", 11: "KEEPALIVE",
           12: "PADDING", 13: "CHAIN", 14: "KEY-TAG", 15: "ERROR"}
RCODES = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}


def expected(node):
    """{position in the frame: (what, size, what it says)} of all that tshark sees in the layer."""
    dns = [proto for proto in node if proto.get("name") == "dns"]
    check(len(dns) == 1, "tshark sees no DNS, or too much")
    fields, values, flags = {}, {}, {}
    edns = {}
    for f in dns[0].iter("field"):
        name, at, size, show = f.get("name"), int(f.get("pos")), int(f.get("size")), f.get("show")
        check("malformed" not in name, "malformed for tshark")
        if name in PLAIN:
            if name in ("dns.qry.name", "dns.resp.name"):
                show = "." if show == "<Root>" else show
            elif name in ("dns.qry.type", "dns.resp.type"):
                show = re.match(r"Type: (\S+)", f.get("showname"))[1], int(show)
            elif name in ("dns.qry.class", "dns.resp.class"):
                show = CLASSES.get(int(show, 0), "CLASS%d" % int(show, 0))
            elif name == "dns.opt.code":
                show = OPTIONS.get(int(show, 0), "OPTION%d" % int(show, 0))
            else:
                show = str(int(show, 0))
            fields[at] = PLAIN[name], size, show
        elif name == "dns.srv.service":  # it takes the owner's name apart
            fields[at] = "name", size, None
        elif name in VALUES:
            values[at] = show
        elif name.startswith("dns.flags."):
            flags[name[10:]] = int(show, 0) if show.isdigit() or show.startswith("0x") else show in ("True", "1")
        elif name == "dns.resp.edns0_version":
            edns[at - 1] = int(show, 0)
        elif name == "dns.resp.z.do":
            edns["do", at - 2] = show in ("1", "True")
    for at, version in [(k, v) for k, v in edns.items() if isinstance(k, int)]:
        fields[at] = "TTL", 4, "version %d%s" % (version, " DO" if edns["do", at] else "")
    flag_at = [at for at, f in fields.items() if f[0] == "flags"][0]
    names = " ".join(short for long, short in FLAGS if flags.get(long))
    rcode = flags.get("rcode", 0)
    fields[flag_at] = "flags", 2, "opcode %d, %s%s" % (flags["opcode"], names + " " if names else "", RCODES[rcode])
    return fields, values


def compare(key, node, fields, message):
    step = key[1]
    at = 40 if step in (5, 6) else 28  # behind the headers of IP and TCP or UDP
    whole = b"".join(octets for _, _, octets in fields)
    check(whole == (struct.pack("!H", len(message)) if step in (5, 6) else b"") + message, key, "the octets differ:", whole.hex())
    wanted, values = expected(node)
    seen = 0
    for what, says, octets in fields:
        here = wanted.get(at)
        if what == "data":  # of which tshark has more than one field, or none
            if at in values:
                check(says == values[at], key, what, says, "and not", values[at])
            check(here is None, key, "tshark has", here, "where -vv has data")
        else:
            check(here and here[0] == what and here[1] == len(octets), key, what, says, octets.hex(), "but tshark:", here)
            show = here[2]
            if what == "type":
                check(says == show[0] or says == "TYPE%d" % show[1], key, "type", says, "and not", show)
            elif show is not None and what != "length":  # which -vv gives as octets only
                check(says == show, key, what, repr(says), "and not", repr(show))
            seen += 1
        at += len(octets)
    check(seen == len(wanted), key, "tshark has fields that -vv has not:", wanted)


def main():
    messages, text = run_proxy(talk)
    told = annotated(text)
    keys = sorted(messages)
    check(len(keys) >= 200, "only", len(keys), "messages")
    nodes = dissect(keys, messages)
    types = set()
    for key in keys:
        check(key in told, key, "is not told")
        compare(key, nodes[key], told[key], messages[key])
        types |= {says for what, says, _ in told[key] if what == "type"}
    check(len(types) > len(DATA) * 3 / 4, "too few types:", types)
    print(len(keys), "messages with records of", len(types), "types: -vv and tshark agree field by field")


main()

#!/usr/bin/env python3
"""README.md is held to what the program does: each of its indented blocks is run, parsed or compared,
by what it begins with, and a block of no known kind is an error. The code of carry() is in pieces, which are
compared as one. Times, addresses and the resolver's
name are masked. usage: readme.py PROXY UPSTREAM GROUP.CASE"""
import contextlib, glob, os, pty, random, re, shutil, socket, ssl, subprocess, sys, tempfile, threading, time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROXY, UPSTREAM = (os.path.abspath(path) for path in sys.argv[1:3])
KINDS = {  # by the first line; the number is how many there must be at least
    "shell": (r"(apt-get|cd|docker|make|nslookup|openssl|ss|systemctl|tcpdump) ", 15),
    "help": (r"dot-proxy \[options\]", 1), "example": (r"dot-proxy -", 1),
    "line": (r"READY|SUCCESS|ANSWERED|FAILURE", 2), "totals": (r"TOTALS", 1), "story": (r"#1 \[1\]", 1),
    "octets": (r"#1 \[5\]", 1), "framing": (r"UDP: ", 1), "picture": (r"stub resolver", 1),
    "timeline": (r" *ms +the UDP loop", 1), "test": (r"TEST\(", 1),
    "pod": (r"apiVersion: ", 2), "compose": (r"services:", 1), "unit": (r"\[Unit\]", 1),
    "resolved": (r"\[Resolve\]", 1), "unbound": (r"server:", 1), "dnsmasq": (r"no-resolv", 1), "corefile": (r"\S+:53 \{", 2)}
QUERY = bytes.fromhex("123401000001000000000000076578616d706c6503636f6d0000010001")


def read(path):
    with open(os.path.join(TOP, path)) as file:
        return file.read()


def check(condition, *why):
    if not condition:
        sys.exit("README.md: " + " ".join(map(str, why)))


def skip(why):
    print("skipped:", why)
    sys.exit(77)


def blocks(kind):  # the indented blocks of a kind, without their indent
    found, block = [], []
    for line in read("README.md").replace(carry_section(), "").split("\n") + ["."]:
        if line.startswith("    ") or (block and not line):
            block.append(line)
        elif block:
            width = min(len(one) - len(one.lstrip()) for one in block if one)
            found.append("\n".join(one[width:] for one in block).strip("\n"))
            block = []
    for one in found:
        check(any(re.match(start, one) for start, _ in KINDS.values()), "of no known kind:", one)
    some = [one for one in found if re.match(KINDS[kind][0], one)]
    check(len(some) >= KINDS[kind][1], "too few blocks of the kind", kind)
    return some


def carry_section():
    return re.search(r"(?s)\n## The function that carries a query\n.*?(?=\n## )", read("README.md"))[0]


def shell_lines():
    return [line for block in blocks("shell") for line in block.split("\n") if line]


def mask(text):
    text = re.sub(r" +[0-9.]+ ms", " T ms", text)
    text = re.sub(r"^(READY .* asking .*?) and \d+ more$", r"\1", text, flags=re.M)
    text = re.sub(r"[0-9a-f.:]+@\d+", "ADDRESS", text)
    text = re.sub(r"ADDRESS(, ADDRESS)+", "ADDRESS", text)
    text = re.sub(r"\b([a-zA-Z_]+)=\d+", r"\1=N", text)  # totals
    text = re.sub(r"\d{4}-\d\d-\d\d", "DATE", text)
    return re.sub(r"cloudflare-dns\.com|dns\.example|dot\.test|wrong\.test", "NAME", text)


class Rig:
    """The tests' own upstream and the program before it."""
    def __enter__(self):
        self.upstream = subprocess.Popen([UPSTREAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True)
        self.options = self.upstream.stdout.readline().split()
        self.certificates = os.path.dirname(self.options[3])
        return self

    def __exit__(self, *_):
        self.upstream.stdin.close()
        self.upstream.wait()

    @contextlib.contextmanager
    def proxy(self, *more, to=None):
        """The program on a free port: the port, the process, the file that its lines go to."""
        options = [to or self.options[1] if o == self.options[1] else o for o in self.options]
        for _ in range(10):
            port = random.randrange(20000, 32000)
            with tempfile.TemporaryFile("w+") as out:
                proxy = subprocess.Popen([PROXY, "-l", "127.0.0.1@%d" % port, *options, *more],
                                         stdout=out)
                try:
                    if listens(port, proxy):  # else somebody has the port
                        yield port, proxy, out
                        return
                finally:
                    proxy.kill()
                    proxy.wait()
        sys.exit("no free port")

    def run(self, *more, queries=1, to=None, query=QUERY):
        """What the program prints for so many queries over UDP, one after the other."""
        with self.proxy(*more, to=to) as (port, proxy, out):
            for n in range(queries):
                check(ask(port, query), "no answer")
                # Its line comes after the answer; then the next connection is made ready.
                wait_for(lambda: len(re.findall("^(SUCC|ANSW|FAIL)", whole(out), re.M)) > n)
                time.sleep(0.3 if n + 1 < queries else 0)
            proxy.terminate()
            check(proxy.wait(60) == 0, "it did not end well")
            return whole(out)


class Plain:
    """A plain resolver on UDP, which answers every name with 10.0.0.80 and remembers it."""
    def __init__(self, address="127.0.0.1", port=0):
        self.heard, self.socket = [], socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((address, port))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            query, client = self.socket.recvfrom(65535)
            end = 12
            while query[end]:
                end += 1 + query[end]
            name = query[13:end]
            self.heard.append(re.sub(rb"[\0-\x1f]", b".", name).decode().lower())
            record = bytes.fromhex("c00c00010001000000fa00040a000050")
            self.socket.sendto(query[:2] + bytes.fromhex("85800001000100000000") +
                               query[12:end + 5] + record, client)


def whole(file):
    file.seek(0)
    return file.read()


def wait_for(condition):  # on a slow machine, too
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    check(condition(), "it does not come")


def listens(port, process):
    while process.poll() is None:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.05)
    return False


def ask(port, query=QUERY):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(30)
        s.sendto(query, ("127.0.0.1", port))
        return s.recv(65535)


def query_for(name):  # type A
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return QUERY[:12] + labels + QUERY[-5:]


# ---- The cases ---------------------------------------------------------------------------------

def every_block_is_of_a_known_kind():
    for kind in KINDS:
        blocks(kind)
    lines = read("README.md").split("\n")
    for number, line in enumerate(lines, 1):  # some lines cannot be broken
        check(len(line) <= 120 or line.startswith(("    apt-get ", "      openssl ", "    TOTALS", "| ")),
              "line", number, "is too wide")


def options_are_the_programs():
    want = subprocess.run([PROXY, "--help"], capture_output=True, text=True, check=True).stdout
    for have in blocks("help"):
        check(have.strip() == want.strip(), "--help prints otherwise:\n" + want)


def accepts(options, what):
    # Options that are good end with exit 1, as the port is taken, and bad ones with 2.
    known = (path for path in ("/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/cert.pem") if os.path.exists(path))
    options = [next(known, one) if re.search(r"^/.*\.pem$", one) else one for one in options]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        options += ["-l", "127.0.0.1@%d" % taken.getsockname()[1]]
        end = subprocess.run([PROXY, *options], capture_output=True, text=True, timeout=60)
    check(end.returncode == 1, what, "is not accepted:", end.stderr)


def commands_are_good():
    image = re.search(r"docker build -t (\S+) \.", read("README.md"))[1]
    for line in shell_lines() + re.findall(r"`(docker run [^`]*|make [^`]*)`", read("README.md")):
        subprocess.run(["bash", "-n", "-c", line], check=True)
        for command in re.findall(r"(?:(?<=&& )|^)make (?:[A-Z]+=\S+ )*[a-z]+(?: [A-Z]+=\S+)*", line):
            for target in re.findall(r" ([a-z]+)(?= |$)", command):
                check(re.search(r"(?m)^%s:" % target, read("Makefile")), "make has no", target)
        if line.startswith("docker run") and image in line:
            in_environment = re.findall(r'-e OPTIONS="([^"]*)"', line) + [""]
            accepts(in_environment[0].split() + line.split(image, 1)[1].split(), line)
    for block in blocks("example"):
        for line in block.split("\n"):
            accepts(line.split()[1:], line)


def script(name):  # that the Dockerfile writes to the image's bin/
    import shlex
    text, = re.findall(r"(?ms)^RUN printf '%%s\\n' >bin/%s ((?:.*\\\n)*?.*?) && " % name, read("Dockerfile"))
    return "\n".join(shlex.split(text.replace("\\\n", ""))) + "\n"


def shell(text, *arguments, **environment):
    end = subprocess.run(["sh", "-c", text, "sh", *arguments], capture_output=True, text=True,
                         env={"PATH": os.environ["PATH"], **environment})
    check(end.returncode == 0, text, end.stderr)
    return end.stdout.strip(), end.stderr.strip()


def image_starts_with_its_options():
    everywhere, other = "--listen 0.0.0.0 --listen ::", "--user 65534 "
    with tempfile.TemporaryDirectory() as dir:
        own, status = dir + "/resolv.conf", dir + "/status"
        text = script("start").replace("/dot-proxy", "echo").replace("/etc/resolv.conf", own)
        text = text.replace("/proc/self/status", status).replace("$(id -u)", "$ID")
        for options, arguments, rights, user, want in (
                ("", "", "c0", 0, other + everywhere), ("", "", "20", 0, everywhere),
                ("", "", "00", 1000, everywhere), ("", "-u quad9", "ff", 0, other + everywhere + " -u quad9"),
                ("-r 50", "-q", "ff", 0, other + everywhere + " -r 50 -q"),
                ("-q -l ::1", "-v", "ff", 0, other + "-q -l ::1 -v"),
                ("", "--listen=127.0.0.1", "ff", 0, other + "--listen=127.0.0.1"),
                ("", "-l127.0.0.1@5300", "00", 1000, "-l127.0.0.1@5300")):
            with open(own, "w") as file:
                file.write("nameserver 192.0.2.1\n")
            with open(status, "w") as file:
                file.write("CapEff:\t00000000a80425%s\n" % rights)
            said, warning = shell(text, *arguments.split(), OPTIONS=options, ID=str(user))
            check(said == want, "options", options, arguments, "start", said)
            check(("127.0.0.1" in open(own).read()) == (everywhere in want), "resolv.conf with", want)
            check(("another user" in warning) == (rights == "20"), "it warns", warning)
        gone = text.replace(own, "/nonexistent/resolv.conf")
        check("cannot be written" in shell(gone, ID="1")[1], "it is silent on resolv.conf")


def image_is_asked_where_it_listens():
    with tempfile.NamedTemporaryFile("w") as file:
        text = script("health").replace("/proc/1/cmdline", file.name).replace("exec nslookup", "echo")
        for words, options, want in (
                ("/dot-proxy --user 1 --listen 0.0.0.0 --listen ::", "", "[127.0.0.1]:53"),
                ("/dot-proxy -l 127.0.0.1@5300 -l ::1", "", "[127.0.0.1]:5300"),
                ("/dot-proxy --listen=::@54 -q", "", "[::1]:54"), ("/dot-proxy -l172.28.0.53", "", "[172.28.0.53]:53"),
                ("/sbin/docker-init -- /bin/start -q", "-r 5 -l fd00::1@55", "[fd00::1]:55"),
                ("/pause", "", "[127.0.0.1]:53")):
            file.seek(0)
            file.truncate()
            file.write(words.replace(" ", "\0") + "\0")
            file.flush()
            said = shell(text, OPTIONS=options)[0]
            check(said == "-type=a resolver.arpa " + want, words, options, "is asked", said)


def image_is_labelled():
    docker = read("Dockerfile")
    version = subprocess.run([PROXY, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    check('version="%s"' % version in docker, "the label is not", version)
    check(re.search(r"for tool in [a-z ]*nslookup.* bin/\$tool", docker), "no nslookup in the image")
    for name in re.findall(r"image: \S*dot-proxy-server\S*", read("README.md")):
        check(name.endswith(":" + version), name, "is not of version", version)


def pin_is_computed_so():
    line, = (line for line in shell_lines() if line.startswith("openssl "))
    if not shutil.which("openssl"):
        skip("no openssl")
    with Rig() as rig:
        shutil.copy(rig.certificates + "/good.pem", rig.certificates + "/cert.pem")
        pin = subprocess.run(line, shell=True, cwd=rig.certificates, capture_output=True, text=True,
                             check=True).stdout.strip()
        other = "A" * 43 + "="
        for one, word in ((pin, "SUCCESS"), (other, "FAILURE")):
            out = rig.run(to=rig.options[1] + ",pin-sha256=" + one)
            check(any(line.startswith(word) for line in out.split("\n")), "pin", one, "gives", out)


def lines_are_the_programs():
    want = {mask(line) for block in blocks("line") for line in block.split("\n")}
    with Rig() as rig:
        have = rig.run(queries=2)
        have += rig.run(query=query_for("servfail.test"))
        have += rig.run(to=rig.options[1].replace("dot.test", "wrong.test"))
    missing = want - {mask(line) for line in have.split("\n")}
    check(not missing, "never printed:", missing, "but", have)


def totals_are_the_programs():
    with Rig() as rig:  # the second query finds a connection that the first one left
        last = rig.run(queries=2).strip().split("\n")[-1]
    last = re.sub(r" raced=\d+", "", last)  # on a slow machine
    for block in blocks("totals"):
        check(mask(block.replace("\n", " ")) == mask(last), "it prints", last)


def story(more):
    with Rig() as rig:
        return [line for line in mask(rig.run(more)).split("\n") if line.startswith(("#1", "        "))]


def story_is_the_programs():
    have = story("-v")
    for block in blocks("story"):
        check(mask(block).split("\n") == have, "-v prints otherwise:", *have, sep_of(block))


def sep_of(block):
    return "\n-- and not --\n" + mask(block)


def octets_are_the_programs():  # -vv: each block is a part of what it prints
    if not blocks("octets"):
        return
    have = "\n".join(story("-vv"))
    for block in blocks("octets"):
        for part in mask(block).split("\n...\n"):
            check(part in have, "-vv prints otherwise:\n" + have, sep_of(block))


def columns(block):  # the octets of the two columns of the framing
    head, *lines = block.split("\n")
    starts = [0, head.index("TLS: "), head.index("what it is")]
    for start, end in zip(starts, starts[1:]):
        text = "".join(" " + line[start:end] for line in lines)
        text = re.sub(r"(\w\w) \* (\d+)", lambda m: (m[1] + " ") * int(m[2]), text)
        yield bytes.fromhex(text)


def framing_is_the_programs():
    got = []
    with Rig() as rig, socket.create_server(("127.0.0.1", 0)) as listener:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(rig.certificates + "/good.pem", rig.certificates + "/good.key")
        context.set_alpn_protocols(["dot"])

        def serve():  # reads one record and closes: the octets are all that is wanted
            while True:
                try:
                    with context.wrap_socket(listener.accept()[0], server_side=True) as s:
                        got.append(s.recv(65535))
                except OSError:
                    if listener.fileno() < 0:
                        return

        threading.Thread(target=serve, daemon=True).start()
        rig.run(to="127.0.0.1@%d#dot.test" % listener.getsockname()[1])
    for block in blocks("framing"):
        udp, tls = columns(block)
        check(udp == QUERY, "the left column is not the query:", udp.hex(" "))
        check(got and tls == got[0], "what came over TLS:", got and got[0].hex(" "))


def load_yaml(text):
    try:
        import yaml
    except ImportError:
        skip("no python3-yaml")
    return yaml.safe_load(text)


def check_containers(pod, text):
    check(pod["containers"], "no containers")
    pod_context = pod["securityContext"]
    check(pod_context["seccompProfile"] == {"type": "RuntimeDefault"}, "seccompProfile")
    known = {"name", "image", "command", "restartPolicy", "startupProbe", "readinessProbe", "resources",
             "securityContext"}
    for one in pod.get("initContainers", []) + pod["containers"]:
        check(set(one) <= known, "unknown keys of a container:", set(one) - known)
        check(one["name"] and ":" in one["image"], "a container without a name, or an image without a tag")
        check(one["securityContext"]["capabilities"]["drop"] == ["ALL"], "capabilities")
        check(one["securityContext"]["allowPrivilegeEscalation"] is False, "privilege escalation")
        check("ports" not in one, "ports, which the host's network does not need")
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):  # of the proxy, not of its resolver
            check(one.get(kind, {}).get("exec", {"command": ["/bin/health"]}) == {"command": ["/bin/health"]}, kind)
        command = one.get("command", [])
        if command[:1] == ["/dot-proxy"]:
            accepts(command[1:], one["name"])
            context = one["securityContext"]
            check(context["readOnlyRootFilesystem"], "a root file system that is writable")
            check("memory" in one["resources"]["limits"], "no limits")
            check("startupProbe" in one or "readinessProbe" in one, "no probe")
            sysctls = pod_context.get("sysctls", [])
            check(any(s["name"].endswith("port_start") and s["value"] == "53" for s in sysctls) or
                  "NET_BIND_SERVICE" in context["capabilities"].get("add", []), "port 53 is closed")


def kubernetes_snippets_parse():
    for text in blocks("pod"):
        y = load_yaml(text)
        check(set(y) == {"apiVersion", "kind", "metadata", "spec"} and y["metadata"]["name"], "keys")
        if y["kind"] == "Pod":
            check(y["apiVersion"] == "v1" and y["spec"]["dnsPolicy"] == "None", "pod")
            check(y["spec"]["dnsConfig"]["nameservers"] == ["127.0.0.1"], "nameservers")
            check_containers(y["spec"], text)
            check(y["spec"]["securityContext"]["runAsNonRoot"], "it may be root")  # for "restricted"
            check(all("add" not in c["securityContext"]["capabilities"]
                      for c in y["spec"]["initContainers"] + y["spec"]["containers"]), "it has a capability")
        else:
            check((y["apiVersion"], y["kind"]) == ("apps/v1", "DaemonSet"), y["kind"])
            template = y["spec"]["template"]
            labels = y["spec"]["selector"]["matchLabels"]
            check(labels == template["metadata"]["labels"], "the labels differ")
            check(template["spec"]["hostNetwork"] is True, "not on the host's network")
            check(template["spec"]["tolerations"] == [{"operator": "Exists"}], "tolerations")
            forward = re.search(r"forward \. (\S+)", "\n".join(blocks("corefile")))[1]
            check("--listen, %s," % forward in text, "CoreDNS asks another address:", forward)
            check_containers(template["spec"], text)


def compose_file_parses():
    import ipaddress
    for text in blocks("compose"):
        y = load_yaml(text)
        dns, = (s for s in y["services"].values() if "build" in s)
        (net, own), = dns["networks"].items()
        subnet = ipaddress.ip_network(y["networks"][net]["ipam"]["config"][0]["subnet"])
        check(ipaddress.ip_address(own["ipv4_address"]) in subnet, "its address is not in", subnet)
        accepts(dns["environment"]["OPTIONS"].split(), "compose")
        for name, service in y["services"].items():
            check(("image" in service) != ("build" in service), name)
            check(set(service["networks"]) <= set(y["networks"]), name, "networks")
            check(service is dns or service["dns"] == [own["ipv4_address"]], name, "asks another")
        # The commands above it do the same.
        lines = [line for line in shell_lines() if "--subnet" in line or "--ip" in line or "--dns" in line]
        for word in (str(subnet), "--ip " + own["ipv4_address"], "--dns " + own["ipv4_address"]):
            check(any(word in line for line in lines), word, "is not in the commands")


def unit_verifies():
    if not shutil.which("systemd-analyze"):
        skip("no systemd-analyze")
    for text in blocks("unit"):
        command = re.search(r"^ExecStart=/usr/local/bin/dot-proxy (.*)$", text, re.M)[1]
        accepts(command.split(), "ExecStart")
        with tempfile.TemporaryDirectory() as dir:
            path = dir + "/dot-proxy.service"
            with open(path, "w") as file:
                file.write(text.replace("/usr/local/bin/dot-proxy", PROXY) + "\n")
            end = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
            for key in ("Type=notify", "Restart=always", "StartLimitIntervalSec=0", "Before=nss-lookup.target"):
                check(key in text.split("\n"), "no", key)
            check("AF_UNIX" in text, "no family to notify systemd by")
            # Of unknown keys it only warns; of other units of the machine it may, too.
            mine = [one for one in end.stderr.split("\n") if "dot-proxy.service" in one]
            check(end.returncode == 0 and not mine, "systemd-analyze verify:", end.stderr)


def resolved_block_has_both_lines():  # it takes a booted systemd to see what they do
    for text in blocks("resolved"):
        check(text.split("\n")[1:] == ["DNS=127.0.0.1", "Domains=~."], "systemd-resolved asks others too")


def unbound_snippet_parses():
    checker = shutil.which("unbound-checkconf", path=os.environ["PATH"] + ":/usr/sbin")
    if not checker:
        skip("no unbound-checkconf")
    for text in blocks("unbound"):
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write(text.replace("server:", 'server:\n    chroot: ""', 1) + "\n")
            file.flush()
            end = subprocess.run([checker, file.name], capture_output=True, text=True)
            check(end.returncode == 0, end.stdout, end.stderr)


@contextlib.contextmanager
def in_front(command, config, dir, **places):
    """A cache with that configuration, in which each key of `places` stands for its value."""
    for _ in range(10):
        port = random.randrange(20000, 32000)
        text = config
        for place, value in {**places, "PORT": port, "DIR": dir}.items():
            text = text.replace(place, str(value))
        with open(dir + "/conf", "w") as file:
            file.write(text)
        cache = subprocess.Popen([*command, dir + "/conf"], stderr=subprocess.DEVNULL)
        try:
            if listens(port, cache):
                yield port
                return
        finally:
            cache.kill()
            cache.wait()
    sys.exit("no free port, or no good configuration:\n" + text)


def program(name):
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") or skip("no " + name)


def asks_the_proxy_only(command, config, proxy_at, own_at):
    """Names of the own zone go to its server, all others to the proxy and the second time nowhere.
    `at`: how the configuration writes a port. Returns what a resolver beside them heard."""
    host = "127.%d.%d.%d" % tuple(random.randrange(1, 255) for _ in range(3))
    try:
        aside, own = Plain(host, 53), Plain()
    except PermissionError:
        skip("no right to port 53")
    with tempfile.TemporaryDirectory() as dir, Rig() as rig, rig.proxy() as (port, _, out):
        with open(dir + "/resolv.conf", "w") as file:
            file.write("nameserver " + host + "\n")
        places = {proxy_at: proxy_at.replace("5300", str(port)), "10.0.0.53": own_at % own.port}
        with in_front(command, config, dir, **places) as cache:
            asked = []  # how often the proxy was, after each of two equal queries
            for _ in range(2):
                check(ask(cache, query_for("example.com"))[6:8] == b"\0\1", "no answer")
                wait_for(lambda: "SUCCESS" in whole(out))
                time.sleep(0.3)
                asked.append(whole(out).count("\n"))
            check(asked[0] == asked[1], "the second answer was not cached:\n" + whole(out))
            check(ask(cache, query_for("host.corp.example"))[-4:] == bytes([10, 0, 0, 80]), "own zone")
            time.sleep(0.3)
            check(asked[1] == whole(out).count("\n"), "the own zone was asked for elsewhere")
    check(set(own.heard) == {"host.corp.example"}, "the zone's server was asked for", own.heard)
    return aside.heard


def dnsmasq_asks_the_proxy_only():
    command = [program("dnsmasq"), "--keep-in-foreground", "-C"]
    for text in blocks("dnsmasq"):
        config = text + "\nport=PORT\nuser=root\npid-file=\nresolv-file=DIR/resolv.conf\n"
        for one, silent in ((config, True), (config.replace("no-resolv", ""), False)):
            heard = asks_the_proxy_only(command, one, "127.0.0.1#5300", "127.0.0.1#%d")
            check(bool(heard) != silent, "the resolver of resolv.conf heard", heard)


def unbound_asks_the_proxy_only():
    command = [program("unbound"), "-d", "-c"]
    own = """server:
    chroot: ""
    username: ""
    directory: "DIR"
    pidfile: ""
    use-syslog: no"""
    for text in blocks("unbound"):
        config = text.replace("server:", own, 1).replace("interface: 127.0.0.1", "interface: 127.0.0.1@PORT")
        config += "\nremote-control:\n    control-enable: no\n"
        heard = asks_the_proxy_only(command, config, "127.0.0.1@5300", "127.0.0.1@%d")
        check(not heard, "the resolver of resolv.conf heard", heard)


def timeline_is_the_programs():  # the steps of a query whose first answer is lost, in this order
    for block in blocks("timeline"):
        want = re.findall(r"\[(\d)\]", block)
        for _ in range(5):  # on a slow machine more than one try may be late
            with Rig() as rig, rig.proxy("-v") as (port, proxy, out):
                for n in range(5):
                    check(ask(port, query_for("a.test")), "no answer")
                    time.sleep(0.3)
                check(ask(port, query_for("silent1.test")), "no answer")
                time.sleep(0.5)
                lines = re.findall(r"^#6 .*", whole(out), re.M)
            have = [line[4] for line in lines]
            if have == want and "overtaken" in lines[-1]:
                break
        else:
            check(False, "-v tells of such a query:", *lines, sep_of(block))


def carry_is_the_programs():  # its pieces, joined, are the function as it is in dot.cpp
    section = carry_section().split("\n")
    have = [line[4:] for line in section if line.startswith("    ")]
    body, = re.findall(r"(?ms)^static void carry\([^;{]*\{\n.*?^\}$", read("dot.cpp"))
    want = [line for line in body.split("\n") if line]
    for one, other in zip(have + [""], want + [""]):
        check(one == other, "carry() in dot.cpp has\n" + other + "\n-- and not --\n" + one)
    check(len(have) == len(want), "carry() has", len(want), "lines, and not", len(have))
    for number in "345678":
        check(any(re.match(r"\[%s\]: " % number, line) for line in section), "no paragraph of", number)


def a_test_looks_so():
    sources = "".join(read("test/" + name) for name in os.listdir(TOP + "/test") if name.endswith(".cpp"))
    for block in blocks("test"):
        check("\n" + block + "\n" in sources, "there is no such test:", block)


def size_is_as_told():
    told = int(re.search(r"about ([\d,]+) lines of code", read("README.md"))[1].replace(",", ""))
    lines = "".join(read(name) for name in ("dot.hpp", "dot.cpp", "main.cpp")).split("\n")
    code = sum(bool(line.strip()) and not line.strip().startswith("//") for line in lines)
    check(abs(code - told) <= told / 20, "there are", code, "lines of code")


def names_are_known():  # every test, function, file and option that is named is there
    future = re.search(r"(?s)\n## What to change next\n.*?(?=\n## )", read("README.md"))[0]
    readme = read("README.md").replace(future, "")
    code = read("dot.hpp") + read("dot.cpp") + read("main.cpp")
    cmake = read("test/CMakeLists.txt")
    sources = "".join(read(os.path.relpath(path, TOP)) for path in glob.glob(TOP + "/test/*.cpp"))
    tests = set(re.findall(r'^TEST\("([\w.]+)"\)', sources, re.M))
    tests |= set(re.findall(r"[a-z]+\.[a-z0-9_]+", cmake))
    words = re.findall(r"`([^`\n]+)`", readme)
    for word in words:
        if re.fullmatch(r"[a-z]+\.\w+_\w+|[a-z]+\.pins", word):
            check(word in tests, "there is no test", word)
        if re.fullmatch(r"[A-Z][a-z]\w*", word):
            check(re.search(r"^\s*(class|struct|enum)( class)? " + word + r"\b", code, re.M), "there is no type", word)
        if re.fullmatch(r"\w+\(\)", word):
            check(re.search(r"^\s*(?:[\w:<>&*]+ )+\*?" + re.escape(word[:-1]), code, re.M),
                  "there is no function", word)
        if re.fullmatch(r"[\w/]+\.(cpp|hpp|sh|py)|\w+/[\w/]*", word):
            check(os.path.exists(os.path.join(TOP, word)), "there is no", word)
        for option in re.findall(r"^--[a-z-]+$", word):
            check(option in blocks("help")[0] or option == "--help", "there is no", option)
    check(sum("." in word for word in words) > 20, "the words are not found")
    for line in shell_lines():
        for group in re.findall(r"ctest .*-R (\S+)$", line):
            check(any(group in name for name in tests), "there is no test", group)
        for file, test in re.findall(r"build/test/(\w+) (\w+\.\w+)", line):
            check('TEST("%s")' % test in read("test/%s.cpp" % file), test, "is not in", file)
    for word in re.findall(r": `([a-z]+\.\w+)`", future):
        check(word not in tests, word, "is there already")


def eight_steps_agree():
    picture, = re.findall(r"(?:^//     .*\n)+", read("dot.hpp"), re.M)[:1]
    picture = re.sub(r"^//     ", "", picture, flags=re.M).rstrip()
    check(blocks("picture") == [picture], "the picture is not that of dot.hpp:\n" + picture)
    steps = re.findall(r"\[(\d)\] ([^|]+?) *\|", picture)
    numbers = [number for number, _ in steps]
    check(numbers == list("12345678"), "the steps are", numbers)
    told = re.findall(r"^\*\*\[(\d)\] ([^*]+)\*\*: (.*?)\*Without it\*", read("README.md"),
                      re.M | re.S)
    check([(n, name) for n, name, _ in told] == steps, "paragraphs of", [t[:2] for t in told])
    code = {name: read(name).split("\n") for name in ("dot.hpp", "dot.cpp", "main.cpp")}
    places = {name: {n for line in lines if "//" in line
                     for n in expand(line.split("//", 1)[1])} for name, lines in code.items()}
    check(places["dot.cpp"] | places["main.cpp"] == set(numbers), "at the code are", places)
    for number, _, text in told:  # the function that is named bears the number, or its place within
        for function in re.findall(r"`(\w+)\(\)`", text.split("RFC")[0]):
            check(number in numbers_of(function, code), function, "does not bear", number)
    have = re.findall(r"^#1 \[(\d)\]", "\n".join(story("-v")), re.M)
    check(have == numbers, "-v tells the steps", have)


def expand(comment):  # "[4]-[6]" is three numbers
    for first, last in re.findall(r"\[(\d)\](?:-\[(\d)\])?", comment):
        yield from map(str, range(int(first), int(last or first) + 1))


def numbers_of(function, code):  # in its body, or in the comment lines before it
    found = set()
    for lines in code.values():
        for at, line in enumerate(lines):
            if not re.match(r"\s*(?:[\w:<>&*]+ )+\*?" + function + r"\(", line):
                continue
            end = at
            indent = re.match(r"\s*", line)[0]
            while end + 1 < len(lines) and not lines[end].startswith(indent + "}") and (
                    lines[at].rstrip().endswith(("{", ",")) or "{" in lines[at]):
                end += 1
            start = at
            while start and lines[start - 1].lstrip().startswith("//"):
                start -= 1
            for one in lines[start:end + 1]:
                if "//" in one:
                    found |= set(expand(one.split("//", 1)[1]))
    return found


def has_colours_on_a_terminal_only():
    demo = [TOP + "/test/demo.sh", PROXY, UPSTREAM]
    plain = subprocess.run(demo, capture_output=True, text=True, check=True).stdout
    check("[8]" in plain and "\x1b" not in plain, "colours in a pipe:", plain)
    seen, record = [], lambda fd: seen.append(os.read(fd, 65536)) or seen[-1]
    os.environ["TERM"] = "xterm"
    status = pty.spawn(demo, record)
    text = b"".join(seen).decode()
    check(status == 0 and "\x1b[" in text, "no colours on a terminal:", text)
    check("[8]" in text and "TOTALS" in text, "lines are lost:", text)


case = globals().get(sys.argv[3].split(".")[1])
check(callable(case), "no such case:", sys.argv[3])
case()

#!/usr/bin/env python3
"""Whether captures show in tshark what the lesson says of them: the stored one, that of the demo, and one of a
reader's own. usage: watch.py PROXY UPSTREAM GROUP.CASE"""
import os, re, shutil, signal, socket, struct, subprocess, sys, tempfile, time

TEST = os.path.dirname(os.path.abspath(__file__))
WATCH = TEST + "/watch"
PROXY, UPSTREAM = (os.path.abspath(path) for path in sys.argv[1:3])
DNS_OVER_TLS = ["-Y", "tcp.port == 853 && dns", "-T", "fields", "-e", "dns.flags.response", "-e", "dns.qry.name"]


def check(condition, *why):
    if not condition:
        sys.exit(" ".join(map(str, why)))


def skip(why):
    print("skipped:", why)
    sys.exit(77)


def read(path):
    with open(path) as file:
        return file.read()


def lines_of(text):  # fields without the space between them
    return [" ".join(line.split()) for line in text.strip("\n").split("\n")] if text.strip("\n") else []


def tshark(path, *options):
    end = subprocess.run(["tshark", "-n", "-r", path, *options], capture_output=True, text=True, check=True)
    return lines_of(end.stdout)


def without_secrets(path):  # blocks of type 10 hold them
    with open(path, "rb") as file:
        data = file.read()
    check(data[:4] == b"\x0a\x0d\x0d\x0a", path, "is no pcapng")
    order = "<" if data[8:12] == b"\x4d\x3c\x2b\x1a" else ">"
    rest, at, found = b"", 0, 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        check(size >= 12, path, "has a block that is too short")
        if kind == 10:
            found += 1
        else:
            rest += data[at:at + size]
        at += size
    check(found, path, "has no secrets")
    return rest


# ---- The stored capture ------------------------------------------------------------------------

def parse_answers(text):
    """[(number, question, bold values, [(command, lines)])]"""
    answers = []
    for number, question, body in re.findall(r"(?ms)^## (\d+)\. ([^\n]+)\n(.*?)(?=^## |\Z)", text):
        prose = re.sub(r"(?m)^    .*$", "", body)
        commands = []
        for line in re.findall(r"(?m)^    (.*)$", body):
            if line.startswith("$ "):
                commands.append((line[2:], []))
            else:
                check(commands, "answer", number, "has lines without a command")
                commands[-1][1].extend(lines_of(line))
        answers.append((int(number), question, re.findall(r"\*\*([^*]+)\*\*", prose), commands))
    return answers


printed = {}  # by command


def run(command):
    if command not in printed:
        check("tshark" in command, command, "asks nobody")
        end = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=WATCH, capture_output=True, text=True)
        check(end.returncode == 0, command, "fails:", end.stderr)
        printed[command] = lines_of(end.stdout)
    return printed[command]


def faults(answers):
    found = []
    for number, _, values, commands in answers:
        words = set()
        for command, lines in commands:
            have = run(command)
            words |= {word for line in have for word in line.split()}
            words |= {part for line in have for part in re.split(r"[ ,]", line)}
            if have != lines:
                found.append("answer %d: %s\nprints %s\nand not %s" % (number, command, have, lines))
        for value in values:
            if value.replace(" ", "") not in words:
                found.append("answer %d: nothing that is printed says %s" % (number, value))
        if len(values) < 2 or not any(run(command) for command, _ in commands):
            found.append("answer %d says too little" % number)
    return found


def the_capture_answers_its_questions():
    text = read(WATCH + "/answers.md")
    answers = parse_answers(text)
    questions = re.findall(r"(?m)^(\d+)\. (.+)$", read(WATCH + "/README.md"))
    check(questions == [(str(a[0]), a[1]) for a in answers], "the questions and the headings of the answers differ")
    check([a[0] for a in answers] == list(range(1, 11)), "there are", len(answers), "answers")
    with open(WATCH + "/sealed.pcapng", "rb") as file:
        check(file.read() == without_secrets(WATCH + "/demo.pcapng"), "sealed.pcapng is of another capture")
    check(not faults(answers), *faults(answers))

    # That this can fail: each answer with one value or one printed line changed must be found.
    changed = 0
    for at, (number, question, values, commands) in enumerate(answers):
        wrong = [(number, question, values[:i] + [values[i] + "777"] + values[i + 1:], commands) for i in range(len(values))]
        for i, (command, lines) in enumerate(commands):
            for other in [lines[:j] + [lines[j] + "777"] + lines[j + 1:] for j in range(len(lines))] + [lines + ["777"]]:
                wrong.append((number, question, values, commands[:i] + [(command, other)] + commands[i + 1:]))
        for one in wrong:
            check(faults(answers[:at] + [one] + answers[at + 1:]), "nobody finds what is wrong in", one)
            changed += 1
    print("10 answers agree with tshark;", changed, "changes of them were found")


# ---- The demo's --------------------------------------------------------------------------------

def demo(capture, path=None):
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    environment.pop("OWN_NETWORK", None)
    end = subprocess.run([TEST + "/demo.sh", PROXY, UPSTREAM, capture], capture_output=True, text=True, env=environment)
    check(end.returncode == 0, "the demo fails:", end.stdout, end.stderr)
    check(len(re.findall(r"^SUCCESS", end.stdout, re.M)) == 2, "two queries, but:", end.stdout)
    check(re.search(r"^#1 \[8\]", end.stdout, re.M) and "TOTALS" in end.stdout, "no story:", end.stdout)
    return end.stdout


def the_demo_is_decoded():
    check("/demo.pcapng" in re.search(r"(?m)^demo:.*\n\t.*", read(TEST + "/../Makefile"))[0], "make demo captures nothing")
    with tempfile.TemporaryDirectory() as dir:
        path = dir + "/demo.pcapng"
        out = demo(path)
        why = re.findall(r"(?m)^No capture: (no .* here: .*|it needs the right .*)", out)
        if why:
            skip(why[0])
        check(os.path.exists(path), "there is no capture:", out)
        have = [re.sub("True", "1", re.sub("False", "0", line)) for line in tshark(path, *DNS_OVER_TLS)]
        for name in ("example.com", "a-longer-name.example.com"):
            for response in "01":
                check(response + " " + name in have, response, name, "is not seen inside TLS:", *have)
        plain = tshark(path, "-Y", "dns && (udp.port == 53 || tcp.port == 53)", "-T", "fields", "-e", "dns.qry.name")
        check(len(plain) == 4, "between client and proxy there is:", *plain)
        resuming = tshark(path, "-Y", "tls.handshake.type == 1 && tls.handshake.extension.type == 41")
        check(resuming, "no connection resumes a session")
        with open(dir + "/sealed.pcapng", "wb") as file:  # the secrets are what shows it
            file.write(without_secrets(path))
        check(not tshark(dir + "/sealed.pcapng", *DNS_OVER_TLS), "it is seen without secrets")
        check(tshark(dir + "/sealed.pcapng", "-Y", "tls.handshake.type == 1"), "no TLS is seen without secrets")


def says_what_a_capture_needs():
    with tempfile.TemporaryDirectory() as dir:
        capture, bin = dir + "/demo.pcapng", dir + "/bin"
        os.mkdir(bin)
        for place in reversed(os.environ["PATH"].split(":")):
            for name in os.listdir(place) if os.path.isdir(place) else []:
                if os.path.lexists(bin + "/" + name):
                    os.remove(bin + "/" + name)
                os.symlink(place + "/" + name, bin + "/" + name)

        def replaced(name, by):  # a script, another place, or nothing
            if os.path.lexists(bin + "/" + name):
                os.remove(bin + "/" + name)
            if by and by.startswith("/"):
                os.symlink(by, bin + "/" + name)
            elif by:
                with open(bin + "/" + name, "w") as file:
                    file.write("#!/bin/sh\n" + by + "\n")
                os.chmod(bin + "/" + name, 0o755)

        fails = "echo no permission >&2; exit 1"
        for tools, why in (({"dumpcap": "", "editcap": "", "ip": "exit 0"}, "no dumpcap editcap here: apt-get install tshark iproute2"),
                           ({"dumpcap": fails, "editcap": fails, "ip": "exit 0", "unshare": "exit 1"}, "root"),
                           ({"unshare": shutil.which("unshare"), "ip": shutil.which("ip")}, "no permission")):
            if None in tools.values():
                continue
            for name, by in tools.items():
                replaced(name, by)
            with open(capture, "w") as file:
                file.write("of an earlier run")
            out = demo(capture, path=bin)
            said = re.findall(r"(?m)^No capture: .*", out)
            check(len(said) == 1 and (why in said[0] or why == "no permission" and "root" in said[0]), "it says", said)
            check(not os.path.exists(capture), "a capture of an earlier run is still there")


# ---- A reader's own ----------------------------------------------------------------------------

def own_queries_are_decoded_as_the_readme_says():
    if "OWN_NETWORK" not in os.environ:  # there the ports are free
        for way in (["unshare", "-n"], ["unshare", "-rn"]):
            if shutil.which("unshare") and subprocess.run(way + ["ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0:
                os.environ["OWN_NETWORK"] = "yes"
                os.execvp(way[0], way + ["sh", "-c", 'ip link set lo up; exec "$@"', "sh", sys.executable, *sys.argv])
        skip("no right to make a network namespace")
    section, = re.findall(r"(?ms)^## Watch it\n.*?(?=^## )", read(TEST + "/../README.md"))
    serve, capture, watch = re.search(r"(?m)^    (make && build/dot-proxy .*)\n    (dumpcap .*)\n    (wireshark .*)$", section).groups()
    rig = subprocess.Popen([UPSTREAM, "853", "127.0.0.2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started = []
    with tempfile.TemporaryDirectory() as dir:
        try:
            options = rig.stdout.readline().strip()
            serve = serve.replace("make && build/dot-proxy", PROXY) + " " + options
            for command, ready in ((serve, "READY"), (capture, "File: ")):
                with open(dir + "/log", "w") as log:
                    started.append(subprocess.Popen("exec " + command, shell=True, cwd=dir, stdout=log, stderr=log))
                wait_for(lambda: ready in read(dir + "/log"), command)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(30)
                client.sendto(bytes.fromhex("123401000001000000000000076578616d706c6503636f6d0000010001"), ("127.0.0.1", 5300))
                client.recv(512)
            look = re.sub(r"^wireshark (.*) (\S+)$", r"tshark -n -r \2 \1", watch)
            look += " -Y dns -T fields -e udp.port -e tcp.port -e dns.qry.name"

            def seen():
                end = subprocess.run(look, shell=True, cwd=dir, capture_output=True, text=True)
                return re.findall(r"(?<!\d)(5300|853)\b.*example\.com", end.stdout)
            wait_for(lambda: sorted(seen()) == ["5300", "5300", "853", "853"], look)
        finally:
            for one in started:
                one.send_signal(signal.SIGTERM)
                one.wait()
            rig.stdin.close()
            rig.wait()


def wait_for(condition, *what):
    end = time.monotonic() + 30
    while not condition():
        check(time.monotonic() < end, "it does not come:", *what)
        time.sleep(0.1)


case = globals().get(sys.argv[3].split(".")[1])
check(callable(case), "no such case:", sys.argv[3])
case()

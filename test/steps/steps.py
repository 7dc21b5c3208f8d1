#!/usr/bin/env python3
"""Eight functions to write, one for each step. N-name.md has what there is to say of step N.
usage: steps.py begin N | try N | prove [N...] | check [TOP]

begin: makes build/step-N, a copy of the tree in which the body of the function is gone, and prints the task.
try:   builds that copy and runs the tests that can see the function.
prove: for each step, in copies: the emptied function fails exactly the tests that grade it; a wrong body, of the kind
       that people write, fails at least one of them; and the program as it is passes them all.
check: the functions, tests and sections that are named are there."""
import concurrent.futures, glob, os, re, shutil, signal, subprocess, sys, textwrap, threading

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
CORES = os.cpu_count()
compiling = threading.Semaphore(CORES)
running = set()  # the tests that do, by their process groups


class Fault(Exception):
    """What is wrong, for people."""


def require(condition, *why):
    if not condition:
        raise Fault(" ".join(map(str, why)))


def read(*path):
    with open(os.path.join(*path)) as file:
        return file.read()


def write(text, *path):
    os.makedirs(os.path.dirname(os.path.join(*path)), exist_ok=True)
    with open(os.path.join(*path), "w") as file:
        file.write(text)


def places(number):  # where the text of that step is; of all steps, if number is "*"
    return sorted(glob.glob("%s/%s-*.md" % (HERE, number if number == "*" else glob.escape(number))))


class Step:
    def __init__(self, path):
        self.number = os.path.basename(path)[0]
        head, *rest = re.split(r"(?m)^## (.*)\n", read(path))
        fields = dict(re.findall(r"(?m)^([a-z-]+): (.*)$", head))
        parts = {title: text.strip("\n") for title, text in zip(rest[::2], rest[1::2])}
        try:
            self.function, self.rfc, self.seen_by = fields["function"], fields["rfc"], fields["seen-by"]
            self.hint = parts["Hint"]
            self.empty = textwrap.dedent(parts["Instead of it"])
            self.wrong = textwrap.dedent("\n".join(re.findall(r"(?m)^(?:    .*)?$", parts["Wrong"]))).strip("\n")
            self.graded_by = set(re.findall(r"(?m)^- (\S+)$", parts["Graded by"]))
        except KeyError as missing:
            raise Fault(path, "has no", missing)


# ---- The source ----------------------------------------------------------------------------------------------------

def definition(source, name):
    """The lines of a function's body, first and last, and its indent. clang-format makes them easy to find."""
    lines = source.split("\n")
    start = r"( *)(?:[\w:<>&*]+ )+%s\(.*\)(?: const)? \{(?: *//.*)?" % re.escape(name)
    found = [(at, match[1]) for at, line in enumerate(lines)
             if name + "(" in line and (match := re.fullmatch(start, line))]
    require(len(found) == 1, "dot.cpp defines", name + "()", len(found), "times, and not once")
    (at, indent), = found
    for end in range(at + 1, len(lines)):
        if lines[end] == indent + "}":
            return at + 1, end, indent + "    "
        require(not lines[end] or lines[end].startswith(indent + "    "), name + "() in dot.cpp has no end")


def body_of(source, name):
    first, last, _ = definition(source, name)
    return textwrap.dedent("\n".join(source.split("\n")[first:last]))


def with_body(source, name, body):
    first, last, indent = definition(source, name)
    lines = source.split("\n")
    return "\n".join(lines[:first] + textwrap.indent(body, indent).split("\n") + lines[last:])


def contract(header, source, name):
    """The comment before the declaration in dot.hpp, or else before the definition, and that line."""
    lines = header.split("\n")
    start = r"(?:[\w:<>&*]+ )+%s\(.*" % re.escape(name)
    found = [at for at, line in enumerate(lines) if name + "(" in line and re.fullmatch(start, line)]
    require(len(found) < 2, "dot.hpp declares", name + "() more than once")
    if not found:
        lines = source.split("\n")
        found = [definition(source, name)[0] - 1]
    start = end = found[0]
    while lines[start - 1].lstrip().startswith("//"):
        start -= 1
    require(start < end, name + "() has no contract: no comment before it")
    while not re.search(r"[;{]", lines[end]):
        end += 1
    text = "\n".join(lines[start:end + 1])
    return re.sub(r" \{.*$", "", textwrap.dedent(text))


def all_tests(top):  # the program that has each test
    found = {}
    for path in glob.glob(top + "/test/*.cpp"):
        for name in re.findall(r'(?m)^TEST\("([\w.]+)"\)', read(path)):
            found[name] = os.path.basename(path)[:-4]
    return found


def tests_of(step, known):  # those that can see its function
    return sorted(name for name in known if re.search(step.seen_by, name))


# ---- Building and running ------------------------------------------------------------------------------------------

def gxx(path, *how):  # it is there when it is whole
    with compiling:
        end = subprocess.run([os.environ.get("CXX", "g++"), "-pthread", *how, "-o", path + ".part"],
                             capture_output=True, text=True)
    errors = re.findall(r"(?m)^.*(?:error|undefined reference).*$", end.stderr) or [end.stderr]
    require(end.returncode == 0, "does not compile:", errors[0])
    os.replace(path + ".part", path)


def is_older(path, *than):
    return not os.path.exists(path) or any(os.path.getmtime(one) > os.path.getmtime(path) for one in than)


class Build:
    """The program and its test programs, of the sources in `tree`. -O0 compiles soonest. The objects that do not depend
    on dot.cpp can be those of another build."""
    def __init__(self, tree, out, shared=None):
        self.tree, self.out, self.shared = tree, out, shared
        os.makedirs(out, exist_ok=True)

    def object(self, source):
        path = "%s/%s.o" % (self.out, os.path.basename(source))
        source = os.path.join(self.tree, source)
        top = self.shared.tree if self.shared else self.tree
        headers = [top + "/dot.hpp"] + (glob.glob(top + "/test/*.hpp") if "/test/" in source else [])
        if is_older(path, source, *headers):
            gxx(path, "-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers",
                "-Wno-unused-function",  # A body that is not written yet does not call its helpers.
                "-I", top, "-I", top + "/test", "-c", source)
        return path

    def link(self, name, objects):
        path = os.path.join(self.out, name)
        if is_older(path, *objects):
            gxx(path, *objects, "-lssl", "-lcrypto")
        return path

    def make(self, programs):
        """Compiles what is needed. Returns where the program and each of the test programs is."""
        common = self.shared or self
        sources = ["main.cpp", "test/upstream.cpp"] + ["test/%s.cpp" % name for name in programs]
        with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
            own = pool.submit(self.object, "dot.cpp")
            others = list(pool.map(common.object, sources))
            dot = own.result()
        main, upstream, *tests = others
        made = {"dot-proxy": self.link("dot-proxy", [main, dot])}
        for name, test in zip(programs, tests):
            if name == "unit":
                made[name] = self.link(name, [test, upstream, dot])
            else:
                made[name] = common.link(name, [test, upstream])
        return made


def outcome(made, program, name):
    """What the test said, and whether it failed. Whatever it started ends with it."""
    test = subprocess.Popen([made[program], name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, errors="replace", start_new_session=True,
                            env={**os.environ, "PROXY": made["dot-proxy"]})
    running.add(test.pid)
    try:
        said, _ = test.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        kill_group(test.pid)
        said = "FAILED %s: it does not end\n" % name
    running.discard(test.pid)
    test.wait()
    return said or "FAILED %s: it ends with %d\n" % (name, test.returncode), test.returncode not in (0, 77)


def kill_group(group):
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def stop(number, _):  # a test that runs must not outlive this program
    for group in list(running):
        kill_group(group)
    os._exit(128 + number)


def failing(build, step, known, expected=()):
    """The tests that fail, and what they said. One that was not expected to must do so three times."""
    names = tests_of(step, known)
    made = build.make(sorted({known[name] for name in names}))

    def look(name):
        for _ in range(1 if name in expected else 3):
            said, has_failed = outcome(made, known[name], name)
            if not has_failed:
                return None
        return said

    with concurrent.futures.ThreadPoolExecutor(3 * CORES) as pool:
        results = dict(zip(names, pool.map(look, names)))
    return {name: said for name, said in results.items() if said is not None}


# ---- What is asked for ---------------------------------------------------------------------------------------------

def chosen(number):
    found = places(number) if re.fullmatch(r"\d+", number) else []
    if found:
        return Step(found[0])
    numbers = " ".join(os.path.basename(path)[0] for path in places("*"))
    print("which step? make step N=1, or another of: " + numbers, file=sys.stderr)
    sys.exit(2)


def title(step):  # "take the query", as the README has it
    found = re.findall(r"(?m)^\*\*\[%s\] ([^*]+)\*\*:" % step.number, read(TOP, "README.md"))
    require(len(found) == 1, "README.md has", len(found), "paragraphs of step", step.number)
    return found[0]


def begin(number):
    step = chosen(number)
    tree = "build/step-" + step.number
    is_there = os.path.exists(os.path.join(TOP, tree))
    if not is_there:
        # It appears under its name when it is whole.
        part = os.path.join(TOP, tree + ".part")
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        for name in ("main.cpp", "dot.hpp", "Makefile", "README.md"):
            shutil.copy(os.path.join(TOP, name), part)
        shutil.copytree(os.path.join(TOP, "test"), part + "/test",
                        ignore=shutil.ignore_patterns("[0-9]*.patch", "answers", "__pycache__"))
        write(with_body(read(TOP, "dot.cpp"), step.function, step.empty), part, "dot.cpp")
        os.rename(part, os.path.join(TOP, tree))
    text = contract(read(TOP, "dot.hpp"), read(TOP, "dot.cpp"), step.function)
    print("[%s] %s: %s() in %s/dot.cpp is yours to write.\n" % (step.number, title(step), step.function, tree))
    print(textwrap.indent(text, "    ") + "\n")
    print("read   " + step.rfc)
    print(textwrap.fill("hint   " + step.hint.replace("\n", " "), 100, subsequent_indent=" " * 7))
    print("test   make try N=" + step.number)
    if is_there:
        print("\n%s was there already, and is left as it is. To begin anew: rm -r %s" % (tree, tree))


def attempt(number):
    step = chosen(number)
    tree = "build/step-" + step.number
    if not os.path.exists(os.path.join(TOP, tree)):
        sys.exit("there is no %s yet: make step N=%s" % (tree, step.number))
    tree = os.path.join(TOP, tree)
    known = all_tests(tree)
    failed = failing(Build(tree, tree + "/build/try"), step, known, known)
    for said in failed.values():
        print(said.strip())
    every = len(tests_of(step, known))
    if failed:
        sys.exit("%d of %d tests fail" % (len(failed), every))
    print("[%s] %s: all %d tests pass. It is done." % (step.number, title(step), every))
    print("Compare: diff -u dot.cpp build/step-%s/dot.cpp" % step.number)


def judge(step, empty, wrong, real):
    """Why the step is not proven, by the tests that fail in the three cases; nothing: it is."""
    passed, others = step.graded_by - empty, empty - step.graded_by
    why = []
    if passed:
        why.append("the emptied one passes " + " ".join(sorted(passed)))
    if others:
        why.append("the emptied one also fails " + " ".join(sorted(others)))
    if not wrong & step.graded_by:
        why.append("the wrong one passes")
    if real:
        why.append("the real one fails " + " ".join(sorted(real)))
    return "; ".join(why)


def prove(numbers):
    steps = [chosen(number) for number in numbers] or [Step(path) for path in places("*")]
    known, source = all_tests(TOP), read(TOP, "dot.cpp")
    out = os.path.join(TOP, "build/steps")
    shared = Build(TOP, out + "/real")
    shared.make(sorted({known[name] for step in steps for name in tests_of(step, known)}))

    def fails(step, kind, body, expected):
        if kind == "real":
            return set(failing(shared, step, known))
        tree = "%s/%s-%s" % (out, step.number, kind)
        text = with_body(source, step.function, body)
        if not os.path.exists(tree + "/dot.cpp") or read(tree, "dot.cpp") != text:
            write(text, tree, "dot.cpp")
        return set(failing(Build(tree, tree, shared), step, known, expected))

    jobs = {}
    pool = concurrent.futures.ThreadPoolExecutor(CORES + 1)
    for step in steps:
        jobs[step, "real"] = pool.submit(fails, step, "real", "", ())
        jobs[step, "empty"] = pool.submit(fails, step, "empty", step.empty, step.graded_by)
        jobs[step, "wrong"] = pool.submit(fails, step, "wrong", step.wrong, ())
    first = steps[0] if numbers else next(step for step in steps if step.number == "3")
    control = pool.submit(fails, first, "control", body_of(source, first.function), ())

    print("step  function      graded by  seen by  empty fails  wrong fails  real fails")
    is_good = True
    for step in steps:
        row = "[%s]   %-12s %6d %10d" % (step.number, step.function, len(step.graded_by), len(tests_of(step, known)))
        try:
            empty, wrong, real = (jobs[step, kind].result() for kind in ("empty", "wrong", "real"))
        except Fault as fault:
            why = str(fault)
        else:
            row += "%11d %12d %11d    " % (len(empty), len(wrong), len(real))
            why = judge(step, empty, wrong, real)
        is_good &= not why
        print(row, "NOT proven: " + why if why else "proven", flush=True)

    def refused(want, what, *results):  # for this reason and no other
        nonlocal is_good
        why = judge(first, *results)
        is_refused = why.startswith(want) and ";" not in why
        print("control:", what, "is refused: " + why if is_refused else "IS NOT REFUSED: " + why)
        is_good &= is_refused

    if is_good:
        empty, wrong, real = (jobs[first, kind].result() for kind in ("empty", "wrong", "real"))
        own = sorted(first.graded_by)[0]
        refused("the wrong one passes", "a wrong body that is the right one", empty, control.result(), real)
        refused("the emptied one passes " + own, "a test that does not grade it", empty - {own}, wrong, real)
        another = empty | {"another.test"}
        refused("the emptied one also fails another.test", "a test that is not named", another, wrong, real)
        refused("the real one fails " + own, "a program that fails a test", empty, wrong, {own})
    sys.exit(not is_good)


def agree(steps, header, source, known, readme):
    """The steps name what is there."""
    require([step.number for step in steps] == list("12345678"), "the steps are", [step.number for step in steps])
    for step in steps:
        name = "[%s]" % step.number
        require(contract(header, source, step.function), name)
        for kind in ("empty", "wrong"):
            body = getattr(step, kind)
            require(body and body_of(with_body(source, step.function, body), step.function) == body, name, kind)
            require(body != body_of(source, step.function), name, kind, "is the right one")
        require(step.graded_by, name, "is graded by nothing")
        unknown = step.graded_by - set(known)
        require(not unknown, name, "there is no test", *unknown)
        unseen = step.graded_by - set(tests_of(step, known))
        require(not unseen, name, "cannot be seen by", *unseen)
        require(step.hint and step.rfc.startswith("RFC "), name, "has no hint or no RFC")
        told = re.findall(r"(?m)^\| \[%s\] \| `(\w+)\(\)` \|" % step.number, readme)
        require(told == [step.function], name, "README.md tells of", told)


def check():
    steps, known = [Step(path) for path in places("*")], all_tests(TOP)
    header, source, readme = (read(TOP, name) for name in ("dot.hpp", "dot.cpp", "README.md"))
    for step in steps:
        title(step)
    agree(steps, header, source, known, readme)

    def finds(what, *changed):  # the check can fail
        try:
            agree(*changed)
        except Fault:
            return
        raise Fault("nobody finds", what)

    for step in steps:
        name, own = step.function, sorted(step.graded_by)[0]
        first, last, _ = definition(source, name)
        lines = source.split("\n")
        twice = lines[:last + 1] + lines[first - 1:last + 1] + lines[last + 1:]
        finds(name + "() under another name", steps, header, re.sub(r"\b%s\(" % name, "other(", source), known, readme)
        finds(name + "() twice", steps, header, "\n".join(twice), known, readme)
        bare = [re.sub(r"(?m)^ *//.*\n", "", text) for text in (header, source)]
        finds(name + "() without a contract", steps, *bare, known, readme)
        fewer = {test: program for test, program in known.items() if test != own}
        finds("that there is no " + own, steps, header, source, fewer, readme)
        finds("that the README names another", steps, header, source, known, readme.replace("`%s()`" % name, "`x()`"))
    finds("seven steps", steps[1:], header, source, known, readme)


for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
try:
    task, arguments = sys.argv[1], sys.argv[2:]
    if task == "prove":
        prove(arguments)
    elif task == "check":
        check()
    else:
        {"begin": begin, "try": attempt}[task](*(arguments or [""]))
except Fault as fault:
    sys.exit(str(fault))

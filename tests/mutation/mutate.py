#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How many faults in the headers the tests would notice.

Changes one place of one header at a time (an operator, a number, a statement), compiles the tests
that belong to the header against the changed copy, and runs them. A mutant is killed if a test
fails, crashes or takes too long; one that does not compile does not count. The sample depends on
the seed alone, so that a figure can be repeated.

    cmake --preset clang -DWEIR_TEST_TOGETHER=OFF && cmake --build --preset clang --target weir_tests
    tests/mutation/mutate.py build/clang --count 100 --seed 1

Survivors are printed with their line before and after. Some cannot be told from the original by
any test (an allocation made larger, a check made twice): read them before writing a test.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "include" / "weir"
TESTS = ROOT / "tests"

# What is replaced by what, in code without its comments and texts.
SWAPS = [
    (r" < ", [" <= ", " > "]),
    (r" <= ", [" < "]),
    (r" > ", [" >= ", " < "]),
    (r" >= ", [" > "]),
    (r" == ", [" != "]),
    (r" != ", [" == "]),
    (r" \+ ", [" - "]),
    (r" - ", [" + "]),
    (r" \* ", [" / "]),
    (r" / ", [" * "]),
    (r" \+= ", [" -= ", " = "]),
    (r" -= ", [" += "]),
    (r" \*= ", [" /= "]),
    (r" && ", [" || "]),
    (r" \|\| ", [" && "]),
    (r"\b0\b", ["1"]),
    (r"\b1\b", ["0", "2"]),
    (r"\btrue\b", ["false"]),
    (r"\bfalse\b", ["true"]),
    (r"std::min\b", ["std::max"]),
    (r"std::max\b", ["std::min"]),
]
STATEMENT = re.compile(r"^ +(?!return\b|using\b|throw)[a-z_][\w.:>\[\]()-]*( [-+*/]?= .*|\(.*\));$")


def code_of(line):
    """The line up to its comment; empty for lines that are no statements."""
    if re.match(r"\s*(//|#|template|using|struct|class|static_assert|namespace)", line):
        return ""
    return re.sub(r"//.*", "", line)


def in_text(line, at):
    return line[:at].count('"') % 2 == 1


def mutants_of(path):
    """All (line number, new line) of one header."""
    found = []
    for number, line in enumerate(path.read_text().split("\n")):
        code = code_of(line)
        for pattern, replacements in SWAPS:
            for match in re.finditer(pattern, code):
                # Brackets of templates look like comparisons.
                if in_text(line, match.start()) or "template <" in code:
                    continue
                for new in replacements:
                    found.append((number, line[: match.start()] + new + line[match.end():]))
        if STATEMENT.match(code):
            found.append((number, "  ;"))
    return found


def tests_of(header):
    """The tests with the header's name; else some that include it; else those of its users."""
    level, seen = [header], {header}
    while level:
        found = []
        for h in level:
            own = TESTS / h.parent
            found += sorted(own.glob(h.stem + "_test.cpp")) + sorted(own.glob(h.stem + "_*_test.cpp"))
        includes = [f"<weir/{h}>" for h in level]
        if not found:
            found = [t for t in sorted(TESTS.rglob("*_test.cpp"))
                     if any(i in t.read_text() for i in includes)]
        if found:
            return found[:4]
        users = [p.relative_to(HEADERS) for p in sorted(HEADERS.rglob("*.hpp"))
                 if p.name != "weir.hpp" and any(i in p.read_text() for i in includes)]
        level = [u for u in users if u not in seen]
        seen.update(level)
    return []


class Runner:
    def __init__(self, build, timeout):
        self.build = build
        self.timeout = timeout
        commands = json.loads((build / "compile_commands.json").read_text())
        self.commands = {Path(c["file"]): c for c in commands}
        self.objects = build / "tests" / "CMakeFiles" / "weir_tests.dir" / "support"

    def run(self, include, test, work):
        """'killed', 'survived' or 'invalid'."""
        entry = self.commands[test]
        words = shlex.split(entry["command"])
        words = [w.replace(f"-I{ROOT}/include", f"-I{include}") for w in words]
        output = work / "test.o"
        words[words.index("-o") + 1] = str(output)
        for option in ("-MD", "-MF", "-MT"):  # No dependency files.
            while option in words:
                at = words.index(option)
                del words[at: at + (1 if option == "-MD" else 2)]
        if subprocess.run(words, cwd=entry["directory"], capture_output=True).returncode != 0:
            return "invalid"
        program = work / "test"
        link = [words[0], "-o", str(program), str(output), "-pthread"]
        link += [str(o) for o in self.objects.glob("*.o")]
        link += [w for w in words if w.startswith("-fsanitize")]
        linked = any(
            subprocess.run(link + extra, capture_output=True).returncode == 0
            for extra in ([], ["-lCatch2"], ["-lCatch2Main", "-lCatch2"]))
        if not linked:
            return "invalid"
        try:
            done = subprocess.run([str(program), "~[slow]"], capture_output=True, timeout=self.timeout)
        except subprocess.TimeoutExpired:
            return "killed"
        return "survived" if done.returncode == 0 else "killed"

    def judge(self, mutant):
        header, number, new = mutant
        tests = [t for t in tests_of(header) if t in self.commands]
        if not tests:
            return "untested"
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            shutil.copytree(ROOT / "include", work / "include")
            changed = work / "include" / "weir" / header
            lines = changed.read_text().split("\n")
            lines[number] = new
            changed.write_text("\n".join(lines))
            for test in tests:
                result = self.run(work / "include", test, work)
                if result != "survived":
                    return result
        return "survived"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("build", type=Path, help="a build directory whose weir_tests is built")
    parser.add_argument("--count", type=int, default=50, help="mutants to sample (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default 1)")
    parser.add_argument("--path", default="", help="only headers whose path begins so, as moe/router")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a test may take")
    options = parser.parse_args()

    headers = sorted(p.relative_to(HEADERS) for p in HEADERS.rglob("*.hpp"))
    everything = [(h, number, new)
                  for h in headers if str(h).startswith(options.path)
                  for number, new in mutants_of(HEADERS / h)]
    sample = random.Random(options.seed).sample(everything, min(options.count, len(everything)))
    runner = Runner(options.build.resolve(), options.timeout)
    with tempfile.TemporaryDirectory() as work:
        first = next(iter(sorted(TESTS.rglob("*_test.cpp"))))
        if runner.run(ROOT / "include", first, Path(work)) != "survived":
            sys.exit(f"{first.relative_to(ROOT)} does not pass as it is; build weir_tests in "
                     f"{options.build} first")
    counts = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, result in zip(sample, pool.map(runner.judge, sample)):
            counts[result] = counts.get(result, 0) + 1
            if result in ("survived", "untested"):
                header, number, new = mutant
                old = (HEADERS / header).read_text().split("\n")[number]
                print(f"{result}: {header}:{number + 1}\n  - {old.strip()}\n  + {new.strip()}",
                      flush=True)
    judged = counts.get("killed", 0) + counts.get("survived", 0)
    print(f"{len(sample)} of {len(everything)} mutants, seed {options.seed}: "
          + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))
    if judged:
        print(f"killed {100.0 * counts.get('killed', 0) / judged:.1f} % of {judged}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

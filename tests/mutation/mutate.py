#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How many faults in the headers the tests would notice.

Changes one place of one header at a time (an operator, a number, a statement), compiles tests that
reach the header against the changed copy, and runs them, except those tagged [slow]. A mutant is
killed if a test fails, crashes or takes too long. One that does not compile does not count. The
sample depends on the seed and the headers alone, so that a figure can be repeated; what a run has
judged when it is stopped is the sample of that --count.

    cmake --preset clang -DWEIR_TEST_TOGETHER=OFF
    tests/mutation/mutate.py build/clang --seed 1 | tee mutants.txt

The tests have to pass as they are. Nothing has to be built beforehand: the script takes commands
from the build directory, and keeps what all mutants share (Catch2's main program, precompiled
headers) there, in `mutation/`.

Which tests: those that mirror the header (moe/routing.hpp: moe/routing_test.cpp and
moe/routing_*_test.cpp), then those that reach it by their includes and say most about the changed
place: a test that names the function or class, or mirrors a header that does, comes before one that
only includes the header. At most --tests files for a mutant; the last ones often take whole models.
Tests of ranks run under mpiexec with 3, 2, 1 and 4 ranks. tests/golden is left out: what
check_golden kills beside the rest is not counted.

Not changed is what a test cannot or should not tell: comments and texts, static_assert, noexcept,
alignas, assert, sizes that are reserved ahead, prefetches, what an iteration of a parallel loop
costs, and code that the preprocessor takes out in this build. To judge the code for AVX-512 and
AMX, configure with -DCMAKE_CXX_FLAGS=-march=native and say --path kernels.

Survivors are printed with their line before and after, and the tests that they passed. Some cannot
be told from the original by any test (a check made twice, a limit where both sides do the same, a
bound of what is copied in one go): read them before writing a test. --again mutants.txt judges the
survivors in that file once more, when there are new tests.

--sanitize builds the first two tests of what survived again, with AddressSanitizer and
UndefinedBehaviorSanitizer, as preset sanitize builds all: many a wrong bound only reads past an
end.
"""

import argparse
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "include"
HEADERS = INCLUDE / "weir"
TESTS = ROOT / "tests"

# What is replaced by what.
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
# What most tests include.
COMMON = """#include <filesystem>
#include <functional>
#include <map>
#include <thread>
#include <variant>
#include <Eigen/Core>
#include <nlohmann/json.hpp>
#include "support/catch.hpp"
"""
STATEMENT = re.compile(r"^ +(?!return\b|using\b|throw)[a-z_][\w.:>\[\]()-]*( [-+*/]?= .*|\(.*\));$")
TEXT = re.compile(r'//[^\n]*|R"\((?:.|\n)*?\)"|"(?:\\.|[^"\\\n])*"|(?<![\w])\'(?:\\.|[^\'\\\n])\'')
# Lines that declare, and lines about nothing but speed.
LEFT_ALONE = re.compile(r"\s*(#|template|using|struct|class|namespace|extern)|.*(\w*[cC]ost\w* = |"
                        r"\bkWorthwhile\b|\b\w*prefetch\w*\(|\breserve\()")
# Calls whose arguments no test can tell: all of them, or the one at this place.
NO_MATTER = {"static_assert": None, "assert": None, "noexcept": None, "alignas": None,
             "reserve": None, "parallel_rows": 1, "parallel_pieces": 2}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=pointer-overflow",
            "-fno-sanitize-recover=all"]


def blank(text, begin, end):
    return text[:begin] + re.sub(r"[^\n]", "\0", text[begin:end]) + text[end:]


def arguments(code, at):
    """Where the arguments of the call whose bracket opens at `at` begin and end."""
    found, depth, begin = [], 0, at + 1
    for i in range(at, len(code)):
        if code[i] in "([{":
            depth += 1
        elif code[i] in ")]}":
            depth -= 1
            if depth == 0:
                return found + [(begin, i)]
        elif code[i] == "," and depth == 1:
            found.append((begin, i))
            begin = i + 1
    return found


@cache
def code_of(path):
    """The lines of a file with zero bytes where nothing is to be changed."""
    code = path.read_text()
    for match in TEXT.finditer(code):
        code = blank(code, match.start(), match.end())
    for match in re.finditer(r"\b(\w+)\(", code):
        if match[1] not in NO_MATTER:
            continue
        place, given = NO_MATTER[match[1]], arguments(code, match.end() - 1)
        if place is not None:
            given = given[place: place + 1]
        for begin, end in given:
            code = blank(code, begin, end)
    return code.split("\n")


def mutants_of(header):
    """All (header, line number, new line)."""
    found = []
    lines = (HEADERS / header).read_text().split("\n")
    for number, (line, code) in enumerate(zip(lines, code_of(HEADERS / header))):
        if LEFT_ALONE.match(code) or "template <" in code:  # Its brackets look like comparisons.
            continue
        for pattern, replacements in SWAPS:
            for match in re.finditer(pattern, code):
                if pattern == r" \+ " and "\0" in code[match.start() - 1] + code[match.end()]:
                    continue  # Texts are put together.
                for new in replacements:
                    found.append((header, number, line[: match.start()] + new + line[match.end():]))
        # Without its text, a statement may still be one.
        if STATEMENT.match(re.sub("\0+$", "", code).rstrip().replace("\0", "_")):
            found.append((header, number, "  ;"))
    return found


# --- Which tests ---------------------------------------------------------------------------------


@cache
def text_of(path):
    return path.read_text()


@cache
def included_by(path):
    """The files of weir and of tests/ that a file includes itself."""
    found = set()
    for name in re.findall(r'#include [<"]([^>"]+)[>"]', text_of(path)):
        for base in (INCLUDE, TESTS, path.parent):
            if (base / name).is_file():
                found.add(base / name)
                break
    return found


@cache
def reached_by(path):
    """All that a file includes, and what that includes."""
    found, open_ends = set(), [path]
    while open_ends:
        for file in included_by(open_ends.pop()) - found:
            found.add(file)
            open_ends.append(file)
    return found


def name_in(line):
    """What a line defines, if it does."""
    for pattern in (r"\s*(?:class|struct|enum class|concept) (\w+)", r"\s*using (\w+) =",
                    r"\s*(?:inline )?constexpr [\w:<>]+ (\w+)\b(?!\()",
                    r"\s*(?!return|else|if|for|while|throw|switch)[\w:<>\[\]][^=;.({]*?[ *&](~?\w+)\("):
        match = re.match(pattern, line)
        if match:
            return match[1]
    return None


@cache
def symbols_of(header):
    """(line number, name) of what is defined in a header's namespaces."""
    return [(n, name_in(line)) for n, line in enumerate(text_of(header).split("\n"))
            if re.match(r"\w", line) and name_in(line)]


def names_at(header, number):
    """The names of the namespace's member and of the class's member around a line."""
    lines, outer, inner = text_of(header).split("\n"), None, None
    for n in range(number, -1, -1):
        if re.match(r"\w", lines[n]) and name_in(lines[n]):
            outer = name_in(lines[n])
            break
        if inner is None and re.match(r"  \w", lines[n]):
            inner = name_in(lines[n])
    return outer, inner


def says(text, name):
    return name is not None and re.search(rf"\b{re.escape(name)}\b", text) is not None


@cache
def mirrored_by(test):
    """The header that a test is named after: foo_bar_test.cpp is foo_bar.hpp's, else foo.hpp's."""
    words = test.stem.removesuffix("_test").split("_")
    for count in range(len(words), 0, -1):
        header = HEADERS / test.parent.relative_to(TESTS) / ("_".join(words[:count]) + ".hpp")
        if header.is_file():
            return header
    return None


def tests_of(header, number, tests, most):
    """Those of `tests` that are asked about a line, best first, and how many of them mirror it."""
    outer, inner = names_at(header, number)
    others = {name for _, name in symbols_of(header)} - {outer}

    def merit(test):
        text = text_of(test)
        mirrored = mirrored_by(test)
        by = text_of(mirrored) if mirrored else ""
        score = 4 * says(text, outer) + 2 * says(text, inner) + 2 * says(by, outer)
        score += 2 * (header in included_by(test)) + 3 * (test.parent.name == header.parent.name)
        score += says(by, inner) + min(2, sum(says(text, name) for name in others))
        return (mirrored != header, -score, len(reached_by(test)), test)

    reaching = sorted(map(merit, (t for t in tests if header in reached_by(t))))
    chosen = [m[-1] for m in reaching[:most]]
    return chosen, sum(not m[0] for m in reaching[:most])


# --- Compiling and running -----------------------------------------------------------------------


class Runner:
    """Compiles a test file as the build directory does, and runs it."""

    def __init__(self, build, timeout, sanitize):
        self.build = build
        self.timeout = timeout
        self.kept = build / "mutation" / ("sanitize" if sanitize else "plain")
        self.kept.mkdir(parents=True, exist_ok=True)
        self.extra = ["-w"] + (SANITIZE if sanitize else [])
        entries = json.loads((build / "compile_commands.json").read_text())
        self.commands = {Path(e["file"]): e for e in entries}
        self.tests = [t for t in self.commands if t.name.endswith("_test.cpp")
                      and TESTS in t.parents
                      and t.relative_to(TESTS).parts[0] not in ("golden", "peer")]
        ctests = (build / "tests" / "CTestTestfile.cmake").read_text()
        words = re.search(r'^add_test\(\[=\[mpi\.\w+\.1\]=\] (.*) "1" ', ctests, re.MULTILINE)
        self.mpiexec = shlex.split(words[1]) if words else None
        self.shared = {}

    def command(self, source, output, include=None):
        """Without what CMake precompiles, and with the changed headers before the others."""
        words = shlex.split(self.commands[source]["command"])
        while "-Xclang" in words:
            at = words.index("-Xclang")
            del words[at: at + 2]
        for option in ("-Winvalid-pch", "-MD"):
            words = [w for w in words if w != option]
        for option in ("-MF", "-MT", "-include"):
            while option in words:
                at = words.index(option)
                del words[at: at + 2]
        words[words.index("-o") + 1] = str(output)
        words[1:1] = [f"-I{include}"] if include else []
        return words + self.extra

    def keep(self, words, source, output):
        """Compiles what does not change, if it has changed."""
        stamp = output.with_suffix(output.suffix + ".command")
        if (output.exists() and output.stat().st_mtime > source.stat().st_mtime
                and stamp.exists() and stamp.read_text() == str(words)):
            return
        done = subprocess.run(words, cwd=self.build, capture_output=True)
        if done.returncode != 0:
            sys.exit(done.stderr.decode())
        stamp.write_text(str(words))

    def prepare(self):
        """What tests are linked with, and what most of them include, precompiled."""
        for target, sources in {
                "weir_tests": ["support/main.cpp", "support/allocations.cpp"],
                "weir_mpi_tests": ["parallel/mpi/main.cpp", "parallel/mpi/counted_bytes.cpp",
                                   "support/allocations.cpp"]}.items():
            one = next((t for t in self.tests if ("mpi" in t.parts) == ("mpi" in target)), None)
            if one is None:
                continue
            folder = self.kept / target
            folder.mkdir(exist_ok=True)
            objects = [folder / (Path(s).stem + ".o") for s in sources]
            for source, output in zip(sources, objects):
                self.keep(self.command(TESTS / source, output), TESTS / source, output)
            libraries = re.search(rf"^build tests/{target}:(?:.*\n)+?  LINK_LIBRARIES = (.*)",
                                  (self.build / "build.ninja").read_text(), re.MULTILINE)
            base = folder / "common.hpp"
            if not base.exists() or base.read_text() != COMMON:
                base.write_text(COMMON)
            words = self.command(one, base)
            clang = "clang" in Path(words[0]).name
            output = Path(f"{base}.{'pch' if clang else 'gch'}")
            words = self.command(one, output)
            at = words.index("-c")
            words[at: at + 2] = ["-x", "c++-header", "-c", str(base)]
            words += ["-fpch-instantiate-templates"] if clang else []
            self.keep(words, base, output)
            self.shared[target] = (["-include", str(base)], objects,
                                   shlex.split(libraries[1]) if libraries else [])

    def alive(self, header):
        """The lines, counted from 0, that the preprocessor leaves in a header, or None for all."""
        if not re.search(r"^\s*#\s*(if|ifdef|ifndef)\b(?! WEIR_COMPILED)", text_of(header),
                         re.MULTILINE):
            return None
        one = next((t for t in self.tests if header in reached_by(t)), None)
        if one is None:
            return None
        words = self.command(one, "-")
        words[words.index("-c"):] = ["-x", "c++", "-E", str(header), *self.extra]
        done = subprocess.run(words, cwd=self.build, capture_output=True)
        found, here, number = set(), False, 0
        for line in done.stdout.decode(errors="replace").split("\n"):
            marker = re.match(r'# (\d+) "(.*?)"', line)
            if marker:
                here, number = Path(marker[2]) == header, int(marker[1]) - 1
                continue
            if here and line.strip():
                found.add(number)
            number += 1
        return found

    def limit(self):
        """Processor time, which does not pass while the machine does something else."""
        resource.setrlimit(resource.RLIMIT_CPU, (self.timeout, self.timeout + 1))

    def run(self, include, test, work):
        """'killed', 'timed out', 'survived' or 'invalid'."""
        ranks = "mpi" in test.parts
        output, program = work / "test.o", work / "test"
        precompiled, objects, libraries = self.shared["weir_mpi_tests" if ranks else "weir_tests"]
        words = self.command(test, output, include) + precompiled
        if subprocess.run(words, cwd=self.build, capture_output=True).returncode != 0:
            return "invalid"
        link = [words[0], "-o", str(program), str(output), *map(str, objects), "-pthread"]
        link += [w for w in self.extra if w.startswith("-fs")] + libraries
        done = next((d for d in (subprocess.run(link + more, capture_output=True)
                                 for more in ([], ["-lCatch2"], ["-lCatch2Main", "-lCatch2"]))
                     if d.returncode == 0), None)
        if done is None:
            sys.exit(f"{test} cannot be linked")
        for count in "3214" if ranks else "1":
            call = ([*self.mpiexec, count] if ranks else []) + [str(program), "~[slow]", "--abort"]
            try:
                done = subprocess.run(call, capture_output=True, cwd=work,
                                      timeout=20 * self.timeout, preexec_fn=self.limit)
            except subprocess.TimeoutExpired:
                return "timed out"
            if done.returncode != 0:
                return "timed out" if done.returncode == -signal.SIGXCPU else "killed"
        return "survived"


def changed_copy(mutant, work):
    """A folder with the changed header alone."""
    header, number, new = mutant
    changed = work / "include" / "weir" / header
    changed.parent.mkdir(parents=True, exist_ok=True)
    lines = (HEADERS / header).read_text().split("\n")
    lines[number] = new
    changed.write_text("\n".join(lines))
    return work / "include"


def judge(mutant, runner, sanitizer, most):
    """(result, the test that killed or the tests that did not)."""
    header, number, _ = mutant
    tests, mirroring = tests_of(HEADERS / header, number, runner.tests, most)
    if not tests:
        return "untested", []
    with tempfile.TemporaryDirectory() as name:
        include = changed_copy(mutant, Path(name))
        for place, test in enumerate(tests):
            result = runner.run(include, test, Path(name))
            if result == "killed" and place < mirroring:
                result = "killed by a mirroring test"
            elif result == "killed":
                result = "killed by another test"
            if result != "survived":
                return result, [test]
        for test in tests[:2] if sanitizer else []:
            if sanitizer.run(include, test, Path(name)) != "survived":
                return "killed by a sanitizer", [test]
    return "survived", tests


def sampled(everything, runner, count, seed):
    """The first `count` of a shuffled list whose lines the build compiles."""
    random.Random(seed).shuffle(everything)
    alive, found = {}, []
    for mutant in everything:
        if len(found) == count:
            break
        header, number, _ = mutant
        if header not in alive:
            alive[header] = runner.alive(HEADERS / header)
        if alive[header] is None or number in alive[header]:
            found.append(mutant)
    return found


def survivors_in(path):
    """The mutants that an earlier run printed as survivors, where their lines are now."""
    found = []
    report = re.findall(r"^(?:survived|untested): (\S+):(\d+)\n  - (.*)\n  \+ (.*)",
                        path.read_text(), re.MULTILINE)
    for header, number, old, new in report:
        lines = text_of(HEADERS / header).split("\n")
        places = [n for n, line in enumerate(lines) if line.strip() == old]
        if not places:
            print(f"{header}:{number} is no longer there: {old}")
            continue
        place = min(places, key=lambda n: abs(n - int(number)))
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        found.append((Path(header), place, indent + new))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("build", type=Path, help="a build directory that is configured")
    parser.add_argument("--count", type=int, default=50, help="mutants to sample (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default 1)")
    parser.add_argument("--path", default="", help="only headers whose path begins so, as moe/router")
    parser.add_argument("--tests", type=int, default=3, help="test files for a mutant (default 3)")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default 1)")
    parser.add_argument("--timeout", type=int, default=60,
                        help="seconds of processor time that a test may take (default 60)")
    parser.add_argument("--sanitize", action="store_true", help="survivors with sanitizers, too")
    parser.add_argument("--again", type=Path, help="judge the survivors that this file lists")
    parser.add_argument("--list", action="store_true", help="print the sample and its tests only")
    options = parser.parse_args()

    build = options.build.resolve()
    runner = Runner(build, options.timeout, False)
    headers = sorted(p.relative_to(HEADERS) for p in HEADERS.rglob("*.hpp"))
    everything = [m for h in headers if str(h).startswith(options.path) for m in mutants_of(h)]
    total = len(everything)
    sample = (survivors_in(options.again) if options.again
              else sampled(everything, runner, options.count, options.seed))
    if options.list:
        for header, number, new in sample:
            tests, mirroring = tests_of(HEADERS / header, number, runner.tests, options.tests)
            print(f"{header}:{number + 1}\n  - {text_of(HEADERS / header).split(chr(10))[number].strip()}"
                  f"\n  + {new.strip()}\n  {mirroring} of",
                  *(str(t.relative_to(TESTS)) for t in tests))
        return 0
    runner.prepare()
    sanitizer = Runner(build, 4 * options.timeout, True) if options.sanitize else None
    if sanitizer:
        sanitizer.prepare()
    with tempfile.TemporaryDirectory() as work:
        first = min(runner.tests)
        if runner.run(INCLUDE, first, Path(work)) != "survived":
            sys.exit(f"{first.relative_to(ROOT)} does not pass as it is")
    counts = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda m: judge(m, runner, sanitizer, options.tests), sample)
        for (header, number, new), (result, tests) in zip(sample, results):
            counts[result] = counts.get(result, 0) + 1
            old = text_of(HEADERS / header).split("\n")[number]
            print(f"{result}: {header}:{number + 1}")
            if result != "invalid":
                print(f"  - {old.strip()}\n  + {new.strip()}")
            if tests and result != "invalid":
                print("  " + " ".join(str(t.relative_to(TESTS)) for t in tests))
            sys.stdout.flush()
    killed = sum(n for name, n in counts.items() if name.startswith("killed") or name == "timed out")
    judged = killed + counts.get("survived", 0) + counts.get("untested", 0)
    print(f"{len(sample)} of {total} mutants, "
          + (f"survivors of {options.again}: " if options.again else f"seed {options.seed}: ")
          + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))
    if judged:
        print(f"killed {100.0 * killed / judged:.1f} % of {judged}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

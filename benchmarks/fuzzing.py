"""What the fuzzing scripts share: damage, a child process that may die of it, and the command line."""

import argparse
import json
import resource
import select
import subprocess
import sys
import time
from pathlib import Path


def damaged(content, kind, rng, end=None):
    """Bytes with one damage before `end`: "flip", one to three bits; "cut" off; "insert", up to 16 bytes more."""
    end = len(content) if end is None else end
    if kind == "cut":
        return content[: rng.integers(end)]
    if kind == "insert":
        place = rng.integers(end + 1)
        return content[:place] + rng.bytes(rng.integers(1, 17)) + content[place:]
    changed = bytearray(content)
    for bit in rng.choice(8 * end, rng.integers(1, 4), replace=False):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class Child:
    """`python SCRIPT --child FOLDER`, which runs `answer_lines`; started again when it has died."""

    def __init__(self, script, folder, seconds):
        self.command, self.seconds, self.process = [sys.executable, script, "--child", str(folder)], seconds, None

    def ask(self, line):
        """(outcome, detail) of a line; "crashed" if the process dies of it or takes longer than `seconds`."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._answer(600)  # it is ready
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self._answer(self.seconds)
        if answer:
            return json.loads(answer)
        self.process.kill()
        status = self.process.wait()
        self.process = None
        return "crashed", f"no answer, exit status {status}"

    def _answer(self, seconds):
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else ""

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def answer_lines(is_equal, refusals, memory):
    """Answer each line of standard input with a line of JSON, (outcome, detail).

    Args:
        is_equal: callable(line) -> bool: opens a damaged file, and whether it holds what the whole one holds.
        refusals: tuple of the exceptions with which it may refuse, in one line.
        memory: int, bytes that it may take on top of what is taken now.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = ("equal" if is_equal(line.strip()) else "changed", "")
        except refusals as error:
            answer = ("crashed" if "\n" in str(error) else "refused", str(error))
        except Exception as error:
            answer = ("crashed", repr(error))
        print(json.dumps(answer), flush=True)


def main(doc, child, campaign, summary, n):
    """Run a script that was called as `SCRIPT OUTPUT [--mutants=n] [--seed=0]`, or as a child.

    Args:
        doc: str, the script's.
        child: callable(folder) that runs `answer_lines`.
        campaign: callable(n, seed) -> dict with `crashes`.
        summary: callable(what `campaign` returned) -> dict of totals and changed_despite_checksum.
        n: int, mutants unless the command line says another number.

    Returns:
        int, exit status: 1 after a crash, or a change that a checksum should have shown.
    """
    if sys.argv[1:2] == ["--child"]:
        return child(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--mutants", type=int, default=n)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    result = campaign(arguments.mutants, arguments.seed)
    shown = {
        "mutants": arguments.mutants,
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - start, 1),
        **summary(result),
    }
    from gpq_tf.files import write_json

    write_json(arguments.output, {**shown, **result})
    print(json.dumps(shown))
    return 1 if result["crashes"] or shown["changed_despite_checksum"] else 0

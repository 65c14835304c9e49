"""SIGINT and SIGTERM in a command: one line, its exit code, nothing half-made that counts."""

import os
import signal
import subprocess
import sys

import pytest

from erasebench.store.local import Store

SWEEP = """
import sys, time
from pathlib import Path
from erasebench import config
from erasebench.store.local import Store

config.build = lambda composed: None  # what takes its time is none of this test's business

def job(run):
    def fill(folder):
        (folder / "x.txt").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
    Store().get_or_make("kind", 1, fill)

sys.exit(config.main(job, ["-m", "method=none,uce", "images=1", "sampler.steps=1"]))
"""
SEVERAL = SWEEP.replace("sys.exit(config.main(", "sys.exit(interrupt.run(lambda: [config.main(").replace(
    '"sampler.steps=1"]))', '"sampler.steps=1"]) for _ in range(2)][0]))'
).replace("from erasebench import config\n", "from erasebench import config, interrupt\n")  # a command of several, as regress is
LIST = """
import sys, time
from erasebench.store.local import Store

def entries(store):
    print("ready", flush=True)
    time.sleep(60)
    yield

Store.entries = entries
from erasebench import cli
sys.exit(cli.main(["store", "list"]))
"""
IMPORT = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "safetensors":
            print("ready", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
sys.argv = ["-m"]  # as the interpreter has it for -m
import erasebench.store.local
"""


def heed_interrupts():
    """In the child: a shell's background jobs ignore SIGINT, and tests may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("script,number", [(SWEEP, signal.SIGINT), (SEVERAL, signal.SIGTERM), (LIST, signal.SIGINT), (LIST, signal.SIGTERM)])
def test_a_signal_stops_a_command_with_one_line(script, number):
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=heed_interrupts,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    lines = [line for line in said.splitlines() if not line.startswith("[")]  # of the log
    assert process.returncode == 128 + number
    assert len(lines) == 1 and lines[0].startswith("interrupted") and "Traceback" not in said
    assert list(Store().entries()) == []


def test_an_interrupt_while_a_command_is_imported_is_one_line_too():
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "error: interrupted\n" and process.returncode == 130

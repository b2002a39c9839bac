"""What the examples have in common: naming kernels, starting the second process, and printing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastattn.dispatch.explain import explain_problem
from fastattn.environment.device import Device


def served(met):
    """How many of these problems each candidate serves, the most frequent first."""
    return dict(Counter(explain_problem(problem).served_by for problem in met).most_common())


def second_process(script, *arguments):
    """What the same script finds in a new process, where what is in the store serves."""
    command = [sys.executable, script, *arguments, "--json", "--no-second"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def open_console(title):
    """A console as wide as the terminal, 100 columns elsewhere, with the title and the machine printed."""
    console = Console() if Console().is_terminal else Console(width=100)
    console.print(Text(title, "bold"))
    about = f"{Device.of(torch.device('cpu')).name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(Text(about, "dim"))
    return console


def table(*headings, wide=None):
    """A table of numbers with one column of names in front, and a wide one of text at the end if it is named."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    made.add_column("")
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    if wide is not None:
        made.add_column(wide, style="cyan", ratio=1)
    return made


TIMES = ("stock", "fastattn", "speed", "A/A")


def times(row):
    """The cells under TIMES."""
    gain, spread = row["stock_ms"] / row["fastattn_ms"], row["aa_spread"]
    style = "bold green" if gain > 1 + spread else "bold red" if gain < 1 - spread else "dim"
    return f"{row['stock_ms']:.0f} ms", f"{row['fastattn_ms']:.0f} ms", Text(f"{gain:.2f}x", style), f"±{spread:.1%}"


def kernels(row):
    """The cell of the kernels that served."""
    return ", ".join(f"{count} x {name}" for name, count in row["kernels"].items())


def tell_tunings(console, first, second):
    """What this process tuned, and what the second one did not."""
    console.print(f"this process tuned {first['tuned']} problems in {first['tuning_s']:.1f} s")
    if second is not None:
        asked = sum(row["problems"] for row in second["rows"])
        console.print(f"a second process met {asked} problems and tuned {second['tuned']}")

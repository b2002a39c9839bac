"""Write docs/kernels.md from the rows: python docs/make_kernels.py. A test compares the page with what this makes."""

from __future__ import annotations

import re
from pathlib import Path

from fastattn.kernels import known_faults, registry
from fastattn.kernels.kernel import Kernel
from fastattn.kernels.libraries import catalogue
from fastattn.kernels.limits import RefuseWhen

PAGE = Path(__file__).with_name("kernels.md")
HEAD = """# The kernels

Made from the rows in `src/fastattn/kernels/adapters/` by `python docs/make_kernels.py`. What a kernel cannot do by itself a
conversion may still bring about ([adding a kernel](adding-a-kernel.md)); `fastattn explain` says which candidates a problem
has, and why each other kernel is out. `packed`, `cache` and `pages` among the options: its library has an entry point
that is told the lengths of packed sequences, how much of a cache is filled, or a page table ([packing](packing.md#on-cuda)).
`kept`: a `fastattn.KVCache` keeps keys and values in its own order for it.
"""
OPTIONS = ("window", "softcap", "dropout", "lse", "score_mod", "custom_mask", "mask_blocks")
FAULTS = """## Known faults

Rows of `src/fastattn/kernels/known_faults.json`: where all of it holds, the kernel is not used; for torch's own kernels that
goes for F.sdpa as well. `FASTATTN_KNOWN_FAULTS` names a file with more of them.

| kernel | fault | where | reported |
|---|---|---|---|"""
CORNERS = {
    "top_left": "top left",
    "bottom_right": "bottom right",
    "any": "both corners",
    "square": "equal lengths",
    None: "",
}
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
COMPILES = {None: "", "once": "before its first run", "each_length": "for each length"}
SAID = {"lse": "return_lse", "custom_mask": "BlockMask", "mask_blocks": "masks with a meaning"}


def page() -> str:
    rows = [k for k in registry.rows() if k not in registry.plugins()]
    parts = [HEAD, overview(rows)]
    for title, mine in groups(rows).items():
        parts.append(f"## {title}\n")
        library = catalogue.library_of(mine[0].library)
        if library is not None:
            command = library.install.replace("{torch}", "2.13")
            parts.append(
                f"`{command}`"
                + (" for torch 2.13" if command != library.install else "")
                + f", module `{library.module}`.\n"
            )
        parts += [one(kernel) for kernel in mine]
    return "\n".join([*parts, FAULTS, "\n".join(map(fault, known_faults.known_faults())) + "\n"])


def overview(rows: list[Kernel]) -> str:
    lines = [
        "| kernel | of | devices | dtypes | causal | masks | options | gradients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for k in rows:
        options = ", ".join(options_of(k))
        dtypes = ", ".join(SHORT[d] for d in k.dtypes)
        cells = (k.name, library_of(k), ", ".join(k.devices), dtypes, CORNERS[k.corner], ", ".join(k.masks), options)
        lines.append(f"| {' | '.join(cells)} | {'yes' if k.grad else 'no'} |")
    return "\n".join(lines) + "\n"


def options_of(k: Kernel) -> list[str]:
    """What it does beside plain attention; `packed`, `cache`, `pages` and `kept`: it has such an entry point."""
    forms = (("packed", k.load_packed), ("cache", k.load_cached), ("pages", k.load_paged), ("kept", k.load_kept))
    own = [name for name, load in forms if load is not None]
    return [SAID.get(o, o) for o in OPTIONS if getattr(k, o)] + own


def library_of(k: Kernel) -> str:
    library = catalogue.library_of(k.library)
    return "torch" if k.library == "torch" else library.name if library else k.library


def groups(rows: list[Kernel]) -> dict[str, list[Kernel]]:
    found: dict[str, list[Kernel]] = {}
    for kernel in rows:
        found.setdefault(library_of(kernel), []).append(kernel)
    return found


def one(k: Kernel) -> str:
    options = options_of(k)
    backward = "no" if not k.grad else ("yes, and for a float mask" if k.mask_grad else "yes")
    first, last = k.versions
    groups = {True: "yes", False: "after they are repeated"}
    lines = [
        ("devices", ", ".join(k.devices)),
        ("dtypes", ", ".join(k.dtypes)),
        ("layout", k.layout),
        ("versions", " and ".join(filter(None, (f"from {first}" if first else "", f"before {last}" if last else "")))),
        ("causal", k.corner or ("by a dense mask" if k.masks else "no")),
        ("masks", ", ".join(k.masks)),
        ("options", ", ".join(options)),
        ("fewer kv heads", groups.get(k.gqa, f"from {k.library} {k.gqa} on, repeated before")),
        ("gradients", backward + ("" if k.deterministic or not k.grad else ", not deterministic")),
        ("compiles", COMPILES[k.compiles] + (", where it did not come compiled" if k.is_built else "")),
        ("accuracy", "quantises: only where the caller gives a number" if k.approximate else ""),
        ("considered", "only where it is named" if k.opt_in else ""),
        ("limits", ", ".join(f"`{n.describe()}`" for n in k.needs if not isinstance(n, RefuseWhen))),
        *dict.fromkeys(("refused", placeholders(n.text)) for n in k.needs if isinstance(n, RefuseWhen)),
        *(
            ("by a dense mask" if k.masks else "refused", placeholders(n.text))
            for n in k.packed_needs
            if isinstance(n, RefuseWhen)
        ),
        ("pages as they are", ", ".join(f"`{n.describe()}`" for n in k.paged_needs if not isinstance(n, RefuseWhen))),
        *(
            ("gathered" if k.load_cached or k.masks else "refused", placeholders(n.text))
            for n in k.paged_needs
            if isinstance(n, RefuseWhen)
        ),
    ]
    said = "\n".join(f"- {name}: {value}" for name, value in lines if value)
    return f"### {k.name}\n\n{k.summary}\n\n{said}\n"


def placeholders(text: str) -> str:
    """A sentence with the names of what it would tell: `head_dim` for {p.head_dim:g}."""
    return re.sub(r"\{(?:p|device)\.([^}:]*)[^}]*\}", r"`\1`", text)


def fault(q: known_faults.KnownFault) -> str:
    kernel = f"F.sdpa where it runs {q.runs}" if q.runs else ", ".join(q.kernels)
    where = [f"{name} {spec}" for name, spec in q.versions.items()]
    where += [f"{name} {condition(value)}" for name, value in q.when.items()]
    return f"| {kernel} | {q.reason} | {'; '.join(where) or 'always'} | <{q.link}> |"


def condition(wanted: object) -> str:
    if isinstance(wanted, dict):
        low = f">= {wanted['min']}" if "min" in wanted else ""
        high = f"<= {wanted['max']}" if "max" in wanted else ""
        step = f"% {wanted['multiple_of']} = {wanted.get('remainder', 0)}" if "multiple_of" in wanted else ""
        return " and ".join(filter(None, (low, high, step)))
    return " or ".join(map(str, wanted)) if isinstance(wanted, list) else str(wanted)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)

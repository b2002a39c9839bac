"""How a Problem is written for people: in full, briefly for a table, and as the words of the command line."""

from __future__ import annotations

import shlex

from fastattn.problems.problem import Problem


def _heads(p: Problem) -> str:
    return f"{p.q_heads}" if p.q_heads == p.kv_heads else f"{p.q_heads}/{p.kv_heads}"


def _dims(p: Problem) -> str:
    return f"{p.head_dim}" if p.head_dim == p.head_dim_v else f"{p.head_dim}/{p.head_dim_v}"


def in_words(p: Problem) -> str:
    """Everything that is not as usual, in one line."""
    about = {"exact": "", "kv": " (kv bucket)", "all": " (bucket)"}[p.lengths]
    words = [
        f"{p.batch} x {_heads(p)} heads x {p.q_len} on {p.kv_len}{about} x d{_dims(p)}",
        p.dtype,
        f"a mask like {p.structure}" if p.structure else f"{p.mask} mask {p.mask_shape}".strip() if p.mask else "",
        f"causal {p.causal}" if p.causal else "",
        f"window {p.window[0]}, {p.window[1]}" if p.window else "",
        f"softcap {p.softcap:g}" if p.softcap else "",
        "dropout" if p.dropout else "",
        "with lse" if p.lse else "",
        "score_mod" if p.score_mod else "",
        "scale " + p.scale if p.scale != "positive" else "",
        "+".join(dict.fromkeys(p.strides)) if set(p.strides) != {"contiguous"} else "",
        "forward + backward" if p.needs_grad else "",
        "deterministic" if p.deterministic else "",
        f"with {', '.join(p.switches)}" if p.switches else "",
        f"accuracy {p.accuracy}" if p.accuracy != "exact" else "",
        f"autocast from {'/'.join(dict.fromkeys(p.cast_from))}" if p.cast_from else "",
        "in a KVCache" if p.kept else "",
        "compiled" if p.compiled else "",
    ]
    return ", ".join(word for word in words if word)


def briefly(p: Problem) -> str:
    """In as few words as tell it from the others of a table; the dtype stands apart."""
    q_len, kv_len = (
        f"{'~' if is_bucket and n > 16 else ''}{n}"
        for n, is_bucket in ((p.q_len, p.lengths == "all"), (p.kv_len, p.lengths != "exact"))
    )
    length = q_len if q_len == kv_len else f"{q_len} on {kv_len}"
    words = [
        f"{p.batch} x {_heads(p)} x {length} d{_dims(p)}",
        {None: "", "top_left": "causal", "bottom_right": "causal↘"}[p.causal],
        f"like {p.structure}"
        if p.structure
        else f"{'bool' if p.mask == 'bool' else 'bias'} {p.mask_shape}"
        if p.mask
        else "",
        f"window {p.window[0]},{p.window[1]}" if p.window else "",
        f"softcap {p.softcap:g}" if p.softcap else "",
        "dropout" if p.dropout else "",
        "lse" if p.lse else "",
        "fwd+bwd" if p.needs_grad else "",
        "kept" if p.kept else "",
        "compiled" if p.compiled else "",
    ]
    return " ".join(word for word in words if word)


def command_line(p: Problem) -> str:
    """The arguments of `fastattn tune` that tune this problem."""
    words = [f"{p.batch}x{_heads(p)}x{p.q_len}x{p.kv_len}x{_dims(p)}", f"--dtype {p.dtype}"]
    words += [f"--causal {p.causal}"] if p.causal else []
    if p.structure:
        words += [f"--mask {shlex.quote(p.structure)}"]
    elif p.mask:
        words += [f"--mask {p.mask}:{p.mask_shape}" + (":grad" if p.mask_grad else "")]
    words += [f"--layout {p.layout}"] if p.layout != "bhsd" else []
    if p.layout != "bhsd" or set(p.strides) != {"contiguous"}:
        words += ["--strides " + ",".join(p.strides)]
    words += [f"--window {p.window[0]},{p.window[1]}"] if p.window else []
    words += [f"--softcap {p.softcap!r}"] if p.softcap else []
    words += ["--dropout"] if p.dropout else []
    words += ["--lse"] if p.lse else []
    words += [f"--cast-from {','.join(p.cast_from)}"] if p.cast_from else []
    words += [f"--device {p.device}"] if p.device != "cpu" else []
    words += [f"--accuracy {p.accuracy}"] if p.accuracy != "exact" else []
    words += ["--grad"] if p.needs_grad else []
    words += ["--bucket"] if p.lengths == "all" else []
    words += ["--kept"] if p.kept else []
    words += ["--compiled"] if p.compiled else []
    return " ".join(words)

"""Goals G1 to G11 of the kernels, read from the JSON of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

NOT_YET = "not measured yet"
B16 = ("b16-proj", "b16-qkv", "b16-fc1", "b16-fc2")
NO_LORAFUSION = "LoRAFusion needs Triton 3.2 and does not run beside this Triton"


def like_for_like(name: str) -> bool:
    """Ours by table or variant, with operands as the others have them; merged rounds the weight at every step."""
    return name.startswith("ours ") and not {"merged", "module", "float32"} & set(name.split())


def named(*names: str) -> Callable[[str], bool]:
    return lambda name: name in names


class Missing(Exception):
    """A figure that is not there; str() says why."""


def goals(state: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each line of the goals' table.

    Returns:
        [{"goal", "what", "target", "better", "eager", "graph", "by", "note", "reason", "verdict"}]; eager and graph are
        {"median", "low", "high"} or null.
    """
    rows = [
        _layer(state, "G1", "fwd / F.linear, 8192x4096x4096", "forward", ["llm"], "linear", 1.05),
        _layer(state, "G2", "fwd / F.linear, B/16 fc1", "forward", ["b16-fc1"], "linear", 1.12),
        _layer(state, "G2", "fwd / F.linear, B/16 packed qkv", "forward", ["b16-qkv"], "linear", 1.12),
        _layer(state, "G3", "fwd / F.linear, B/16 768->768", "forward", ["b16-proj"], "linear", 1.25),
        _layer(state, "G3", "fwd / F.linear, B/16 3072->768", "forward", ["b16-fc2"], "linear", 1.20),
        _layer(state, "G4", "fwd+bwd / eager, B/16 geomean", "backward", B16, "as released", 0.62),
        _layer(state, "G5", "fwd+bwd / torch.compile, B/16 geomean", "compiled", B16, "compiled", 0.78),
        _layer(state, "G6", "fwd+bwd / PEFT no-cast, B/16 geomean", "backward", B16, "peft no-cast", 0.60),
        _layer(
            state,
            "G6",
            "fwd+bwd / PEFT default, B/16 geomean",
            "backward",
            B16,
            "peft",
            0.50,
            ours=named("ours auto float32 adapters"),
        ),  # fmt: skip
        *_lorafusion(state),
        *_merge(state),
        _figure(state, "G9", "optimizer + prox / fused + foreach", "optimizer", "ProxAdamW", _FUSED, 0.40),
        _figure(state, "G9", "optimizer + prox / as released", "optimizer", "ProxAdamW", "as released", 0.02),
        _step(state, "step B/16 / released, bf16 autocast", "released bf16 autocast", 0.55),
        _step(state, "step B/16 / as released, float32", "released float32", 0.15),
        _plain(state, "plain product / cuBLAS speed, K >= 1024", lambda k: k >= 1024, 0.95),
        _plain(state, "plain product / cuBLAS speed, K = 768", lambda k: k == 768, 0.90),
    ]
    for row in rows:
        row["verdict"] = _verdict(row, state)
    return rows


_FUSED = "fused AdamW + foreach prox"


def _row(goal: str, what: str, target: float, better: str = "<=", **found: Any) -> dict[str, Any]:
    empty = {"eager": None, "graph": None, "by": None, "note": None, "reason": None}
    return {"goal": goal, "what": what, "better": better, "target": target, **empty, **found}


def _data(state: dict[str, Any], part: str) -> dict[str, Any]:
    """
    Raises:
        Missing: the part left no data.
    """
    record = state["parts"].get(part, {"status": "was not asked for"})
    if record.get("data"):
        return record["data"]
    raise Missing(f"part {part}: {record.get('error') or record.get('reason') or record['status']}")


def _entry(state: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    """A part's entry for the shape of that name.

    Raises:
        Missing: it is not there, or it holds a reason instead of figures.
    """
    for key, entry in _data(state, part).items():
        if key.rsplit("-", 1)[0] == name:
            if "rivals" in entry:
                return entry
            raise Missing(f"{key}: {entry.get('reason')}")
    raise Missing(f"part {part} has no shape {name}: {_unfinished(state, part)}")


def _unfinished(state: dict[str, Any], part: str) -> str:
    record = state["parts"].get(part, {})
    return record.get("error") or record.get("reason") or record.get("status", "was not asked for")


def _layer(
    state: dict[str, Any], goal: str, what: str, part: str, names: Iterable[str], base: str, target: float,
    ours: Callable[[str], bool] = like_for_like,
) -> dict[str, Any]:  # fmt: skip
    """The fastest of ours over a base, the geometric mean where there are several shapes."""
    picks, missing = [], []
    for name in names:
        try:
            picks.append(_best(_entry(state, part, name), ours, base))
        except Missing as error:
            missing.append(str(error))
    if not picks:
        return _row(goal, what, target, reason=missing[0])
    # each shape by its fastest variant, as a tuned table would have it
    by = "; ".join(dict.fromkeys(pick["by"] for pick in picks))
    auto = _geomean([pick["auto"] for pick in picks])
    note = f"auto: {auto['median']:.3f}" if auto else None
    eager, graph = (_geomean([pick[how] for pick in picks]) for how in ("eager", "graph"))
    # a mean over some of its shapes is shown, and is no verdict
    return _row(goal, what, target, eager=eager, graph=graph, by=by, note=note, reason="; ".join(missing) or None)


def _best(entry: dict[str, Any], ours: Callable[[str], bool], base: str) -> dict[str, Any]:
    found = entry["rivals"]
    if "to" not in found.get(base, {}):
        raise Missing(f"{base}: {found.get(base, {}).get('reason', 'not among the rivals')}")
    tried = {name: entry for name, entry in found.items() if ours(name)}
    ratios = {name: entry["to"].get(base) for name, entry in tried.items() if "to" in entry}
    known = {name: r for name, r in ratios.items() if r and (value(r["graph"]) or value(r["eager"]))}
    if not known:
        raise Missing("; ".join(f"{name}: {entry.get('reason')}" for name, entry in tried.items()))
    best = min(known, key=lambda name: value(known[name]["graph"]) or value(known[name]["eager"]))
    auto = known.get("ours auto") or known[best]
    # a base that cannot be captured leaves the eager figure alone
    return {**known[best], "by": best, "auto": auto["graph"] if value(auto["graph"]) else auto["eager"]}


def value(figure: dict[str, Any] | None) -> float | None:
    return figure["median"] if figure else None


def _geomean(figures: list[dict[str, Any]]) -> dict[str, float] | None:
    """Of medians and of quartiles; None where one is missing."""
    if not figures or any(value(figure) is None for figure in figures):
        return None
    return {
        key: math.exp(sum(math.log(max(figure[key], 1e-9)) for figure in figures) / len(figures))
        for key in ("median", "low", "high")
    }


def _lorafusion(state: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for what, target, ours in (
        ("fwd+bwd / LoRAFusion, its grid", 0.96, like_for_like),
        ("the same, dropout 0.1", 0.92, named("ours module dropout 0.1")),
    ):
        note = None
        try:
            entries = [e for e in _data(state, "lorafusion").values() if "rivals" in e]
            floors = [_best(entry, ours, "linear") for entry in entries]
            figure = _geomean([f["graph"] if value(f["graph"]) else f["eager"] for f in floors])
            note = f"ours / F.linear fwd+bwd {figure['median']:.3f}" if figure else None
        except Missing as missing:
            note = f"ours / F.linear {NOT_YET}: {missing}"
        rows.append(_row("G7", what, target, reason=NO_LORAFUSION, note=note))
    return rows


def _merge(state: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (
        ("merge of 144 modules / addmm_ loop, fp16", 0.12, "<="),
        ("merge kernels / copy bandwidth, fp16", 0.80, ">="),
    )
    try:
        found = _data(state, "merge").get("float16", {"reason": _unfinished(state, "merge")})
        if "merge_" not in found:
            raise Missing(found.get("reason", "part merge left no figure"))
    except Missing as missing:
        return [_row("G8", what, target, better, reason=str(missing)) for what, target, better in lines]
    call, unchecked = found["merge_"], found["merge_ check=False"]
    at_random = found["merge_ stochastic"]["to check=False"]["median"]
    note = f"check=False {unchecked['to addmm_ loop']['median']:.3f}; stochastic / nearest {at_random:.2f} (limit 1.10)"
    by = f"merge_ ({found['backend']}); graph: check=False"
    graph = unchecked["to addmm_ loop, graph"] if value(unchecked["to addmm_ loop, graph"]) else None
    ratio = _row("G8", *lines[0], eager=call["to addmm_ loop"], graph=graph, by=by, note=note)
    share = unchecked["share_of_copy"]
    if share is None:
        reason = unchecked["profile"].get("reason") or "no ceiling was measured"
        return [ratio, _row("G8", *lines[1], reason=f"no kernel time: {reason}")]
    spread = dict.fromkeys(("median", "low", "high"), share)
    return [ratio, _row("G8", *lines[1], eager=spread, by="merge_ check=False", note="kernel time by the profiler")]


def _figure(
    state: dict[str, Any], goal: str, what: str, part: str, ours: str, base: str, target: float
) -> dict[str, Any]:
    try:
        entry = _data(state, part).get(ours, {"reason": _unfinished(state, part)})
        if base not in entry.get("to", {}):
            raise Missing(f"{ours}: {entry.get('reason', f'{base} was not measured')}")
    except Missing as missing:
        return _row(goal, what, target, reason=str(missing))
    ratio = entry["to"][base]
    known = {how: ratio[how] if value(ratio[how]) is not None else None for how in ("eager", "graph")}
    note = ratio["graph"].get("reason") if known["graph"] is None else ratio.get("graph_base")
    return _row(goal, what, target, by=ours, note=note, **known)


def _step(state: dict[str, Any], what: str, base: str, target: float) -> dict[str, Any]:
    """The faster of ours under autocast and ours over a bf16 base."""
    rows = [
        _figure(state, "G10", what, "step", f"ours {kind}", base, target) for kind in ("bf16 autocast", "bf16 base")
    ]
    known = [row for row in rows if row["eager"] or row["graph"]]
    row = min(known, key=lambda r: value(r["graph"]) or value(r["eager"])) if known else rows[0]
    model = state["parts"].get("step", {}).get("data", {}).get("model")
    return {**row, "note": "; ".join(filter(None, (model, row["note"])))}


def _plain(state: dict[str, Any], what: str, wanted: Callable[[int], bool], target: float) -> dict[str, Any]:
    """Of each shape the fastest tile; of the shapes the slowest."""
    try:
        entries = [
            e for e in _data(state, "plain").values() if "tiles" in e and (wanted(e["shape"]["k"]) or _small(state))
        ]
        if not entries:
            reasons = [e.get("reason") for e in _data(state, "plain").values() if isinstance(e, dict)]
            raise Missing(next(filter(None, reasons), _unfinished(state, "plain")))
        picks = [_fastest_tile(entry) for entry in entries]
    except Missing as missing:
        return _row("G11", what, target, ">=", reason=str(missing))
    slowest = min(picks, key=lambda pick: value(pick["graph"]) or value(pick["eager"]))
    graph = slowest["graph"] if value(slowest["graph"]) is not None else None
    return _row("G11", what, target, ">=", eager=slowest["eager"], graph=graph, by=slowest["by"], note="slowest shape")


def _fastest_tile(entry: dict[str, Any]) -> dict[str, Any]:
    speeds = {n: t["speed"] for n, t in entry["tiles"].items() if "speed" in t and n != "linear"}
    if not speeds:
        raise Missing(
            "; ".join(f"{name}: {tile.get('reason')}" for name, tile in entry["tiles"].items() if name != "linear")
        )
    best = max(speeds, key=lambda name: value(speeds[name]["graph"]) or value(speeds[name]["eager"]))
    shape = entry["shape"]
    return {**speeds[best], "by": f"tile {best} at {shape['m']}x{shape['k']}x{shape['n']}"}


def _small(state: dict[str, Any]) -> bool:
    return bool(state.get("small"))


def _verdict(row: dict[str, Any], state: dict[str, Any]) -> str:
    values = [value(row["eager"]), value(row["graph"])]
    if values == [None, None]:
        return NOT_YET
    if row["reason"]:
        return "incomplete"
    device = str(state["parts"].get("facts", {}).get("data", {}).get("device", "CPU"))
    if _small(state) or device.startswith("CPU"):
        return "small run, no result"
    fits = [
        None if v is None else (v <= row["target"] if row["better"] == "<=" else v >= row["target"]) for v in values
    ]
    if None in fits:
        return "reached" if True in fits else "missed"
    return {(True, True): "reached", (False, False): "missed", (True, False): "eager only"}.get(
        tuple(fits), "graph only"
    )

"""The table that is printed last."""

from __future__ import annotations

from typing import Any

from gpu.goals import value


def table(state: dict[str, Any]) -> str:
    """goal / measured (eager, graph) / target / verdict, then what went wrong."""
    lines = [f"{'goal':<5}{'what':<44}{'eager':>20}{'graph':>20}  {'target':<9}verdict"]
    for row in state["goals"]:
        cells = f"{_cell(row['eager']):>20}{_cell(row['graph']):>20}"
        lines.append(f"{row['goal']:<5}{row['what']:<44}{cells}  {row['better']} {row['target']:<6g}{row['verdict']}")
        detail = "; ".join(filter(None, (row["by"], row["note"], row["reason"])))
        if detail:
            lines.append(f"{'':<5}{detail[:150]}")
    for name, part in state["parts"].items():
        if part["status"] not in ("done",):
            lines.append(f"part {name}: {part['status']} {part.get('error') or part.get('reason') or ''}".rstrip())
    lines += [f"left out: {rival}: {reason}" for rival, reason in state["excluded"].items()]
    ceilings = state["parts"].get("ceilings", {}).get("data", {})
    if "copy_gbs" in ceilings:
        device = state["parts"].get("facts", {}).get("data", {}).get("device")
        lines.append(f"{device}: product {ceilings['gemm_tflops']:.4g} TFLOP/s, copy {ceilings['copy_gbs']:.4g} GB/s")
    return "\n".join(lines)


def _cell(figure: dict[str, Any] | None) -> str:
    if value(figure) is None:
        return "-"
    return f"{figure['median']:.4g} [{figure['low']:.3g} {figure['high']:.3g}]"

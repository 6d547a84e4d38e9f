"""How is the outcome of a demo told? One table."""

from __future__ import annotations

from rich.table import Table

from orchestrator.demo.result import quantile
from orchestrator.demo.summary import Summary


def summary_table(summary: Summary) -> Table:
    """Requests, migrations by outcome, downtime, what was copied, errors, mismatches, drains."""
    table = Table(title="kvferry demo", title_justify="left", show_header=False, min_width=72)
    table.add_column("what", style="dim")
    table.add_column("value")
    table.add_row("requests", f"{summary.num_requests} ({summary.num_tokens:,} tokens in {summary.moved_s:.0f} s)")
    table.add_row("migrations by outcome", ", ".join(f"{name} {count}" for name, count in summary.outcomes) or "none")
    table.add_row("moved while running", str(summary.num_running_moves))
    gaps_ms = [hand_over.gap_s * 1e3 for hand_over in summary.hand_overs]
    steps = [hand_over.num_steps for hand_over in summary.hand_overs]
    table.add_row("downtime, p50 / p99", f"{_pair(gaps_ms)} ms = {_pair(steps)} decode steps")
    table.add_row("  stopped at the engines", f"{_pair([stopped_s * 1e3 for stopped_s in summary.stopped_s])} ms")
    table.add_row("copied", f"{summary.num_blocks:,} KV blocks, {summary.num_bytes / 2**20:,.1f} MiB")
    table.add_row("drains", "\n".join(_drains(summary)) or "none")
    table.add_row("client errors", _judged(len(summary.errors)))
    compared = summary.comparison
    table.add_row("compared with an undisturbed run", f"{compared.num_answers} answers, {compared.num_tokens:,} tokens")
    table.add_row("mismatched tokens", _judged(compared.mismatched_tokens))
    table.caption = (
        "downtime: the gap a client saw from the source's last token to the\n"
        "destination's first; decode step: median gap of that request around it"
    )
    table.caption_justify = "left"
    return table


def _pair(samples: list[float]) -> str:
    return f"{quantile(samples, 50):.1f} / {quantile(samples, 99):.1f}" if samples else "no sample"


def _judged(count: int) -> str:
    return f"[{'green' if count == 0 else 'bold red'}]{count}[/]"


def _drains(summary: Summary) -> list[str]:
    return [
        f"{drain.instance} ({drain.num_owned} requests) "
        + ("was not empty in time" if drain.drain_s is None else f"empty in {drain.drain_s:.2f} s")
        for drain in summary.drains
    ]

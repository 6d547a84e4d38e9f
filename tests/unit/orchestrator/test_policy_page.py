"""Are the numbers of the policies' page those of the policies? Its tables are read, and everything is computed anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from instance.messages import ALL_CACHED, LoadReport, RequestLoad
from migration.types import Epoch, InstanceId
from orchestrator.policy.attain import plan_attain
from orchestrator.policy.autoscale import AutoscaleParams
from orchestrator.policy.dispatch import Choice, DispatchBook, DispatchParams, demand_blocks
from orchestrator.policy.drain import DrainParams, plan_drain
from orchestrator.policy.load import freeness, running_blocks, virtual_usage_blocks
from orchestrator.policy.moves import (
    InstanceView,
    Move,
    after_joining,
    after_leaving,
    after_leaving_queue,
    blocks_wanted,
    freeness_steps,
)
from orchestrator.policy.rebalance import RebalanceParams, Resting, plan_rebalance
from orchestrator.policy.requeue import plan_requeue
from orchestrator.policy.standing import standing_of
from orchestrator.policy.targets import tightest_of
from orchestrator.state import CoreParams
from tests.support.reports import load_report, request_load
from tests.support.slow_dispatch import score
from tests.support.slow_prefixes import cached_blocks

SOURCE, UNSEEN_AT, UNSEEN_BLOCKS, AGE_S = InstanceId("instance-0"), InstanceId("instance-1"), 40, 0.125
CACHED_AT = InstanceId("instance-1")
REPORTED_S = 20.0
"""Long after the slow start of an instance."""
WAITS = "waits for (s)"
Table = list[dict[str, str]]


def tables_of(text: str) -> dict[str, Table]:
    """Every table by the heading it stands under; "heading 2" for the second one there."""
    found: dict[str, Table] = {}
    heading, columns = "", list[str]()
    name = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").strip()
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if not columns:
            columns = cells
            name = heading if heading not in found else f"{heading} 2"
            found[name] = []
        elif set(line) - set("|-"):
            found[name].append(dict(zip(columns, cells, strict=True)))
    return found


class Page:
    """The page's example, as values of the code."""

    def __init__(self, text: str) -> None:
        self.text, self.tables = text, tables_of(text)
        self.requests = tuple(map(self._request, self.tables["Requests"]))
        self.loads = {InstanceId(row["instance"]): self._load(row) for row in self.tables["Reports"]}

    def _request(self, row: dict[str, str]) -> RequestLoad:
        tokens = int(row["prompt tokens"]), int(row["output tokens"])
        priority, blocks = int(row["priority"]), int(row["blocks"])
        return RequestLoad(row["request"], "", "running", priority, *tokens, 9999, blocks, 1.0, True)

    def _load(self, row: dict[str, str]) -> LoadReport:
        load = load_report(
            row["instance"],
            total_blocks=int(row["total"]),
            free_blocks=int(row["free"]),
            reserved_blocks=int(row["reserved"]),
            num_running=int(row["running"]),
            head_of_line_blocks=int(row["head of line"]),
            num_waiting=2 if row["head of line"] != "0" else 0,
        )
        return msgspec.structs.replace(load, waiting_blocks=int(row["waiting"]))

    def views(self, draining: InstanceId | None = None) -> tuple[InstanceView, ...]:
        return tuple(
            InstanceView(
                name,
                msgspec.structs.replace(load, state="draining" if name == draining else "serving"),
                self.requests if name == SOURCE else (),
                name == draining,
                CoreParams().max_migrations_out,
                CoreParams().max_migrations_in,
                AGE_S,
            )
            for name, load in self.loads.items()
        )


@pytest.fixture
def page(repo_root: Path) -> Page:
    return Page((repo_root / "orchestrator" / "policy" / "README.md").read_text(encoding="utf-8"))


def test_the_example_fits_together(page: Page) -> None:
    assert sum(request.num_blocks for request in page.requests) == running_blocks(page.loads[SOURCE])
    assert len(page.requests) == page.loads[SOURCE].num_running
    for request in page.requests:
        tokens = request.num_prompt_tokens + request.num_output_tokens
        assert request.num_blocks == -(-tokens // page.loads[SOURCE].block_size)


def test_the_parameters_are_those_of_the_code(page: Page) -> None:
    read = (DispatchParams, RebalanceParams, DrainParams, AutoscaleParams, CoreParams)
    kinds = {kind.__name__: kind() for kind in read}
    for row in page.tables["Parameters"]:
        assert row["default"] == str(getattr(kinds[row["of"]], row["parameter"])), row
    told = {(row["of"], row["parameter"]) for row in page.tables["Parameters"]}
    # `load` is no number: the levels' headroom, which the page tells with priorities.
    names = {field.name for field in dataclasses.fields(RebalanceParams)} - {"load"}
    of_rebalance = {("RebalanceParams", name) for name in names}
    assert of_rebalance <= told, "each parameter of the rule is on the page"


def test_every_policy_module_is_on_the_page(page: Page, repo_root: Path) -> None:
    named = " ".join(row["code"] for row in page.tables["policy"])
    modules = {path.name for path in (repo_root / "orchestrator" / "policy").glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if name not in named} == set()


def test_the_figures_of_load(page: Page) -> None:
    rows = {InstanceId(row["instance"]): row for row in page.tables["Figures of load"]}
    assert rows.keys() == page.loads.keys()
    for name, load in page.loads.items():
        assert rows[name] == {
            "instance": name,
            "running blocks": str(running_blocks(load)),
            "virtual usage": str(virtual_usage_blocks(load)),
            "freeness": f"{freeness(load):.1f}",
            "steps left": f"{freeness_steps(load):.0f}",
        }


def test_the_dispatches(page: Page) -> None:
    assert len(page.tables["Dispatch of a request"]) == 3
    for row in page.tables["Dispatch of a request"]:
        book = DispatchBook()
        book.set_members([(name, Epoch(1)) for name in page.loads])
        for reported_s in (0.0, REPORTED_S):
            for load in page.loads.values():
                assert book.on_report(load, reported_s)
        num_cached = int(row[f"cached at {CACHED_AT}"])
        prompt = range(int(row["prompt tokens"]) // 16)
        book.on_cached(cached_blocks(CACHED_AT, ALL_CACHED, num_cached, prompt[:num_cached]))
        book.on_dispatched(UNSEEN_AT, UNSEEN_BLOCKS, REPORTED_S)
        now_s = REPORTED_S + AGE_S
        demand = demand_blocks(int(row["prompt tokens"]), 16)
        assert row["demand"] == str(demand)
        for seen in book.view(now_s).instances:
            saved = num_cached if seen.instance == CACHED_AT else 0
            assert row[f"score of {seen.instance}"] == f"{score(seen, demand, DispatchParams(), 1, saved):.1f}"
        choice = book.choose(demand, now_s, prefix=prompt)
        assert isinstance(choice, Choice) and choice.instance == row["chosen"]


def after(page: Page, request: RequestLoad, source: LoadReport, destination: LoadReport) -> dict[str, str]:
    """What a move of it makes of both, as the page's tables say it."""
    size, margin = request.num_blocks, RebalanceParams().margin_steps
    left = freeness_steps(after_leaving(source, request.priority, size))
    joined = freeness_steps(after_joining(destination, request.priority, size))
    pays = (
        size <= destination.free_blocks
        and freeness_steps(destination) - freeness_steps(source) > margin
        and joined - left > margin
        and left > freeness_steps(source)
    )
    return {
        "request": request.request_id,
        "tokens": str(request.num_prompt_tokens + request.num_output_tokens),
        "source after": f"{left:.0f}",
        "destination after": f"{joined:.0f}",
        "difference": f"{joined - left:.0f}",
        "pays": "yes" if pays else "no",
    }


def as_rows(moves: tuple[Move, ...]) -> Table:
    return [
        {"request": move.request_id, "source": move.source, "destination": move.destination, "reason": move.reason}
        for move in moves
    ]


def test_the_move_that_is_proposed_and_why_it_is_this_one(page: Page) -> None:
    moves = plan_rebalance(page.views(), Resting(), RebalanceParams())
    assert page.tables["The move that is proposed 2"] == as_rows(moves)
    looked_at = page.tables["The move that is proposed"]
    ordered = sorted(page.requests, key=lambda item: (-item.priority, item.num_prompt_tokens + item.num_output_tokens))
    assert looked_at == [
        after(page, request, page.loads[SOURCE], page.loads[moves[0].destination]) for request in ordered
    ]
    assert next(row["request"] for row in looked_at if row["pays"] == "yes") == moves[0].request_id


def test_why_there_is_no_second_move(page: Page) -> None:
    (move,) = plan_rebalance(page.views(), Resting(), RebalanceParams())
    source = after_leaving(page.loads[SOURCE], move.priority, move.num_blocks)
    loads = page.loads | {move.destination: after_joining(page.loads[move.destination], move.priority, move.num_blocks)}
    requests = {request.request_id: request for request in page.requests if request.request_id != move.request_id}
    rows = page.tables["Why there is no second move"]
    assert {(row["request"], row["destination"]) for row in rows} == {
        (request, name) for request in requests for name in loads if name != SOURCE
    }
    for row in rows:
        expected = after(page, requests[row["request"]], source, loads[InstanceId(row["destination"])])
        assert row == {name: value for name, value in expected.items() if name in row} | {
            "destination": row["destination"]
        }
        assert row["pays"] == "no"


def test_the_move_of_one_that_waits(page: Page) -> None:
    rows = page.tables["If the two that wait may move"]
    queue = [
        RequestLoad(row["request"], "", "waiting", 0, int(row["prompt tokens"]), 0, 9, 0, float(row[WAITS]), True)
        for row in rows
    ]
    assert sum(blocks_wanted(one, 16) for one in queue) == page.loads[SOURCE].waiting_blocks
    for row, one in zip(rows, queue, strict=True):
        wanted = blocks_wanted(one, 16)
        assert row["blocks wanted"] == str(wanted)
        for name in ("instance-1", "instance-2"):
            left = freeness_steps(after_joining(page.loads[InstanceId(name)], one.priority, wanted))
            assert row[f"steps after at {name}"] == f"{left:.0f}"
    views = tuple(msgspec.structs.replace(view, requests=(*view.requests, *queue)) for view in page.views()[:1])
    moves = plan_requeue((*views, *page.views()[1:]), Resting(), RebalanceParams())
    assert page.tables["If the two that wait may move 2"] == as_rows(moves)
    left_here = after_leaving_queue(page.loads[SOURCE], queue[0], queue[1:])
    assert f"(40 - 30) * 16 / 5 = {freeness_steps(left_here):.0f} steps left" in page.text
    assert plan_requeue(page.views(), Resting(), RebalanceParams()) == (), "elsewhere on the page they stay"


def test_the_drain(page: Page) -> None:
    moves = plan_drain(page.views(draining=SOURCE), frozenset(), DrainParams())
    assert page.tables["If instance-0 were draining"] == as_rows(moves)


def test_the_move_for_the_sake_of_a_target(page: Page) -> None:
    speed = (0.010, 0.0, 0.0, 0.0005, 1e-6, 0.0)
    rows = page.tables["If requests had targets"]
    views, f = [], msgspec.structs.replace(request_load("f", 50), tpot_s=0.024)
    for row in rows:
        num, tokens, strictest = int(row["running"]), int(row["context tokens"]), row["strictest target there"]
        wants = f if row["TPOT with f"] == "" else request_load("g", 50)
        if strictest != "none":
            wants = msgspec.structs.replace(wants, tpot_s=float(strictest) / 1e3)
        others = tuple(request_load(f"{row['instance']}-{at}", 1, movable=False) for at in range(num - 1))
        load = load_report(row["instance"], total_blocks=4000, free_blocks=4000 - tokens // 16, num_running=num)
        requests = (wants, *others)
        view = InstanceView(InstanceId(row["instance"]), load, requests, False, 2, 2, AGE_S)
        views.append(msgspec.structs.replace(view, tightest=tightest_of(requests)))
        standing = standing_of(load, speed)
        assert row["TPOT"] == f"{standing.tpot_s() * 1e3:.1f}"
        if row["TPOT with f"]:
            assert row["TPOT with f"] == f"{standing.with_running(800).tpot_s() * 1e3:.1f}"
    steps = {view.instance: freeness_steps(view.load) for view in views}
    assert max(steps, key=lambda name: steps[name]) == "instance-4", "the freest is asked first"
    moves = plan_attain(tuple(views), dict.fromkeys(steps, speed), Resting(), RebalanceParams())
    assert page.tables["If requests had targets 2"] == as_rows(moves)


def test_a_number_that_is_wrong_would_be_noticed(repo_root: Path) -> None:
    """The control: the example with one block more free does not give the page's figures."""
    text = (repo_root / "orchestrator" / "policy" / "README.md").read_text(encoding="utf-8")
    wrong = Page(text.replace("| instance-0 | 1000 | 40 |", "| instance-0 | 1000 | 41 |"))
    for check in (
        test_the_figures_of_load,
        test_the_move_of_one_that_waits,
        test_the_move_that_is_proposed_and_why_it_is_this_one,
    ):
        with pytest.raises(AssertionError):
            check(wrong)
    for old, new in (("| 18.0 | 19.3 | 18.5 |", "| 18.0 | 19.3 | 19.5 |"), ("| 20 | 8000 |", "| 20 | 8200 |")):
        with pytest.raises(AssertionError):
            test_the_move_for_the_sake_of_a_target(Page(text.replace(old, new)))

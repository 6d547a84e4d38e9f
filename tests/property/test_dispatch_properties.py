"""What must hold for every cluster view."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.messages import ALL_CACHED, LoadReport
from migration.types import Epoch, InstanceId
from orchestrator.policy.dispatch import Choice, DispatchBook, DispatchParams, NoChoice, Rule
from orchestrator.policy.load import LoadParams
from tests.support.idle_report import report
from tests.support.slow_dispatch import choose_instance
from tests.support.slow_prefixes import SlowIndex, cached_blocks

PARAMS = DispatchParams()
NUM_VIEWS = 10_000
WITH_HEADROOM = DispatchParams(load=LoadParams(headroom_blocks=((-1, 20), (3, 7))), slow_start_s=0.0, prefix_weight=2.5)


@st.composite
def reports(draw: st.DrawFn, name: str = "a") -> LoadReport:
    total = draw(st.integers(1, 200))
    free = draw(st.integers(0, total))
    head = draw(st.integers(0, 50))
    return LoadReport(
        instance=name,
        epoch=1,
        step=draw(st.integers(0, 9)),
        state=draw(st.sampled_from(["serving", "serving", "draining", "starting", "stopped"])),
        block_size=16,
        total_blocks=total,
        free_blocks=free,
        reserved_blocks=draw(st.integers(0, total - free)),
        num_running=draw(st.integers(0, 20)),
        num_waiting=0,
        running_by_priority=tuple(draw(st.dictionaries(st.integers(-2, 4), st.integers(0, 5), max_size=3)).items()),
        head_of_line_blocks=head,
        waiting_blocks=head + draw(st.integers(0, 50)),
        step_time_s=0.0,
        num_preemptions=0,
        migrations_in=0,
        migrations_out=0,
    )


def book_of(*all_reports: LoadReport) -> DispatchBook:
    book = DispatchBook()
    book.set_members([(InstanceId(one.instance), Epoch(one.epoch)) for one in all_reports])
    for one in all_reports:
        book.on_report(one, 0.0)
    return book


@settings(deadline=None)
@given(st.data())
def test_only_serving_fresh_instances_that_are_not_excluded_are_chosen(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from("abcdef"), unique=True))
    book = book_of(*[data.draw(reports(name)) for name in names])
    excluded = {InstanceId(name) for name in data.draw(st.sets(st.sampled_from("abcdef")))}
    now_s = data.draw(st.floats(0.0, 6.0))
    view = book.view(now_s)
    choice = book.choose(data.draw(st.integers(0, 300)), now_s, excluded)
    eligible = {
        seen.instance
        for seen in view.instances
        if seen.report.state == "serving" and seen.report_age_s <= PARAMS.max_report_age_s
    } - excluded
    if isinstance(choice, Choice):
        assert choice.instance in eligible
    else:
        assert not eligible
        assert choice.reason


@settings(deadline=None)
@given(st.data())
def test_the_same_view_gives_the_same_plan_in_whatever_order_it_came(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from("abcdef"), unique=True, min_size=1))
    all_reports = [data.draw(reports(name)) for name in names]
    shuffled = data.draw(st.permutations(all_reports))
    demand = data.draw(st.integers(0, 300))
    first = book_of(*all_reports).choose(demand, 0.0)
    assert first == book_of(*shuffled).choose(demand, 0.0)


@settings(deadline=None)
@given(reports(), st.integers(1, 5), st.integers(1, 60), st.integers(0, 80))
def test_a_burst_of_equal_requests_spreads_within_one_over_equal_instances(
    like: LoadReport, num_instances: int, num_requests: int, demand: int
) -> None:
    equals = [
        LoadReport(**{field: getattr(like, field) for field in like.__struct_fields__} | {"instance": f"i{n}"})
        for n in range(num_instances)
    ]
    book = book_of(*equals)
    counts = Counter({InstanceId(one.instance): 0 for one in equals})
    for _ in range(num_requests):
        choice = book.choose(demand, 0.0)
        if like.state != "serving":
            assert not isinstance(choice, Choice)
            return
        assert isinstance(choice, Choice)
        book.on_dispatched(choice.instance, demand, 0.0)
        book.check_integrity()
        counts[choice.instance] += 1
    assert max(counts.values()) - min(counts.values()) <= 1


@settings(deadline=None)
@given(reports(), st.integers(2, 10), st.integers(1, 80))
def test_without_the_accounting_a_burst_herds_on_one_instance(like: LoadReport, num_requests: int, demand: int) -> None:
    """The negative control of the spread."""
    twin = LoadReport(**{field: getattr(like, field) for field in like.__struct_fields__} | {"instance": "b"})
    book = book_of(like, twin)
    choices = {book.choose(demand, 0.0) for _ in range(num_requests)}
    assert len(choices) == 1


@given(st.data())
def test_gateways_that_see_the_same_fill_a_fleet_evenly(data: st.DataObject) -> None:
    """However unequal it was: what all of them send between two reports is what one that knew everything would send,
    give or take one request a gateway, and one that a tie decided."""
    empty, full = data.draw(st.integers(20, 60)), data.draw(st.integers(0, 20))
    num_gateways, num_rounds = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 12))
    sent = send_rounds(num_gateways, num_rounds, empty, full, told=num_gateways)
    alone = send_rounds(1, num_gateways * num_rounds, empty, full, told=1)
    assert abs(sent["empty"] - alone["empty"]) <= num_gateways + 1


def test_control_gateways_that_each_believe_to_be_alone_herd() -> None:
    assert send_rounds(6, 10, 30, 20, told=1)["empty"] == 60
    assert send_rounds(1, 60, 30, 20, told=1)["empty"] < 40


def send_rounds(num_gateways: int, num_rounds: int, empty: int, full: int, told: int) -> Counter[str]:
    """How often each instance is chosen when `num_gateways` choose in turns, without a report between."""
    reports = [
        report(name, free_blocks=free * 10, total_blocks=600, num_running=50)
        for name, free in (("empty", empty), ("full", full))
    ]
    books = [DispatchBook(gateway=f"gateway-{number}") for number in range(num_gateways)]
    for book in books:
        book.set_members([(InstanceId(one.instance), Epoch(one.epoch)) for one in reports], told)
        for one in reports:
            book.on_report(one, 0.0)
    counts: Counter[str] = Counter()
    for _ in range(num_rounds):
        for book in books:
            choice = book.choose(5, 0.0)
            assert isinstance(choice, Choice)
            book.on_dispatched(choice.instance, 5, 0.0)
            counts[choice.instance] += 1
    return counts


@given(st.lists(st.sampled_from("abcd"), unique=True, min_size=1), st.integers(1, 12))
def test_round_robin_takes_turns_whatever_the_load(names: list[str], num_choices: int) -> None:
    book = DispatchBook(DispatchParams(rule=Rule.ROUND_ROBIN))
    book.set_members([(InstanceId(name), Epoch(1)) for name in names])
    for number, name in enumerate(names):
        book.on_report(report(name, free_blocks=100 - 20 * number), 0.0)
    turns = [choice.instance for _ in range(num_choices) if isinstance(choice := book.choose(5, 0.0), Choice)]
    assert turns == [InstanceId(sorted(names)[turn % len(names)]) for turn in range(num_choices)]


def test_it_chooses_what_the_slow_version_does_in_ten_thousand_views() -> None:
    """Members come, go and restart, report, get requests, refuse them, say what they have cached; time passes. After
    each of these both agree. Not hypothesis: it takes a minute to draw so many."""
    rng = random.Random(20261121)
    num_choices = num_affine = 0
    for params in (PARAMS, WITH_HEADROOM):
        book = DispatchBook(params, max_unseen=4, unseen_for_s=5.0)
        index = SlowIndex()
        epochs: dict[InstanceId, int] = {}
        now_s = 0.0
        for _ in range(NUM_VIEWS // 2):
            name = InstanceId(rng.choice("abcdef"))
            match rng.choices(["report", "dispatch", "refuse", "wait", "cached", "members"], [8, 8, 2, 2, 2, 1])[0]:
                case "report":
                    book.on_report(random_report(rng, name, epochs.get(name, 0)), now_s)
                case "dispatch" if name in epochs:
                    book.on_dispatched(name, rng.randint(0, 60), now_s, rng.randint(-2, 5))
                case "refuse":
                    book.on_not_taken(name, Epoch(epochs.get(name, 0)), rng.randint(1, 40))
                case "cached":
                    cached = rng.sample(range(60), rng.randint(0, 50))
                    message = cached_blocks(name, ALL_CACHED, 9, cached, epoch=epochs.get(name, 0))
                    book.on_cached(message)
                    index.on_cached(message)
                case "members":
                    epochs = {known: epoch for known, epoch in epochs.items() if rng.random() < 0.9}
                    epochs[name] = epochs.get(name, 0) + rng.randint(0, 1)
                    num_gateways = rng.choice([None, 1, 3])
                    book.set_members([(known, Epoch(epoch)) for known, epoch in epochs.items()], num_gateways)
                    index.set_members(list(epochs.items()))
                case _:
                    now_s += rng.choice([0.1, 1.0, 2.9, 3.0, 3.1, 5.1])
            demand, priority = rng.randint(0, 250), rng.randint(-2, 5)
            excluded = {InstanceId(other) for other in rng.sample("abcdefg", rng.choice([0, 0, 0, 1, 3]))}
            prefix = tuple(rng.sample(range(60), rng.choice([0, min(demand, 40)])))
            saved = {known: count for known in epochs if (count := index.saved_blocks(known, prefix))}
            held = {InstanceId(known): len(hashes) for known, hashes in index.hashes.items()}
            fast, slow = (
                book.choose(demand, now_s, excluded, prefix=prefix, priority=priority),
                choose_instance(book.view(now_s), demand, params, excluded, saved, held, priority=priority),
            )
            if isinstance(slow, NoChoice):
                assert isinstance(fast, NoChoice) and fast.any_serving == slow.any_serving
            else:
                assert fast == slow
                num_choices += 1
                num_affine += slow.instance in saved
            book.check_integrity()
    assert num_choices > NUM_VIEWS // 2, "most views have somebody to choose"
    assert num_affine > NUM_VIEWS // 20, "and many have something of the prompt where it goes"


def random_report(rng: random.Random, name: str, epoch: int) -> LoadReport:
    total = rng.randint(1, 200)
    free = rng.randint(0, total)
    head = rng.choice([0, 0, rng.randint(1, 50)])
    return report(
        name,
        epoch=epoch,
        step=rng.randint(0, 9) if rng.random() < 0.1 else 10,
        state=rng.choice(["serving"] * 9 + ["draining"]),
        total_blocks=total,
        free_blocks=free,
        reserved_blocks=rng.randint(0, total - free),
        num_running=rng.randint(0, 20),
        step_time_s=rng.choice([0.0, 0.02, 0.5]),
        running_by_priority=tuple((level, rng.randint(0, 3)) for level in rng.sample(range(-2, 5), 2)),
        head_of_line_blocks=head,
        waiting_blocks=head + rng.randint(0, 50),
        submits_seen=rng.randint(0, 60),
    )


def test_control_columns_that_are_not_kept_are_noticed() -> None:
    book = book_of(report("a"), report("b"))
    book._columns.batch[0] += 1
    with pytest.raises(AssertionError, match="batch is stale"):
        book.check_integrity()

"""What must hold for every cluster view."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from instance.messages import LoadReport
from migration.types import Epoch, InstanceId
from orchestrator.policy.dispatch import Choice, DispatchBook, DispatchParams, choose_instance

PARAMS = DispatchParams()


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
        running_by_priority=(),
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


@given(st.data())
def test_only_serving_fresh_instances_that_are_not_excluded_are_chosen(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from("abcdef"), unique=True))
    book = book_of(*[data.draw(reports(name)) for name in names])
    excluded = {InstanceId(name) for name in data.draw(st.sets(st.sampled_from("abcdef")))}
    view = book.view(data.draw(st.floats(0.0, 6.0)))
    choice = choose_instance(view, data.draw(st.integers(0, 300)), PARAMS, excluded)
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


@given(st.data())
def test_the_same_view_gives_the_same_plan_in_whatever_order_it_came(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from("abcdef"), unique=True, min_size=1))
    all_reports = [data.draw(reports(name)) for name in names]
    shuffled = data.draw(st.permutations(all_reports))
    demand = data.draw(st.integers(0, 300))
    first = choose_instance(book_of(*all_reports).view(0.0), demand, PARAMS)
    assert first == choose_instance(book_of(*shuffled).view(0.0), demand, PARAMS)


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
        choice = choose_instance(book.view(0.0), demand, PARAMS)
        if like.state != "serving":
            assert not isinstance(choice, Choice)
            return
        assert isinstance(choice, Choice)
        book.on_dispatched(choice.instance, demand, 0.0)
        book.check_integrity()
        counts[choice.instance] += 1
    assert max(counts.values()) - min(counts.values()) <= 1


@given(reports(), st.integers(2, 10), st.integers(1, 80))
def test_without_the_accounting_a_burst_herds_on_one_instance(like: LoadReport, num_requests: int, demand: int) -> None:
    """The negative control of the spread."""
    twin = LoadReport(**{field: getattr(like, field) for field in like.__struct_fields__} | {"instance": "b"})
    view = book_of(like, twin).view(0.0)
    choices = {choose_instance(view, demand, PARAMS) for _ in range(num_requests)}
    assert len(choices) == 1

"""Does each named workload ask what its source has, at the rate wanted, the same with the same seed?"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean

import numpy as np
import pytest

from orchestrator.errors import ConfigError
from orchestrator.sim.arrivals import PREFIX_BLOCK_TOKENS, Arrival
from orchestrator.sim.asked import Asked, Wanted, paced
from orchestrator.sim.catalogue import SOURCES, workload_named
from orchestrator.sim.servegen import read_windows, stream
from orchestrator.sim.traces import endless, read_trace, spread

NUM_ROWS = 200
LONGEST = 8_192
PERCENTILES = (1, 5, 10, 25, 50, 75, 80, 90, 95, 99)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))


def csv_of(header: str, rows: list[tuple[object, ...]]) -> str:
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of small tables and traces, laid out as the real ones are; a row is known by its prompt's length."""
    rng = Random(7)
    lengths = [(100 + row, 10) for row in range(NUM_ROWS)]
    for name in ("sharegpt_8k_llama2", "arxiv_summarization_llama2"):
        write(tmp_path / "lengths" / f"{name}.csv.gz", csv_of("input_tokens,output_tokens", list(lengths)))
    times_s = sorted(rng.uniform(50.0, 150.0) ** 2 for _ in lengths)  # not from zero, and more and more often
    trace = [(at_s, *row) for at_s, row in zip(times_s, lengths, strict=True)]
    for name in ("azure2023_code", "azure2023_conv"):
        write(tmp_path / "traces" / f"{name}.csv.gz", csv_of("arrival_s,input_tokens,output_tokens", list(trace)))
    mooncake = [
        {"arrival_s": 3 * (row // 10) - 0.001 * (row >= 10), "input_tokens": 600 + row, "output_tokens": 5}
        | {"hash_ids": [row % 2, 10 + row]}
        for row in range(NUM_ROWS)
    ]
    write(tmp_path / "traces" / "mooncake_conversation.jsonl.gz", "".join(f"{json.dumps(row)}\n" for row in mooncake))
    columns = [
        f"{which}_{what}" for which in ("input", "output") for what in ("mean", *map("p{}".format, PERCENTILES), "max")
    ]
    for model in ("m-small", "m-large", "deepseek-r1"):
        clients = [
            (at_s, client, 1.0 + client, 1.5, ("Gamma", "Weibull")[client % 2], 1, 1)
            for at_s in range(0, 43_200, 600)
            for client in range(7)
        ]
        table = [
            (
                at_s,
                client,
                *[sign for most in ((at_s // 21_600 + 1) * 1_000, 50) for sign in (most / 2, *_evenly(most))],
            )
            for at_s in (0, 21_600)
            for client in range(1, 7)  # the first one's lengths are not there
        ]
        of_model = tmp_path / "forecast"
        header = "ts_s,client,rate_rps,iat_cv,pattern,p1_shape,p2_scale"
        write(of_model / f"servegen_{model}_clients_d0.csv.gz", csv_of(header, list(clients)))
        write(of_model / f"servegen_{model}_lengths_d0.csv.gz", csv_of(f"ts_s,client,{','.join(columns)}", list(table)))
    return tmp_path


def _evenly(most: int) -> list[float]:
    """Percentiles and the longest of lengths drawn uniformly up to that."""
    return [most * share / 100 for share in (*PERCENTILES, 100)]


def day(
    folder: Path | None, name: str, seed: int = 1, rate: float = 4.0, count: int = 150, **more: float
) -> list[Arrival]:
    wanted = Wanted(rate, count, longest=LONGEST, coefficient_of_variation=more.get("cv", 1.0))
    return workload_named(name, Random(seed), wanted, folder).arrivals


# ---------------------------------------------------------------------- all of them
@pytest.mark.parametrize("name", ["M-M", *SOURCES])
def test_a_day_follows_from_its_seed_and_comes_at_its_rate(folder: Path, name: str) -> None:
    found = day(folder, name, count=2_000)
    assert found == day(folder, name, count=2_000) != day(folder, name, seed=2, count=2_000)
    assert [one.index for one in found] == list(range(2_000))
    times_s = [one.at_s for one in found]
    assert times_s == sorted(times_s) and times_s[-1] == pytest.approx(2_000 / 4.0, rel=0.1)
    assert all(1 <= one.num_answer <= one.max_tokens for one in found)
    assert len({one.num_prompt + one.max_tokens for one in found}) == 1, (
        "what a client asks for says how long its answer is"
    )
    if name not in {"servegen-m-small", "servegen-m-large", "servegen-deepseek-r1"}:  # windows come at their own pace
        twice = day(folder, name, rate=8.0, count=2_000)
        assert [one.at_s for one in twice] == pytest.approx([at_s / 2 for at_s in times_s])


@pytest.mark.parametrize("name", list(SOURCES))
def test_halves_have_nothing_in_common(folder: Path, name: str) -> None:
    def prompts(half: str) -> set[int]:
        return {one.num_prompt for seed in range(5) for one in day(folder, f"{name}:{half}", seed, count=500)}

    train, test = prompts("train"), prompts("test")
    if name.startswith("servegen"):
        assert max(train) <= 1_000 < max(test) <= 2_000, "the second half's lengths are twice those of the first"
        return
    assert not train & test and max(train) < min(test)
    everything = {one.num_prompt for one in day(folder, name, count=3_000)}
    assert train | test == everything and len(everything) == NUM_ROWS


@pytest.mark.parametrize("name", ["M-M", *SOURCES])
def test_the_real_files_give_every_workload(data_dir: Path, name: str) -> None:
    found = day(data_dir, name, rate=6.0, count=1_000)
    assert len(found) == 1_000
    assert found[-1].at_s == pytest.approx(1_000 / 6.0, rel=0.1)
    assert found == day(data_dir, name, rate=6.0, count=1_000) != day(data_dir, name, seed=2, rate=6.0, count=1_000)
    assert max(one.num_prompt + one.num_answer for one in found) <= LONGEST


def test_what_an_engine_cannot_hold_is_left_out_or_cut_short_and_counted(folder: Path) -> None:
    wanted = Wanted(4.0, NUM_ROWS // 2, longest=200)
    for name in ("azure-conv", "sharegpt"):
        found = workload_named(name, Random(3), wanted, folder)
        assert (
            max(one.num_prompt + one.max_tokens for one in found.arrivals)
            == 200
            > max(one.num_prompt for one in found.arrivals)
        )
        cut = [one for one in found.arrivals if one.num_answer < 10]
        assert len(cut) == found.num_cut_short > 0
        assert {one.num_prompt + one.num_answer for one in cut} == {200}
        assert found.num_left_out > 50
        assert found.arrivals[-1].at_s == pytest.approx(wanted.count / 4.0, rel=0.3), "the rate is that of those sent"
    assert workload_named("azure-conv", Random(3), Wanted(4.0, 9, LONGEST), folder).num_left_out == 0
    with pytest.raises(ConfigError, match="hardly any prompt of this workload is shorter than 50 tokens"):
        workload_named("azure-conv", Random(3), Wanted(4.0, 9, longest=50), folder)


# ---------------------------------------------------------------------- tables and traces
def test_a_table_has_its_lengths_at_generated_times(data_dir: Path) -> None:
    found = day(data_dir, "sharegpt", count=20_000, rate=10.0, cv=3.0)
    gaps_s = np.diff([one.at_s for one in found])
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(3.0, rel=0.1)
    assert gaps_s.mean() == pytest.approx(0.1, rel=0.1)
    assert fmean(one.num_prompt for one in found) == pytest.approx(2_347, rel=0.03)  # of all its rows
    assert fmean(one.num_answer for one in found) == pytest.approx(436, rel=0.03)


def test_a_trace_keeps_its_gaps_in_proportion_and_begins_where_the_seed_says(folder: Path) -> None:
    trace = read_trace(folder / "traces" / "azure2023_conv.csv.gz")
    found = day(folder, "azure-conv", seed=5, count=NUM_ROWS - 1)
    start = found[0].num_prompt - 100
    assert start != day(folder, "azure-conv", seed=6)[0].num_prompt - 100
    order = [(start + index) % NUM_ROWS for index in range(NUM_ROWS - 1)]
    assert [one.num_prompt for one in found] == [trace[row].num_prompt for row in order]
    pairs = [
        (found[index + 1].at_s - found[index].at_s, row) for index, row in enumerate(order[:-1]) if row + 1 < NUM_ROWS
    ]
    factors = [gap_s / (trace[row + 1].at_s - trace[row].at_s) for gap_s, row in pairs]
    assert factors == pytest.approx([factors[0]] * len(factors))
    assert found[0].at_s == 0.0


def test_a_trace_that_ends_begins_anew_and_shares_prefixes_within_a_round_only(folder: Path) -> None:
    found = day(folder, "mooncake", count=3 * NUM_ROWS)
    rounds = [found[index : index + NUM_ROWS] for index in range(0, len(found), NUM_ROWS)]
    assert [one.num_prompt for one in rounds[0]] == [one.num_prompt for one in rounds[1]]
    ids = [{each for one in requests for each in one.prefix_ids} for requests in rounds]
    assert len(set.union(*ids)) == sum(map(len, ids)) == 3 * (NUM_ROWS + 2)
    for requests in rounds:
        assert set(Counter(one.prefix_ids[0] for one in requests).values()) == {NUM_ROWS // 2}
    lap_s = [rounds[number + 1][0].at_s - rounds[number][0].at_s for number in range(2)]
    assert lap_s == pytest.approx([NUM_ROWS / 4.0] * 2, rel=0.02)


def test_prefixes_of_mooncake_are_one_id_for_each_block_of_the_prompt(data_dir: Path) -> None:
    found = day(data_dir, "mooncake", count=2_000)
    assert all(len(one.prefix_ids) == -(-one.num_prompt // PREFIX_BLOCK_TOKENS) for one in found)
    assert Counter(one.prefix_ids[0] for one in found).most_common(1)[0][1] > 200, "most begin alike"
    assert not any(one.prefix_ids for one in day(data_dir, "azure-code", count=50))


def test_requests_of_a_tick_are_spread_over_it_in_their_order() -> None:
    rng = Random(4)
    ticks = sorted(rng.randrange(500) for _ in range(5_000))
    found = spread([Asked(3.0 * tick - 0.001 * (tick > 0), row, 1) for row, tick in enumerate(ticks)], rng, 3.0)
    assert [one.num_prompt for one in found] == list(range(5_000))
    assert [int(one.at_s // 3) for one in found] == ticks
    assert all(one.at_s <= later.at_s for one, later in pairwise(found))
    within = [one.at_s % 3 / 3 for one in found]
    assert np.percentile(within, [10, 50, 90]) == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
    gaps_s = np.diff([one.at_s for one in found])
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, abs=0.06), "like Poisson's, neither even nor in bursts"


def test_as_many_requests_of_mooncake_come_a_tick_as_with_poisson(data_dir: Path) -> None:
    """Which is why they are spread at random."""
    trace = read_trace(data_dir / "traces" / "mooncake_conversation.jsonl.gz")
    a_tick = np.bincount([round(one.at_s / 3) for one in trace])
    assert a_tick.var() / a_tick.mean() == pytest.approx(1.0, abs=0.2)


def test_ticks_are_spread_in_mooncake_and_nowhere_else(folder: Path) -> None:
    found = day(folder, "mooncake", count=NUM_ROWS)
    assert len({one.at_s for one in found}) == NUM_ROWS
    text = gzip.decompress((folder / "traces" / "mooncake_conversation.jsonl.gz").read_bytes())
    (folder / "my.jsonl").write_bytes(text)
    assert len({one.at_s for one in day(folder, str(folder / "my.jsonl"), count=NUM_ROWS)}) <= NUM_ROWS / 10 + 1


def test_the_request_after_the_last_gives_the_pace_and_is_not_counted() -> None:
    trace = [Asked(float(at_s), 90 + 5 * (at_s == 4), 1 + 9 * (at_s == 4)) for at_s in range(5)]
    found = paced(trace, Wanted(2.0, 4, longest=100))
    assert [one.at_s for one in found.arrivals] == [0.0, 0.5, 1.0, 1.5]
    assert found.num_cut_short == 0


def test_a_part_of_a_trace_has_its_own_rate_but_a_day_the_wanted_one(data_dir: Path) -> None:
    trace = read_trace(data_dir / "traces" / "azure2023_code.csv.gz")
    parts_s = [trace[row + 1_000].at_s - trace[row].at_s for row in range(0, 6_000, 100)]
    assert max(parts_s) > 2 * min(parts_s)
    for seed in range(5):
        found = paced(endless(trace, Random(seed).randrange(len(trace))), Wanted(4.0, 1_000, LONGEST)).arrivals
        assert found[-1].at_s == pytest.approx(250, rel=0.02), "but for the last gap"


def test_requests_of_one_instant_have_no_pace() -> None:
    with pytest.raises(ConfigError, match="come at one instant"):
        paced(endless([Asked(5.0, 1, 1)] * 9, 0), Wanted(1.0, 4, LONGEST))


# ---------------------------------------------------------------------- ServeGen's clients
def test_clients_send_by_their_rates_and_those_without_lengths_send_nothing(folder: Path) -> None:
    found = day(folder, "servegen-m-small", rate=20.0, count=20_000)
    kinds = Counter(one.kind for one in found)
    assert kinds.keys() == {"client 3", "client 4", "client 5", "client 6", "other clients"}
    shares = {f"client {client}": (1 + client) / 27 for client in range(3, 7)} | {"other clients": 5 / 27}
    assert {kind: number / 20_000 for kind, number in kinds.items()} == pytest.approx(shares, abs=0.02)
    assert fmean(one.num_answer for one in found) == pytest.approx(25, rel=0.05)


def test_a_day_of_clients_begins_where_the_seed_says(folder: Path) -> None:
    """The first six hours have prompts of at most 1,000 tokens, the other six of up to twice that."""
    longest = [max(one.num_prompt for one in day(folder, "servegen-m-large", seed)) for seed in range(12)]
    assert {one > 1_000 for one in longest} == {False, True}


def test_clients_keep_their_variation_and_rates_grow_together(folder: Path) -> None:
    paths = [[folder / "forecast" / f"servegen_m-small_{what}_d0.csv.gz"] for what in ("clients", "lengths")]
    window = read_windows(*paths)[0]
    assert window.requests_per_s == 27.0
    requests = stream([window], Random(2), 0.5, {"2", "5"})
    times_s: dict[str, list[float]] = {}
    while (one := next(requests)).at_s < 12_000:
        times_s.setdefault(one.kind, []).append(one.at_s)
    for client in (2, 5):
        gaps_s = np.diff(times_s[f"client {client}"])
        assert gaps_s.mean() == pytest.approx(2 / (1 + client), rel=0.04)
        assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.5, rel=0.06)


# ---------------------------------------------------------------------- what is wrong
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("M-X", "no workload named 'M-X': name two of S, M and L, such as M-L; or sharegpt"),
        ("azure-conv:first", "azure-conv:first: 'first' is neither train nor test"),
        ("M-M:train", "M-M:train: M-M is drawn from the seed and has no halves"),
        ("missing.csv:test", "missing.csv is no trace of requests: FileNotFoundError"),
    ],
)
def test_a_wrong_name_is_told(folder: Path, name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        day(folder, name)


def test_generated_gaps_are_refused_where_a_trace_has_its_own(folder: Path) -> None:
    for name in ("azure-conv", "servegen-m-small:train", str(folder / "traces" / "azure2023_code.csv.gz")):
        with pytest.raises(ConfigError, match=r"--cv: the requests of .* come as they came"):
            day(folder, name, cv=2.0)
    assert len(day(folder, "arxiv", cv=2.0)) == 150


def test_missing_files_are_told_with_the_way_to_give_them(tmp_path: Path) -> None:
    for name in SOURCES:
        with pytest.raises(
            ConfigError, match=rf"--workload {name}: it needs .*gz: name the folder .* --data DIR or KV"
        ):
            day(None, name)
        with pytest.raises(
            ConfigError, match=rf"{name}: it needs .*gz, and .* has none: .* --data DIR or KVFERRY_DATA"
        ):
            day(tmp_path, name)
    with pytest.raises(ConfigError, match="is no folder"):
        day(tmp_path / "nowhere", "arxiv")


GOOD = "arrival_s,input_tokens,output_tokens\n0,1,1\n1,2,2\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "fewer than two requests"),
        (GOOD.replace("input", "prompt"), "KeyError: 'input_tokens'"),
        (GOOD + "2,3\n", "output_tokens is None"),
        (GOOD + "x,3,3\n", "could not convert"),
        (GOOD + "nan,3,3\n", "arrival_s is 'nan'"),
        (GOOD + "2,-3,3\n", "input_tokens is '-3'"),
        (GOOD + "0.5,3,3\n", "does not ascend"),
        (GOOD.replace("1,1\n", "1,1\n\0"), "ValueError|Error"),
    ],
)
def test_a_broken_trace_is_told(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "my.csv"
    path.write_text(GOOD)
    assert [one.num_prompt for one in day(None, str(path), count=2)] in ([1, 2], [2, 1])
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"my.csv is no trace of requests: .*({why})"):
        day(None, str(path))


@pytest.mark.parametrize("line", ["[1]", "{", '{"arrival_s": 1, "input_tokens": 1, "output_tokens": 1, "hash_ids": 3}'])
def test_a_broken_line_of_json_is_told(tmp_path: Path, line: str) -> None:
    path = tmp_path / "my.jsonl"
    good = '{"arrival_s": 0, "input_tokens": 1, "output_tokens": 1}\n'
    path.write_text(good + good.replace("0", "1", 1) + line)
    with pytest.raises(ConfigError, match=r"my\.jsonl is no trace of requests: "):
        day(None, str(path))


def test_a_file_cut_in_the_middle_is_told(folder: Path) -> None:
    for path, name in {
        "traces/azure2023_conv.csv.gz": "azure-conv",
        "lengths/arxiv_summarization_llama2.csv.gz": "arxiv",
        "forecast/servegen_m-small_clients_d0.csv.gz": "servegen-m-small",
        "forecast/servegen_m-large_lengths_d0.csv.gz": "servegen-m-large",
    }.items():
        whole = (folder / path).read_bytes()
        for broken in (whole[: len(whole) // 2], b"not gzip", whole[:20] + b"\xff" * 50 + whole[70:]):
            (folder / path).write_bytes(broken)
            with pytest.raises(ConfigError, match=f"--workload {name}: .*{Path(path).name} is no t"):
                day(folder, name)


def test_a_client_of_another_family_is_told(folder: Path) -> None:
    path = folder / "forecast" / "servegen_m-small_clients_d0.csv.gz"
    write(path, gzip.decompress(path.read_bytes()).decode().replace("Weibull", "Pareto"))
    with pytest.raises(ConfigError, match=r"is no table of ServeGen's clients: .*Pareto"):
        day(folder, "servegen-m-small")

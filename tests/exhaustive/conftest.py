"""What did the explorations find? Their figures as the last line of the session, also when tests run in parallel."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

_FIGURES = pytest.StashKey["Figures"]()


@dataclass(slots=True)
class Figures:
    num_states: int = 0
    num_violations: int = 0
    num_mutations: int = 0
    num_caught: int = 0
    traces: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        caught = f"mutations caught {self.num_caught} of {self.num_mutations}"
        return f"states {self.num_states} violations {self.num_violations} {caught}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--show-traces", action="store_true", help="print what each exploration found, mutations in full")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Figures()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The reports carry the figures, from other processes too."""
    figures = config.stash[_FIGURES]
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            found = dict(report.user_properties)
            if report.when != "call" or "num_states" not in found:
                continue
            is_mutation, trace = bool(found["is_mutation"]), str(found["trace"])
            if is_mutation:
                figures.num_mutations += 1
                figures.num_caught += outcome == "passed"
            else:
                figures.num_states += int(str(found["num_states"]))
                figures.num_violations += bool(trace)
            title = f"{found['name']}: {found['num_states']} states, {report.duration:.1f} s"
            figures.traces.append(f"{title}\n{trace}" if trace else title)
    if config.getoption("--show-traces", default=False):
        terminalreporter.section("explored")
        for text in figures.traces:
            terminalreporter.write_line(text)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """After pytest's own last line."""
    figures = config.stash.get(_FIGURES, None)
    if figures is not None and figures.traces:
        print(figures)

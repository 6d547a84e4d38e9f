"""The command line: `kvferry serve | status | migrate | drain | ...`. Heavy imports are inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException
from typer.models import OptionInfo

from orchestrator import cli_admin, cli_priorities, cli_scale, cli_simulate, config
from orchestrator.cli_client import Admin, before_the_command, connect
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.policy.levels import DEFAULT_LEVELS

BAD_INPUT = 2
NOT_DONE = 1
"""The command was understood, and the answer is no."""
INTERRUPTED = 130

app = typer.Typer(
    name="kvferry",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback()(before_the_command)
app.add_typer(cli_simulate.app)

_MINE = "Cluster"
_ACCESS = "Who may use the admin API"
_CARRIAGE = "Moving KV blocks"
_TUNING = "Rebalancing"
_SCALING = "Number of instances"
_PLACES = "Where instances run, on a Ray of several nodes"
_PRIORITIES = "Priorities"


def _option(text: str, variable: str, default: object, panel: str = _MINE, hidden: bool = False) -> OptionInfo:
    """An option whose default is filled in by `config`, so that a variable or a file can set it, too."""
    help_text = f"{text} Default: {default}. (KVFERRY_{variable})"
    option: OptionInfo = typer.Option(help=help_text, show_default=False, rich_help_panel=panel, hidden=hidden)
    return option


_CARRIER = "What moves KV blocks: shm, tcp, or nccl (GPUs only; never run on one yet)."
_COPIES = "Budget of copies from an instance while requests decode on, and again to it, in MB/s; 0: no limit."
_COPIES_SUIT = "12.5 without a GPU, no limit with one"
_LEVELS = "NAME:RANK[:BLOCKS],...: vLLM's rank (lower is urgent), and blocks kept free beside one that runs."
_KEYS = "YAML file of API keys and the level of each, the most urgent it may have."
_CLASSES = "Targets in ms by class, as NAME=TTFT/TPOT,... with - for none: interactive=500/50,bulk=60000/-."
_CHECKSUM = "Sum every chunk of blocks, and refuse one that came otherwise. Not with nccl."


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Any flag of `vllm serve` may follow, such as --max-model-len 2048: vLLM's own parser checks it first.",
)
def serve(  # noqa: PLR0913, PLR0917 - one parameter a flag
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder, or name on the hub. Comes first.")] = None,
    instances: Annotated[int | None, _option("vLLM instances.", "INSTANCES", 2)] = None,
    gateways: Annotated[int | None, _option("OpenAI servers, on one port.", "GATEWAYS", 1)] = None,
    host: Annotated[str | None, _option("Address of the OpenAI endpoint.", "HOST", "127.0.0.1")] = None,
    port: Annotated[int | None, _option("Port of the OpenAI endpoint.", "PORT", 8000)] = None,
    admin_port: Annotated[int | None, _option("Port of the admin API.", "ADMIN_PORT", 50051)] = None,
    admin_host: Annotated[
        str | None,
        _option("Address of the admin API; elsewhere than here only with a token.", "ADMIN_HOST", "127.0.0.1"),
    ] = None,
    admin_token_file: Annotated[
        str | None, _option("File with the token that calls must carry.", "ADMIN_TOKEN_FILE", "none", _ACCESS)
    ] = None,
    admin_tls_cert: Annotated[
        str | None, _option("Certificate of the admin API, in PEM: TLS.", "ADMIN_TLS_CERT", "none", _ACCESS)
    ] = None,
    admin_tls_key: Annotated[str | None, _option("Its key.", "ADMIN_TLS_KEY", "none", _ACCESS)] = None,
    admin_client_ca: Annotated[
        str | None,
        _option("Clients must show a certificate that these have signed.", "ADMIN_CLIENT_CA", "none", _ACCESS),
    ] = None,
    ray_address: Annotated[str | None, _option("A running Ray to join.", "RAY_ADDRESS", "own")] = None,
    carrier: Annotated[str | None, _option(_CARRIER, "CARRIER", "shm", _CARRIAGE)] = None,
    carrier_checksum: Annotated[
        bool | None,
        typer.Option(
            "--carrier-checksum/--no-carrier-checksum",
            help=f"{_CHECKSUM} Default: no. (KVFERRY_CARRIER_CHECKSUM)",
            show_default=False,
            rich_help_panel=_CARRIAGE,
        ),
    ] = None,
    copy_mb_per_s: Annotated[float | None, _option(_COPIES, "COPY_MB_PER_S", _COPIES_SUIT, _CARRIAGE)] = None,
    dispatch: Annotated[
        str | None, _option("New requests go by freeness, or round-robin to compare.", "DISPATCH", "freeness", _TUNING)
    ] = None,
    rebalance: Annotated[
        bool | None,
        typer.Option(
            "--rebalance/--no-rebalance",
            help="Move running requests when it pays. Default: yes. (KVFERRY_REBALANCE)",
            show_default=False,
            rich_help_panel=_TUNING,
        ),
    ] = None,
    tick_s: Annotated[float | None, _option("Seconds between two looks.", "TICK_S", 0.5, _TUNING)] = None,
    threshold_steps: Annotated[
        float | None,
        _option("Decode steps left: below, an instance gives requests away.", "THRESHOLD_STEPS", 512, _TUNING),
    ] = None,
    margin_steps: Annotated[
        float | None, _option("Decode steps by which a move must pay.", "MARGIN_STEPS", 64, _TUNING)
    ] = None,
    rest_s: Annotated[float | None, _option("Seconds a moved request rests.", "REST_S", 1, _TUNING)] = None,
    max_migrations: Annotated[
        int | None, _option("At once, in and out per instance.", "MAX_MIGRATIONS", 2, _TUNING)
    ] = None,
    autoscale: Annotated[
        bool | None,
        typer.Option(
            "--autoscale/--no-autoscale",
            help="Start and stop instances as the load asks for. Default: no. (KVFERRY_AUTOSCALE)",
            show_default=False,
            rich_help_panel=_SCALING,
        ),
    ] = None,
    autoscale_min: Annotated[
        int | None, _option("Fewest, also for `kvferry scale`.", "AUTOSCALE_MIN", 1, _SCALING)
    ] = None,
    autoscale_max: Annotated[
        int | None, _option("Most, also for `kvferry scale`.", "AUTOSCALE_MAX", "--instances", _SCALING)
    ] = None,
    autoscale_low_steps: Annotated[
        float | None, _option("Mean freeness below: one more.", "AUTOSCALE_LOW_STEPS", 160, _SCALING)
    ] = None,
    autoscale_high_steps: Annotated[
        float | None, _option("Mean freeness above: one less.", "AUTOSCALE_HIGH_STEPS", 960, _SCALING)
    ] = None,
    autoscale_period_s: Annotated[
        float | None, _option("Seconds below; three times as long above.", "AUTOSCALE_PERIOD_S", 10, _SCALING)
    ] = None,
    autoscale_cooldown_s: Annotated[
        float | None, _option("After a change none is given up so soon.", "AUTOSCALE_COOLDOWN_S", 60, _SCALING)
    ] = None,
    retire_timeout_s: Annotated[
        float | None, _option("Not empty by then: it stays.", "RETIRE_TIMEOUT_S", 600, _SCALING)
    ] = None,
    placement: Annotated[str | None, _option("pack or spread.", "PLACEMENT", "pack", _PLACES)] = None,
    instance_resources: Annotated[
        str | None, _option("Held besides GPUs: NAME=AMOUNT,...", "INSTANCE_RESOURCES", "none", _PLACES)
    ] = None,
    instance_labels: Annotated[
        str | None, _option("Of the node: NAME=VALUE,...", "INSTANCE_LABELS", "none", _PLACES)
    ] = None,
    priority_levels: Annotated[str | None, _option(_LEVELS, "PRIORITY_LEVELS", DEFAULT_LEVELS, _PRIORITIES)] = None,
    priority_keys: Annotated[str | None, _option(_KEYS, "PRIORITY_KEYS", "none", _PRIORITIES)] = None,
    start_timeout_s: Annotated[float | None, _option("Seconds to load.", "START_TIMEOUT_S", 300)] = None,
    slo_classes: Annotated[str | None, _option(_CLASSES, "SLO_CLASSES", "none")] = None,
    journal: Annotated[str | None, _option("File for events and decisions, as JSON lines.", "JOURNAL", "none")] = None,
    journal_part_mib: Annotated[
        int | None, _option("MiB of a file of the journal; then the next one begins.", "JOURNAL_PART_MIB", 32)
    ] = None,
    journal_parts: Annotated[int | None, _option("Files of the journal kept.", "JOURNAL_PARTS", 4)] = None,
    log_level: Annotated[str | None, _option("Of our own log lines.", "LOG_LEVEL", "INFO")] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file with these settings. (KVFERRY_CONFIG)", rich_help_panel=_MINE),
    ] = None,
    engine: Annotated[str | None, _option("vllm or fake.", "ENGINE", "vllm", hidden=True)] = None,
) -> None:
    """Start instances and gateways, and serve until Ctrl-C."""
    flags = {
        "model": model,
        "instances": instances,
        "gateways": gateways,
        "host": host,
        "port": port,
        "admin_port": admin_port,
        "admin_host": admin_host,
        "admin_token_file": admin_token_file,
        "admin_tls_cert": admin_tls_cert,
        "admin_tls_key": admin_tls_key,
        "admin_client_ca": admin_client_ca,
        "ray_address": ray_address,
        "carrier": carrier,
        "carrier_checksum": carrier_checksum,
        "copy_mb_per_s": copy_mb_per_s,
        "dispatch": dispatch,
        "rebalance": rebalance,
        "tick_s": tick_s,
        "threshold_steps": threshold_steps,
        "margin_steps": margin_steps,
        "rest_s": rest_s,
        "max_migrations": max_migrations,
        "autoscale": autoscale,
        "autoscale_min": autoscale_min,
        "autoscale_max": autoscale_max,
        "autoscale_low_steps": autoscale_low_steps,
        "autoscale_high_steps": autoscale_high_steps,
        "autoscale_period_s": autoscale_period_s,
        "autoscale_cooldown_s": autoscale_cooldown_s,
        "retire_timeout_s": retire_timeout_s,
        "placement": placement,
        "instance_resources": instance_resources,
        "instance_labels": instance_labels,
        "priority_levels": priority_levels,
        "priority_keys": priority_keys,
        "start_timeout_s": start_timeout_s,
        "slo_classes": slo_classes,
        "journal": journal,
        "journal_part_mib": journal_part_mib,
        "journal_parts": journal_parts,
        "log_level": log_level,
        "engine": engine,
    }
    if model is not None and model.startswith("-"):
        raise ConfigError(f"name the model first, then flags such as {model}")
    settings = config.serve_config_here(flags, config_file, tuple(context.args))
    from rich.console import Console  # noqa: PLC0415

    from orchestrator import serve as foreground  # noqa: PLC0415

    foreground.run(settings, Console())


@app.command()
def status(
    admin: Admin = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it until Ctrl-C.")] = False,
) -> None:
    """Show instances, gateways, requests and the latest migrations."""
    from orchestrator import cli_status as shown  # noqa: PLC0415

    shown.show(connect(admin), as_json=as_json, watch=watch)


@app.command()
def migrate(
    request: Annotated[str, typer.Argument(help="Engine's or client's request id, or a prefix that fits only one.")],
    to: Annotated[str, typer.Option("--to", metavar="INSTANCE", help="Where it shall go on.")],
    admin: Admin = None,
) -> None:
    """Move one running request and say how it ended."""
    from orchestrator import cli_status as shown  # noqa: PLC0415

    with connect(admin) as client:
        migration = client.migrate(request, to)
    print(shown.migration_line(migration))
    if not shown.is_committed(migration):
        raise typer.Exit(NOT_DONE)


@app.command(context_settings={"ignore_unknown_options": True})  # -10 is a level
def priority(
    request: Annotated[str, typer.Argument(help="Engine's or client's request id, or a prefix that fits only one.")],
    level: Annotated[str, typer.Argument(help="A level's name, or a number: lower is more urgent.")],
    admin: Admin = None,
) -> None:
    """Make one request more, or less, urgent while it waits or runs."""
    from orchestrator import cli_status as shown  # noqa: PLC0415

    with connect(admin) as client:
        print(shown.priority_line(client.set_priority(request, level)))


@app.command()
def drain(
    instance: Annotated[str, typer.Argument(help="The instance to empty.")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it is empty.")] = True,
    deadline: Annotated[
        float | None, typer.Option(min=0.1, metavar="SECONDS", help="Wait no longer than this.")
    ] = None,
    admin: Admin = None,
) -> None:
    """Take an instance out of dispatch and move its requests away."""
    from orchestrator import cli_status as shown  # noqa: PLC0415

    with connect(admin) as client:
        shown.follow_drain(instance, client.drain(instance, wait, deadline))


@app.command()
def undrain(
    instance: Annotated[str, typer.Argument(help="The instance to put back into service.")], admin: Admin = None
) -> None:
    """Put a draining instance back into service."""
    with connect(admin) as client:
        client.undrain(instance)
    print(f"{instance} serves again")


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="As given to `serve --journal`, or one part of it such as FILE.1.")],
    request: Annotated[
        str | None, typer.Option("--request", metavar="ID", help="Only of this request: its id or a prefix.")
    ] = None,
    instance: Annotated[str | None, typer.Option("--instance", metavar="NAME", help="Only of this instance.")] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Seconds after its beginning, or UTC as in 2026-11-22T10:30."),
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="As --since.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain a journal: what was decided, when and why. Exit status 1 when the core would decide otherwise now."""
    from orchestrator import cli_replay as told  # noqa: PLC0415

    status = told.show(file, told.wanted(request, instance, since, until), as_json)
    if status:
        raise typer.Exit(status)


@app.command()
def demo(  # noqa: PLR0913, PLR0917 - one parameter a flag
    duration: Annotated[float, typer.Option(metavar="SECONDS", help="How long requests are sent.")] = 60.0,
    trace: Annotated[
        Path | None, typer.Option(help="Azure CSV or Mooncake JSONL. Default: a generated workload.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for result.json and the picture.")] = Path("demo-out"),
    model: Annotated[
        str | None, typer.Option(help="Hugging Face folder or hub name. Default: the small model.")
    ] = None,
    carrier: Annotated[str, typer.Option(help="What moves KV blocks: shm or tcp.")] = "shm",
    carrier_checksum: Annotated[bool, typer.Option("--carrier-checksum", help=_CHECKSUM)] = False,
) -> None:
    """Two instances under uneven load, requests that move, every answer checked."""
    from orchestrator.demo import DemoOptions, run  # noqa: PLC0415

    options = DemoOptions(
        duration_s=duration,
        trace=trace,
        seed=seed,
        out=out,
        model=model,
        carrier=carrier,
        carrier_checksum=carrier_checksum,
    )
    raise typer.Exit(run(options))


cli_admin.add_to(app)
cli_priorities.add_to(app)
app.command()(cli_scale.scale)


def main() -> None:
    """Entry point of the console script: every failure is one line on stderr."""
    sys.exit(run_cli(sys.argv[1:]))


def run_cli(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    from orchestrator.admin.errors import Declined  # noqa: PLC0415

    try:
        result = typer.main.get_command(app).main(arguments, prog_name="kvferry", standalone_mode=False)
    except Declined as error:
        return _complain(error, NOT_DONE)
    except OrchestratorError as error:
        return _complain(error, BAD_INPUT)
    except TyperException as error:
        return _complain(error.format_message(), BAD_INPUT)
    except (KeyboardInterrupt, Abort):
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def _complain(error: object, status: int) -> int:
    print(f"kvferry: {' '.join(str(error).split())}", file=sys.stderr)
    return status
